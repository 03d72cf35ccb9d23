"""Later calls with gradients are launched from what earlier ones left, and see all that has changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import gossamer
from gossamer import masks
from gossamer.frontend.operators import learned
from gossamer.ir.errors import UnsupportedError
from gossamer.runtime import driver

WINDOW = masks.sliding_window(7, 2)
ALLOWED = torch.from_numpy(WINDOW.to_dense(24, 24))


@pytest.fixture(autouse=True)
def own_plans():
    driver.reset()
    yield
    driver.reset()


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each backward of an attention found its kernels."""
    found: list[bool] = []
    remember = learned.Learned._remember
    gradients = learned.Learned.gradients

    def counted(self: Any, *arguments: Any) -> Any:
        found.append(True)
        return gradients(self, *arguments)

    def missed(self: Any, *arguments: Any) -> Any:
        found[-1] = False
        return remember(self, *arguments)

    monkeypatch.setattr(learned.Learned, "gradients", counted)
    monkeypatch.setattr(learned.Learned, "_remember", missed)
    return found


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes or [(2, 4, 24, 16)] * 3]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=ALLOWED)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return gossamer.attention(q, k, v, mask=WINDOW)


def same(
    one: Callable[..., Tensor], other: Callable[..., Tensor], inputs: list[Tensor], times: int = 3
) -> None:
    """Values and gradients, at every one of some calls."""
    asked = [t for t in inputs if t.requires_grad]
    for _ in range(times):
        got, expected = one(*inputs), other(*inputs)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        slopes = torch.randn_like(expected)
        pairs = [torch.autograd.grad(out, asked, slopes) for out in (got, expected)]
        torch.testing.assert_close(*pairs, atol=1e-5, rtol=1e-4)


def test_kernels_are_found_from_the_third_call_on(looked: list[bool]) -> None:
    same(ours, dense, leaves(), 4)
    assert looked == [False, True, True]  # the first call went the long way


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_those_that_are_asked_for(asked: tuple[int, ...]) -> None:
    inputs = leaves()
    for n, tensor in enumerate(inputs):
        tensor.requires_grad_(n in asked)
    same(ours, dense, inputs)


@pytest.mark.parametrize(
    "slopes",
    [
        lambda out: out.sum(),
        lambda out: (out.transpose(1, 2).flatten(2) ** 2).sum(),
        lambda out: (out.mT.contiguous() ** 2).sum(),
        lambda out: (torch.complex(out, out).conj().imag ** 2).sum(),
    ],
)
def test_gradients_lie_in_memory_as_they_like(slopes: Callable[[Tensor], Tensor], looked: list[bool]) -> None:
    inputs = leaves()
    for _ in range(3):
        pairs = [torch.autograd.grad(slopes(f(*inputs)), inputs) for f in (ours, dense)]
        torch.testing.assert_close(*pairs, atol=1e-5, rtol=1e-4)
    assert looked == [False, True]


def test_tensors_that_hooks_have_moved() -> None:
    """What is saved comes back in another layout, as offloading and packing leave it."""
    packing = (lambda t: t, lambda t: t.mT.clone(memory_format=torch.contiguous_format).mT)
    inputs = leaves()

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gossamer.linear_attention(q, k, v, "elu", causal=True)

    for function in (ours, causal):
        expected = torch.autograd.grad(function(*inputs).sum(), inputs)
        for moved in (False, True, True, False):
            with saved_tensors_hooks(*packing) if moved else nullcontext():
                found = torch.autograd.grad(function(*inputs).sum(), inputs)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_an_lse_and_what_it_adds() -> None:
    inputs = leaves()

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = gossamer.attention(q, k, v, mask=WINDOW, return_lse=True)
        return out + lse[..., None]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT / 4).masked_fill(~ALLOWED, -torch.inf)
        return scores.softmax(-1) @ v + scores.logsumexp(-1, keepdim=True)

    same(both, plain, inputs)


def test_shared_batches_and_grouped_heads() -> None:
    inputs = leaves((3, 4, 24, 16), (1, 2, 24, 16), (1, 2, 24, 16))

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gossamer.attention(q, k, v, mask=WINDOW, enable_gqa=True)

    def spread(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(q, *(t.expand(3, -1, -1, -1).repeat_interleave(2, 1) for t in (k, v)))

    same(grouped, spread, inputs)


def test_gradients_of_gradients_are_refused_later_too() -> None:
    inputs = leaves()
    same(ours, dense, inputs)
    [grad] = torch.autograd.grad(ours(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises((UnsupportedError, RuntimeError), match="gradients of gradients"):
        grad.sum().backward()
    with pytest.raises(UnsupportedError, match="is_grads_batched"):
        torch.autograd.grad(ours(*inputs), inputs, torch.ones(2, 2, 4, 24, 16), is_grads_batched=True)


def test_other_ways_to_differentiate() -> None:
    inputs = leaves()
    same(ours, dense, inputs)
    found = torch.func.grad(lambda q: ours(q, *inputs[1:]).sum())(inputs[0])
    torch.testing.assert_close(
        found, torch.autograd.grad(dense(*inputs).sum(), inputs[0])[0], atol=1e-5, rtol=1e-4
    )
    same(lambda *given: checkpoint(ours, *given, use_reentrant=False), dense, inputs)  # type: ignore[arg-type]
    with torch.no_grad():
        assert not ours(*inputs).requires_grad


def test_writes_between_are_noticed() -> None:
    inputs = leaves()
    same(ours, dense, inputs)
    moved = [t * 1 for t in inputs]
    out = ours(*moved)
    moved[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("heads", [1, 4])
def test_flurka(heads: int) -> None:
    x, *weights, low = leaves((2, 20, 16), (16, 32), (16, 32), (16, 32), (6, 20))

    def low_rank(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, low: Tensor) -> Tensor:
        return gossamer.flurka(x, w_q, w_k, w_v, low, heads=heads, feature_map="relu", eps=1.0)

    def plain(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, low: Tensor) -> Tensor:
        rows = (x @ w_q, low @ x @ w_k, low @ x @ w_v)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in rows)
        scores = (q.relu() + 1e-3) @ (k.relu() + 1e-3).mT
        return (scores @ v / (scores.sum(-1, keepdim=True) + 1)).transpose(1, 2).flatten(2)

    inputs = [x, *weights, low]
    same(low_rank, plain, inputs)
    for slopes in (lambda out: out.sum(), lambda out: (out.mT.contiguous() ** 2).sum()):
        for _ in range(2):
            pairs = [torch.autograd.grad(slopes(f(*inputs)), inputs) for f in (low_rank, plain)]
            torch.testing.assert_close(*pairs, atol=1e-4, rtol=1e-3)

"""`gossamer.attention` inside torch.compile(fullgraph=True)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as pytorch
from torch.utils.checkpoint import checkpoint

import gossamer
from gossamer import masks
from gossamer.flex import and_masks, create_block_mask, flex_attention

WINDOW = masks.sliding_window(7, 2)
DENSE = torch.rand(20, 20, generator=torch.Generator().manual_seed(1)) > 0.5
RECOVERED = gossamer.Mask.from_dense(DENSE)
DOCUMENTS = masks.document(offsets=torch.tensor([0, 5, 12, 60]))
SELECTED = masks.selected(torch.tensor([[[[0], [1], [1]]]]), 24, rows=8, keys=8)
IDS = torch.arange(60) // 7
TABLE = torch.randn(4, 119, generator=torch.Generator().manual_seed(2))
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(length: int = 20, batch: int = 2, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    return tuple(torch.randn(batch, 4, length, 16, **{"requires_grad": True, **more}) for _ in range(3))  # type: ignore


def check(
    function: Callable[..., Any], *calls: Any, graphs: int = 1, backend: str = "aot_eager", **how: Any
) -> None:
    """Compiled and eager calls agree, in outputs and in gradients; so many graphs are compiled for them."""
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend=backend, **how)
    for call in calls:
        expected, got = function(*call), compiled(*call)
        torch.testing.assert_close(got, expected)
        inputs = [t for t in call if isinstance(t, Tensor) and t.requires_grad]
        if inputs:
            losses = (
                sum(t.square().sum() for t in (x if isinstance(x, tuple) else (x,))) for x in (got, expected)
            )
            ours, theirs = (torch.autograd.grad(loss, inputs, allow_unused=True) for loss in losses)
            torch.testing.assert_close(ours, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def near(i: Any, j: Any, reach: int) -> Any:
    return torch.where(i > j, i - j, j - i) <= reach


def outer(reach: int) -> Callable[..., Any]:
    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        return near(i, j, reach) & (h < 3)

    return mask_mod


WIDTH = 4
MASKS: dict[str, Any] = {
    "none": None,
    "prebuilt": WINDOW,
    "union": WINDOW | masks.global_tokens(2),
    "recovered": RECOVERED,
    "documents": DOCUMENTS,
    "selected": SELECTED,
    "boolean tensor": DENSE,
    "lambda": lambda b, h, i, j: i >= j,
    "global integer": lambda b, h, i, j: (i >= j) & (i - j < WIDTH),
    "captured tensor": lambda b, h, i, j: IDS[i] == IDS[j],
    "helper": outer(5),
    "divided": lambda b, h, i, j: ((i - j) % 3 == 0) | (i // 8 == j // 8),
    "partly": lambda b, h, i, j: (i - j).abs() < torch.clamp(i, max=6),
    "constant": lambda b, h, i, j: i >= j - IDS[-1] + IDS[0],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(mask: Any) -> None:
    check(lambda q, k, v: gossamer.attention(q, k, v, mask=mask), tensors(20 if mask is not SELECTED else 24))


MAPS: dict[str, Any] = {
    "soft cap": dict(score_mod=lambda s, b, h, i, j: 20 * torch.tanh(s / 20)),
    "relative": dict(score_mod=lambda s, b, h, i, j: s + TABLE[h, i - j + 59]),
    "captured before": dict(
        score_mod=gossamer.ScoreMod.trace(lambda s, b, h, i, j: s * 0.5 - 0.25 * (i - j))
    ),
    "probabilities": dict(prob_mod=lambda p, b, h, i, j: p * TABLE[h, j]),
    "dropout": dict(dropout_p=0.5, dropout_seed=7),
    "both": dict(prob_mod=lambda p, b, h, i, j: p * TABLE[h, j], dropout_p=0.5, dropout_seed=torch.tensor(3)),
    "sinks": dict(sinks=torch.ones(4), return_lse=True),
    "scale": dict(scale=0.3, q_offset=2),
    "column sums": dict(return_lse=True, mask=WINDOW),
    "offsets": dict(q_offset=torch.tensor([0, 3]), kv_lens=torch.tensor([20, 4])),
}


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
def test_options(options: dict[str, Any]) -> None:
    check(lambda q, k, v: gossamer.attention(q, k, v, **{"mask": WINDOW, **options}), tensors())


def test_column_sums_where_nothing_learns() -> None:
    check(
        lambda q, k, v: gossamer.attention(q, k, v, mask=WINDOW, return_column_sums=True),
        tensors(requires_grad=False),
    )


def test_masks_made_inside() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, width: int, ids: Tensor) -> Any:
        mask = (masks.sliding_window(width) | masks.strided(4, 2)) & masks.causal() & masks.document(ids)
        return gossamer.attention(q, k, v, mask=mask)

    calls = [(*tensors(n), width, IDS[:n].clone()) for n, width in ((20, 5), (24, 3), (31, 9))]
    check(attend, *calls, dynamic=True)


def test_flex_attention() -> None:
    causal = lambda b, h, i, j: i >= j  # noqa: E731
    block_mask = create_block_mask(and_masks(causal, outer(6)), None, None, 20, 20, device="cpu")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        biased = lambda s, b, h, i, j: s + TABLE[h, i - j + 59]  # noqa: E731
        return flex_attention(q, k, v, score_mod=biased, block_mask=block_mask)

    check(attend, tensors())
    theirs = pytorch.create_block_mask(causal, None, None, 20, 20, device="cpu")
    with pytest.raises(Exception, match=r"Make it with gossamer.flex.create_block_mask"):
        torch.compile(flex_attention, fullgraph=True, backend="eager")(*tensors(), block_mask=theirs)


# ---- what changes compiles nothing ----


def test_lengths_and_batches() -> None:
    check(
        lambda q, k, v: gossamer.attention(q, k, v, mask=outer(5)),
        tensors(20, 2),
        tensors(33, 3),
        tensors(47, 5),
        dynamic=True,
    )


def test_a_marked_dimension() -> None:
    calls = [tensors(n) for n in (20, 33, 47)]
    for t in calls[0]:
        torch._dynamo.mark_dynamic(t, 2)
    check(lambda q, k, v: gossamer.attention(q, k, v, mask=lambda b, h, i, j: i >= j), *calls)


def test_integers() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, width: int, first: int) -> Any:
        return gossamer.attention(
            q, k, v, mask=lambda b, h, i, j: (i - j <= width // 2) & (j > i - first), q_offset=first
        )

    check(attend, *((*tensors(), width, width + 2) for width in (3, 6, 9)), dynamic=True)
    check(attend, *((*tensors(), width, width + 2) for width in (3, 6, 9, 12)), graphs=2)


def test_a_length_in_a_mask() -> None:
    check(
        lambda q, k, v: gossamer.attention(q, k, v, mask=lambda b, h, i, j: i >= j - q.shape[2] // 4),
        *map(tensors, (20, 33, 47)),
        dynamic=True,
    )


def test_another_mask_of_the_same_structure() -> None:
    calls = [(*tensors(), masks.sliding_window(width)) for width in (3, 4, 5, 6)]
    check(lambda q, k, v, mask: gossamer.attention(q, k, v, mask=mask), *calls, graphs=2)


def test_another_structure_is_noticed() -> None:
    calls = [(*tensors(), mask) for mask in (WINDOW, masks.causal(), masks.strided(4, 2), WINDOW)]
    check(lambda q, k, v, mask: gossamer.attention(q, k, v, mask=mask), *calls, graphs=3)


def test_packed_sequences() -> None:
    calls = [
        (*tensors(20, 1), torch.tensor([0, 3, 20])),
        (*tensors(33, 1), torch.tensor([0, 3, 5, 33])),
    ]
    check(
        lambda q, k, v, at: gossamer.attention(
            q, k, v, mask=masks.causal(), cu_seqlens_q=at, cu_seqlens_kv=at
        ),
        *calls,
        dynamic=True,
    )


# ---- models ----


class Layer(nn.Module):
    """An attention with a mask and a learned table of its own."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask, self.width = mask, 6
        self.table = nn.Parameter(torch.randn(4, 39))
        self.qkv = nn.Linear(64, 192)

    def score_mod(self, score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score + self.table[h, i - j + 19]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        mask = self.mask or (lambda b, h, i, j: (i >= j) & (i - j <= self.width))
        out = gossamer.attention(q, k, v, mask=mask, score_mod=self.score_mod)
        return x + out.transpose(1, 2).flatten(2)  # type: ignore[union-attr]


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def check_model(model: nn.Module, backend: str = "aot_eager", **how: Any) -> None:
    x = torch.randn(2, 20, 64, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend=backend, **how)
    outs, grads = [], []
    for run in (model, compiled):
        out = run(x)
        outs.append(out)
        out.square().sum().backward()
        grads.append([t.grad for t in (x, *model.parameters())])
        x.grad = None
        model.zero_grad()
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)


def test_floats_that_change() -> None:
    softer = lambda q, k, v, x: gossamer.attention(q, k, v, score_mod=lambda s, b, h, i, j: s * x + x)  # noqa: E731
    check(softer, *((*tensors(), x) for x in (0.5, 0.25, 0.75)), graphs=2)


def test_dropout_draws_a_seed() -> None:
    dropped = torch.compile(
        lambda q, k, v: gossamer.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    q, k, v = tensors()
    torch.manual_seed(3)
    first = dropped(q, k, v)
    again = dropped(q, k, v)
    torch.manual_seed(3)
    torch.testing.assert_close(dropped(q, k, v), first)
    assert not torch.allclose(again, first)


def test_modules_used_twice() -> None:
    torch.manual_seed(0)
    shared = Layer(None)
    check_model(nn.Sequential(shared, Layer(outer(6)), shared))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    torch.manual_seed(0)
    check_model(nn.Sequential(Checkpointed(Layer(None), reentrant), Checkpointed(Layer(outer(6)), reentrant)))


def test_autocast() -> None:
    q, k, v = tensors()
    attend = lambda q, k, v: gossamer.attention(q, k, v, mask=WINDOW)  # noqa: E731
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
        expected = attend(q, k, v)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gossamer.attention(q, k, v, mask=lambda b, h, i, j: i >= j)

    check(inside, tensors())


@pytest.mark.slow
@needs_compiler
def test_inductor() -> None:
    torch.manual_seed(0)
    check_model(nn.Sequential(Layer(None), Layer(outer(6))), backend="inductor")


@pytest.mark.slow
@needs_compiler
def test_inductor_with_dynamic_shapes() -> None:
    attend = lambda q, k, v: gossamer.attention(q * 2, k, v + 1, mask=outer(5), return_lse=True)  # noqa: E731
    check(attend, *map(tensors, (20, 33, 47)), backend="inductor", dynamic=True)


def test_transforms_inside() -> None:
    def per_example(q: Tensor, k: Tensor, v: Tensor) -> Any:
        loss = lambda q, k, v: gossamer.attention(q, k, v, mask=WINDOW).square().sum()  # noqa: E731
        return torch.vmap(torch.func.grad(loss))(q[:, None], k[:, None], v[:, None])

    check(per_example, tensors(requires_grad=False))


# ---- errors ----


def test_what_cannot_be_captured_is_said() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return gossamer.attention(
            q, k, v, mask=lambda b, h, i, j: torch.cumsum(IDS, 0)[i] > torch.linalg.norm(j * 1.0)
        )

    with pytest.raises(Exception, match=r"cannot be captured"):
        torch.compile(attend, fullgraph=True, backend="eager")(*tensors())


@pytest.mark.parametrize("make", [gossamer.Mask.trace, WINDOW.__and__])
def test_masks_are_captured_outside(make: Any) -> None:
    attend = lambda q, k, v: gossamer.attention(q, k, v, mask=make(lambda b, h, i, j: i >= j))  # noqa: E731
    with pytest.raises(Exception, match=r"inside torch.compile.*Pass the function itself"):
        torch.compile(attend, fullgraph=True, backend="eager")(*tensors())


def test_wrong_shapes_are_said() -> None:
    q, k, v = tensors()
    attend = lambda q, k, v: gossamer.attention(q, k, v, mask=WINDOW)  # noqa: E731
    with pytest.raises(Exception, match=r"attention.key: expected 4 heads"):
        torch.compile(attend, fullgraph=True, backend="eager")(q, k[:, :2], v[:, :2])


def test_a_mask_does_not_learn_here_either() -> None:
    least = torch.zeros(4, requires_grad=True)
    attend = lambda q, k, v: gossamer.attention(q, k, v, mask=lambda b, h, i, j: (i - j) * 1.0 >= least[h])  # noqa: E731
    with pytest.raises(Exception, match="requires a gradient"):
        torch.compile(attend, fullgraph=True, backend="eager")(*tensors())

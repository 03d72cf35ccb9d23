"""`gossamer.attention` in torch's autograd and transforms of functions, without a compiler.

What gradients are is not judged here, but that the right ones reach the right tensors.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gossamer
from gossamer import masks
from gossamer.flex import AuxRequest, create_block_mask, flex_attention
from gossamer.frontend.form import Call, Form, Options, take_apart
from gossamer.frontend.operators import rules as operator_rules
from gossamer.ir.errors import InputError, UnsupportedError
from gossamer.ir.plan import Schedule

WINDOW = masks.sliding_window(7, 2)
Inputs = tuple[Tensor, Tensor, Tensor]


def tensors(
    batch: int = 2, heads: int = 4, length: int = 24, size: int = 16, kv_heads: int | None = None, **more: Any
) -> Inputs:
    torch.manual_seed(0)
    shapes = [(batch, n, length, size) for n in (heads, kv_heads or heads, kv_heads or heads)]
    return tuple(torch.randn(shape, **{"requires_grad": True, **more}) for shape in shapes)  # type: ignore


def dense(mask: gossamer.Mask, length: int) -> Tensor:
    return torch.from_numpy(mask.to_dense(length, length))


def assert_same_gradients(ours: Tensor, theirs: Tensor, inputs: Any, atol: float = 1e-5) -> None:
    """Of a weighted sum of both."""
    weights = torch.randn_like(theirs)
    got = torch.autograd.grad((ours * weights).sum(), inputs, retain_graph=True)
    expected = torch.autograd.grad((theirs * weights).sum(), inputs, retain_graph=True)
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-4)


def test_query_key_and_value() -> None:
    q, k, v = tensors()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense(WINDOW, 24))
    assert_same_gradients(gossamer.attention(q, k, v, mask=WINDOW), expected, (q, k, v))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_only_what_is_asked_for_gets_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    compute = operator_rules.differentiate
    monkeypatch.setattr(
        operator_rules, "differentiate", lambda *given: asked.append(given[-1]) or compute(*given)
    )
    inputs = dict(zip("qkv", tensors(requires_grad=False), strict=True))
    inputs[name].requires_grad_()
    gossamer.attention(*inputs.values(), mask=WINDOW).sum().backward()
    assert asked == [[name]]
    assert [n for n, t in inputs.items() if t.grad is not None] == [name]


def test_grouped_heads_and_a_shared_batch() -> None:
    q, k, v = tensors(kv_heads=2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert_same_gradients(gossamer.attention(q, k, v, enable_gqa=True), expected, (q, k, v))
    k, v = (t[:1].detach().requires_grad_() for t in (k, v))
    wide = [t.expand(2, -1, -1, -1) for t in (k, v)]
    expected = F.scaled_dot_product_attention(q, *wide, enable_gqa=True)
    assert_same_gradients(gossamer.attention(q, k, v, enable_gqa=True), expected, (q, k, v))


def test_through_the_lse_alone_and_beside_the_output() -> None:
    q, k, v = tensors()
    scores = (q @ k.mT / 4).masked_fill(~dense(WINDOW, 24), -torch.inf)
    out, lse = gossamer.attention(q, k, v, mask=WINDOW, return_lse=True)
    assert lse.dtype == torch.float32 and lse.requires_grad
    assert_same_gradients(lse, scores.logsumexp(-1), (q, k))
    assert torch.equal(torch.autograd.grad(lse.sum(), v, retain_graph=True)[0], torch.zeros_like(v))
    both = torch.cat([out, lse[..., None]], -1)
    assert_same_gradients(
        both, torch.cat([scores.softmax(-1) @ v, scores.logsumexp(-1)[..., None]], -1), (q, k, v)
    )


def test_captured_tensors_and_sinks() -> None:
    q, k, v = tensors()
    table, slopes = torch.randn(4, 47, requires_grad=True), torch.rand(24, requires_grad=True)
    sinks = torch.randn(4, requires_grad=True)
    at = torch.arange(24)[:, None] - torch.arange(24) + 23
    scores = (q @ k.mT / 4 + table[:, at]).masked_fill(~dense(WINDOW, 24), -torch.inf)
    joined = torch.cat([scores, sinks[:, None, None].expand(2, 4, 24, 1)], -1)
    expected = (joined.softmax(-1)[..., :-1] * slopes) @ v
    out = gossamer.attention(
        q, k, v,
        mask=WINDOW,
        sinks=sinks,
        score_mod=lambda s, b, h, i, j: s + table[h, i - j + 23],
        prob_mod=lambda p, b, h, i, j: p * slopes[j],
    )  # fmt: skip
    assert_same_gradients(out, expected, (q, k, v, table, slopes, sinks), atol=1e-4)


def test_a_captured_number_in_a_tensor_keeps_its_shape() -> None:
    q, k, v = tensors()
    factor = torch.tensor(0.7, requires_grad=True)
    out = gossamer.attention(q, k, v, score_mod=lambda s, b, h, i, j: s * factor)
    expected = F.scaled_dot_product_attention(q * factor, k, v)
    assert_same_gradients(out, expected, (q, k, v, factor), atol=1e-4)


def test_dropout_is_replayed() -> None:
    q, k, v = tensors()
    drop = dict(mask=WINDOW, dropout_p=0.5, dropout_seed=11)
    kept = gossamer.attention(q, k, torch.eye(24).expand(2, 4, 24, 24), **drop) != 0
    scores = (q @ k.mT / 4).masked_fill(~dense(WINDOW, 24), -torch.inf)
    expected = (scores.softmax(-1) * kept * 2) @ v
    assert_same_gradients(gossamer.attention(q, k, v, **drop), expected, (q, k, v))


def test_twice_in_one_graph() -> None:
    q, k, v = tensors()

    def block(attend: Any, x: Tensor) -> Tensor:
        return attend(attend(x, k, v), k, attend(x, k, v))

    ours = block(lambda *t: gossamer.attention(*t, mask=WINDOW), q)
    theirs = block(lambda *t: F.scaled_dot_product_attention(*t, attn_mask=dense(WINDOW, 24)), q)
    assert_same_gradients(ours, theirs, (q, k, v))


def test_a_tensor_changed_before_its_gradient_is_noticed() -> None:
    q, k, v = tensors()
    bias = torch.randn(4)
    out = gossamer.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h])
    bias.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    q, k, v = tensors()

    def run(x: Tensor) -> Tensor:
        return gossamer.attention(x * 2, k, v, mask=WINDOW, dropout_p=0.3)

    torch.manual_seed(3)
    ours = checkpoint(run, q, use_reentrant=reentrant)
    assert ours is not None
    ours.square().sum().backward()
    got, q.grad = q.grad, None
    torch.manual_seed(3)
    run(q).square().sum().backward()
    torch.testing.assert_close(got, q.grad)


def test_only_rows_are_saved_beside_inputs_and_outputs() -> None:
    q, k, v = tensors(batch=1, heads=1, length=100)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = gossamer.attention(q, k, v, mask=WINDOW)
    assert sorted(t.numel() for t in saved) == [100, *[1600] * 4]
    assert {t.data_ptr() for t in saved} >= {t.data_ptr() for t in (q, k, v, out)}


def test_what_is_saved_goes_with_the_graph() -> None:
    q, k, v = tensors()
    held = [torch.randn(4)]
    gone = weakref.ref(held[0])
    out = gossamer.attention(
        q, k, v, score_mod=partial(lambda table, s, b, h, i, j: s + table[h], held.pop())
    )
    out.sum().backward()
    del out
    gc.collect()
    assert gone() is None


def test_autocast() -> None:
    q, k, v = tensors()
    bias = torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gossamer.attention(q, k, v, mask=WINDOW, score_mod=lambda s, b, h, i, j: s + bias[h])
        with torch.no_grad():
            assert gossamer.attention(q, k, v).dtype == torch.bfloat16
        assert gossamer.attention(*(t.double() for t in (q, k, v))).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32 and bias.grad is not None


def test_the_largest_scores_and_column_sums_have_none() -> None:
    q, k, v = tensors()
    out, sums = gossamer.attention(q, k, v, mask=WINDOW, return_column_sums=True)
    out.sum().backward(retain_graph=True)  # the output has one all the same
    with pytest.raises(UnsupportedError, match=r"column sums have no gradient.*detach"):
        sums.sum().backward()
    _, aux = flex_attention(q, k, v, return_aux=AuxRequest(max_scores=True))
    assert aux.max_scores is not None
    with pytest.raises(UnsupportedError, match="largest scores have no gradient"):
        aux.max_scores.sum().backward()


def test_pages_have_none() -> None:
    q, k, v = tensors(batch=2, length=8)
    pages, lengths = torch.tensor([[0], [1]]), torch.tensor([8, 5])
    with pytest.raises(UnsupportedError, match=r"pages of keys have no gradient.*no_grad"):
        gossamer.attention(q, k, v, block_table=pages, kv_lens=lengths)
    with torch.no_grad():
        gossamer.attention(q, k, v, block_table=pages, kv_lens=lengths)


def test_gradients_of_gradients_are_refused() -> None:
    q, k, v = tensors()
    (grad,) = torch.autograd.grad(gossamer.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"gradients of gradients are not built.*create_graph"):
        grad.sum().backward()


def test_flex_attention_learns_too() -> None:
    q, k, v = tensors()
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 24, 24, device="cpu")
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_same_gradients(flex_attention(q, k, v, block_mask=block_mask), expected, (q, k, v))  # type: ignore


# ---- transforms of functions ----


def test_grad_and_vjp() -> None:
    q, k, v = tensors(requires_grad=False)
    loss = lambda q, k, v: gossamer.attention(q, k, v, mask=WINDOW).square().sum()  # noqa: E731
    got = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(got, expected)
    out, pull = torch.func.vjp(lambda q: gossamer.attention(q, k, v, mask=WINDOW), q)
    torch.testing.assert_close(pull(2 * out)[0], expected[0])


MAPPED = {
    "window": dict(mask=WINDOW),
    "batch": dict(mask=masks.prefix_lm(torch.tensor([3, 9]))),
    "sinks": dict(sinks=torch.ones(4), mask=WINDOW),
    "dropout": dict(dropout_p=0.5, dropout_seed=1),
}


@pytest.mark.parametrize("options", MAPPED.values(), ids=MAPPED)
@pytest.mark.parametrize("dims", [(0, None, None), (2, 0, 1)], ids=str)
def test_vmap(options: dict[str, Any], dims: tuple[int | None, ...]) -> None:
    inputs = tensors(requires_grad=False)
    inputs = [
        t if d is None else torch.randn(3, *t.shape).movedim(0, d) for t, d in zip(inputs, dims, strict=True)
    ]

    def attend(*given: Tensor) -> Tensor:
        return gossamer.attention(*given, **options)  # type: ignore[return-value, arg-type]

    def at(i: int) -> list[Tensor]:
        return [t if d is None else t.select(d, i) for t, d in zip(inputs, dims, strict=True)]

    got = torch.vmap(attend, dims)(*inputs)
    torch.testing.assert_close(got, torch.stack([attend(*at(i)) for i in range(3)]))
    grads = torch.vmap(torch.func.grad(lambda *t: attend(*t).square().sum(), (0, 1)), dims)(*inputs)
    for i in range(3):
        own = [t.requires_grad_() for t in at(i)[:2]]
        expected = torch.autograd.grad(attend(*own, at(i)[2]).square().sum(), own)
        torch.testing.assert_close([g[i] for g in grads], list(expected), atol=1e-5, rtol=1e-4)


def test_vmap_over_captured_tensors() -> None:
    q, k, v = tensors(requires_grad=False)
    biases = torch.randn(3, 4)

    def attend(bias: Tensor) -> Tensor:
        return gossamer.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h] * (i - j))  # type: ignore

    torch.testing.assert_close(torch.vmap(attend)(biases), torch.stack(list(map(attend, biases))))
    per_example = torch.vmap(torch.func.grad(lambda bias: attend(bias).square().sum()))(biases)
    one = biases[1].clone().requires_grad_()
    attend(one).square().sum().backward()
    torch.testing.assert_close(per_example[1], one.grad, atol=1e-4, rtol=1e-4)


def test_batches_of_gradients() -> None:
    q, k, v = (torch.randn(2, 4, 20, 16, requires_grad=True) for _ in range(3))
    out = gossamer.attention(q, k, v, mask=masks.causal())
    many = torch.randn(3, *out.shape)
    gradient = lambda g: torch.autograd.grad(out, (q, k, v), g, retain_graph=True)  # noqa: E731
    expected = [torch.stack(found) for found in zip(*map(gradient, many), strict=True)]
    torch.testing.assert_close(list(torch.vmap(gradient)(many)), expected)
    with pytest.raises(UnsupportedError, match=r"Use torch\.func\.jacrev"):
        torch.autograd.grad(out, q, many, is_grads_batched=True)


def test_vmap_within_grad() -> None:
    q, k, v = tensors(requires_grad=False)

    def loss(q: Tensor) -> Tensor:
        return torch.vmap(lambda x: gossamer.attention(x[None], k[:1], v[:1], mask=WINDOW))(q).square().sum()

    inner = q.clone().requires_grad_()
    loss(inner).backward()
    torch.testing.assert_close(torch.func.grad(loss)(q), inner.grad)


def test_a_gradient_within_a_gradient_is_refused() -> None:
    q, k, v = tensors(requires_grad=False)

    def first(q: Tensor) -> Tensor:
        return torch.func.grad(lambda q: gossamer.attention(q, k, v).square().sum())(q).sum()

    with pytest.raises(UnsupportedError, match="gradients of gradients are not built"):
        torch.func.grad(first)(q)


# ---- the operators ----


def parts(extra: tuple[str, ...] = ("lse",), **given: Any) -> Any:
    call = Call(
        gossamer.Mask.of(given.get("mask")),
        gossamer.ScoreMod.of(given.get("score_mod")),
        gossamer.ProbMod.of(given.get("prob_mod")),
        given.get("scale"),
        given.get("held", {}),
        given.get("offset"),
        Options(extra=extra, schedule=given.get("schedule")),
    )
    return take_apart(call, torch.device("cpu"))


FORMS = {
    "plain": {},
    "window": dict(mask=WINDOW, scale=0.3, offset=2),
    "maps": dict(
        mask=masks.document(offsets=torch.tensor([0, 5, 24])),
        score_mod=lambda s, b, h, i, j: s * 0.5 + 3 * (i - j),
        prob_mod=lambda p, b, h, i, j: p * 2.0,
        held={"sinks": torch.ones(4)},
    ),
    "everything out": dict(mask=WINDOW, extra=("lse", "column_sums")),
    "schedule": dict(mask=WINDOW, schedule=Schedule((16,), (16,))),
}


@pytest.mark.parametrize("given", FORMS.values(), ids=FORMS)
def test_forms_are_text_and_back(given: dict[str, Any]) -> None:
    form, tensors_of_call, integers, floats = parts(**given)
    assert Form.parse(form.text) == form
    again = take_apart(form.join(tensors_of_call, integers, floats), torch.device("cpu"))
    assert again.form == form and (again.integers, again.floats) == (integers, floats)
    assert all(a is b for a, b in zip(again.tensors, tensors_of_call, strict=True))


@pytest.mark.parametrize("name", ["plain", "window", "maps"])
def test_opcheck(name: str) -> None:
    form, others, integers, floats = parts(**FORMS[name])
    q, k, v = tensors()
    given = (q, k, v, others, integers, floats, form.text)
    torch.library.opcheck(torch.ops.gossamer.attention.default, given)
    out, lse = (t.detach() for t in torch.ops.gossamer.attention(*given))
    plain = (*(t.detach() for t in (q, k, v)), *given[3:])
    for grad_lse, wanted in ((None, "q,k,v"), (lse, "k")):
        backward = (*plain, out, lse, out.clone(), grad_lse, wanted)
        torch.library.opcheck(torch.ops.gossamer.attention_backward.default, backward)


def test_a_form_without_an_lse_has_its_gradient() -> None:
    form, others, integers, floats = parts(extra=("column_sums",))
    q, k, v = tensors()
    out, sums = torch.ops.gossamer.attention(q, k, v, others, integers, floats, form.text)
    assert sums.shape == (2, 4, 24)
    assert_same_gradients(out, F.scaled_dot_product_attention(q, k, v), (q, k, v))


@pytest.mark.parametrize("text", ["", "window", "[0]", '[1,["true",[],[],[]]]', "1"])
def test_what_is_no_form(text: str) -> None:
    with pytest.raises(InputError, match=r"expected a form of version 1.*Export the program again"):
        torch.ops.gossamer.attention(*tensors(requires_grad=False), [], [], [], text)


def test_modes_see_one_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    q, k, v = tensors()
    with Seen():
        gossamer.attention(q, k, v, mask=WINDOW).sum().backward()
    assert [n for n in names if "gossamer" in n] == [
        "gossamer.attention.default",
        "gossamer.attention_backward.default",
    ]

"""Gradients of gossamer.experts: torch's gradcheck in float64, plain torch in others, every level."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer import testing  # noqa: E402
from gossamer.frontend.moe.activation import clamped_swiglu  # noqa: E402
from gossamer.ir import graph_interpret, kernel_interpret  # noqa: E402
from gossamer.ir.errors import InputError  # noqa: E402
from gossamer.ir.expr import real, sigmoid  # noqa: E402
from gossamer.passes.moe.gradient import WANTED, build_gradients  # noqa: E402
from gossamer.passes.moe.pipeline import compile_gradients  # noqa: E402
from gossamer.passes.moe.spec import ExpertsSpec  # noqa: E402
from gossamer.tests import moe_cases as CASES  # noqa: E402

Case, plain, ULP = CASES.Case, CASES.plain, CASES.ULP
TENSORS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
SWIGLU = real("x0") * sigmoid(real("x0")) * real("x1")
SMALL = {"hidden": 4, "inner": 3, "experts": 3, "dtype": torch.float64}


@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=5, **SMALL),
        Case(tokens=5, options={"recompute": True}, **SMALL),
        Case(tokens=6, transposed=True, interleaved=True, biased=True, activation=clamped_swiglu(), **SMALL),
        Case(tokens=6, gated=False, biased=True, activation="gelu", options={"recompute": True}, **SMALL),
        Case(tokens=70, **(SMALL | {"hidden": 2, "inner": 2})),
    ],
    ids=repr,
)
@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck(case, ragged):
    layer = case.layer()
    names = [name for name in TENSORS if name in layer]
    ids, weights = case.routing(lowest=-1, highest=case.experts + 1)

    def run(x, weights, *tensors):
        routing = ids, weights
        if ragged:
            chosen = gossamer.Routing.from_topk(ids, weights, case.experts)
            routing = chosen.replace(weights=chosen.weights), None
        return gossamer.experts(x, *routing, **(layer | dict(zip(names, tensors, strict=True))))

    given = [t.double().requires_grad_() for t in (case.x(), weights, *(layer[n] for n in names))]
    assert torch.autograd.gradcheck(run, given, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_as_exact_as_torch(dtype, recompute):
    """Largest errors of a few numbers scatter: a narrow miss is judged again on another gradient."""
    case = Case(tokens=60, dtype=dtype, hidden=48, inner=40, biased=True)
    worst = min(_share_of_allowed(case, recompute) for _ in range(3))
    assert worst <= 1


def _share_of_allowed(case, recompute):
    """The largest error of a gradient over what is allowed."""
    dtype = case.dtype
    ids, weights = case.routing(lowest=-1, highest=case.experts + 1)
    slope = torch.randn(60, 48, dtype=torch.float64)

    def gradients(run, kind):
        layer = case.layer()
        leaves = {n: layer[n].to(kind).clone().requires_grad_() for n in TENSORS}
        leaves |= {
            "x": case.x().to(kind).clone().requires_grad_(),
            "weights": weights.to(kind).clone().requires_grad_(),
        }
        more = {n: leaves[n] for n in TENSORS}
        run(leaves["x"], leaves["weights"], layer | more).backward(slope.to(kind))
        return {n: t.grad.double() for n, t in leaves.items()}

    def in_torch(x, w, layer):
        return plain(case, x, ids, w, layer, x.dtype)

    exact = gradients(in_torch, torch.float64)
    theirs = gradients(in_torch, dtype)
    ours = gradients(lambda x, w, layer: gossamer.experts(x, ids, w, recompute=recompute, **layer), dtype)
    shares = []
    for name, value in exact.items():
        allowed = 2 * (theirs[name] - value).abs().max() + 2 * ULP[dtype] * value.abs().max()
        shares.append(float((ours[name] - value).abs().max() / allowed))
    assert max(shares) <= 2, dict(zip(exact, shares, strict=True))
    return max(shares)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_that_do_not_learn_cost_no_products(transposed):
    case = Case(tokens=30, biased=True, transposed=transposed)
    ids, weights = case.routing()
    trains = torch.tensor([False, True, True, False])
    names = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")

    def slopes(**more):
        layer, x = case.layer(), case.x().requires_grad_()
        given = [x, *(layer[name].requires_grad_() for name in names)]
        out = gossamer.experts(x, ids, weights, **layer, **more)
        return torch.autograd.grad(out.square().sum(), given)

    found, all_of_them = slopes(trainable=trains), slopes()
    assert torch.equal(found[0], all_of_them[0])
    for mine, theirs in zip(found[1:], all_of_them[1:], strict=True):
        assert torch.equal(mine[trains], theirs[trains]) and not mine[~trains].any()
    with pytest.raises(InputError, match=r"trainable: expected torch.bool of shape \(4,\)"):
        slopes(trainable=trains[:2])


def test_what_needs_no_gradient_is_not_computed():
    case = Case(tokens=20)
    layer, (ids, weights) = case.layer(), case.routing()
    down = layer["down_proj"].requires_grad_()
    x = case.x()
    gossamer.experts(x, ids, weights, **layer).sum().backward()
    assert down.grad is not None and x.grad is None and layer["gate_up_proj"].grad is None
    spec = ExpertsSpec(4, 2, 16, 12, SWIGLU, keeps=True)
    kinds = [op.kind for op in build_gradients(spec, ["down"]).ops]
    assert kinds == ["grouped_gemm", "map_grad_rows", "grouped_outer"]
    assert [op.kind for op in build_gradients(spec, ["down_bias"]).ops] == ["grouped_outer"]


def test_gradients_do_not_depend_on_the_run():
    case = Case(tokens=200, experts=8, top_k=4)
    layer, (ids, weights) = case.layer(), case.routing()
    x = case.x().requires_grad_()

    def run():
        (found,) = torch.autograd.grad(gossamer.experts(x, ids, weights, **layer).square().sum(), x)
        return found

    first = run()
    assert all(torch.equal(first, run()) for _ in range(3))


def test_no_tokens_have_gradients_of_zero():
    case = Case(tokens=0)
    layer, (ids, weights) = case.layer(), case.routing()
    x, up = case.x().requires_grad_(), layer["gate_up_proj"].requires_grad_()
    gossamer.experts(x, ids, weights, **layer).sum().backward()
    assert x.grad.shape == (0, case.hidden) and not up.grad.any()


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "softmax_of_topk"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_router_logits_have_gradients(router, renormalize):
    case = Case(tokens=7, experts=5)
    layer = case.layer()
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    settings = {"top_k": 2, "router": router, "renormalize": renormalize, "scale": 1.5}
    matrices = layer["gate_up_proj"], layer["down_proj"]
    gossamer.moe(case.x(), logits, *matrices, **settings).square().sum().backward()
    scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "softmax_of_topk": logits}[router]
    weights, ids = scores.topk(2, -1)
    if router == "softmax_of_topk":
        weights = weights.softmax(-1)
    elif renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    found, logits.grad = logits.grad, None
    plain(case, case.x(), ids, 1.5 * weights, layer, torch.float32).square().sum().backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("halves", ["split", "interleaved", None])
def test_every_level_computes_the_same(target, keeps, halves):
    activation = SWIGLU if halves else real("x0") * sigmoid(real("x0"))
    spec = ExpertsSpec(
        3, 2, 8, 6, activation, halves, keeps=keeps, biased=True, load="few", target=target, transposed=keeps,
        masked=keeps,
    )  # fmt: skip
    graph = build_gradients(spec, WANTED)
    testing.verify(graph)
    assert testing.parse(testing.to_text(graph)) == graph
    rng, tokens = np.random.default_rng(0), 9
    ids = rng.integers(-1, 4, tokens * 2)
    kept = np.flatnonzero((ids >= 0) & (ids < 3))
    order = kept[np.argsort(ids[kept], kind="stable")]
    place = np.full(18, -1)
    place[order] = np.arange(len(order))
    sizes = {"T": tokens, "rows": 18}
    given = {
        v.name: rng.standard_normal([sizes.get(n, n) for n in v.shape]).astype(np.float32)
        for v in graph.inputs
    }
    given |= {
        "tokens": np.pad(order // 2, (0, 18 - len(order))),
        "bounds": np.concatenate([[0], np.cumsum(np.bincount(ids[kept], minlength=3))]),
        "place": place.reshape(9, 2),
    } | ({"trains": np.array([1, 0, 1])} if keeps else {})
    expected = graph_interpret.interpret(graph, given)
    flat = given | {name: given[name].reshape(-1) for name in ("place", "ones")}
    flat |= {name: np.zeros_like(value) for name, value in expected.items()}
    program = compile_gradients(spec, WANTED)
    assert testing.parse(testing.to_text(program)) == program
    for name, value in kernel_interpret.interpret(program, flat).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)

"""Low-rank adapters of experts: added within the products, with gradients of their own."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer.frontend import testing  # noqa: E402
from gossamer.ir import graph_interpret, kernel_interpret  # noqa: E402
from gossamer.ir.errors import InputError  # noqa: E402
from gossamer.ir.expr import real, sigmoid  # noqa: E402
from gossamer.passes.moe.build import build_experts  # noqa: E402
from gossamer.passes.moe.gradient import LORA, build_gradients  # noqa: E402
from gossamer.passes.moe.pipeline import compile_experts  # noqa: E402
from gossamer.passes.moe.spec import ExpertsSpec  # noqa: E402
from gossamer.tests import moe_cases as CASES  # noqa: E402

Case, plain, ULP = CASES.Case, CASES.plain, CASES.ULP

SWIGLU = real("x0") * sigmoid(real("x0")) * real("x1")


def adapters(case, rank, seed=0):
    """gate_up_lora and down_lora."""
    g = torch.Generator().manual_seed(seed)
    e, columns = case.experts, case.inner * (2 if case.gated else 1)
    shapes = (rank, case.hidden), (columns, rank), (rank + 1, case.inner), (case.hidden, rank + 1)
    a, b, c, d = (
        (torch.randn(e, *s, generator=g, dtype=torch.float64) / s[1] ** 0.5).to(case.dtype) for s in shapes
    )
    return {"gate_up_lora": (a, b), "down_lora": (c, d)}


def merged(case, layer, lora, scale, dtype):
    """The layer with what adapters add in its matrices."""
    found = dict(layer)
    for name in ("gate_up", "down"):
        a, b = (m.to(dtype) for m in lora[f"{name}_lora"])
        more = scale * b @ a
        found[f"{name}_proj"] = layer[f"{name}_proj"].to(dtype) + (more.mT if case.transposed else more)
    return found


@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=70, biased=True),
        Case(tokens=9, transposed=True, interleaved=True, dtype=torch.bfloat16),
        Case(tokens=1, gated=False, activation="relu2"),
    ],
    ids=repr,
)
def test_adapters_are_added(case):
    largest = torch.zeros(4, dtype=torch.float64)  # over draws: errors of ours, theirs, the reference; values
    for seed in range(1 + 60 // case.tokens):
        layer, x, lora = case.layer(seed), case.x(seed), adapters(case, 4, seed)
        ids, weights = case.routing(seed, -1, case.experts + 1)
        given = {**layer, **lora, "lora_scale": 0.5}
        exact = plain(case, x, ids, weights, merged(case, layer, lora, 0.5, torch.float64), torch.float64)
        theirs = plain(case, x, ids, weights, merged(case, layer, lora, 0.5, case.dtype), case.dtype)
        found = gossamer.experts(x, ids, weights, **given)
        reference = gossamer.experts(x, ids, weights, **given, backend="reference")
        errors = [(t.double() - exact).abs().max() for t in (found, theirs, reference)]
        largest = torch.maximum(largest, torch.stack([*errors, exact.abs().max()]))
    ours, theirs, reference, value = largest
    allowed = 2 * theirs + 2 * ULP[case.dtype] * value
    assert ours <= allowed and reference <= allowed


@pytest.mark.parametrize(
    ("case", "recompute", "which"),
    [
        (Case(tokens=6, experts=3, hidden=4, inner=3, dtype=torch.float64), False, "both"),
        (
            Case(tokens=6, experts=3, hidden=4, inner=3, dtype=torch.float64, biased=True),
            True,
            "gate_up_lora",
        ),
        (
            Case(tokens=6, experts=3, hidden=4, inner=3, dtype=torch.float64, transposed=True),
            False,
            "down_lora",
        ),
    ],
    ids=["both", "gate_up", "down"],
)
def test_gradients(case, recompute, which):
    layer, x = case.layer(), case.x()
    ids, weights = case.routing(0, -1, case.experts + 1)
    lora = {name: pair for name, pair in adapters(case, 2).items() if which in ("both", name)}
    names = list(lora)

    def function(x, weights, *matrices):
        pairs = {name: tuple(matrices[2 * i : 2 * i + 2]) for i, name in enumerate(names)}
        more = {"lora_scale": 1.5, "recompute": recompute}
        return gossamer.experts(x, ids, weights, **layer, **pairs, **more)

    given = [x, weights.double(), *(m for pair in lora.values() for m in pair)]
    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in given])


def test_a_frozen_base_costs_no_gradient():
    spec = ExpertsSpec(4, 2, 16, 12, SWIGLU, ranks=(4, 4), keeps=True)
    graph = build_gradients(spec, LORA)
    testing.verify(graph)
    matrices = [op.output.name for op in graph.ops if op.kind == "grouped_outer"]
    assert matrices == ["dgate_up_a", "dgate_up_b", "ddown_a", "ddown_b"]
    assert not any(op.output.name == "dxs" for op in graph.ops)


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
def test_every_level_computes_the_same(target):
    spec = ExpertsSpec(
        3, 2, 8, 6, SWIGLU, ranks=(4, 5), lora_scale=2.0, biased=True, load="few", target=target
    )
    graph = build_experts(spec)
    assert testing.parse(testing.to_text(graph)) == graph
    rng = np.random.default_rng(0)
    given = {
        v.name: rng.standard_normal([9 if n == "T" else n for n in v.shape]).astype(np.float32)
        for v in graph.inputs
    }
    given["ids"] = rng.integers(-1, 4, (9, 2))
    expected = graph_interpret.interpret(graph, given)["o"]
    flat = given | {name: given[name].reshape(-1) for name in ("ids", "weights")}
    flat["o"] = np.full((9, 8), np.nan, np.float32)
    found = kernel_interpret.interpret(compile_experts(spec), flat)["o"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gate_up_lora", lambda a, b: (a, b[:, :3]), r"gate_up_lora\[1\]: expected shape \(4, 24, 3\)"),
        ("down_lora", lambda a, b: (a[:2], b), r"down_lora\[0\]: expected shape \(4, 4, 12\)"),
        ("down_lora", lambda a, b: (a.double(), b), r"down_lora\[0\]: expected x's dtype"),
        ("down_lora", lambda a, b: (a[:, :0], b[:, :, :0]), "of rank 1 or more"),
    ],
)
def test_bad_input(name, change, message):
    case = Case(tokens=5)
    lora = adapters(case, 3)
    lora[name] = change(*lora[name])
    with pytest.raises(InputError, match=message):
        gossamer.experts(case.x(), *case.routing(), **case.layer(), **lora)

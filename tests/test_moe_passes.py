"""Passes of layers of experts: every level computes the same, and fusion takes what it may and no more."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer import testing
from gossamer.ir import graph_interpret, kernel_interpret
from gossamer.ir.errors import InputError, VerifyError
from gossamer.ir.expr import real, sigmoid
from gossamer.ir.graph import Op, Value
from gossamer.ir.graph_text import op_text
from gossamer.ir.kernel_text import parse_program
from gossamer.ir.kernel_text import to_text as kernel_text
from gossamer.passes.moe.build import build_experts
from gossamer.passes.moe.direct import direct
from gossamer.passes.moe.fuse import fuse_experts
from gossamer.passes.moe.pipeline import compile_experts, lower_experts, run_experts
from gossamer.passes.moe.router import compile_router
from gossamer.passes.moe.router_spec import RouterSpec
from gossamer.passes.moe.spec import ExpertsSpec

SWIGLU = real("x0") * sigmoid(real("x0")) * real("x1")


def spec_of(experts=4, top_k=2, hidden=8, inner=6, **more):
    activation = SWIGLU if more.get("halves", "split") else sigmoid(real("x0"))
    return ExpertsSpec(experts, top_k, hidden, inner, activation, **more)


def arguments(spec, tokens, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    e, n = spec.experts, spec.up_columns
    up, down = (
        ((e, spec.hidden, n), (e, spec.inner, spec.hidden))
        if spec.transposed
        else (
            (e, n, spec.hidden),
            (e, spec.hidden, spec.inner),
        )
    )
    found = {"x": normal(tokens, spec.hidden), "gate_up": normal(*up), "down": normal(*down)}
    if spec.biased:
        found |= {"gate_up_bias": normal(e, n), "down_bias": normal(e, spec.hidden)}
    ids = rng.integers(-1, e + 1, (tokens, spec.top_k))
    return found | {"ids": ids, "weights": rng.random((tokens, spec.top_k)).astype(np.float32)}


def flat(given, spec):
    """The arguments of kernels: entries in a row, and an output to fill."""
    more = {name: given[name].reshape(-1) for name in ("ids", "weights")}
    return given | more | {"o": np.full_like(given["x"], np.nan)}


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from(["split", "interleaved", None]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["cpu", "cuda:sm_90"]),
    st.sampled_from(["one", "few", "many"]),
)
def test_every_level_computes_the_same(
    experts, top_k, tokens, halves, biased, transposed, single, target, load
):
    spec = spec_of(
        experts,
        top_k,
        halves=halves,
        biased=biased,
        transposed=transposed,
        single=single,
        target=target,
        load=load,
    )
    given = arguments(spec, tokens)
    graph = build_experts(spec)
    fused = testing.run_pass(graph, fuse_experts)
    scheduled = run_experts(graph, spec)
    program = lower_experts(scheduled, spec)
    expected = graph_interpret.interpret(graph, given)["o"]
    np.testing.assert_allclose(graph_interpret.interpret(fused, given)["o"], expected, rtol=1e-5, atol=1e-5)
    assert testing.parse(testing.to_text(scheduled)) == scheduled
    assert parse_program(kernel_text(program)) == program
    found = kernel_interpret.interpret(program, flat(given, spec))["o"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [600, 1500])
def test_many_chunks_of_entries(tokens):
    spec = spec_of(5, 3, 4, 3)
    given = arguments(spec, tokens)
    expected = graph_interpret.interpret(build_experts(spec), given)["o"]
    found = kernel_interpret.interpret(compile_experts(spec), flat(given, spec))["o"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# ---- direct ----


def test_a_handful_of_entries_is_not_sorted():
    fused = fuse_experts(build_experts(spec_of(biased=True)))
    found = testing.run_pass(fused, direct)
    assert [op.kind for op in found.ops] == ["entry_gemm", "entry_combine"]
    assert len(compile_experts(spec_of(load="one")).kernels) == 2


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
@pytest.mark.parametrize(
    "more",
    [
        {"ranks": (4, 3), "adapters": "i64", "biased": True},
        {"ranks": (0, 3), "adapters": "i32"},
        {"ranks": (4, 0), "halves": "interleaved"},
    ],
    ids=str,
)
def test_entries_take_adapters(more, target):
    activation = real("x0") * sigmoid(real("x0")) * real("x1")
    facts = {"load": "one", "lora_scale": 0.5, "target": target, **more}
    spec = ExpertsSpec(3, 2, 8, 6, activation, **facts)
    graph = build_experts(spec)
    fused = run_experts(graph, spec)
    assert [op.kind for op in fused.ops] == ["entry_gemm", "entry_combine"]
    testing.verify(fused)
    assert testing.parse(testing.to_text(fused)) == fused
    rng, sizes = np.random.default_rng(0), {"T": 4, "adapters": 3}
    arguments = {
        v.name: rng.standard_normal([sizes.get(n, n) for n in v.shape]).astype(np.float32)
        for v in graph.inputs
    }
    arguments["ids"] = rng.integers(-1, 4, (4, 2))
    if spec.adapters:
        arguments["adapter_ids"] = np.array([1, -1, 5, 0])
    expected = graph_interpret.interpret(graph, arguments)["o"]
    np.testing.assert_allclose(
        graph_interpret.interpret(fused, arguments)["o"], expected, rtol=1e-4, atol=1e-4
    )
    flat = arguments | {name: arguments[name].reshape(-1) for name in ("ids", "weights")}
    flat["o"] = np.full((4, 8), np.nan, np.float32)
    found = kernel_interpret.interpret(compile_experts(spec), flat)["o"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_direct_leaves_alone_adapters_of_large_ranks():
    activation = real("x0") * sigmoid(real("x0")) * real("x1")
    spec = ExpertsSpec(3, 2, 8, 6, activation, ranks=(64, 4), load="one")
    assert run_experts(build_experts(spec), spec).ops[0].kind == "group"


def test_direct_leaves_alone_what_is_sorted_for_others():
    for graph in (build_experts(spec_of()), fuse_experts(build_experts(spec_of(keeps=True)))):
        assert testing.run_pass(graph, direct) == graph
    fused = fuse_experts(build_experts(spec_of()))
    kept = type(fused)(fused.name, fused.inputs, fused.ops, ("o", "y"))
    assert testing.run_pass(kept, direct) == kept


# ---- fuse ----


def test_fuse_takes_gather_split_and_map():
    assert [op.kind for op in fuse_experts(build_experts(spec_of())).ops] == [
        "group",
        "grouped_gemm",
        "grouped_gemm",
        "combine",
    ]
    text = op_text(fuse_experts(build_experts(spec_of(biased=True))).ops[1])
    assert text.startswith(
        "%h = grouped_gemm %x, %gate_up, %bounds, %tokens, %gate_up_bias {biased = True, expr"
    )


def test_fuse_leaves_alone_what_is_returned():
    graph = build_experts(spec_of())
    for name, kinds in (("xs", ["gather", "grouped_gemm"]), ("a", ["grouped_gemm", "split", "map"])):
        kept = type(graph)(graph.name, graph.inputs, graph.ops, ("o", name))
        found = [op.kind for op in testing.run_pass(kept, fuse_experts).ops]
        assert [k for k in found if k in kinds][: len(kinds)] == kinds


def test_lower_refuses_what_is_not_scheduled():
    spec = spec_of()
    with pytest.raises(InputError, match="fused and scheduled"):
        lower_experts(build_experts(spec), spec)
    with pytest.raises(InputError, match=r"passes\.moe\.schedule"):
        lower_experts(fuse_experts(build_experts(spec)), spec)


# ---- rules ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda op: op.with_attrs(transpose_b=False) if op.kind == "grouped_matmul" else None,
            "summed extent",
        ),
        (lambda op: op.with_attrs(experts=7) if op.kind == "group" else None, "expected shape"),
        (lambda op: Op("gather", ("x", "x"), op.outputs) if op.kind == "gather" else None, "dimensions"),
        (
            lambda op: Op(op.kind, op.inputs[:2], op.outputs) if op.kind == "combine" else None,
            "expected 3 or 4",
        ),
    ],
)
def test_rules(change, message):
    with pytest.raises(VerifyError, match=message):
        testing.verify(build_experts(spec_of()).map_ops(change))


def test_odd_columns_have_no_halves():
    x = Value("x", "f32", ("n", 7))
    op = Op("split", ("x",), (Value("a", "f32", ("n", 3)), Value("b", "f32", ("n", 3))))
    with pytest.raises(VerifyError, match="even number of columns"):
        testing.verify(type(build_experts(spec_of()))("f", (x,), (op,), ("a",)))


@pytest.mark.parametrize(
    "more", [{"experts": 0}, {"experts": 5000}, {"dtype": "i8"}, {"load": "heavy"}, {"top_k": -1}]
)
def test_specs_are_checked(more):
    with pytest.raises(InputError, match="ExpertsSpec"):
        spec_of(**more)


# ---- routers ----


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
@pytest.mark.parametrize("groups", [1, 3])
def test_router_kernel(target, groups):
    spec = RouterSpec(
        12, 3, "sigmoid", corrected="f32", groups=groups, top_groups=min(2, groups), target=target
    )
    rng = np.random.default_rng(0)
    logits, bias = (rng.standard_normal(s).astype(np.float32) for s in ((9, 12), (12,)))
    given = {
        "logits": logits,
        "bias": bias,
        "scale": 1.0,
        "ids": np.zeros((9, 3)),
        "weights": np.zeros((9, 3)),
    }
    found = kernel_interpret.interpret(compile_router(spec), given)
    scores = 1 / (1 + np.exp(-logits))
    choice = scores + bias
    if groups > 1:
        ranks = np.sort(choice.reshape(9, groups, -1), -1)[..., -2:].sum(-1)
        closed = np.argsort(np.argsort(-ranks, -1), -1) >= 2
        choice = np.where(np.repeat(closed, 12 // groups, 1), -np.inf, choice)
    ids = np.argsort(-choice, -1, kind="stable")[:, :3]
    assert (found["ids"] == ids).all()
    weights = np.take_along_axis(scores, ids, 1)
    np.testing.assert_allclose(found["weights"], weights / weights.sum(1, keepdims=True), rtol=1e-5)

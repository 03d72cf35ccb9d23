"""Passes of linear attention: every level computes the same; what is fused and what is left alone."""

import itertools

import numpy as np
import pytest
import sympy

from gossamer import testing
from gossamer.ir import graph_interpret, kernel_interpret
from gossamer.ir.errors import InputError, UnsupportedError, VerifyError
from gossamer.ir.expr import integer, real, where
from gossamer.ir.graph import Graph, Op, Value
from gossamer.ir.kernel_text import parse_program
from gossamer.ir.kernel_text import to_text as kernel_text
from gossamer.ir.linear import FeatureMap
from gossamer.passes.linear.build import build_linear, build_linear_gradients
from gossamer.passes.linear.fuse import fuse_linear
from gossamer.passes.linear.pipeline import compile_linear, lower_linear, run_linear
from gossamer.passes.linear.spec import LinearSpec

X = real("x0")
ELU = FeatureMap((where(X > 0, X + 1, sympy.exp(X)),))
HEDGEHOG = FeatureMap((X, -X), softmax=True)
TWO = FeatureMap((sympy.exp(X / 2), sympy.exp(-X / 2)))


def spec_of(features=ELU, keys=None, **more):
    return LinearSpec(features, keys or features, **({"qk_size": 5, "v_size": 3, "eps": 0.5} | more))


def arguments(graph, seed=0, **sizes):
    rng = np.random.default_rng(seed)
    sizes = {"B": 2, "Hq": 2, "Hk": 2, "L": 70, "N": 40} | sizes
    kinds = {"f32": np.float32, "f64": np.float64}
    return {
        v.name: (np.abs(rng.standard_normal([sizes.get(n, n) for n in v.shape])) + 0.1).astype(kinds[v.dtype])
        for v in graph.inputs
    }


def graphs(spec):
    names = ["q", "k", "v"]
    if spec.initial:
        names += ["state", "sums"][: 2 if spec.normalised else 1]
    return build_linear(spec), build_linear_gradients(spec, names)


MAPS = {"elu": ELU, "hedgehog": HEDGEHOG, "two": TWO}
OPTIONS = [
    (*options, list(MAPS)[n % 3])
    for n, options in enumerate(itertools.product((True, False), (0.5, None), (True, False), (True, False)))
]


@pytest.mark.parametrize(("causal", "eps", "grouped", "split", "features"), OPTIONS)
@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
def test_every_level_computes_the_same(causal, eps, grouped, split, features, target):
    states = grouped != split
    spec = spec_of(
        MAPS[features], causal=causal, eps=eps, grouped=grouped, split=split, initial=states, final=states,
        keeps=True, target=target,
    )  # fmt: skip
    for graph in graphs(spec):
        given = arguments(graph, Hq=4 if grouped else 2)
        expected = graph_interpret.interpret(graph, given)
        fused = testing.run_pass(graph, fuse_linear)
        scheduled = run_linear(graph, spec)
        program = lower_linear(scheduled, spec)
        assert testing.parse(testing.to_text(scheduled)) == scheduled
        assert parse_program(kernel_text(program)) == program
        same = graph_interpret.interpret(fused, given)
        outputs = {name: np.full_like(value, np.nan) for name, value in expected.items()}
        spans = {a.name: 2 for kernel in program.kernels for a in kernel.scalars}
        found = kernel_interpret.interpret(program, given | outputs | spans)
        for name, value in expected.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(same[name], value, atol=1e-5 * scale, rtol=1e-4, err_msg=name)
            np.testing.assert_allclose(found[name], value, atol=1e-5 * scale, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_gradients_are_those_of_differences(causal, grouped):
    """In float64, of a weighted sum of all results, by central differences along a random direction."""
    spec = spec_of(HEDGEHOG, dtype="f64", causal=causal, grouped=grouped, initial=True, final=True)
    forward, backward = graphs(spec)
    names = ("q", "k", "v", "state", "sums")
    sizes = {"Hq": 4 if grouped else 2, "L": 6, "N": 5}
    given = arguments(forward, **sizes)
    kept = spec_of(
        HEDGEHOG, dtype="f64", causal=causal, grouped=grouped, initial=True, final=True, keeps=True
    )
    results = graph_interpret.interpret(build_linear(kept), given)
    weights = {name: arguments(backward, 3, **sizes)[name] for name in ("do", "dnew_state", "dnew_sums")}
    more = {name: value for name, value in results.items() if name in {v.name for v in backward.inputs}}
    read = {v.name for v in backward.inputs}
    found = graph_interpret.interpret(
        backward, {n: v for n, v in (given | more | weights).items() if n in read}
    )

    def total(values):
        made = graph_interpret.interpret(forward, values)
        return sum((made[name[1:]] * weight).sum() for name, weight in weights.items())

    rng = np.random.default_rng(5)
    for name in names:
        step = rng.standard_normal(given[name].shape) * 1e-6
        slope = (total(given | {name: given[name] + step}) - total(given | {name: given[name] - step})) / 2
        np.testing.assert_allclose((found[f"d{name}"] * step).sum(), slope, rtol=1e-6)


# ---- fuse ----


def test_fuse_makes_one_operation():
    graph = testing.run_pass(build_linear(spec_of()), fuse_linear)
    (op,) = graph.ops
    assert op.kind == "linear_values" and op.inputs == ("q", "k", "v")
    assert (op.attr("x_map"), op.attr("f_map"), op.attr("eps")) == (ELU, ELU, 0.5)
    assert len(op.outputs) == 1


def test_fuse_of_gradients_divides_where_values_are_loaded():
    graph = testing.run_pass(build_linear_gradients(spec_of(), ("q", "k", "v")), fuse_linear)
    kinds = [op.kind for op in graph.ops]
    assert sorted(kinds) == ["linear_features", "linear_features", "linear_values", "normalise_grad"]
    assert {op.attr("divides") for op in graph.ops if op.kind != "normalise_grad"} == {"y", "g"}
    assert all(op.attr("out_map") == ELU for op in graph.of_kind("linear_features"))


def test_fuse_leaves_alone_what_is_returned():
    graph = build_linear(spec_of())
    for name in ("fq", "num"):
        kept = Graph(graph.name, graph.inputs, graph.ops, ("o", name))
        fused = testing.run_pass(kept, fuse_linear)
        assert fused.producer(name).kind == graph.producer(name).kind
        assert fused.outputs == ("o", name)


def test_identity_maps_vanish():
    (op,) = fuse_linear(build_linear(spec_of(FeatureMap((X,)), eps=None))).ops
    assert op.attr("x_map") is None and op.attr("f_map") is None


# ---- sharing, shapes, rejections ----


def test_gradients_of_keys_and_values_share_their_states():
    spec = spec_of(split=True)
    graph = build_linear_gradients(spec, ("k", "v"))
    names = [k.name for k in lower_linear(run_linear(graph, spec), spec).kernels]
    assert sorted(names) == ["linear_dden", "linear_dk", "linear_dv", "q_do_prefix", "q_do_states"]


def test_kernels_of_one_head_size_serve_every_length():
    program = compile_linear(spec_of(causal=True))
    given = build_linear(spec_of(causal=True))
    for length in (1, 31, 32, 33, 100):
        values = arguments(given, L=length)
        expected = graph_interpret.interpret(given, values)["o"]
        found = kernel_interpret.interpret(program, values | {"o": np.full_like(expected, np.nan)})["o"]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_wide_states_are_cut_into_columns():
    spec = spec_of(qk_size=20, v_size=300)
    graph = build_linear(spec)
    program = compile_linear(spec)
    assert any(dim.name == "n0" for dim in program.kernels[-1].grid)
    given = arguments(graph, B=1)
    expected = graph_interpret.interpret(graph, given)["o"]
    found = kernel_interpret.interpret(program, given | {"o": np.full_like(expected, np.nan)})["o"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"order": "sideways"}, "order: expected one of forward, backward"),
        ({"operands": ("x", "f")}, "operands: expected 3 different roles"),
        ({"operands": ("x", "f", "y")}, "operands: expected x, f, g among them"),
        ({"x_map": HEDGEHOG}, "number of features"),
    ],
)
def test_verify_rejects(changed, message):
    (op,) = fuse_linear(build_linear(spec_of())).ops
    graph = Graph("bad", build_linear(spec_of()).inputs, (op.with_attrs(**changed),), ("o",))
    with pytest.raises(VerifyError, match=message):
        testing.verify(graph) if hasattr(testing, "verify") else graph_interpret.verify(graph)


def test_feature_maps_are_made_of_elements():
    with pytest.raises(VerifyError, match="made of x0"):
        FeatureMap((integer("q") + X,))
    with pytest.raises(VerifyError, match="at least one part"):
        FeatureMap(())


def test_specs_reject():
    with pytest.raises(InputError, match="as many parts as q_map"):
        spec_of(ELU, TWO)
    with pytest.raises(InputError, match="qk_size"):
        spec_of(qk_size=0)
    with pytest.raises(InputError, match="dtype"):
        spec_of(dtype="i32")


def test_what_has_no_rule_says_so(monkeypatch):
    from gossamer.passes.linear import build as linear_build

    monkeypatch.delitem(linear_build.RULES, "normalise")
    with pytest.raises(UnsupportedError, match="normalise has no gradient rule"):
        build_linear_gradients(spec_of(), ("q",))


def test_unscheduled_graphs_are_rejected():
    spec = spec_of()
    with pytest.raises(InputError, match="fused and scheduled"):
        lower_linear(build_linear(spec), spec)
    with pytest.raises(InputError, match=r"has passed passes\.linear\.schedule"):
        lower_linear(fuse_linear(build_linear(spec)), spec)


def test_an_operation_in_a_graph_prints_and_parses():
    op = Op("features", ("x",), (Value("f", "f32", ("B", "H", "L", 8)),)).with_attrs(map=TWO)
    graph = Graph("one", (Value("x", "f32", ("B", "H", "L", 4)),), (op,), ("f",))
    assert testing.parse(testing.to_text(graph)) == graph

"""Kernels of linear attention as Triton text: on Triton's interpreter, and compiled ahead of time."""

import math

import numpy as np
import pytest
import sympy

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from gossamer.codegen.triton import emit  # noqa: E402
from gossamer.ir.evaluate import evaluate  # noqa: E402
from gossamer.ir.expr import integer, real, where  # noqa: E402
from gossamer.ir.graph_interpret import interpret  # noqa: E402
from gossamer.ir.linear import FeatureMap  # noqa: E402
from gossamer.passes.linear.build import build_linear, build_linear_gradients  # noqa: E402
from gossamer.passes.linear.pipeline import compile_linear, compile_linear_gradients  # noqa: E402
from gossamer.passes.linear.spec import LinearSpec  # noqa: E402
from gossamer.runtime.gpu import compile_ahead  # noqa: E402
from gossamer.runtime.triton_interpreter import run_interpreted  # noqa: E402

X = real("x0")
ELU = FeatureMap((where(X > 0, X + 1, sympy.exp(X)),))
HEDGEHOG = FeatureMap((X, -X), softmax=True)
DTYPES = {"f16": torch.float16, "f32": torch.float32}


def run(program, given, sizes):
    """All tensors of a program after its kernels have run on Triton's interpreter."""
    values = {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in given.items()}
    for t in program.intermediates:
        extents = [integer(n) if isinstance(n, str) else sympy.sympify(n) for n in t.shape]
        shape = [int(evaluate(n, sizes)) for n in extents]
        values[t.name] = torch.full(shape, math.nan, dtype=DTYPES[t.dtype])
    for kernel in program.kernels:
        run_interpreted(emit(kernel), {a.name: values[a.name] for a in kernel.args})
    return values


@pytest.mark.parametrize(
    ("features", "more"),
    [
        (ELU, {"causal": True, "split": True, "initial": True, "final": True}),
        (ELU, {"causal": False, "split": True, "grouped": True}),
        (HEDGEHOG, {"causal": True, "grouped": True, "eps": None}),
        (ELU, {"causal": True, "dtype": "f16", "v_size": 40}),
    ],
    ids=str,
)
def test_interpreter(features, more):
    options = {"qk_size": 12, "v_size": 10, "eps": 0.5, "keeps": True, "aligned": False} | more
    spec = LinearSpec(features, features, target="cuda:sm_90", **options)
    sizes = {"B": 1, "Hq": 4 if spec.grouped else 2, "Hk": 2, "L": 150, "N": 150, "span_L": 1, "span_N": 1}
    states = (["state", "sums"] if spec.normalised else ["state"]) if spec.initial else []
    wanted = ("q", "k", "v", *states)
    pairs = [
        (build_linear(spec), compile_linear(spec)),
        (build_linear_gradients(spec, wanted), compile_linear_gradients(spec, wanted)),
    ]
    rng = np.random.default_rng(0)
    kinds = {"f16": np.float16, "f32": np.float32}
    for graph, program in pairs:
        given = {}
        for v in graph.inputs:
            drawn = np.abs(rng.standard_normal([sizes.get(n, n) for n in v.shape])) + 0.1
            given[v.name] = drawn.astype(kinds[v.dtype])
        expected = interpret(graph, given)
        outputs = {name: np.full_like(value, np.nan) for name, value in expected.items()}
        found = run(program, given | outputs | {"span_L": 1, "span_N": 1}, sizes)
        for name, value in expected.items():
            tolerance = (3e-3 if value.dtype == np.float16 else 2e-5) * float(np.abs(value).max())
            np.testing.assert_allclose(found[name].numpy(), value, rtol=2e-3, atol=tolerance, err_msg=name)


def programs(spec):
    return (compile_linear(spec), compile_linear_gradients(spec, ("q", "k", "v")))


@pytest.mark.parametrize("causal", [True, False])
def test_compiled_for_an_h100_without_spills(causal):
    spec = LinearSpec(ELU, ELU, dtype="bf16", causal=causal, split=True, keeps=True, target="cuda:sm_90")
    for program in programs(spec):
        for kernel in program.kernels:
            binary = compile_ahead(emit(kernel), "cuda:sm_90")
            assert not binary.spills and not binary.lacks, kernel.name
            if "dden" not in kernel.name and not kernel.name.endswith(("prefix", "total")):
                assert "wgmma" in binary.assembly, kernel.name


def test_features_of_two_parts_compile_without_spills():
    spec = LinearSpec(HEDGEHOG, HEDGEHOG, dtype="bf16", split=True, target="cuda:sm_90")
    binary = compile_ahead(emit(compile_linear(spec).kernels[-1]), "cuda:sm_90")
    assert not binary.spills and "wgmma" in binary.assembly


@pytest.mark.parametrize("target", ["cuda:sm_80", "hip:gfx942"])
def test_kernels_compile_elsewhere(target):
    spec = LinearSpec(ELU, ELU, dtype="f16", grouped=True, target=target)
    for kernel in compile_linear(spec).kernels:
        assert not compile_ahead(emit(kernel), target).lacks


def test_golden(golden):
    spec = LinearSpec(ELU, ELU, dtype="bf16", split=True, target="cuda:sm_90")
    golden("triton/linear_attention.py", emit(compile_linear(spec).kernels[-1]))


def test_golden_on_a_cpu(golden):
    from gossamer.codegen.tvm import emit as emit_tvm

    spec = LinearSpec(ELU, ELU, qk_size=16, v_size=16)
    golden("tvm/linear_attention.py", emit_tvm(compile_linear(spec).kernels[-1]))

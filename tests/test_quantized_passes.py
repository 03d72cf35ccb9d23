"""Quantised experts below the frontend: every level computes the same, texts parse, Triton's text runs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import sympify

from gossamer import testing
from gossamer.ir import graph_interpret, kernel_interpret
from gossamer.ir.errors import InputError, VerifyError
from gossamer.ir.evaluate import evaluate, round_to
from gossamer.ir.expr import float_of_bits, integer, parse, to_text
from gossamer.ir.graph import Op
from gossamer.ir.graph_text import op_text
from gossamer.ir.kernel import For, Load
from gossamer.ir.kernel_text import parse_program
from gossamer.ir.kernel_text import to_text as kernel_text
from gossamer.ir.quantized import Quantized, dequantize, e4m3
from gossamer.ir.ragged import Tiling
from gossamer.passes.moe.build import build_experts
from gossamer.passes.moe.fuse import fuse_experts
from gossamer.passes.moe.gradient import build_gradients
from gossamer.passes.moe.pipeline import compile_experts, compile_gradients, lower_experts, run_experts
from gossamer.passes.moe.spec import ExpertsSpec
from gossamer.tests import quantized_cases as CASES

FORMATS, SWIGLU, T, TOP = CASES.FORMATS, CASES.SWIGLU, CASES.T, CASES.TOP
arguments, for_kernels, on_triton = CASES.arguments, CASES.for_kernels, CASES.on_triton
spec_of, stored = CASES.spec_of, CASES.stored


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([0, 2, 4, 8]),
    st.integers(1, 45),
    st.integers(1, 40),
    st.sampled_from([4, 8, 16, 64]),
    st.sampled_from(["cpu", "cuda:sm_90", "cuda:sm_80"]),
    st.sampled_from(["one", "few", "many"]),
)
def test_every_level_computes_the_same(format, bits, hidden, inner, group, target, load):
    spec = spec_of(format, group, hidden, inner, bits, target=target, load=load, biased=group == 4)
    given = arguments(spec)
    graph = build_experts(spec)
    expected = graph_interpret.interpret(graph, given)["o"]
    scheduled = run_experts(graph, spec)
    testing.verify(scheduled)
    assert testing.parse(testing.to_text(scheduled)) == scheduled
    found = graph_interpret.interpret(scheduled, given)["o"]
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * largest)
    program = lower_experts(scheduled, spec)
    assert parse_program(kernel_text(program)) == program
    given = for_kernels(given, spec)
    if target == "cuda:sm_80" and format == "fp8":
        given |= {n: v for n, v in arguments(spec).items() if n.endswith("codes")}
    found = kernel_interpret.interpret(program, given)["o"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * largest)


def test_codes_stand_for_numbers_in_the_order_of_columns():
    q = Quantized("int", (4,), 6, 6)
    codes = np.array([[[0x91, 0xA2, 0xB3]]], np.uint8)  # columns 0, 1, 2 below, 3, 4, 5 above
    found = dequantize(q, [codes, np.ones((1, 1, 1))])
    assert found.tolist() == [[[1 - 8, 2 - 8, 3 - 8, 9 - 8, 10 - 8, 11 - 8]]]


# ---- fuse ----


def test_products_take_codes_and_decode_them_themselves():
    fused = testing.run_pass(build_experts(spec_of("int4")), fuse_experts)
    assert [op.kind for op in fused.ops] == ["group", "grouped_gemm", "grouped_gemm", "combine"]
    text = op_text(fused.ops[2])
    assert text.startswith("%y = grouped_gemm %h, %down_codes, %bounds, %down_scales {quantized = Quantized(")


def test_gradients_decode_once_a_product():
    spec = spec_of("int4")
    fused = fuse_experts(build_gradients(spec, ("x", "weights")))
    assert sum(op.attr("quantized") is not None for op in fused.ops) == 3  # both of gate_up, one of down


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
@pytest.mark.parametrize("format", ["int2", "mxfp4", "int4 zeros"])
def test_gradients_at_every_level(format, target):
    spec = spec_of(format, 8, 24, 16, target=target)
    graph, rng = build_gradients(spec, ("x", "weights")), np.random.default_rng(0)
    layer, entries = arguments(spec), T * TOP
    sizes = {"T": T, "rows": entries}
    given = {
        v.name: layer.get(v.name, rng.standard_normal([sizes.get(n, n) for n in v.shape]).astype(np.float32))
        for v in graph.inputs
    }
    place = rng.permutation(entries)
    tokens = np.zeros(entries, np.int32)
    tokens[place] = np.arange(entries) // TOP
    given |= {"tokens": tokens, "bounds": np.array([0, 7, 7, entries], np.int32)}
    given["place"] = place.reshape(T, TOP).astype(np.int32)
    expected = graph_interpret.interpret(graph, given)
    flat = given | {n: given[n].reshape(-1) for n in ("place", "ones")}
    flat |= {name: np.full_like(value, np.nan) for name, value in expected.items()}
    found = kernel_interpret.interpret(compile_gradients(spec, ("x", "weights")), flat)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5 * np.abs(value).max())


# ---- rules ----


def change(**fields):
    def rule(op):
        if op.kind != "dequantize":
            return None
        q = op.attr("format")
        return op.with_attrs(
            format=Quantized(**({n: getattr(q, n) for n in q.__dataclass_fields__} | fields))
        )

    return rule


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (change(planes=(3,), bits=3), "planes of 8, 4 or 2 bits"),
        (change(element="e5m2"), "expected an element"),
        (change(group=3), "shape of %gate_up_scales"),
        (change(columns=25), "shape of %gate_up_codes"),
        (lambda op: Op(op.kind, op.inputs[:1], op.outputs, op.attrs) if op.kind[0] == "d" else None, "2 of"),
    ],
)  # fmt: skip
def test_rules(rule, message):
    with pytest.raises(VerifyError, match=message):
        testing.verify(build_experts(spec_of("int4")).map_ops(rule))


def test_transposed_matrices_have_no_codes():
    with pytest.raises(InputError, match=r"matrices \[E, out, in\]"):
        spec_of("int4", transposed=True)


def test_the_float_of_bits():
    expr = float_of_bits(integer("n") + 1)
    assert parse(to_text(expr), {"n": integer("n")}) == expr
    assert evaluate(expr, {"n": 0x3F800000 - 1}) == 1.0 and float_of_bits(sympify(0x40490FDB)) > 3.14


def test_e4m3_rounds_to_nearest():
    values = e4m3(np.arange(127, dtype=np.uint8))
    assert np.array_equal(round_to(values, "f8e4m3"), values.astype(np.float32))
    assert round_to(1.06, "f8e4m3") == 1.0 and round_to(1.07, "f8e4m3") == 1.125
    assert np.isnan(round_to(500.0, "f8e4m3"))


# ---- Triton ----


@pytest.mark.parametrize(
    ("format", "load", "scales"),
    [
        ("int4", "one", "codes"),
        ("int4", "few", "products"),
        ("nested", "few", "codes"),
        ("mxfp4", "few", "products"),
        ("int8", "few", "sums"),
        ("int4 zeros", "one", "codes"),
        ("int4 zeros", "few", "products"),
        ("int8 zeros", "few", "codes"),
    ],
)
def test_triton_interpreter(format, load, scales):
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    group = 64 if scales == "sums" else 16
    tiling = Tiling(16, 16, 16, wide=2, unroll=2, scales=scales, turned=True)
    spec = spec_of(format, group, 64, 32, target="cuda:sm_90", load=load, tiling=(tiling, tiling))
    given = arguments(spec, 6)
    expected = graph_interpret.interpret(build_experts(spec), given)["o"]
    program = compile_experts(spec)
    values = on_triton(program, for_kernels(given, spec), 6)
    np.testing.assert_allclose(values["o"], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


HANDFUL = [("int4", 16), ("int8", 96), ("mxfp4", 32), ("int2", 8), ("int4 zeros", 16), ("int8 zeros", 96)]


@pytest.mark.parametrize(("cols", "chunks", "unroll"), [(2, 2, 1), (4, 1, 2), (8, 4, 2)])
@pytest.mark.parametrize(("format", "group"), HANDFUL)
def test_a_handful_of_entries_at_every_level(format, group, cols, chunks, unroll):
    """Any tiling: rows of 96 and 80 columns leave rests of turns, of chunks and of tiles of columns."""
    tiling = Tiling(1, cols, 8 * chunks, unroll=unroll, scales="products")
    facts = {"dtype": "bf16", "target": "cuda:sm_90", "load": "one", "tiling": (tiling, tiling)}
    spec = spec_of(format, group, 96, 80, **facts)
    given = arguments(spec, 2)
    expected = graph_interpret.interpret(build_experts(spec), given)["o"]
    found = kernel_interpret.interpret(compile_experts(spec), for_kernels(given, spec))["o"]
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())


def mixtral(format, load, group):
    pair = tuple(stored(format, k, group) for k in (4096, 14336))
    return ExpertsSpec(
        8, 2, 4096, 14336, SWIGLU, dtype="bf16", load=load, target="cuda:sm_90", quantized=pair
    )


@pytest.mark.parametrize(
    ("format", "load", "group"),
    [
        ("int4", "few", 128),
        ("int4 zeros", "few", 128),
        ("mxfp4", "few", 32),
        ("int8", "many", 99999),
        ("fp8", "many", 99999),
    ],
)
def test_products_compile_for_an_h100_without_spills(format, load, group):
    pytest.importorskip("triton")
    from gossamer.codegen.triton import emit
    from gossamer.runtime.gpu import compile_ahead

    for kernel in compile_experts(mixtral(format, load, group)).kernels[2:4]:
        binary = compile_ahead(emit(kernel), "cuda:sm_90")
        assert not binary.spills and not binary.lacks
        # Decoded in registers: what the tensor cores take was never in shared memory.
        assert "wgmma" in binary.assembly and "cp.async" in binary.assembly


@pytest.mark.parametrize("load", ["few", "many"])
@pytest.mark.parametrize(("format", "group"), [("int4", 128), ("int4", 40), ("int2", 128)])
def test_scales_of_every_element_fit_an_h100(format, group, load):
    """No step of the second product is of one group: scales come beside the codes, element by element."""
    pytest.importorskip("triton")
    from gossamer.codegen.triton import emit
    from gossamer.runtime.gpu import compile_ahead

    pair = stored(format, 256, group), stored(format, 384, group)
    spec = ExpertsSpec(8, 2, 256, 384, SWIGLU, dtype="bf16", load=load, target="cuda:sm_90", quantized=pair)
    kernel = compile_experts(spec).kernels[3]
    assert not compile_ahead(emit(kernel), "cuda:sm_90").lacks
    (loop,) = (s for s in kernel.body[-1].body if isinstance(s, For))
    loads = [s for s in loop.body if isinstance(s, Load)]
    bytes_of = {"u8": 1, "bf16": 2, "f32": 4}
    turn = sum(math.prod(kernel.axis(a).size for a in s.axes) * bytes_of[s.dtype] for s in loads)
    assert any(s.tensor.endswith("scales") and len(s.axes) == 2 for s in loads)
    assert turn * dict(kernel.meta)["stages"] <= 232_448  # Triton 3.6 stages all of them, 3.7 some


def test_a_token_compiles_for_an_h100_without_spills():
    pytest.importorskip("triton")
    from gossamer.codegen.triton import emit
    from gossamer.runtime.gpu import compile_ahead

    kernels = [k for f in ("int4", "int4 zeros") for k in compile_experts(mixtral(f, "one", 128)).kernels]
    for kernel in kernels:
        binary = compile_ahead(emit(kernel), "cuda:sm_90")
        assert not binary.spills and "ld.global.v4" in binary.assembly


@pytest.mark.parametrize("target", ["cuda:sm_80", "hip:gfx942"])
def test_products_compile_elsewhere(target):
    pytest.importorskip("triton")
    from gossamer.codegen.triton import emit
    from gossamer.runtime.gpu import compile_ahead

    pair = stored("mxfp4" if target.startswith("hip") else "fp8", 256, 32), stored("int4", 128, 32)
    spec = ExpertsSpec(8, 2, 256, 128, SWIGLU, dtype="f16", load="some", target=target, quantized=pair)
    for kernel in compile_experts(spec).kernels[2:4]:
        assert not compile_ahead(emit(kernel), target).lacks


def test_golden(golden):
    pytest.importorskip("triton")
    from gossamer.codegen.triton import emit

    golden("triton/experts_int4.py", emit(compile_experts(mixtral("int4", "few", 128)).kernels[2]))

"""Axes of which only a part is there: text, rules, meaning, and CPU code with vectors of what is there."""

import math

import numpy as np
import pytest

from gossamer.codegen.tvm import emit
from gossamer.ir.errors import InterpretError, VerifyError
from gossamer.ir.kernel_interpret import interpret
from gossamer.ir.kernel_text import parse, to_text
from gossamer.ir.kernel_verify import verify

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")
from gossamer.runtime.compile import compile_kernels  # noqa: E402
from gossamer.runtime.cpu import build_object  # noqa: E402
from gossamer.runtime.executable import Executable  # noqa: E402

ROWS = 80
HINTS = {"block": 16, "in_place": 1, "prefetch": 1, "shares": 3, "sums": 16, "transpose": 1}


def product(dtype="f32", hints=HINTS, extent=ROWS):
    """Rows of x by the rows of w, a tile of rows after another, the last of which has what is left."""
    meta = ", ".join(f"{name}={value}" for name, value in sorted(hints.items()))
    return parse(f"""
    kernel @rows(
      x: {dtype}[T, 48] in unit 1,
      w: {dtype}[20, 48] in unit 1,
      y: {dtype}[T, 20] out unit 1,
      z: {dtype}[T, 48] out unit 1
    ) grid(t: (T + {extent - 1}) // {extent})
      axes(i: {extent} live here, n: 20, d: 48) lanes i meta({meta}) {{
      let here = min(T - {extent} * t, {extent})
      tile row: i32[i] = min({extent} * t + i, T - 1)
      tile A: {dtype}[i, d] = load x[row, d]
      tile B: {dtype}[n, d] = load w[n, d]
      tile C: {dtype}[i, n] = dot(A, B) over d
      tile most: {dtype}[i] = max abs(A) over d
      C = C / (1 + most)
      store y[{extent} * t + i, n] = C over (i, n) where {extent} * t + i < T
      store z[{extent} * t + i, d] = A over (i, d) where {extent} * t + i < T
    }}
    """)


def run(kernel, x, w):
    function = Executable(compile_kernels([kernel], "cpu"))
    results = []
    for rows in x:
        y, z = torch.full((len(rows), 20), math.nan, dtype=w.dtype), torch.full_like(rows, math.nan)
        function({"x": rows, "w": w, "y": y, "z": z}, threads=2)
        results.append((y, z))
    return results


@pytest.mark.parametrize("dtype, hints", [("f32", HINTS), ("f64", HINTS), ("f32", {})])
def test_every_number_of_rows(dtype, hints):
    kernel = product(dtype, hints)
    kind = {"f32": torch.float32, "f64": torch.float64}[dtype]
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(20, 48, generator=generator, dtype=kind)
    x = [torch.randn(n, 48, generator=generator, dtype=kind) for n in (1, 16, 17, 33, 64, 79, 80, 81, 145)]
    for rows, (y, z) in zip(x, run(kernel, x, w), strict=True):
        expected = interpret(kernel, {"x": rows.numpy(), "w": w.numpy()})
        np.testing.assert_array_equal(z.numpy(), rows.numpy())
        np.testing.assert_allclose(y.numpy(), expected["y"], rtol=1e-4, atol=1e-5)


def test_transposes_and_prefetches_are_there_where_the_kernel_asks():
    asked, plain = emit(product()), emit(product(hints={}))
    assert "T.Shuffle" in asked and "llvm.prefetch" in asked and "d_part" in asked
    assert "T.Shuffle" not in plain and "llvm.prefetch" not in plain and "d_part" not in plain


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_objects_ask_tvm_for_no_memory(dtype):
    assert b"TVMBackendAllocWorkspace" not in build_object(emit(product(dtype)), "cpu")


def test_the_interpreter_has_only_what_is_there():
    text = to_text(product())
    assert "i: 80 live here" in text and parse(text) == product()
    x, w = np.ones((3, 48), np.float32), np.ones((20, 48), np.float32)
    unguarded = text.replace(" where 80 * t + i < T", "")
    assert "where" not in unguarded
    np.testing.assert_array_equal(interpret(parse(unguarded), {"x": x, "w": w})["z"], x)
    with pytest.raises(InterpretError, match="1 to 80 coordinates of axis i; got 83"):
        interpret(parse(text.replace("let here = min(", "let here = 80 + min(")), {"x": x, "w": w})


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "  let here",
            "  tile early: i32[i] = i\n  let here",
            "expected `let here` before what is over it",
        ),
        ("max abs(A) over d", "max abs(C) over n\n    tile s: f32[d] = sum A over i", "no sum along 'i'"),
        ("let here", "let there", "expected `let here` before"),
    ],
)
def test_rules(old, new, message):
    text = to_text(product())
    assert old in text
    with pytest.raises(VerifyError, match=message):
        verify(parse(text.replace(old, new, 1)))

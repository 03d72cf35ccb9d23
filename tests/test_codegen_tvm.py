"""The CPU backend: emitted TVMScript, compiled and run, does what NumPy and the interpreter say."""

import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from gossamer.codegen.tvm import emit
from gossamer.codegen.tvm_layout import pieces
from gossamer.ir.errors import BackendError, InputError, UnsupportedError
from gossamer.ir.evaluate import evaluate
from gossamer.ir.kernel import Kernel
from gossamer.ir.kernel_interpret import intermediates, interpret
from gossamer.ir.kernel_text import parse
from gossamer.ir.mask import Mask
from gossamer.passes.pipeline import compile_spec
from gossamer.passes.spec import AttentionSpec

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")
from gossamer.runtime.compile import compile_kernels  # noqa: E402
from gossamer.runtime.cpu import build_object, load_object  # noqa: E402
from gossamer.runtime.executable import Executable  # noqa: E402
from gossamer.tests import kernels as PROGRAMS  # noqa: E402

FOLDER = Path(__file__).parent
TORCH = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
TORCH |= {"i32": torch.int32, "i64": torch.int64, "bool": torch.bool}


@cache
def compiled(kernel: Kernel):
    return Executable(compile_kernels([kernel], "cpu"))


def call(kernel, arguments, threads=2):
    """Run a kernel on torch tensors and numbers by name."""
    compiled(kernel)(arguments, threads=threads)


def run(kernel, threads=2, **given):
    """The outputs of a kernel, NumPy in and out; outputs start as NaN or 0."""
    arguments = {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in given.items()}
    shapes = {k: v.shape for k, v in interpret(kernel, given).items()}
    for tensor in kernel.tensors:
        if tensor.name in shapes:
            dtype = TORCH[tensor.dtype]
            fill = math.nan if dtype.is_floating_point else 0
            arguments[tensor.name] = torch.full(shapes[tensor.name], fill, dtype=dtype)
    call(kernel, arguments, threads)
    return {name: arguments[name].numpy() for name in shapes}


def agrees(kernel, tolerance=1e-5, **given):
    """The compiled kernel and the interpreter give the same."""
    expected = interpret(kernel, given)
    for name, value in run(kernel, **given).items():
        np.testing.assert_allclose(value, expected[name], rtol=tolerance, atol=tolerance)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# ---- programs ----


@pytest.mark.parametrize("case", PROGRAMS.cases(), ids=lambda c: c.name)
def test_programs_give_what_numpy_gives(case):
    for threads in (1, 2):
        for name, value in run(case.kernel, threads, **case.inputs).items():
            np.testing.assert_allclose(value, case.expected[name], rtol=1e-5, atol=1e-5)


SPANS = """
kernel @spans(x: f32[n, 16] in unit 1, y: f32[16] out unit 0, a: i64, b: i64)
grid(t: 1) axes(d: 16) lanes d {
  tile S: f32[d] = 0
  for u in 0 .. a | a + 2 .. b | b + 1 .. n {
    tile X: f32[d] = load x[u, d]
    S = 2 * S + X
  }
  store y[d] = S over d
}
"""


@pytest.mark.parametrize("a, b", [(3, 7), (0, 9), (5, 4), (0, 0), (9, 12)])
def test_a_loop_runs_over_its_spans_in_order_and_skips_empty_ones(a, b):
    agrees(parse(SPANS), x=normal(12, 16), a=a, b=b)
    assert emit(parse(SPANS)).count("x[u") == 1  # the body stands there once


@pytest.mark.parametrize("lanes", ["lanes i ", "lanes d ", ""])
@pytest.mark.parametrize("d", [1, 20])
def test_reductions_along_and_across_the_lanes(lanes, d):
    kernel = parse(f"""
    kernel @reductions(x: f32[17, {d}] in unit 1, y: f32[7, 17] out unit 1)
    grid(t: 1) axes(i: 17, d: {d}) {lanes}{{
      tile X: f32[i, d] = load x[i, d]
      tile big: f32[i] = max -exp(X) over d
      tile low: f32[i] = min exp(X) over d
      tile all: f32[i] = sum X + 1 over d
      tile one: f32[i] = sum 1 over d
      tile has: bool[i] = any X > 1.5 over d
      tile ever: bool[] = any X > 100 over (i, d)
      tile most: f32[] = max X over (i, d)
      tile G: f32[i] = 0
      if not ever {{ G = 7 }}
      store y[0, i] = big over i
      store y[1, i] = low over i
      store y[2, i] = all over i
      store y[3, i] = one over i
      store y[4, i] = where(has, 1, 0) over i
      store y[5, i] = G over i
      store y[6, i] = most over i
    }}
    """)
    agrees(kernel, x=normal(17, d))


@pytest.mark.parametrize("lanes", ["lanes i ", "lanes j ", ""])
@pytest.mark.parametrize("i, j, x", [(32, 17, 5), (80, 3, 33), (1, 96, 1)])
def test_dots_of_any_extents_with_any_axis_in_the_lanes(lanes, i, j, x):
    kernel = parse(f"""
    kernel @dots(a: f32[{x}, {i}] in unit 1, b: f32[{j}, {x}] in unit 1, c: f32[{i}, {j}] out unit 1)
    grid(t: 1) axes(x: {x}, j: {j}, i: {i}) {lanes}{{
      tile A: f32[x, i] = load a[x, i]
      tile B: f32[j, x] = load b[j, x]
      A = A + 1
      tile C: f32[i, j] = dot(A, B) over x
      C += dot(A, B) over x
      store c[i, j] = C over (i, j)
    }}
    """)
    agrees(kernel, a=normal(x, i), b=normal(j, x, seed=1))


def test_the_register_block_changes_nothing_but_speed():
    text = """
    kernel @block(a: f32[40, 32] in unit 1, b: f32[11, 40] in unit 1, c: f32[32, 11] out unit 1)
    grid(t: 1) axes(x: 40, j: 11, i: 32) lanes i meta(block=BLOCK) {
      tile A: f32[x, i] = load a[x, i]
      tile B: f32[j, x] = load b[j, x]
      tile C: f32[i, j] = dot(A, B) over x
      store c[i, j] = C over (i, j)
    }
    """
    a, b = normal(40, 32), normal(11, 40)
    results = [run(parse(text.replace("BLOCK", str(n))), a=a, b=b)["c"] for n in (1, 4, 8)]
    assert all(np.array_equal(r, results[0]) for r in results)


# ---- expressions ----

INTEGERS = ["x // 7", "x % 7", "x // 8", "x % 8", "x // d", "x % d", "min(x, 3) * max(x, -4)", "abs(x - 2)"]
INTEGERS += ["bitand(x, 12)", "bitxor(x, d)", "bitor(x, 3)", "shl(1, bitand(x, 15))", "shr(x, 2)"]
INTEGERS += ["where(not (x > 3 and d < 4), x, -x)", "(x + 40) // 3 * 5 - x", "i // 5 % 3 - i"]
INTEGERS += [
    "x * x * x * x * 12345 % 1009",
    "bitxor(x * 40503, 1234567) * 22987 % 65521",
    "x ** 3 + n * 100000 % 7",
]
INTEGERS += ["bits_of_float(x / 3)", "bits_of_float(-inf)"]
INTEGERS += ["cast(i8, 100 * x)", "shift[bitand(x, 7)] - x"]


def test_integers_as_the_interpreter_has_them():
    stores = "\n".join(f"store y[{n}, i] = {e} over i" for n, e in enumerate(INTEGERS))
    kernel = parse(f"""
    kernel @integers(a: i32[64] in unit 0, b: i32[64] in unit 0, shift: i64[8] in unit 0,
      y: i64[{len(INTEGERS)}, 64] out unit 1, n: i64)
    grid(t: 1) axes(i: 64) lanes i {{
      tile x: i32[i] = load a[i]
      tile d: i32[i] = load b[i]
      {stores}
    }}
    """)
    a = np.arange(-32, 32, dtype=np.int32)
    b = np.where(a % 3 == 0, -5, 3).astype(np.int32)
    given = {"a": a, "b": b, "shift": np.arange(8) + 2**40, "n": 12345}
    expected, got = interpret(kernel, given)["y"], run(kernel, **given)["y"]
    for n, text in enumerate(INTEGERS):
        np.testing.assert_array_equal(got[n], expected[n], text)


FLOATS = ["tanh(x)", "sigmoid(x)", "exp2(x)", "exp(x)", "log2(abs(x) + 1)", "log(abs(x))", "sin(x)", "cos(x)"]
FLOATS += [
    "sqrt(abs(x))",
    "1 / (2 + x ** 2)",
    "x ** 3",
    "pow(abs(x), 0.3)",
    "pow(x, 5)",
    "pow(2 + x ** 2, -2)",
]
FLOATS += ["trunc(x)", "floor(x)", "erf(x)", "tan(x / 8)", "max(x, 0.1) - min(x, i)", "where(x > 1, 0, x)"]
FLOATS += [
    "cast(f16, x)",
    "cast(bf16, x)",
    "i / 3",
    "-x - 1",
    "x * (1 + tanh(x * (1 + x ** 2)))",
    "cast(i32, x)",
]


@pytest.mark.parametrize("dtype, tolerance", [("f32", 1e-6), ("f64", 1e-14)])
def test_functions_of_floats(dtype, tolerance):
    stores = "\n".join(f"store y[{n}, i] = {e} over i" for n, e in enumerate(FLOATS))
    kernel = parse(f"""
    kernel @floats(a: {dtype}[64] in unit 0, y: {dtype}[{len(FLOATS)}, 64] out unit 1)
    grid(t: 1) axes(i: 64) lanes i {{
      tile x: {dtype}[i] = load a[i]
      {stores}
    }}
    """)
    x = np.linspace(-6, 6, 64)
    x[:8] = [1, 1e-4, -1e-4, 0.01, 0.2, 0.26, -0.3, -1]
    x = x.astype(np.float32 if dtype == "f32" else np.float64)
    expected, got = interpret(kernel, {"a": x})["y"], run(kernel, a=x)["y"]
    for n, text in enumerate(FLOATS):
        np.testing.assert_allclose(got[n], expected[n], 3 * tolerance, tolerance / 10, err_msg=text)


CORNERS = [0.0, -1.0, math.inf, -math.inf, math.nan, 1e30, -1e30, -1022.0, -127.0, -200.0, 128.0, 1e-40]


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_the_ends_of_functions(dtype):
    names = ("exp2", "exp", "log2", "log", "sigmoid", "tanh")
    stores = "\n".join(f"store y[{n}, i] = {f}(x) over i" for n, f in enumerate(names))
    kernel = parse(f"""
    kernel @ends(a: {dtype}[{len(CORNERS)}] in unit 0, y: {dtype}[{len(names)}, {len(CORNERS)}] out unit 1)
    grid(t: 1) axes(i: {len(CORNERS)}) lanes i {{
      tile x: {dtype}[i] = load a[i]
      {stores}
    }}
    """)
    x = np.array(CORNERS, np.float32 if dtype == "f32" else np.float64)
    got = dict(zip(names, run(kernel, a=x)["y"], strict=True))
    smallest = np.finfo(x.dtype).tiny
    with np.errstate(all="ignore"):
        expected = {"exp2": np.exp2(x), "exp": np.exp(x), "log2": np.log2(x), "log": np.log(x)}
        expected |= {"sigmoid": 1 / (1 + np.exp(-x)), "tanh": np.tanh(x)}
    for name, value in expected.items():
        if name != "tanh":
            value[np.abs(value) < smallest] = 0  # no result is denormal
        np.testing.assert_allclose(got[name], value, 1e-6, err_msg=name)
    assert got["exp2"][x <= -1022 if dtype == "f64" else x <= -127].max() <= smallest


def test_nan_stays_in_maxima_and_minima():
    kernel = parse("""
    kernel @nans(x: f32[16, 8] in unit 1, y: f32[6, 16] out unit 1) grid(t: 1) axes(i: 16, d: 8) lanes i {
      tile X: f32[i, d] = load x[i, d]
      tile a: f32[i] = load x[i, 0]
      tile b: f32[i] = load x[i, 1]
      tile high: f32[i] = max X over d
      tile low: f32[i] = min X over d
      store y[0, i] = high over i
      store y[1, i] = low over i
      store y[2, i] = max(a, b) over i
      store y[3, i] = min(b, a) over i
      store y[4, i] = max(a, 0) over i
      store y[5, i] = exp2(a) over i
    }
    """)
    x = normal(16, 8)
    x[[2, 5, 7], [0, 1, 6]] = math.nan
    expected, got = interpret(kernel, {"x": x})["y"], run(kernel, x=x)["y"]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))


def test_what_cpus_lack_is_named():
    kernel = parse(
        "kernel @f(x: f32[4] out unit 0) grid(t: 1) axes(i: 4)"
        "{\n tile y: f32[i] = 1\n store x[i] = y over i\n}"
    )
    strange = (replace(kernel.body[0], dtype="f8"), *kernel.body[1:])
    with pytest.raises(UnsupportedError, match=r"tile y: no dtype 'f8' on CPUs; use f64, f32"):
        emit(replace(kernel, body=strange))


# ---- memory ----

COPY = """
kernel @copy(x: {dtype}[n, m] in{unit}, y: {out}[n, m] out{unit})
grid(t: (n + 15) // 16, u: (m + 23) // 24) axes(i: 16, j: 24) lanes {lanes} {{
  tile X: {tile}[i, j] = load x[16 * t + i, 24 * u + j] where 16 * t + i < n and 24 * u + j < m else -1
  store y[16 * t + i, 24 * u + j] = 2 * X over (i, j) where 16 * t + i < n and 24 * u + j < m
}}
"""


@pytest.mark.parametrize("lanes", ["i", "j"])
@pytest.mark.parametrize("unit", [" unit 1", " unit 0", ""])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_views_of_any_stride_and_alignment(dtype, unit, lanes):
    tile = "f32" if dtype == "bf16" else dtype
    kernel = parse(COPY.format(dtype=dtype, out=dtype, tile=tile, unit=unit, lanes=lanes))
    x = torch.randn(43, 61).to(TORCH[dtype])
    y = torch.full((43, 61), math.nan, dtype=TORCH[dtype])
    if unit == " unit 0":
        x, y = x.T.contiguous().T, y.T.contiguous().T
    # Off by one element, so that nothing is aligned, and with room between the rows.
    for source, target in [(x, y), (x[1:, 1:-3], y[1:, 1:-3])]:
        target.fill_(math.nan)
        call(kernel, {"x": source, "y": target})
        assert torch.equal(target, 2 * source)
    if not unit:
        y.fill_(math.nan)
        call(kernel, {"x": x[::2, ::3], "y": y[::2, ::3]})
        assert torch.equal(y[::2, ::3], 2 * x[::2, ::3])
        assert y[1::2].isnan().all()


@pytest.mark.parametrize("out", ["f16", "bf16"])
def test_stores_round_to_nearest_even(out):
    text = COPY.format(dtype="f32", out=out, tile="f32", unit=" unit 1", lanes="i")
    x = torch.randn(64, 50) * 10.0 ** torch.linspace(-6, 4, 64)[:, None]
    x[0, :6] = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1 + 2**-9, 1 + 3 * 2**-9])
    y = torch.zeros(64, 50, dtype=TORCH[out])
    call(parse(text), {"x": x, "y": y})
    torch.testing.assert_close(y, (2 * x).to(TORCH[out]), rtol=0, atol=0, equal_nan=True)


def test_half_tiles_hold_rounded_values():
    kernel = parse("""
    kernel @half(x: f32[32] in unit 0, y: f32[32] out unit 0) grid(t: 1) axes(i: 32) lanes i {
      tile H: f16[i] = load x[i]
      tile W: f16[i] = H * 3
      store y[i] = W over i
    }
    """)
    x = normal(32)
    expected = (x.astype(np.float16).astype(np.float32) * 3).astype(np.float16)
    np.testing.assert_array_equal(run(kernel, x=x)["y"], expected)


def test_gathered_rows_and_an_index_from_a_captured_tensor():
    kernel = parse("""
    kernel @gather(x: f32[n, D] in, rows: i64[m] in unit 0, shift: i32[m] in unit 0, y: f32[m, D] out unit 1)
    grid(t: (m + 15) // 16) axes(i: 16, d: 10) lanes d {
      tile row: i64[i] = load rows[16 * t + i] where 16 * t + i < m else 0
      tile X: f32[i, d] = load x[row, d] where row >= 0 and d < D else -1
      tile by: i32[i] = load shift[16 * t + i] where 16 * t + i < m else 0
      store y[16 * t + i, d] = X + by * d + rows[0] over (i, d) where 16 * t + i < m
    }
    """)
    rng = np.random.default_rng(0)
    rows, shift = rng.integers(-1, 7, 37), rng.integers(-5, 5, 37, dtype=np.int32)
    x = normal(7, 10)
    expected = np.where(rows[:, None] >= 0, x[rows], -1) + shift[:, None] * np.arange(10) + rows[0]
    np.testing.assert_allclose(run(kernel, x=x, rows=rows, shift=shift)["y"], expected, 1e-5, 1e-5)


# ---- attention ----

S = 77
MASKS = {
    "mask() { true }": (),
    "mask() { k <= q }": (),
    "mask(p0, p1) { abs(q - k) <= p0 or q < p1 or k < p1 }": (7, 3),
    "mask(p0) { (q - k) % 4 == 0 and abs(q - k) <= 4 * p0 }": (3,),
    "mask(p0) { abs(q - k) < p0 or (q - k) % 16 == 0 }": (5,),
    "mask() { abs(q // 13 - k // 13) <= 2 and abs(q % 13 - k % 13) <= 3 }": (),
    "mask(p0) { bitand(q, k) == 0 or bitxor(q * 40503, p0) * 22987 % 65521 % 8 == k // 8 }": (99,),
    "mask(; c0: i64[1]) { (c0[k] == c0[q]) }": (),
}
WINDOW = "mask(p0) { abs(q - k) <= p0 }"


@cache
def attention(text, dtype, size, v_size):
    spec = AttentionSpec(Mask.parse(text), dtype=dtype, qk_size=size, v_size=v_size, return_lse=True)
    return spec, compile_spec(spec)


def check(text, params=(), *, dtype="f32", heads=(2, 2), lengths=(S, S), size=16, v_size=None, views=False):
    """Against float64, within what the dtype leaves of it. Rows without a key: zeros, and -inf."""
    (hq, hk), (n, m), v_size = heads, lengths, v_size or size
    spec, program = attention(text, dtype, size, v_size)
    rng = torch.Generator().manual_seed(0)

    def make(h, length, last):
        shape = (1, length, h, last) if views else (1, h, length, last)
        x = torch.randn(shape, generator=rng).to(TORCH[dtype])
        return x.transpose(1, 2) if views else x

    q, k, v = make(hq, n, size), make(hk, m, size), make(hk, m, v_size)
    o = torch.full((1, hq, n, v_size), math.nan, dtype=TORCH[dtype])
    lse = torch.full((1, hq, n), math.nan, dtype=torch.float64 if dtype == "f64" else torch.float32)
    given = dict(zip(spec.mask.params, params, strict=True))
    given |= {c.name: np.arange(S) // 20 + 2**33 for c in spec.mask.captures}
    arguments = {n: torch.as_tensor(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    arguments |= {"q": q, "k": k, "v": v, "o": o, "lse": lse, "scale": 0.3}
    arguments |= {name: torch.from_numpy(x) for name, x in intermediates(program, arguments).items()}
    for kernel in program.kernels:
        call(kernel, arguments)

    indices = {"q": np.arange(n)[:, None], "k": np.arange(m)[None], "q_len": n, "kv_len": m, "b": 0, "h": 0}
    attends = np.broadcast_to(evaluate(spec.mask.predicate, indices | given), (n, m))
    k64, v64 = (x.double().repeat_interleave(hq // hk, 1) for x in (k, v))
    scores = (q.double() @ k64.mT * 0.3).masked_fill(~torch.from_numpy(attends.copy()), -math.inf)
    expected = scores.softmax(-1).nan_to_num(0) @ v64
    tolerance = {"f64": 1e-13, "f32": 2e-6, "f16": 1e-3, "bf16": 8e-3}[dtype]
    torch.testing.assert_close(o.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", MASKS)
def test_every_kind_of_mask(text):
    check(text, MASKS[text])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f64"])
def test_grouped_heads_odd_lengths_and_empty_rows(dtype):
    for heads, lengths in [((4, 2), (61, 45)), ((3, 1), (1, 70)), ((2, 2), (70, 1))]:
        check(WINDOW, (5,), dtype=dtype, heads=heads, lengths=lengths)


@pytest.mark.parametrize("size, v_size", [(80, 96), (17, 1)])
def test_head_sizes_of_any_kind(size, v_size):
    check(WINDOW, (9,), size=size, v_size=v_size, lengths=(45, 45), views=True)


# ---- objects ----


def undefined_symbols(data, folder):
    path = folder / "kernel.o"
    path.write_bytes(data)
    listed = subprocess.run(["nm", "--undefined-only", path], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in listed.stdout.splitlines()}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f64"])
def test_objects_need_libc_alone(dtype, tmp_path):
    _, program = attention(WINDOW, dtype, 16, 16)
    data = build_object(emit(program.kernels[0]), "cpu")
    assert undefined_symbols(data, tmp_path) <= {"memset", "memcpy"}


def test_objects_for_another_cpu():
    assert build_object(emit(parse(SPANS)), "cpu:znver4") != build_object(emit(parse(SPANS)), "cpu:x86-64-v2")


# ---- the text ----


@pytest.mark.parametrize("case", PROGRAMS.cases(), ids=lambda c: c.name)
def test_golden_programs(case, golden):
    golden(f"tvm/{case.name}.py", emit(case.kernel))


def test_golden_spans(golden):
    golden("tvm/spans.py", emit(parse(SPANS)))


def test_text_is_the_same_in_another_process():
    program = FOLDER / "programs" / "window_attention.kir"
    code = (
        "import sys; from pathlib import Path; from gossamer.codegen.tvm import emit;"
        "from gossamer.ir.kernel_text import parse;"
        "sys.stdout.write(emit(parse(Path(sys.argv[1]).read_text())))"
    )
    command = [sys.executable, "-c", code, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=FOLDER.parent.parent)
    assert done.stdout == emit(PROGRAMS.load("window_attention"))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"x": torch.zeros(12, 16, dtype=torch.float64)}, r"spans: x: expected elements of f32; got torch.f"),
        ({"x": torch.zeros(12, 15)}, r"spans: x.shape\[1\]: expected 16; got 15"),
        ({"y": torch.zeros(2, 8)}, r"argument y: expected 1 dimensions \(16\); got \(2, 8\)"),
        ({"x": torch.zeros(16, 12).T}, r"spans: x.stride\(1\): expected 1; got 12. Pass x.contiguous\(\)"),
        ({"z": torch.zeros(11)}, r"spans: z.shape\[0\]: expected 12, as n of the tensors before it; got 11"),
        ({"x": torch.view_as_complex(torch.zeros(12, 16, 2)).conj().imag}, "got a lazy negative"),
        ({"y": torch.frombuffer(bytearray(68), dtype=torch.float32, offset=1, count=16)}, "4 bytes divide"),
    ],
)
def test_tensors_that_the_kernel_is_not_for_are_refused_at_the_call(bad, message):
    kernel = parse(SPANS.replace("y: f32[16]", "z: f32[n] in unit 0, y: f32[16]"))
    good = {"x": torch.zeros(12, 16), "y": torch.zeros(16), "z": torch.zeros(12), "a": 1, "b": 2}
    call(kernel, good)
    with pytest.raises(InputError, match=message):
        call(kernel, good | bad)


@pytest.mark.parametrize("extent", [1, 2, 7, 16, 17, 40, 64, 80, 96, 100, 256])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bool"])
def test_pieces_cover_an_axis_once_in_powers_of_two(extent, dtype):
    cover = [
        piece.start + n * piece.width + lane
        for piece in pieces(extent, dtype)
        for n in range(piece.count)
        for lane in range(piece.width)
    ]
    assert cover == list(range(extent))
    assert all(piece.width & (piece.width - 1) == 0 for piece in pieces(extent, dtype))


def test_kernels_that_programs_have_in_common_are_built_once():
    shared, other = parse(SPANS), parse(SPANS.replace("@spans", "@others"))
    compile_kernels([shared], "cpu")
    built = build_object.cache_info()
    compile_kernels([shared, other], "cpu")
    assert build_object.cache_info()[:2] == (built.hits + 1, built.misses + 1)


def test_broken_objects_and_sources_are_backend_errors():
    data = build_object(emit(parse(SPANS)), "cpu")
    for broken, entry in ((b"no object", "spans"), (data[:300], "spans"), (data, "missing")):
        with pytest.raises(
            BackendError, match=f"cannot load kernel '{entry}' from an object of {len(broken)} b"
        ):
            load_object(broken, entry)
    with pytest.raises(BackendError, match="TVM refused a generated kernel for cpu"):
        build_object("nonsense(", "cpu")

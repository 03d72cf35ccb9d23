"""Triton: emitted text runs on the interpreter as the NumPy oracle says, and compiles for every target."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gossamer.codegen.triton import emit, signature
from gossamer.ir.errors import BackendError, InputError, UnsupportedError
from gossamer.ir.evaluate import evaluate
from gossamer.ir.kernel_interpret import intermediates, interpret
from gossamer.ir.kernel_text import parse
from gossamer.ir.mask import Mask
from gossamer.passes.pipeline import compile_spec
from gossamer.passes.spec import AttentionSpec

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from gossamer.runtime.gpu import TARGETS, compile_ahead, load, target_of  # noqa: E402
from gossamer.runtime.triton_interpreter import run_interpreted  # noqa: E402
from gossamer.tests import kernels as PROGRAMS  # noqa: E402

FOLDER = Path(__file__).parent


def run(kernel, **given):
    """The outputs of a kernel on Triton's interpreter, NumPy in and out; outputs are made as NaN or 0."""
    arguments = {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in given.items()}
    outputs = {k: v.shape for k, v in interpret(kernel, given).items()}
    dtypes = {t.name: t.dtype for t in kernel.tensors}
    for name, shape in outputs.items():
        dtype = {"f32": torch.float32, "f64": torch.float64, "i32": torch.int32}[dtypes[name]]
        arguments[name] = torch.full(shape, math.nan if dtype.is_floating_point else 0, dtype=dtype)
    run_interpreted(emit(kernel), arguments)
    return {name: arguments[name].numpy() for name in outputs}


def agrees(kernel, tolerance=1e-5, **given):
    """Triton's interpreter and the Kernel IR's own give the same."""
    expected = interpret(kernel, given)
    for name, value in run(kernel, **given).items():
        np.testing.assert_allclose(value, expected[name], rtol=tolerance, atol=tolerance)


def attention(text, dtype="f32", size=16, v_size=None, target="cuda:sm_90", **more):
    """The kernels of an attention under the mask of some text, with the default schedule."""
    spec = AttentionSpec(
        mask=Mask.parse(text),
        dtype=dtype,
        qk_size=size,
        v_size=v_size or size,
        return_lse=True,
        target=target,
        **more,
    )
    return spec, compile_spec(spec)


# ---- programs that are no attention, from text ----


@pytest.mark.parametrize("case", PROGRAMS.cases(), ids=lambda c: c.name)
def test_programs_give_what_numpy_gives(case):
    for name, value in run(case.kernel, **case.inputs).items():
        np.testing.assert_allclose(value, case.expected[name], rtol=1e-4, atol=1e-4)


SPANS = """
kernel @spans(x: f32[n, 16] in unit 1, y: f32[16] out unit 0, a: i64, b: i64)
grid(t: 1) axes(d: 16) {
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
    x = np.random.default_rng(a).standard_normal((12, 16), dtype=np.float32)
    expected = np.zeros(16, np.float32)
    for u in [*range(a), *range(a + 2, b), *range(b + 1, 12)]:
        expected = 2 * expected + x[u]
    np.testing.assert_allclose(run(parse(SPANS), x=x, a=a, b=b)["y"], expected, rtol=1e-5)


def test_gathered_rows_and_an_index_from_a_captured_tensor():
    kernel = parse(
        """
    kernel @gather(x: f32[n, D] in, rows: i64[m] in unit 0, shift: i32[m] in unit 0, y: f32[m, D] out unit 1)
    grid(t: (m + 15) // 16) axes(i: 16, d: 10 of 16) {
      tile row: i64[i] = load rows[16 * t + i] where 16 * t + i < m else 0
      tile X: f32[i, d] = load x[row, d] where row >= 0 and d < D else -1
      store y[16 * t + i, d] = X + shift[16 * t + i] * d over (i, d) where 16 * t + i < m
    }
    """
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 10), dtype=np.float32)
    rows = rng.integers(-1, 7, 37)
    shift = rng.integers(-5, 5, 37, dtype=np.int32)
    expected = np.where(rows[:, None] >= 0, x[rows], -1) + shift[:, None] * np.arange(10)
    arguments = {"x": x.T.copy().T, "rows": rows, "shift": shift}  # x: rows are the contiguous dimension
    y = torch.full((37, 10), math.nan)
    tensors = {k: torch.from_numpy(v) for k, v in arguments.items()}
    run_interpreted(emit(kernel), tensors | {"y": y})
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-6)


INTEGERS = ["x // 7", "x % 7", "x // 8", "x % 8", "x // d", "x % d", "min(x, 3) * max(x, -4)", "abs(x - 2)"]
INTEGERS += ["bitand(x, 12)", "bitxor(x, d)", "where(not (x > 3 and d < 4), x, -x)", "(x + 40) // 3 * 5 - x"]
INTEGERS += ["bits_of_float(x / 3)", "bits_of_float(exp(x))"]


def test_integers_divide_downwards_whatever_their_sign():
    stores = "\n".join(f"store y[{n}, i] = {e} over i" for n, e in enumerate(INTEGERS))
    kernel = parse(f"""
    kernel @integers(a: i32[64] in unit 0, b: i32[64] in unit 0, y: i32[{len(INTEGERS)}, 64] out unit 1)
    grid(t: 1) axes(i: 64) {{
      tile x: i32[i] = load a[i]
      tile d: i32[i] = load b[i]
      {stores}
    }}
    """)
    a = np.arange(-32, 32, dtype=np.int32)
    b = np.where(a % 3 == 0, -5, 3).astype(np.int32)
    agrees(kernel, a=a, b=b)


FLOATS = [
    "tanh(x)",
    "sigmoid(x)",
    "exp2(x)",
    "exp(x)",
    "log2(abs(x) + 1)",
    "log(abs(x) + 1)",
    "sin(x)",
    "cos(x)",
]
FLOATS += [
    "sqrt(abs(x))",
    "1 / (2 + x ** 2)",
    "x ** 3",
    "pow(abs(x), 0.3)",
    "pow(x, 5)",
    "trunc(x)",
    "floor(x)",
]
FLOATS += [
    "erf(x)",
    "tan(x / 8)",
    "max(x, 0.1) - min(x, i)",
    "where(x == -inf, 0, x)",
    "cast(f16, x)",
    "i / 3",
]


@pytest.mark.parametrize("dtype, tolerance", [("f32", 3e-6), ("f64", 1e-12)])
def test_functions_of_floats(dtype, tolerance):
    stores = "\n".join(f"store y[{n}, i] = {e} over i" for n, e in enumerate(FLOATS))
    kernel = parse(f"""
    kernel @floats(a: {dtype}[64] in unit 0, y: {dtype}[{len(FLOATS)}, 64] out unit 1)
    grid(t: 1) axes(i: 64) {{
      tile x: {dtype}[i] = load a[i]
      {stores}
    }}
    """)
    x = np.linspace(-6, 6, 64)
    x[:8] = [0, 1e-4, -1e-4, 0.01, 0.2, 0.26, -0.3, 1]
    agrees(kernel, tolerance, a=x.astype(np.float32 if dtype == "f32" else np.float64))


def test_reductions_do_not_see_the_padding():
    kernel = parse(
        """
    kernel @padding(x: f32[16, 20] in unit 1, y: f32[6, 16] out unit 1) grid(t: 1) axes(i: 16, d: 20 of 32) {
      tile X: f32[i, d] = load x[i, d] where true else -1
      tile Z: f32[i, d] = X + 1
      tile big: f32[i] = max -exp(X) over d
      tile low: f32[i] = min exp(X) over d
      tile all: f32[i] = sum Z over d
      tile one: f32[i] = sum 1 over d
      tile has: bool[i] = any X > 1.5 over d
      tile ever: bool[] = any X > 100 over (i, d)
      tile G: f32[i] = 0
      if not ever { G = 7 }
      store y[0, i] = big over i
      store y[1, i] = low over i
      store y[2, i] = all over i
      store y[3, i] = one over i
      store y[4, i] = where(has, 1, 0) over i
      store y[5, i] = G over i
    }
    """
    )
    agrees(kernel, x=np.random.default_rng(0).standard_normal((16, 20), dtype=np.float32))


@pytest.mark.parametrize("over", ["x: 8", "x: 16", "x: 24 of 32"])
def test_dots_short_and_padded_with_operands_in_any_layout(over):
    extent = int(re.search(r"\d+", over).group())
    kernel = parse(f"""
    kernel @dots(a: f32[{extent}, 16] in unit 1, b: f32[16, {extent}] in unit 1, c: f32[16, 16] out unit 1)
    grid(t: 1) axes({over}, j: 16, i: 16) {{
      tile A: f32[x, i] = load a[x, i]
      tile B: f32[j, x] = load b[j, x]
      A = A + 1
      B = exp2(B)
      tile C: f32[i, j] = dot(A, B) over x
      C += dot(A, B) over x
      store c[i, j] = C over (i, j)
    }}
    """)
    rng = np.random.default_rng(0)
    shapes = {"a": (extent, 16), "b": (16, extent)}
    agrees(kernel, **{k: rng.standard_normal(s, dtype=np.float32) for k, s in shapes.items()})


# ---- attention, from masks ----

S = 77
MASKS = {
    "mask() { true }": (),
    "mask() { k <= q }": (),
    "mask(p0, p1) { q - p0 <= k and k <= q + p1 }": (9, 3),
    "mask(p0, p1) { abs(q - k) <= p0 or q < p1 or k < p1 }": (7, 3),
    "mask(p0) { (q - k) % 4 == 0 and abs(q - k) <= 4 * p0 }": (3,),
    "mask(p0) { abs(q - k) < p0 or (q - k) % 16 == 0 }": (5,),
    "mask() { k <= q and (q // 16 == k // 16 or k % 16 >= 12) }": (),
    "mask() { abs(q // 13 - k // 13) <= 2 and abs(q % 13 - k % 13) <= 3 }": (),
    "mask() { bitand(q, k) == 0 }": (),
    "mask(; c0: i32[1]) { (c0[k] == c0[q]) }": (),
}


def check(text, params=(), *, dtype="f32", heads=(2, 2), lengths=(S, S), size=16, v_size=None, views=False):
    """Against float64, within what f32 and f16 leave of it. Rows without a key: zeros, and -inf."""
    rng = torch.Generator().manual_seed(0)
    torch_dtype = {"f32": torch.float32, "f16": torch.float16, "f64": torch.float64}[dtype]
    aligned = all(n * torch_dtype.itemsize % 16 == 0 for n in (size, v_size or size))
    spec, program = attention(text, dtype, size, v_size, aligned=aligned)
    (hq, hk), (n, m), v_size = heads, lengths, v_size or size

    def make(h, length, last):
        shape = (1, length, h, last) if views else (1, h, length, last)
        x = torch.randn(shape, generator=rng).to(torch_dtype)
        return x.transpose(1, 2) if views else x

    q, k, v = make(hq, n, size), make(hk, m, size), make(hk, m, v_size)
    o = torch.full((1, hq, n, v_size), math.nan, dtype=torch_dtype)
    lse = torch.full((1, hq, n), math.nan, dtype=torch.float64 if dtype == "f64" else torch.float32)
    given = dict(zip(spec.mask.params, params, strict=True))
    given |= {c.name: np.arange(S, dtype=np.int32) // 20 for c in spec.mask.captures}
    arguments = {
        name: torch.as_tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in given.items()
    }
    arguments |= {"q": q, "k": k, "v": v, "o": o, "lse": lse, "scale": 0.3}
    arguments |= {name: torch.from_numpy(x) for name, x in intermediates(program, arguments).items()}
    for kernel in program.kernels:
        run_interpreted(emit(kernel), {a.name: arguments[a.name] for a in kernel.args})

    indices = {"q": np.arange(n)[:, None], "k": np.arange(m)[None], "q_len": n, "kv_len": m, "b": 0, "h": 0}
    attends = np.broadcast_to(evaluate(spec.mask.predicate, indices | given), (n, m))
    k64, v64 = (x.double().repeat_interleave(hq // hk, 1) for x in (k, v))
    scores = (q.double() @ k64.mT * 0.3).masked_fill(~torch.from_numpy(attends.copy()), -math.inf)
    expected = scores.softmax(-1).nan_to_num(0) @ v64
    tolerance = {"f64": 1e-12, "f32": 2e-6, "f16": 3e-3}[dtype]
    torch.testing.assert_close(o.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", MASKS)
def test_every_kind_of_mask(text):
    check(text, MASKS[text])


WINDOW = "mask(p0) { abs(q - k) <= p0 }"


@pytest.mark.parametrize("dtype", ["f32", "f16", "f64"])
@pytest.mark.parametrize("heads, lengths", [((4, 2), (61, 45)), ((3, 1), (1, 70)), ((2, 2), (70, 1))])
def test_grouped_heads_odd_lengths_and_empty_rows(dtype, heads, lengths):
    check(WINDOW, (5,), dtype=dtype, heads=heads, lengths=lengths)


@pytest.mark.parametrize("size, v_size", [(80, 80), (24, 40), (20, 16)])
def test_head_sizes_that_are_padded(size, v_size):
    check(WINDOW, (9,), dtype="f16", size=size, v_size=v_size, lengths=(45, 45))


def test_strided_views():
    check(WINDOW, (9,), views=True, lengths=(45, 61))


# ---- the text ----


@pytest.mark.parametrize("case", PROGRAMS.cases(), ids=lambda c: c.name)
def test_golden_programs(case, golden):
    golden(f"triton/{case.name}.py", emit(case.kernel))


def test_golden_spans(golden):
    golden("triton/spans.py", emit(parse(SPANS)))


def test_text_is_the_same_in_another_process():
    program = FOLDER / "programs" / "window_attention.kir"
    code = (
        "import sys; from pathlib import Path; from gossamer.codegen.triton import emit;"
        "from gossamer.ir.kernel_text import parse;"
        f"sys.stdout.write(emit(parse(Path({str(program)!r}).read_text())))"
    )
    command = [sys.executable, "-c", code]
    other = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert other.stdout == emit(parse(program.read_text()))


def test_the_signature_is_the_function_s():
    kernel = PROGRAMS.load("window_attention")
    arguments = signature(kernel)
    function = load(emit(kernel)).kernel
    assert [a.name for a in arguments] == function.arg_names
    assert [a.type for a in arguments] == [p.annotation_type for p in function.params]
    assert ("s_q_2", "i64", "q.stride(2)") in [(a.name, a.type, a.source) for a in arguments]
    assert not any(a.name == "s_q_3" for a in arguments)  # a unit dimension has no stride


def test_names_that_would_hide_ours_are_changed():
    kernel = parse("""
    kernel @names(x: f32[tl, s_x] in unit 1, y: f32[tl, s_x] out unit 1, pid: i32)
    grid(bind: tl) axes(d: 16) {
      tile X: f32[d] = load x[bind, d] where d < s_x else 0
      store y[bind, d] = X + pid over d where d < s_x
    }
    """)
    agrees(kernel, x=np.ones((3, 5), np.float32), pid=4)


def test_sizes_are_powers_of_two():
    kernel = parse("kernel @odd(y: f32[24] out unit 0) grid(t: 1) axes(d: 24) { store y[d] = 1 over d }")
    with pytest.raises(BackendError, match=r"axis d has size 24 for extent 24.*pad the axis"):
        emit(kernel)


def test_a_tile_that_spans_too_much_memory_is_refused():
    source = emit(
        parse("""
    kernel @far(x: f32[n, m] in unit 1, y: f32[n, m] out unit 1) grid(t: 1) axes(i: 16, d: 16) {
      tile X: f32[i, d] = load x[i, d]
      store y[i, d] = X over (i, d)
    }
    """)
    )
    x = torch.empty_strided((16, 16), (1 << 28, 1), device="meta")
    with pytest.raises(OverflowError, match="far: a stride is so large"):
        load(source).bind(x, x)


def test_the_interpreter_refuses_bf16():
    with pytest.raises(UnsupportedError, match="bf16"):
        run_interpreted("", {"x": torch.zeros(1, dtype=torch.bfloat16)})


def test_the_interpreter_says_what_went_wrong():
    with pytest.raises(BackendError, match="NameError"):
        run_interpreted("nonsense", {})


# ---- ahead of time ----


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_a_gpu(target):
    _, program = attention(WINDOW, "f16", 64, target=target)
    binary = compile_ahead(emit(program.kernels[0]), target)
    assert binary.code[:4] == b"\x7fELF"
    assert binary.name in binary.assembly
    assert not binary.lacks and binary.spills == 0 and binary.registers > 0 and binary.warps == 4


@pytest.mark.parametrize("name", PROGRAMS.PROGRAMS)
def test_programs_compile(name):
    assert compile_ahead(emit(PROGRAMS.load(name)), "cuda:sm_90").spills == 0


SIZES = [("bf16", 64), ("f16", 80), ("bf16", 128), ("bf16", 256), ("f32", 64)]


@pytest.mark.parametrize("dtype, size", SIZES)
def test_default_schedules_do_not_spill_on_hopper(dtype, size):
    _, program = attention(WINDOW, dtype, size)
    for kernel in program.kernels:
        binary = compile_ahead(emit(kernel), "cuda:sm_90a")
        assert binary.spills == 0 and not binary.lacks


@pytest.mark.slow
@pytest.mark.parametrize("text", MASKS)
def test_no_mask_spills_on_hopper(text):
    _, program = attention(text, "bf16", 64)
    for kernel in program.kernels:
        assert compile_ahead(emit(kernel), "cuda:sm_90").spills == 0


@pytest.mark.parametrize("size", [64, 72, 80])
def test_alignment_is_what_makes_loads_asynchronous(size):
    for aligned in (True, False):
        program = attention(WINDOW, "f16", size, target="cuda:sm_80", aligned=aligned)[1]
        source = emit(program.kernels[0])
        assert load(source).DIVISORS.get("p_q", 1) == (16 if aligned else 1)
        assert load(source).DIVISORS.get("s_k_2", 1) == (8 if aligned else 1)  # elements of two bytes
        assert ("cp.async.cg" in compile_ahead(source, "cuda:sm_80").assembly) == aligned


@pytest.mark.parametrize(
    "size, dtype, align", [(64, "f16", 16), (36, "f16", 8), (33, "bf16", 2), (5, "f32", 4)]
)
def test_outputs_are_as_aligned_as_their_rows_are_long(size, dtype, align):
    kernel = attention(WINDOW, dtype, size)[1].kernels[0]
    assert {t.name: t.align for t in kernel.tensors}["o"] == align


@pytest.mark.parametrize(
    "capability, target", [((8, 0), "sm_80"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90")]
)
def test_a_capability_has_a_target(capability, target):
    assert target_of(*capability) == f"cuda:{target}"


@pytest.mark.parametrize("capability", [(7, 5), (9, 2), (11, 0)])
def test_a_capability_without_a_target_is_refused(capability):
    with pytest.raises(UnsupportedError, match=r"expected one of 8\.0, .*12\.0"):
        target_of(*capability)


def test_unknown_targets_are_named():
    with pytest.raises(InputError, match=r"expected one of cuda:sm_80.*got 'cuda:sm_12'"):
        compile_ahead("", "cuda:sm_12")


def test_products_of_f64_tiles_are_not_for_amd():
    source = emit(attention(WINDOW, "f64")[1].kernels[0])
    with pytest.raises(UnsupportedError, match=r"f64 tiles for hip:gfx942; use f32"):
        compile_ahead(source, "hip:gfx942")


ROTATING = """
kernel @rotating(x: f32[n, 16] in unit 1 align 16, order: i32[n] in unit 0, y: f32[n, 16] out unit 1)
grid(t: 1) axes(d: 16) meta(descriptors=0) {
  tile following: i32[] = order[0]
  for u in 0 .. n {
    tile at: i32[] = following
    tile ahead: i32[] = load order[min(u + 1, n - 1)]
    following = ahead
    tile row: i32[] = at
    tile X: f32[d] = load x[row, d]
    store y[u, d] = X over d
  }
}
"""


def test_addresses_are_made_of_what_a_name_was_when_it_was_read():
    x = np.random.default_rng(3).standard_normal((7, 16), dtype=np.float32)
    order = np.random.default_rng(3).permutation(7).astype(np.int32)
    np.testing.assert_array_equal(run(parse(ROTATING), x=x, order=order)["y"], x[order])

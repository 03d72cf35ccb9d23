"""Tile programs: text and back, every rule of the verifier, the interpreter against NumPy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
from hypothesis import given, settings

from gossamer import testing
from gossamer.ir import expr as E
from gossamer.ir import kernel as K
from gossamer.ir.errors import InputError, InterpretError, ParseError, VerifyError
from gossamer.ir.kernel_interpret import interpret
from gossamer.ir.kernel_text import parse, parse_program, to_text
from gossamer.ir.kernel_verify import verify

HERE = Path(__file__).parent
from gossamer.tests import kernels as FIXTURES  # noqa: E402

PROGRAMS = sorted((HERE / "programs").glob("*.kir"))

BASE = """\
# every kind of statement
kernel @base(
  x: f32[n, m] in unit 1,
  w: f16[m] in,
  ids: i32[n] in,
  y: f32[n, m] out unit 1,
  z: f32[n] inout,
  p0: i64,
  scale: f32
) grid(t: (n + 3) // 4) axes(i: 4, j: 6 of 8, e: 4) lanes i meta(stages=2, warps=4) {
  let first = 4 * t
  let odd = t % 2 == 1
  tile row: i32[i] = first + i
  tile X: f32[i, j] = load x[row, j] where j < m and row < n else -inf
  tile W: f32[j] = load w[min(j, m - 1)]
  tile D: f32[e, j] = 0.5
  tile S: f32[i, e] = dot(X, D) over j
  tile peak: f32[i] = max X over j
  tile some: bool[] = any X == -inf over (i, j)
  tile id: i32[i] = load ids[min(row, n - 1)]
  for u in 0 .. min(2, t + 1) | 5 .. p0 {
    S = S * scale + u
    if odd and some {
      peak = max(id, peak)
    }
    S += dot(X, D) over j precision tf32
  }
  store y[row, j] = where(X == -inf, 0, W * X) over (i, j) where j < m and row < n
  store z[row] = max(peak, ids[0]) over i where row < n
}
"""


def test_base_reads_and_spells() -> None:
    kernel = parse(BASE)
    assert to_text(kernel) == BASE
    verify(kernel)
    assert kernel.comment == ("every kind of statement",)
    assert kernel.body[-1].guard == (E.integer("row") < E.integer("n"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_programs_read_and_spell(path: Path) -> None:
    kernel = parse(path.read_text())
    assert to_text(kernel) == path.read_text()
    assert parse(to_text(kernel)) == kernel
    verify(kernel)


def test_program_of_kernels_reads_and_spells() -> None:
    state = K.Tensor("z", "f32", ("n",), "inout")
    program = K.Program(
        (parse(BASE), replace(parse(BASE), name="next")), (state,), "mask() { q < k }\n", (("n > 5", "it's"),)
    )
    assert parse_program(to_text(program)) == program
    verify(program)


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("let first", "set first", "line 11, column 3", "expected a statement or the name of a tile"),
        ("4 * t\n", "4 * tt\n", "line 11, column 19", "unknown name 'tt'"),
        ("lanes i", "lane i", "line 10, column 53", "expected '{'"),
        ("(X, D)", "(X D)", "line 17, column 29", "expected ','; got 'D) over j'"),
        ("f16[m]", "f17[m]", "line 4, column 6", "expected a dtype"),
        ("let odd", "let over", "line 12, column 7", "'over' is a word of the language"),
        (" else -inf", "", "line 14, column 61", "expected 'else'"),
        ("precision tf32\n  }", "precision tf32", "line 30, column 1", "expected a statement or '}'"),
        ("kernel @base", "@base", "line 2, column 1", "expected 'kernel'"),
        ("over i where", "over where", "line 29", "'where' is a word of the language"),
    ],
)
def test_malformed_text_says_where(old: str, new: str, place: str, message: str) -> None:
    with pytest.raises(ParseError) as error:
        parse(BASE.replace(old, new, 1))
    assert place in str(error.value) and message in str(error.value)


def test_text_after_the_kernel_is_an_error() -> None:
    with pytest.raises(ParseError, match="expected the end of the text; got 'kernel"):
        parse(BASE + BASE)


EDITS = [
    ("argument", "scale: f32", "scale: f16", "dtype of scale: expected one of i64, i32, f32, f64"),
    ("argument", "unit 1,\n  w", "unit 2,\n  w", "unit of x: expected a dimension below 2; got 2"),
    ("argument", "f32[n, m] in", "f32[n, 0] in", "shape of x: expected extents of at least 1; got 0"),
    ("name", "scale: f32", "p0: f32, scale: f32", "'p0' is taken"),
    ("name", "w: f16[m]", "w: f16[ids]", "'ids' is taken"),
    ("name", "axes(i: 4, j", "axes(t: 4, i: 4, j", "'t' is taken"),
    ("name", "let odd = t % 2 == 1", "let odd = t % 2 == 1\n  let first = t", "'first' is taken"),
    ("name", "  for u in", "  for u in 0 .. 1 {\n    let u = 1\n  }\n  for u in", "'u' is taken"),
    ("axis", "j: 6 of 8", "j: 6 of 4", "expected 1 <= extent <= size; got extent 6, size 4"),
    ("axis", "lanes i", "lanes k", "lanes: expected an axis"),
    ("meta", "stages=2, warps=4", "warps=4, stages=2", "expected different names, sorted"),
    ("kind", "let first = 4 * t", "let first = scale * t", "expected an integer or a condition"),
    ("kind", "0 .. min(2", "0.5 .. min(2", "expected a value of kind 'int'; got 'float': 0.5"),
    ("kind", "5 .. p0", "5 .. inf", "expected a value of kind 'int'; got 'float': inf"),
    ("kind", "if odd and some", "if t", "expected a value of kind 'bool'; got 'int': t"),
    ("kind", "i32[i] = first + i", "i32[i] = scale", "expected a value of kind 'int'; got 'float': scale"),
    ("kind", "load w[min(j, m - 1)]", "load w[scale]", "expected a value of kind 'int'"),
    ("kind", "ids[0]) over", "ids[scale]) over", "expected integer indices; got scale in ids[scale]"),
    ("axes", "f32[j] = load w[min(j, m - 1)]", "f32[j] = load w[i]", "got the axis 'i' over (i)"),
    ("axes", "tile D: f32[e, j] = 0.5", "tile D: f32[e, j] = X", "got the tile 'X' over (i, j)"),
    ("scalar", "let odd = t", "let odd = i", "expected scalars only; got the axis 'i'"),
    ("scalar", "if odd and some", "if X == 0 and odd", "expected scalars only; got the tile 'X'"),
    ("scalar", "5 .. p0", "5 .. id", "expected scalars only; got the tile 'id'"),
    ("scope", "max(peak, ids[0])", "max(peak, y[0, 0])", "expected a tensor argument to read; got 'y'"),
    ("declare", "    S = S * scale + u", "    tile S: f32[i, e] = u", "'S' is declared already"),
    ("declare", "tile D: f32[e, j]", "tile D: f32[e, e]", "expected different axes of the kernel"),
    ("load", "= load w[min(j, m - 1)]", "= load w[j, j]", "w has 1 dimensions; got 2 indices"),
    ("load", "load w[min", "load v[min", "expected a tensor argument (x, w, ids, y, z); got 'v'"),
    ("load", "load w[min(j, m - 1)]", "load y[0, min(j, m - 1)]", "got 'y' of role out"),
    ("load", "ids[0]) over", "x[0]) over", "x has 2 dimensions; got 1 in x[0]"),
    ("store", "store z[row]", "store ids[row]", "expected a tensor of role out or inout; got 'ids'"),
    ("store", "store z[row]", "store z[row, 0]", "z has 1 dimensions; got 2 indices"),
    ("store", "store y[row, j]", "store y[row, 0]", "the index does not depend on j"),
    ("dot", "f32[i, e] = dot(X, D) over j", "f32[e, j] = dot(D, X) over i", "another axis than the lanes"),
    ("dot", "tile S: f32[i, e] = dot(X, D)", "tile S: f32[e, i] = dot(X, D)", "expected 'X' over {e, j}"),
    ("dot", "tile S: f32[i, e]", "tile S: f32[i, j]", "expected a result over two axes other than 'j'"),
    ("dot", "precision tf32", "precision fp8", "precision: expected one of ieee, tf32"),
    ("dot", "tile D: f32[e, j]", "tile D: f64[e, j]", "expected operands of one dtype; got f32 and f64"),
    ("dot", "tile S: f32[i, e]", "tile S: i32[i, e]", "expected a result of kind 'float'; got i32"),
    ("dot", "tile S: f32[i, e] = dot", "tile S: f32[i, e] += dot", "to be declared before it accumulates"),
    ("dot", "= dot(X, D) over", "= dot(X, p0) over", "expected a tile in scope; got 'p0'"),
    ("reduce", "max X over j", "max X over (i, j)", "expected different axes of the kernel"),
    (
        "reduce",
        "over (i, j)\n  tile id",
        "over (i, j)\n  tile no: f32[] = any X == 0 over (i, j)\n  tile id",
        "expected bool for 'any'",
    ),
    ("reduce", "over (i, j)\n", "over ()\n", "expected at least one axis to reduce over"),
]


@pytest.mark.parametrize(
    ("rule", "old", "new", "message"), EDITS, ids=[f"{r}-{n[:24]}" for r, _, n, _ in EDITS]
)
def test_rejects(rule: str, old: str, new: str, message: str) -> None:
    assert old in BASE
    with pytest.raises(VerifyError) as error:
        verify(parse(BASE.replace(old, new, 1)))
    assert str(error.value).startswith(f"{rule}: ") and message in str(error.value)
    assert "of kernel @base" in str(error.value) or rule in ("argument", "name", "axis", "meta", "kind")


def _kernel(*body: K.Stmt, **changes: object) -> K.Kernel:
    return replace(parse(BASE), body=body, **changes)


S, i = E.real("S"), E.integer("i")
UNREADABLE = [
    ("scope", _kernel(K.Let("a", E.integer("nowhere"))), "'nowhere' is not declared here"),
    ("kind", _kernel(K.Let("a", sympy.floor(E.real("p0")) + E.integer("t"))), "expected an integer or"),
    ("kind", _kernel(K.If(E.boolean("t"), ())), "'t' is a scalar of dtype i64; got a bool symbol"),
    ("kind", _kernel(K.Let("a", E.readf(E.real("ids"), sympy.Integer(0)) > 1)), "ids holds i32; got readf"),
    ("assign", _kernel(K.Compute("S", "f32", ("i",), S, declares=False)), "'S' is not declared here"),
    (
        "assign",
        _kernel(K.Compute("S", "f32", ("i",), i, declares=False)),
        "expected a declared tile 'S': f32[i]",
    ),
    ("loop", _kernel(K.For("u", (), ())), "expected at least one span"),
    ("reduce", _kernel(K.Reduce("S", "f32", ("i",), "prod", i, ("j",))), "operation: expected one of sum"),
    ("declare", _kernel(K.Compute("S", "f8", ("i",), i)), "dtype of S: expected one of"),
    ("name", _kernel(K.Let("for", E.integer("t"))), "a word of the language"),
    ("meta", _kernel(comment=("two\nlines",)), "comment lines without line ends"),
    ("argument", _kernel(args=(K.Tensor("x", "f32", (1,), "read"),)), "role of x: expected one of in, out"),
]


@pytest.mark.parametrize(
    ("rule", "kernel", "message"), UNREADABLE, ids=[f"{r}-{m[:20]}" for r, _, m in UNREADABLE]
)
def test_rejects_what_text_cannot_say(rule: str, kernel: K.Kernel, message: str) -> None:
    with pytest.raises(VerifyError) as error:
        verify(kernel)
    assert message in str(error.value)


def test_names_end_with_their_block() -> None:
    text = BASE.replace("    S = S * scale + u\n", "    tile T: f32[i] = u\n").replace(
        "max(peak, ids[0])", "T"
    )
    with pytest.raises(ParseError, match="unknown name 'T'"):
        parse(text)


def test_same_name_in_two_blocks_has_one_type() -> None:
    again = BASE.replace(
        "  store y",
        "  if odd {\n    tile T: f32[i] = 0\n  }\n  if odd {\n    tile T: f64[i] = 0\n  }\n  store y",
    )
    with pytest.raises(VerifyError, match="'T' has another dtype or other axes elsewhere"):
        verify(parse(again))
    verify(parse(again.replace("f64", "f32")))


def test_program_rules() -> None:
    base = parse(BASE)
    with pytest.raises(VerifyError, match="kernels of different names"):
        verify(K.Program((base, base)))
    with pytest.raises(VerifyError, match="kernels disagree on 'z'"):
        other = parse(BASE.replace("z: f32[n]", "z: f64[n]").replace("@base", "@other"))
        verify(K.Program((base, other)))
    with pytest.raises(VerifyError, match="the intermediate 'acc' is an argument of no kernel"):
        verify(K.Program((base,), (K.Tensor("acc", "f32", ("n",)),)))


# The interpreter ------------------------------------------------------------------------------------


def _arguments(n: int = 7, m: int = 5) -> dict[str, object]:
    rng = np.random.default_rng(1)
    return {
        "x": rng.standard_normal((n, m), dtype=np.float32),
        "w": rng.standard_normal(m).astype(np.float16),
        "ids": np.arange(n, dtype=np.int32),
        "z": np.zeros(n, np.float32),
        "p0": 6,
        "scale": 0.5,
    }


def test_interprets_base() -> None:
    given = _arguments()
    kept = {name: np.copy(value) for name, value in given.items()}
    out = interpret(parse(BASE), given)
    np.testing.assert_allclose(out["y"], given["x"] * given["w"].astype(np.float32), rtol=1e-6)
    # Rows 4 .. 6 are an odd cell with a row beyond n, so -inf occurs and `some and odd` holds there.
    peak = given["x"].max(1)
    expected = np.where(np.arange(7) >= 4, np.maximum(peak, np.arange(7)), peak)
    np.testing.assert_allclose(out["z"], np.maximum(expected, 0), rtol=1e-6)
    for name, value in kept.items():
        np.testing.assert_array_equal(given[name], value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "where j < m and row < n else",
            "where row < n else",
            "into the 5 entries of dimension 1 of x; got 5",
        ),
        ("over i where row < n", "over i", "into the 7 entries of dimension 0 of z; got 7 at i = 3"),
        ("min(j, m - 1)", "j", "into the 5 entries of dimension 0 of w; got 5 at j = 5"),
        ("ids[0]", "ids[p0 + 1]", "ids[p0 + 1]: dimension 0 is read at 7 .. 7"),
        ("5 .. p0", "1 .. p0", "spans overlap: 0 .. 2 and 1 .. 6"),
        ("store z[row]", "store z[i]", "grid cells 0 and 1 both write an element of z"),
        ("store z[row]", "store z[row // 2]", "two coordinates of one tile write the same element of z"),
        ("let odd = t % 2", "let odd = t // (t - 1)", "integer division by zero in t // (t - 1)"),
    ],
)
def test_interpreter_finds(old: str, new: str, message: str) -> None:
    with pytest.raises(InterpretError) as error:
        interpret(parse(BASE.replace(old, new, 1)), _arguments())
    assert message in str(error.value) and "of kernel @base" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "expected an array for 'x'; got none"),
        ({"p0": None}, "expected a number for 'p0'; got none"),
        ({"extra": 1}, "expected arguments ids, p0, scale"),
        ({"z": np.zeros(6)}, "expected shape (7); got (6,)"),
        ({"w": np.zeros((5, 1))}, "expected shape (5); got (5, 1)"),
    ],
)
def test_interpreter_checks_arguments(change: dict[str, object], message: str) -> None:
    arguments = {k: v for k, v in (_arguments() | change).items() if v is not None}
    with pytest.raises(InputError) as error:
        interpret(parse(BASE), arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("case", FIXTURES.cases(), ids=lambda c: c.name)
def test_programs_mean_what_numpy_says(case: Any) -> None:
    out = interpret(case.kernel, case.inputs)
    assert list(out) == list(case.expected)
    for name, expected in case.expected.items():
        np.testing.assert_allclose(out[name], expected, rtol=2e-4, atol=2e-5)


def test_padded_coordinates_are_never_seen() -> None:
    padded = BASE.replace("j: 6 of 8", "j: 6 of 64")
    for name, value in interpret(parse(BASE), _arguments()).items():
        np.testing.assert_array_equal(interpret(parse(padded), _arguments())[name], value)


@pytest.mark.parametrize(("dtype", "value"), [("f64", 1 + 2**-30), ("f32", 1.0), ("f16", 1.0), ("bf16", 1.0)])
def test_tiles_round_to_their_dtype(dtype: str, value: float) -> None:
    text = f"""
        kernel @r(y: f64[2] out) grid() axes(i: 2) {{
          tile X: {dtype}[i] = {1 + 2**-30!r}
          store y[i] = X over i
        }}"""
    assert interpret(parse(text), {})["y"].tolist() == [value, value]


def test_programs_pass_state_through_intermediates() -> None:
    header = "grid() axes(i: 4) {\n  store"
    one = f"kernel @one(x: f32[n] in, s: f32[n] inout) {header} s[i] = 2 * x[i] over i\n}}"
    two = f"kernel @two(s: f32[n] inout, y: f32[n] out) {header} y[i] = s[i] + 1 over i\n}}"
    program = K.Program((parse(one), parse(two)), (K.Tensor("s", "f32", ("n",), "inout"),))
    out = interpret(program, {"x": np.arange(4.0), "y": np.zeros(4)})
    assert list(out) == ["y"]
    assert out["y"].tolist() == [1, 3, 5, 7]


@settings(max_examples=15, deadline=None)
@given(testing.kernels())
def test_drawn_kernels_verify_come_back_and_run(kernel: K.Kernel) -> None:
    verify(kernel)
    assert parse(to_text(kernel)) == kernel
    arguments = testing.random_arguments(kernel, lengths={"n": 6, "m": 11})
    z = interpret(kernel, arguments)["z"]
    assert z.shape == (6, 3) and np.isfinite(z).all()

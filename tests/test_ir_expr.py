"""Expressions: text and back, order and parentheses, folding, kinds, NumPy meaning."""

import os
import subprocess
import sys
from math import erf

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer import testing
from gossamer.ir import expr as E
from gossamer.ir.errors import InterpretError, ParseError, UnsupportedError
from gossamer.ir.evaluate import evaluate, round_to

INTEGERS = {n: E.integer(n) for n in ("q", "k", "b", "h", "t", "i", "p0", "q_len")}
FLOATS = {n: E.real(n) for n in ("x", "y", "S")}
NAMES = {**INTEGERS, **FLOATS, "ok": E.boolean("ok"), "c0": E.integer("c0"), "t0": E.real("t0")}
SPELLINGS = [
    "q - k",
    "32 * t + i - 1",
    "min(32 * t + i, q_len - 1)",
    "(q_len + 31) // 32",
    "-(q // 3)",
    "-(k % 4) - q // 3",
    "(-q) // 3",
    "q - k % 4",
    "2 * (q // 3) + k",
    "x / S / y",
    "3 * x / 4",
    "-S * (x + y)",
    "-x ** 2",
    "1 / sqrt(x)",
    "x - 1.5 * y",
    "x == -inf",
    "where(exp2(x) == inf, 0, x)",
    "max(x, y) != -inf",
    "(ok or q < 5) and k <= q",
    "not ok",
    "not ((k < 5 and q < k) or ok)",
    "where(q - k <= 4, x, -inf)",
    "c0[q, k + 1]",
    "t0[q - k]",
    "cast(f16, x)",
    "xor(ok, q < k)",
    "exp(1) * x",
    "5 < q",
    "bitand(q, k) == 0",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_reads_and_spells(text: str) -> None:
    assert E.to_text(E.parse(text, NAMES)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q +", "not an expression: 'q +'"),
        ("q + zz", "line 1, column 5: unknown name 'zz'; known: S, b"),
        ("spam(q)", "unknown function 'spam'; known: abs, bitand"),
        ("zz[q]", "unknown name 'zz'"),
        ("[q for q in k]", "expressions cannot contain"),
        ("q.real", "expressions cannot contain 'q.real'"),
        ("__import__('os')", "expressions cannot contain \"'os'\""),
        ("'q'", "expressions cannot contain"),
        ("(q < k) + 1", "expected a number; got the condition 'q < k'"),
        ("q and ok", "expected a condition; got the number 'q'"),
        ("9 ** 9 ** 9", "expected an exponent within 64 of 0"),
        ("pow(9, 900000)", "expected an exponent within 64 of 0"),
        ("where(ok, q)", "where(ok, q)"),
        ("(" * 400 + "q" + ")" * 400, "not an expression"),
    ],
)
def test_rejects(text: str, message: str) -> None:
    with pytest.raises(ParseError) as error:
        E.parse(text, NAMES)
    assert message in str(error.value)


def test_positions_count_from_where_the_text_stands() -> None:
    with pytest.raises(ParseError) as error:
        E.parse("  q + zz", NAMES, line=7, column=10)
    assert (error.value.line, error.value.column) == (7, 16)


def test_what_has_no_text_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="no text for gamma"):
        E.to_text(sympy.gamma(FLOATS["x"]))


integers = testing.expressions("int", tuple(INTEGERS))


@settings(max_examples=150, deadline=None)
@given(integers | testing.expressions("float", ("q", "k"), tuple(FLOATS)) | testing.expressions("bool"))
def test_text_comes_back_as_the_same_expression(expr: sympy.Basic) -> None:
    text = E.to_text(expr)
    assert E.parse(text, NAMES) == expr
    assert E.to_text(E.parse(text, NAMES)) == text


@settings(max_examples=60, deadline=None)
@given(integers, st.integers(-20, 20), st.integers(-20, 20))
def test_evaluation_agrees_with_constant_folding(expr: sympy.Basic, q: int, k: int) -> None:
    values = {n: v for v, n in enumerate(INTEGERS)} | {"q": q, "k": k}
    folded = expr.xreplace({INTEGERS[n]: sympy.Integer(v) for n, v in values.items()})
    assert evaluate(expr, values) == np.int64(int(folded))


ORDER_PROGRAM = """
import sympy
from gossamer.ir import expr as E
q, k, p, r = (E.integer(n) for n in ("q", "k", "p0", "r"))
x, y = E.real("x"), E.real("y")
print(E.to_text(E.any_of([q - k <= p, sympy.Eq(E.floormod(q - k, 4), 0), (k < 5) & (q > r)])))
print(E.to_text(E.all_of([E.read(E.integer("c0"), q) < k, q > 2, k <= q, sympy.Ne(q, r)])))
print(E.to_text(3 * q * k - 2 * r + p * p - E.minimum(q, k) * E.floordiv(r, 2)))
print(E.to_text(sympy.exp(x - y) * sympy.tanh(y / x) / (x + y) + sympy.sqrt(x) / y))
"""


def test_text_is_the_same_in_every_process() -> None:
    texts = set()
    for seed in ("0", "1", "2"):
        command = [sys.executable, "-c", ORDER_PROGRAM]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        texts.add(done.stdout)
    assert len(texts) == 1


def test_constants_fold_and_infinities_vanish() -> None:
    q = INTEGERS["q"]
    assert E.floordiv(sympy.Integer(-7), sympy.Integer(2)) == -4
    assert E.floormod(sympy.Integer(-7), sympy.Integer(4)) == 1
    assert E.minimum(q, E.INF) == q and E.maximum(-E.INF, q) == q
    assert E.where(sympy.true, q, 0) == q
    assert E.shl(sympy.Integer(1), sympy.Integer(10)) == 1024
    assert E.shl(sympy.Integer(1), sympy.Integer(10**9)).args == (1, 10**9)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("q ** 2", "int"),
        ("q / 2", "float"),
        ("1 / q", "float"),
        ("where(ok, q, 1)", "int"),
        ("where(ok, q, x)", "float"),
        ("t0[q]", "float"),
        ("c0[q]", "int"),
        ("q < k", "bool"),
        ("ok", "bool"),
        ("not ok", "bool"),
        ("max(x, q)", "float"),
        ("cast(i32, x)", "int"),
        ("cast(bf16, q)", "float"),
        ("-inf", "float"),
    ],
)
def test_kinds(text: str, kind: str) -> None:
    assert E.kind(E.parse(text, NAMES)) == kind


def test_evaluates_in_the_float_type_asked_for() -> None:
    x = np.linspace(0.1, 3, 7, dtype=np.float32)
    values = {"x": x, "q": np.arange(7), "y": 2.5}
    got = evaluate(
        E.parse("where(q < 3, exp(-x) / 3, sigmoid(y * x) + erf(x) + q)", NAMES), values, floats=np.float32
    )
    assert got.dtype == np.float32
    wide = x.astype(float)
    want = np.where(
        np.arange(7) < 3,
        np.exp(-wide) / 3,
        1 / (1 + np.exp(-2.5 * wide)) + [erf(v) for v in wide] + np.arange(7),
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q // k", "integer division by zero in q // k"),
        ("c0[q]", r"c0\[q\]: dimension 0 is read at 0 .. 4; it has 3 entries"),
        ("c0[q, k]", "expected 2 dimensions; got shape"),
        ("h + 1", "no value for 'h'; given: c0, k, q"),
    ],
)
def test_evaluation_refuses(text: str, message: str) -> None:
    values = {"q": np.arange(5), "k": np.array([1, 0, 1, 1, 1]), "c0": np.arange(3)}
    with pytest.raises(InterpretError, match=message):
        evaluate(E.parse(text, NAMES), values)


def test_bf16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.inf, -np.inf, np.nan, -0.0], np.float32)
    want = np.array([1.0, 1.0, 1 + 2**-6, np.inf, np.inf, -np.inf, np.nan, -0.0], np.float32)
    np.testing.assert_array_equal(round_to(values, "bf16"), want)

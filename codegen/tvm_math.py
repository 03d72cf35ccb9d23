"""Real functions in vector arithmetic: what LLVM would turn into one libm call a lane.

Each function writes its steps through `let` and returns the text of its value. NaN comes out as
NaN. Coefficients: Chebyshev interpolation at the precision named beside each table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Let = Callable[[str, str], str]  # (stem, text) -> the name bound to the text


@dataclass(frozen=True)
class _Float:
    """A binary float: exponent bias, bits of the fraction, and polynomials fitted to it."""

    integer: str
    bias: int
    fraction: int
    exp2: tuple[float, ...]
    exp: tuple[float, ...]
    log: tuple[float, ...]
    ln2_high: float  # few enough bits that n * ln2_high is exact
    ln2_low: float
    root_half: int  # the bits of sqrt(1/2)
    tiny: float  # the smallest normal number


_FLOATS = {
    "float32": _Float(
        integer="int32",
        bias=127,
        fraction=23,
        # (2**x - 1) / x on |x| <= 1/2: 2**x to 4e-9.
        exp2=(
            0.6931471880262288,
            0.24022650760568126,
            0.05550357114219078,
            0.009618082557277852,
            0.0013390863364671234,
            0.0001545316294512069,
        ),
        # (e**x - 1) / x on |x| <= ln(2)/2: e**x to 4e-9.
        exp=(
            1.00000001077157,
            0.5000000013457727,
            0.16666505260408124,
            0.04166646500604005,
            0.008369148490856347,
            0.0013933641031986701,
        ),
        # (ln((1+s)/(1-s)) / s - 2) / s**2 in powers of s**2, s <= tan(pi/8)**2: the logarithm to 4e-11.
        log=(0.6666666655449709, 0.40000121839806124, 0.28550820815960665, 0.23330467216303835),
        ln2_high=0.693115234375,
        ln2_low=3.1946184945309415e-05,
        root_half=0x3F3504F3,
        tiny=2.0**-126,
    ),
    "float64": _Float(
        integer="int64",
        bias=1023,
        fraction=52,
        # The same to 7e-18,
        exp2=(
            0.6931471805599453,
            0.24022650695910097,
            0.0555041086648216,
            0.009618129107606888,
            0.0013333558146416936,
            0.0001540353044173605,
            1.525273382983612e-05,
            1.321544258792169e-06,
            1.0178062445845774e-07,
            7.072585949269223e-09,
            4.4549605981865186e-10,
        ),
        # to 7e-18,
        exp=(
            1.0,
            0.5000000000000006,
            0.1666666666666667,
            0.04166666666657314,
            0.008333333333326141,
            0.0013888888932488599,
            0.00019841269874800493,
            2.4801504346997686e-05,
            2.7557255425746435e-06,
            2.7626357241447223e-07,
            2.510520637395701e-08,
        ),
        # and to 1e-21.
        log=(
            0.6666666666666666,
            0.3999999999999999,
            0.2857142857143536,
            0.22222222219858734,
            0.18181818593656762,
            0.15384575132330097,
            0.13335638669839822,
            0.1168812364286311,
            0.11881997202961458,
        ),
        ln2_high=0.6931471803691238,
        ln2_low=1.9082149292705877e-10,
        root_half=0x3FE6A09E667F3BCD,
        tiny=2.0**-1022,
    ),
}

_LARGEST_F32 = 2.0**128 - 2.0**104
LN2 = 0.6931471805599453
LOG2E = 1.4426950408889634


def literal(value: float | str, dtype: str) -> str:
    """A constant of a float dtype; 'inf', '-inf' and 'nan' as strings."""
    if isinstance(value, str):
        return f'T.{dtype}("{value}")'
    if abs(value) > _LARGEST_F32:  # T.float64 refuses them
        return f'T.FloatImm("{dtype}", {value!r})'
    return f"T.{dtype}({value!r})"


def _horner(coefficients: tuple[float, ...], x: str, dtype: str) -> str:
    text = literal(coefficients[-1], dtype)
    for c in reversed(coefficients[:-1]):
        text = f"({text} * {x} + {literal(c, dtype)})"
    return text


def _clamp(x: str, low: float, high: float, dtype: str, let: Let) -> str:
    """x within [low, high]. NaN stays: min and max take the second operand unless the first is better."""
    return let("x", f"T.min({literal(float(high), dtype)}, T.max({literal(float(low), dtype)}, {x}))")


def _round(x: str, dtype: str, let: Let) -> tuple[str, str]:
    """The nearest integer n of x as a float, and 2**n: zero at -bias, infinity at bias + 1.

    Adding 1.5 * 2**fraction leaves n in the low bits, where a shift turns it into an exponent. The sum
    goes through an integer, because TVM would simplify x + c - c."""
    f = _FLOATS[dtype]
    magic = literal(1.5 * 2**f.fraction + f.bias, dtype)
    bits = let("b", f'T.reinterpret("{f.integer}", {x} + {magic})')
    n = let("n", f'T.reinterpret("{dtype}", {bits}) - {magic}')
    return n, let("p", f'T.reinterpret("{dtype}", T.shift_left({bits}, {_shift(f)}))')


def _shift(f: _Float) -> str:
    return f"T.{f.integer}({f.fraction})"


def exp2(x: str, dtype: str, let: Let) -> str:
    """2**x within about one ulp: exactly zero below -bias + 1/2, infinite from bias + 1/2.

    No result is denormal: arithmetic on denormals is many times slower."""
    f = _FLOATS[dtype]
    x = _clamp(x, -f.bias, f.bias + 1, dtype, let)
    n, scale = _round(x, dtype, let)
    r = let("r", f"{x} - {n}")
    return f"{_horner((1.0, *f.exp2), r, dtype)} * {scale}"


def exp(x: str, dtype: str, let: Let) -> str:
    """e**x within about one ulp, with the range of `exp2`."""
    f = _FLOATS[dtype]
    r, scale = _exp_parts(x, dtype, let)
    return f"{_horner((1.0, *f.exp), r, dtype)} * {scale}"


def _exp_parts(x: str, dtype: str, let: Let) -> tuple[str, str]:
    """r and 2**n with e**x = 2**n * e**r, |r| <= ln(2)/2."""
    f = _FLOATS[dtype]
    x = _clamp(x, -f.bias * LN2, (f.bias + 1) * LN2, dtype, let)
    n, scale = _round(f"{x} * {literal(LOG2E, dtype)}", dtype, let)
    high, low = literal(f.ln2_high, dtype), literal(f.ln2_low, dtype)
    return let("r", f"{x} - {n} * {high} - {n} * {low}"), scale


def sigmoid(x: str, dtype: str, let: Let) -> str:
    """1 / (1 + e**-x)."""
    one = literal(1.0, dtype)
    e = let("e", exp(let("x", f"{literal(0.0, dtype)} - {x}"), dtype, let))
    return f"{one} / ({one} + {e})"


def tanh(x: str, dtype: str, let: Let) -> str:
    """tanh from e**(2|x|) - 1, which keeps the relative accuracy near zero."""
    f = _FLOATS[dtype]
    one, two, zero = literal(1.0, dtype), literal(2.0, dtype), literal(0.0, dtype)
    x = let("x", x)
    most = literal(float(f.fraction), dtype)  # tanh is 1 long before
    y = let("y", f"T.abs({x}) * {two}")
    r, scale = _exp_parts(let("y", f"T.Select({y} > {most} * {two}, {most} * {two}, {y})"), dtype, let)
    e = let("e", f"{_horner(f.exp, r, dtype)} * {r} * {scale} + ({scale} - {one})")
    t = let("t", f"{e} / ({e} + {two})")
    return f"T.Select({x} < {zero}, {zero} - {t}, {t})"


def log(x: str, dtype: str, let: Let) -> str:
    """The natural logarithm within about one ulp; -inf at zero, NaN below."""
    f = _FLOATS[dtype]
    x, e, s, tail = _log_parts(x, dtype, let)
    high, low = literal(f.ln2_high, dtype), literal(f.ln2_low, dtype)
    return _log_ends(x, f"{e} * {high} + ({tail} + {e} * {low} + {s} * {literal(2.0, dtype)})", dtype, let)


def log2(x: str, dtype: str, let: Let) -> str:
    """The binary logarithm within about two ulps; -inf at zero, NaN below."""
    x, e, s, tail = _log_parts(x, dtype, let)
    mantissa = f"({tail} + {s} * {literal(2.0, dtype)}) * {literal(LOG2E, dtype)}"
    return _log_ends(x, f"{e} + {mantissa}", dtype, let)


def _log_parts(x: str, dtype: str, let: Let) -> tuple[str, str, str, str]:
    """x, its exponent e, and s, tail with ln(x) = e ln(2) + 2 s + tail; the mantissa is around 1."""
    f = _FLOATS[dtype]
    one = literal(1.0, dtype)
    x = let("x", x)
    tiny = f"{x} < {literal(f.tiny, dtype)}"
    grown = f"T.Select({tiny}, {x} * {literal(2.0 ** (f.fraction + 1), dtype)}, {x})"
    bits = let("b", f'T.reinterpret("{f.integer}", {grown})')
    shift, half = _shift(f), f"T.{f.integer}({f.root_half})"
    n = let("n", f"T.shift_right({bits} - {half}, {shift})")
    m = let("m", f'T.reinterpret("{dtype}", {bits} - T.shift_left({n}, {shift}))')
    zero = literal(0.0, dtype)
    fewer = f"T.Select({tiny}, {literal(f.fraction + 1.0, dtype)}, {zero})"
    e = let("e", f'T.Cast("{dtype}", {n}) - {fewer}')
    s = let("s", f"({m} - {one}) / ({m} + {one})")
    z = let("z", f"{s} * {s}")
    return x, e, s, let("h", f"{_horner(f.log, z, dtype)} * {z} * {s}")


def _log_ends(x: str, value: str, dtype: str, let: Let) -> str:
    value = let("v", value)
    inside = f"T.Select({x} < {literal('inf', dtype)}, {value}, {x})"  # infinity and NaN stay
    outside = f"T.Select({x} < {literal(0.0, dtype)}, {literal('nan', dtype)}, {literal('-inf', dtype)})"
    return f"T.Select({x} <= {literal(0.0, dtype)}, {outside}, {inside})"


VECTOR: dict[str, Callable[[str, str, Let], str]] = {
    "exp": exp,
    "exp2": exp2,
    "log": log,
    "log2": log2,
    "sigmoid": sigmoid,
    "tanh": tanh,
}
"""Functions by their name in expressions."""

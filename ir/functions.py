"""The functions and symbols of expressions: what sympy lacks for integers, tensors and dtypes.

They stay unevaluated except on constants, because isl, not sympy, reasons about integers. Import
them from `ir.expr`, which adds text and the small combinators.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
from sympy.logic.boolalg import Boolean

from .philox import random_bits as philox

if TYPE_CHECKING:
    Expr = Any  # sympy's operators and attributes are beyond type checkers
else:
    Expr = sympy.Basic
INF = sympy.oo


def integer(name: str) -> sympy.Symbol:
    """An integer symbol (an index, a length, a captured integer, a tile coordinate)."""
    return sympy.Symbol(name, integer=True)


def real(name: str) -> sympy.Symbol:
    """A floating-point symbol (a score, a captured float, a tile of floats); it may be infinite."""
    return sympy.Symbol(name, extended_real=True)


def boolean(name: str) -> sympy.Symbol:
    """A truth-valued symbol (a tile of booleans)."""
    return sympy.Symbol(name)


def rebuilt(expr: Expr) -> Expr:
    """expr as sympy makes it anew from its parts, which is what reading its text gives."""
    seen: dict[Expr, Expr] = {}

    def build(e: Expr) -> Expr:
        if not e.args:
            return e
        if e not in seen:
            seen[e] = e.func(*map(build, e.args))
        return seen[e]

    for _ in range(8):
        again = build(expr)
        if again == expr:
            break
        expr, seen = again, {}
    return expr


def kind(expr: Expr) -> str:
    """'bool', 'int' or 'float': the kind of value an expression denotes."""
    if isinstance(expr, Boolean) and not isinstance(expr, sympy.Symbol):
        return "bool"
    if isinstance(expr, sympy.Symbol):
        return "int" if expr.is_integer else "float" if expr.is_extended_real else "bool"
    if isinstance(expr, _Typed):
        return expr.kind()
    if expr.is_Float or expr in (sympy.oo, -sympy.oo, sympy.nan):
        return "float"
    if expr.is_Rational:
        return "int" if expr.is_Integer else "float"
    if isinstance(expr, sympy.Pow) and expr.args[1].is_Integer and expr.args[1] > 0:
        return "float" if kind(expr.args[0]) == "float" else "int"
    kinds = {kind(a) for a in expr.args}
    if isinstance(expr, (sympy.Add, sympy.Mul, sympy.Abs)):
        return "float" if "float" in kinds else "int"
    return "float"


class _Typed(sympy.Function):
    """A gossamer function; `result` is its kind, or 'same' for the join of its arguments' kinds."""

    result = "same"

    def kind(self) -> str:
        if self.result != "same":
            return self.result
        return "float" if any(kind(a) == "float" for a in self.args) else "int"

    # Answers to sympy's assumption engine, which derives the rest (rational, extended_real, ...).

    def _eval_is_integer(self) -> bool | None:
        return self.kind() == "int" or None

    def _eval_is_extended_real(self) -> bool:
        return True  # not real: a score may be infinite, and `x == -inf` must not fold to false


def _ints(*values: Expr) -> bool:
    return all(v.is_Integer for v in values)


class floordiv(_Typed):
    """Floor division of integers, as Python's `//`."""

    result = "int"
    nargs = (2,)

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if b == 1:
            return a
        return sympy.Integer(int(a) // int(b)) if _ints(a, b) and b != 0 else None


class floormod(_Typed):
    """Remainder with the sign of the divisor, as Python's `%`."""

    result = "int"
    nargs = (2,)

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if b in (1, -1):
            return sympy.Integer(0)
        return sympy.Integer(int(a) % int(b)) if _ints(a, b) and b != 0 else None


def _bitwise(name: str, apply: Callable[[int, int], int], second: range | None = None) -> type[_Typed]:
    """A function of two integers; constants fold where the second lies in `second` (None: any)."""

    def fold(cls: type, a: Expr, b: Expr) -> Expr | None:
        if not _ints(a, b) or (second is not None and int(b) not in second):
            return None
        return sympy.Integer(apply(int(a), int(b)))

    members = {"result": "int", "nargs": (2,), "eval": classmethod(fold), "__module__": __name__}
    return type(name, (_Typed,), members)


bitand = _bitwise("bitand", lambda a, b: a & b)
bitor = _bitwise("bitor", lambda a, b: a | b)
bitxor = _bitwise("bitxor", lambda a, b: a ^ b)
shl = _bitwise("shl", lambda a, b: a << b, range(64))
shr = _bitwise("shr", lambda a, b: a >> b, range(64))


class random_bits(_Typed):
    """`random_bits(key, x, y)`: the 32 random bits at the counter (x, y), as a signed integer.

    Philox2x32-10 (`ir/philox.py`); key, x and y count modulo 2**32."""

    result = "int"
    nargs = (3,)

    @classmethod
    def eval(cls, key: Expr, x: Expr, y: Expr) -> Expr | None:
        return sympy.Integer(int(philox(*map(_word, (key, x, y))))) if _ints(key, x, y) else None


class bits_of_float(_Typed):
    """`bits_of_float(x)`: the 32 bits of x, rounded to f32, as a signed integer (IEEE 754, binary32)."""

    result = "int"
    nargs = (1,)


def _word(value: Expr) -> int:
    return int(value) % 2**32


class minimum(_Typed):
    """The smaller of two numbers; unlike sympy.Min it never reasons, so it stays cheap."""

    nargs = (2,)

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if a == b or b == sympy.oo:
            return a
        if a == sympy.oo:
            return b
        return sympy.Min(a, b) if a.is_number and b.is_number else None


class maximum(_Typed):
    """The larger of two numbers; see `minimum`."""

    nargs = (2,)

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if a == b or b == -sympy.oo:
            return a
        if a == -sympy.oo:
            return b
        return sympy.Max(a, b) if a.is_number and b.is_number else None


class where(_Typed):
    """`where(c, a, b)`: a where the condition holds, else b; elementwise, both sides evaluated."""

    nargs = (3,)

    @classmethod
    def eval(cls, c: Expr, a: Expr, b: Expr) -> Expr | None:
        if c == sympy.true or a == b:
            return a
        return b if c == sympy.false else None

    def kind(self) -> str:
        return "float" if "float" in (kind(self.args[1]), kind(self.args[2])) else "int"


class read(_Typed):
    """`read(t, i, j)`: one element of the captured tensor t. An integer unless `readf`."""

    result = "int"


class readf(_Typed):
    """`readf(t, i, j)`: one element of a captured tensor of floats."""

    result = "float"


def _real_function(name: str, numeric: Callable[[float], float]) -> type[_Typed]:
    def fold(cls: type, x: Expr) -> Expr | None:
        return sympy.Float(numeric(float(x))) if x.is_Float else None

    members = {"result": "float", "nargs": (1,), "eval": classmethod(fold), "__module__": __name__}
    return type(name, (_Typed,), members)


exp2 = _real_function("exp2", lambda x: 2.0**x)
log2 = _real_function("log2", math.log2)
sigmoid = _real_function("sigmoid", lambda x: 1 / (1 + math.exp(-x)))
erf = _real_function("erf", math.erf)
trunc = _real_function("trunc", math.trunc)


class stop_gradient(_Typed):
    """`stop_gradient(x)`: the float x, constant to derivatives."""

    result = "float"
    nargs = (1,)

    @classmethod
    def eval(cls, x: Expr) -> Expr | None:
        return x if x.is_number or isinstance(x, stop_gradient) else None


class float_of_bits(_Typed):
    """`float_of_bits(i)`: the f32 that the lower 32 bits of an integer spell."""

    result = "float"
    nargs = (1,)

    @classmethod
    def eval(cls, i: Expr) -> Expr | None:
        return sympy.Float(struct.unpack("<f", struct.pack("<I", _word(i)))[0]) if i.is_Integer else None


class cast(_Typed):
    """`cast(f16, x)`: x rounded to a dtype; the dtype is a plain symbol."""

    nargs = (2,)

    def kind(self) -> str:
        name = str(self.args[0])
        return "float" if name[0] == "f" or name == "bf16" else "int"


_SYMPY_FUNCTIONS = (sympy.exp, sympy.log, sympy.sqrt, sympy.tanh, sympy.sin, sympy.cos, sympy.tan)
FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "min": minimum,
    "max": maximum,
    **{f.__name__: f for f in (where, read, readf, bitand, bitor, bitxor, shl, shr, random_bits, cast)},
    **{f.__name__: f for f in (exp2, log2, sigmoid, erf, trunc, stop_gradient)},
    **{f.__name__: f for f in (float_of_bits, bits_of_float)},
    **{f.__name__: f for f in _SYMPY_FUNCTIONS},
    "abs": sympy.Abs,
    "floor": sympy.floor,
    "pow": sympy.Pow,
    "xor": sympy.Xor,
}
"""Every function of the text form by its name; floor division, remainder and arithmetic are operators."""

DTYPES = ("f64", "f32", "f16", "bf16", "f8e4m3", "i64", "i32", "i16", "i8", "u8", "bool")

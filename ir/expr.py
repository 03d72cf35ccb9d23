"""Scalar expressions: sympy trees with the handful of integer and tensor functions kernels need.

Every level of the IR (masks, score maps, index maps, loop bounds) uses these expressions. sympy
carries, substitutes and compares them; the functions below add what sympy lacks and stay
unevaluated except on constants, because isl, not sympy, does the reasoning about integers.

Kinds are carried by sympy assumptions: `integer(name)` is an integer, `real(name)` a float,
`boolean(name)` a truth value. Text form: `to_text`; back: `parse` (no eval), which needs the
kinds of the free names.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping

import sympy
from sympy.logic.boolalg import Boolean, BooleanFunction
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from .errors import ParseError

Expr = sympy.Basic
INF = sympy.oo


def integer(name: str) -> sympy.Symbol:
    """An integer symbol (an index, a length, a captured integer, a tile coordinate)."""
    return sympy.Symbol(name, integer=True)


def real(name: str) -> sympy.Symbol:
    """A floating-point symbol (a score, a captured float, a tile of floats)."""
    return sympy.Symbol(name, real=True)


def boolean(name: str) -> sympy.Symbol:
    """A truth-valued symbol (a tile of booleans)."""
    return sympy.Symbol(name)


def kind(expr: Expr) -> str:
    """'bool', 'int' or 'float': the kind of value an expression denotes."""
    if isinstance(expr, Boolean) and not isinstance(expr, sympy.Symbol):
        return "bool"
    if isinstance(expr, sympy.Symbol):
        return "int" if expr.is_integer else "float" if expr.is_real else "bool"
    if isinstance(expr, _Typed):
        return expr.kind()
    if expr.is_Float or expr in (sympy.oo, -sympy.oo, sympy.nan):
        return "float"
    if expr.is_Rational:
        return "int" if expr.is_Integer else "float"
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

    @property
    def is_integer(self) -> bool | None:  # type: ignore[override]
        return self.kind() == "int" or None

    @property
    def is_real(self) -> bool | None:  # type: ignore[override]
        return True


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


def _bitwise(name: str, apply: Callable[[int, int], int]) -> type[_Typed]:
    def fold(cls: type, a: Expr, b: Expr) -> Expr | None:
        return sympy.Integer(apply(int(a), int(b))) if _ints(a, b) else None

    return type(name, (_Typed,), {"result": "int", "nargs": (2,), "eval": classmethod(fold), "__module__": __name__})


bitand = _bitwise("bitand", lambda a, b: a & b)
bitor = _bitwise("bitor", lambda a, b: a | b)
bitxor = _bitwise("bitxor", lambda a, b: a ^ b)
shl = _bitwise("shl", lambda a, b: a << b)
shr = _bitwise("shr", lambda a, b: a >> b)


class minimum(_Typed):
    """The smaller of two numbers; unlike sympy.Min it never reasons, so it stays cheap."""

    nargs = (2,)

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if a == b:
            return a
        return sympy.Min(a, b) if a.is_number and b.is_number else None


class maximum(_Typed):
    """The larger of two numbers; see `minimum`."""

    nargs = (2,)

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if a == b:
            return a
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

    return type(name, (_Typed,), {"result": "float", "nargs": (1,), "eval": classmethod(fold), "__module__": __name__})


exp2 = _real_function("exp2", lambda x: 2.0**x)
log2 = _real_function("log2", math.log2)
sigmoid = _real_function("sigmoid", lambda x: 1 / (1 + math.exp(-x)))
erf = _real_function("erf", math.erf)
trunc = _real_function("trunc", math.trunc)


class cast(_Typed):
    """`cast(f16, x)`: x rounded to a dtype; the dtype is a plain symbol."""

    nargs = (2,)

    def kind(self) -> str:
        name = str(self.args[0])
        return "float" if name[0] == "f" or name == "bf16" else "int"


FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "min": minimum,
    "max": maximum,
    **{f.__name__: f for f in (where, read, readf, bitand, bitor, bitxor, shl, shr, cast)},
    **{f.__name__: f for f in (exp2, log2, sigmoid, erf, trunc)},
    **{f.__name__: f for f in (sympy.exp, sympy.log, sympy.sqrt, sympy.tanh, sympy.sin, sympy.cos, sympy.tan)},
    "abs": sympy.Abs,
    "floor": sympy.floor,
    "pow": sympy.Pow,
}
DTYPES = ("f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool")


def sum_of(terms: list[Expr]) -> Expr:
    """The sum of a list; 0 when empty."""
    return sympy.Add(*terms)


def any_of(conditions: list[Expr]) -> Expr:
    """The disjunction of a list; false when empty."""
    return sympy.Or(*conditions)


def all_of(conditions: list[Expr]) -> Expr:
    """The conjunction of a list; true when empty."""
    return sympy.And(*conditions)


def fold_min(values: list[Expr]) -> Expr:
    """min over a non-empty list, as nested binary `minimum`."""
    out = values[0]
    for v in values[1:]:
        out = minimum(out, v)
    return out


def fold_max(values: list[Expr]) -> Expr:
    """max over a non-empty list, as nested binary `maximum`."""
    out = values[0]
    for v in values[1:]:
        out = maximum(out, v)
    return out


def ceildiv(a: Expr, b: Expr | int) -> Expr:
    """ceil(a / b) of integers."""
    return floordiv(a + b - 1, sympy.sympify(b))


class _Text(StrPrinter):
    """Python-like text; the inverse of `parse`."""

    def _binary(self, expr: Expr, op: str) -> str:
        a, b = (self.parenthesize(x, PRECEDENCE["Mul"], strict=False) for x in expr.args)
        return f"({a} {op} {b})"

    def _print_floordiv(self, expr: Expr) -> str:
        return self._binary(expr, "//")

    def _print_floormod(self, expr: Expr) -> str:
        return self._binary(expr, "%")

    def _print_minimum(self, expr: Expr) -> str:
        return f"min({self.stringify(expr.args, ', ')})"

    def _print_maximum(self, expr: Expr) -> str:
        return f"max({self.stringify(expr.args, ', ')})"

    def _print_read(self, expr: Expr) -> str:
        return f"{expr.args[0]}[{self.stringify(expr.args[1:], ', ')}]"

    def _print_readf(self, expr: Expr) -> str:
        return self._print_read(expr)

    def _print_Abs(self, expr: Expr) -> str:
        return f"abs({self._print(expr.args[0])})"

    def _print_And(self, expr: Expr) -> str:
        return "(" + " and ".join(sorted(self._print(a) for a in expr.args)) + ")"

    def _print_Or(self, expr: Expr) -> str:
        return "(" + " or ".join(sorted(self._print(a) for a in expr.args)) + ")"

    def _print_Not(self, expr: Expr) -> str:
        return f"(not {self._print(expr.args[0])})"

    def _print_Xor(self, expr: Expr) -> str:
        return self._print(expr.rewrite(sympy.Or))

    def _print_Relational(self, expr: Expr) -> str:
        return f"({self._print(expr.lhs)} {expr.rel_op} {self._print(expr.rhs)})"

    def _print_Equality(self, expr: Expr) -> str:
        return f"({self._print(expr.lhs)} == {self._print(expr.rhs)})"

    def _print_Unequality(self, expr: Expr) -> str:
        return f"({self._print(expr.lhs)} != {self._print(expr.rhs)})"

    def _print_BooleanTrue(self, expr: Expr) -> str:
        return "true"

    def _print_BooleanFalse(self, expr: Expr) -> str:
        return "false"

    def _print_Infinity(self, expr: Expr) -> str:
        return "inf"

    def _print_NegativeInfinity(self, expr: Expr) -> str:
        return "-inf"

    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))

    def _print_Rational(self, expr: sympy.Rational) -> str:
        return f"({expr.p} / {expr.q})"

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:
        base, exponent = expr.args
        if exponent == sympy.Rational(1, 2):
            return f"sqrt({self._print(base)})"
        return f"pow({self._print(base)}, {self._print(exponent)})"

    def _print_Mul(self, expr: sympy.Mul) -> str:
        return " * ".join(self.parenthesize(a, PRECEDENCE["Mul"], strict=False) for a in expr.as_ordered_factors())


def to_text(expr: Expr | int | float) -> str:
    """Deterministic text of an expression; `parse(to_text(e), kinds) == e`."""
    return _Text({"full_prec": False}).doprint(sympy.sympify(expr))


_BINARY: dict[type[ast.operator], Callable[[Expr, Expr], Expr]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: floordiv,
    ast.Mod: floormod,
    ast.Pow: sympy.Pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Expr, Expr], Expr]] = {
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
}
_CONSTANTS = {"true": sympy.true, "false": sympy.false, "inf": sympy.oo, "nan": sympy.nan}


def parse(text: str, names: Mapping[str, Expr]) -> Expr:
    """Read an expression back. `names` maps every free name to its symbol.

    Tensors that are indexed (`doc[q]`) are looked up in `names` too: a `real` symbol reads floats,
    any other reads integers. Raises ParseError with the position of the first problem.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ParseError(f"not an expression: {text!r} ({error.msg})", error.lineno or 1, error.offset or 1) from None
    return _build(tree.body, names)


def _build(node: ast.expr, names: Mapping[str, Expr]) -> Expr:
    def fail(message: str) -> ParseError:
        return ParseError(message, node.lineno, node.col_offset + 1)

    match node:
        case ast.Constant(value=bool() as value):
            return sympy.true if value else sympy.false
        case ast.Constant(value=int() as value):
            return sympy.Integer(value)
        case ast.Constant(value=float() as value):
            return sympy.Float(value)
        case ast.Name(id=name):
            if name in names:
                return names[name]
            if name in _CONSTANTS:
                return _CONSTANTS[name]
            if name in DTYPES:
                return sympy.Symbol(name)
            raise fail(f"unknown name {name!r}; known: {', '.join(sorted(names))}")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_build(operand, names)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return sympy.Not(_build(operand, names))
        case ast.BoolOp(op=op, values=values):
            join = sympy.And if isinstance(op, ast.And) else sympy.Or
            return join(*(_build(v, names) for v in values))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_build(left, names), _build(right, names))
        case ast.Compare(left=left, ops=ops, comparators=rest):
            sides = [_build(s, names) for s in (left, *rest)]
            return sympy.And(*(_COMPARE[type(o)](a, b) for o, a, b in zip(ops, sides, sides[1:], strict=False)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_build(a, names) for a in args))
        case ast.Subscript(value=ast.Name(id=name), slice=index):
            if name not in names:
                raise fail(f"unknown tensor {name!r}; known: {', '.join(sorted(names))}")
            items = index.elts if isinstance(index, ast.Tuple) else [index]
            function = readf if kind(names[name]) == "float" else read
            return function(names[name], *(_build(i, names) for i in items))
        case _:
            raise fail(f"expressions cannot contain {ast.unparse(node)!r}")


__all__ = [n for n, v in list(globals().items()) if not n.startswith("_") and getattr(v, "__module__", __name__) == __name__]

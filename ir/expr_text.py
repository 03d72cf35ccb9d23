"""Text of expressions and back: Python's operators and precedence, `parse(to_text(e)) == e`.

The text depends on the expression alone: terms, factors and conditions are put in an order of our
own, so that neither hash seeds nor sympy's internal order show. Sums read most significant first
(`32 * t + i - 1`), subtractions and divisions are spelled as such. Parsing builds sums and products
in one step from all their parts, so that sympy canonicalises them as it did the first time.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

import sympy
from sympy.logic.boolalg import BooleanFunction

from . import functions as F
from .errors import ParseError, UnsupportedError
from .syntax import parse_expression

OR, AND, NOT, COMPARE, SUM, PRODUCT, SIGN, POWER, ATOM = range(9)
"""Precedences, loosest first."""

_CALLS: dict[type, str] = {f: name for name, f in F.FUNCTIONS.items() if isinstance(f, type)}
_HALF = sympy.Rational(1, 2)


def to_text(expr: F.Expr | int | float) -> str:
    """Deterministic text of an expression; `parse(to_text(e), names) == e`.

    >>> q, k = F.integer("q"), F.integer("k")
    >>> to_text((q - k <= 4 * F.integer("p0")) & sympy.Eq(F.floormod(q, 2), 0))
    'q % 2 == 0 and q - k <= 4 * p0'

    The equality holds for expressions that sympy leaves as they are (`e.func(*e.args) == e` throughout).
    Raises UnsupportedError for sympy nodes that are not part of the language.
    """
    return _print(sympy.sympify(expr))[0]


def _wrap(expr: F.Expr, least: int) -> str:
    """Text of expr, in parentheses unless it binds at least as tightly as `least`."""
    text, precedence = _print(expr)
    return text if precedence >= least else f"({text})"


def _list(args: tuple[F.Expr, ...]) -> str:
    return ", ".join(to_text(a) for a in args)


def _print(expr: F.Expr) -> tuple[str, int]:
    """(text, precedence)."""
    match expr:
        case sympy.Symbol():
            return expr.name, ATOM
        case sympy.Integer() | sympy.Float() | sympy.Rational():
            return _sum([expr])
        case sympy.Add():
            return _sum(list(expr.args))
        case sympy.Mul():
            return _sum([expr])
        case sympy.Pow():
            return _power(expr)
        case F.floordiv() | F.floormod():
            operator = "//" if isinstance(expr, F.floordiv) else "%"
            a, b = (_wrap(x, SIGN + 1) for x in expr.args)
            return f"{a} {operator} {b}", PRODUCT
        case F.read() | F.readf():
            return f"{expr.args[0]}[{_list(expr.args[1:])}]", ATOM
        case sympy.core.relational.Relational():
            operator = expr.rel_op  # type: ignore[attr-defined]
            return f"{_wrap(expr.lhs, SUM)} {operator} {_wrap(expr.rhs, SUM)}", COMPARE
        case sympy.And():
            return " and ".join(sorted(_wrap(a, NOT) for a in expr.args)), AND
        case sympy.Or():
            return " or ".join(sorted(_wrap(a, NOT) for a in expr.args)), OR
        case sympy.Not():
            return f"not {_wrap(expr.args[0], COMPARE)}", NOT
        case sympy.Xor():
            return f"xor({', '.join(sorted(to_text(a) for a in expr.args))})", ATOM
    if expr in _NAMES:
        return _NAMES[expr]
    if type(expr) in _CALLS:
        return f"{_CALLS[type(expr)]}({_list(expr.args)})", ATOM
    raise UnsupportedError(
        f"no text for {type(expr).__name__} in {expr}; expressions hold {', '.join(sorted(F.FUNCTIONS))}"
    )


_NAMES: dict[F.Expr, tuple[str, int]] = {
    sympy.true: ("true", ATOM),
    sympy.false: ("false", ATOM),
    sympy.oo: ("inf", ATOM),
    -sympy.oo: ("-inf", SIGN),
    sympy.nan: ("nan", ATOM),
    sympy.E: ("exp(1)", ATOM),
}


def _sum(terms: list[F.Expr]) -> tuple[str, int]:
    """Positive terms before negative ones, large coefficients first, numbers last."""
    parts = []
    for term in terms:
        coefficient, factors = _split(term)
        negative = bool(coefficient.is_extended_negative)
        text, precedence = _product(-coefficient if negative else coefficient, factors)
        divides = coefficient == -1 and isinstance(factors[0] if factors else None, F.floordiv | F.floormod)
        order = (not factors, negative, -abs(float(coefficient)), text)
        parts.append((order, negative, text, precedence, divides))
    parts.sort(key=lambda part: part[0])
    out = ""
    for _, negative, text, _, divides in parts:
        if out:
            out += f" - {text}" if negative else f" + {text}"
        elif divides:
            out = f"-({text})"  # a leading sign would bind to the dividend alone
        else:
            out = f"-{text}" if negative else text
    if len(parts) > 1:
        return out, SUM
    return out, PRODUCT if parts[0][1] else parts[0][3]


def _split(term: F.Expr) -> tuple[F.Expr, tuple[F.Expr, ...]]:
    """A term as its number and its other factors."""
    if term.is_Number:
        return term, ()
    if isinstance(term, sympy.Mul) and term.args[0].is_Number:
        return term.args[0], term.args[1:]
    return sympy.Integer(1), term.args if isinstance(term, sympy.Mul) else (term,)


def _product(coefficient: F.Expr, factors: tuple[F.Expr, ...]) -> tuple[str, int]:
    """coefficient * factors / factors; the coefficient is not negative."""
    if not factors and coefficient.is_Integer:
        return str(coefficient), ATOM
    if not factors and not coefficient.is_Rational:
        return _number(coefficient)[0], ATOM
    if coefficient == 1 and len(factors) == 1 and _inverse(factors[0]) is None:
        return _print(factors[0])
    tops, bottoms = [], []
    for factor in factors:
        inverse = _inverse(factor)
        if inverse is None:
            tops.append(_wrap(factor, SIGN + 1))
        else:
            bottoms.append(_wrap(inverse, SIGN + 1))
    tops.sort(key=lambda text: (text.startswith("("), text))
    bottoms.sort()
    number, below = _number(coefficient)
    if number != "1" or not tops:
        tops.insert(0, number)
    if below:
        bottoms.insert(0, below)
    return " / ".join([" * ".join(tops), *bottoms]), PRODUCT


def _number(value: F.Expr) -> tuple[str, str]:
    """Numerator and denominator text of a number; the denominator is '' when it is 1."""
    if value == sympy.oo:
        return "inf", ""
    if value.is_Float:
        return repr(float(value)), ""
    return str(value.p), str(value.q) if value.q != 1 else ""  # type: ignore[attr-defined]


def _inverse(factor: F.Expr) -> F.Expr | None:
    """x when factor is 1 / x for a constant negative power, else None."""
    if isinstance(factor, sympy.Pow) and factor.args[1].is_Rational and factor.args[1] < 0:
        return sympy.Pow(factor.args[0], -factor.args[1])
    return None


def _power(expr: sympy.Pow) -> tuple[str, int]:
    base, exponent = expr.args
    if exponent == _HALF:
        return f"sqrt({to_text(base)})", ATOM
    inverse = _inverse(expr)
    if inverse is not None:
        return f"1 / {_wrap(inverse, SIGN + 1)}", PRODUCT
    if exponent.is_Integer:
        return f"{_wrap(base, ATOM)} ** {exponent}", POWER
    return f"pow({_list(expr.args)})", ATOM


_COMPARE: dict[type[ast.cmpop], Callable[[F.Expr, F.Expr], F.Expr]] = {
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
}
_CONSTANTS = {"true": sympy.true, "false": sympy.false, "inf": sympy.oo, "nan": sympy.nan}


def parse(
    text: str,
    names: Mapping[str, F.Expr],
    *,
    unknown: Callable[[str], F.Expr] | None = None,
    line: int = 1,
    column: int = 1,
) -> F.Expr:
    """Read an expression back. `names` maps every free name to its symbol.

    Tensors that are indexed (`doc[q]`) are looked up in `names` too: a `real` symbol reads floats,
    any other reads integers. unknown: makes the symbol of a name that `names` lacks (without it such
    names are errors). line, column: where the text stands in its file, for messages. Raises
    ParseError with the position of the first problem.

    >>> parse("max(q, 4) * 2 >= doc[q]", {"q": F.integer("q"), "doc": F.integer("doc")})
    2*maximum(q, 4) >= read(doc, q)
    """
    reader = _Reader(names, unknown, line, column + len(text) - len(text.lstrip()))
    try:
        return reader.expr(parse_expression(text.strip()))
    except SyntaxError as error:
        at = (error.offset or 1) - 1 if (error.lineno or 1) == 1 else 0
        message = f"not an expression: {text.strip()!r} ({error.msg})"
        raise ParseError(message, line, reader.column + at) from None
    except (RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, ParseError):
            raise
        raise ParseError(f"not an expression: {text.strip()[:60]!r}... ({error})", line, column) from None


class _Reader:
    """Builds sympy trees from Python's syntax trees."""

    def __init__(
        self, names: Mapping[str, F.Expr], unknown: Callable[[str], F.Expr] | None, line: int, column: int
    ) -> None:
        self.names, self.unknown, self.line, self.column = names, unknown, line, column

    def fail(self, node: ast.expr, message: str) -> ParseError:
        return ParseError(message, self.line + node.lineno - 1, self.column + node.col_offset)

    def name(self, node: ast.expr, name: str) -> F.Expr:
        if name in self.names:
            return self.names[name]
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name in F.DTYPES:
            return sympy.Symbol(name)
        if self.unknown is not None:
            return self.unknown(name)
        raise self.fail(node, f"unknown name {name!r}; known: {', '.join(sorted(self.names))}")

    def expr(self, node: ast.expr) -> F.Expr:
        match node:
            case ast.Constant(value=bool() as value):
                return sympy.true if value else sympy.false
            case ast.Constant(value=int() as value):
                return sympy.Integer(value)
            case ast.Constant(value=float() as value):
                return sympy.Float(value)
            case ast.Name(id=name):
                return self.name(node, name)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return sympy.Not(self.truth(operand))
            case ast.BoolOp(op=op, values=values):
                join = sympy.And if isinstance(op, ast.And) else sympy.Or
                return join(*(self.truth(v) for v in values))
            case ast.BinOp(op=ast.Add() | ast.Sub()):
                return sympy.Add(*self.terms(node))
            case ast.BinOp(op=ast.Mult() | ast.Div()) | ast.UnaryOp(op=ast.USub()):
                return sympy.Mul(*self.factors(node))
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                return F.floordiv(self.number(left), self.number(right))
            case ast.BinOp(left=left, op=ast.Mod(), right=right):
                return F.floormod(self.number(left), self.number(right))
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                return self.power(node, self.number(left), self.number(right))
            case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(o) in _COMPARE for o in ops):
                sides = [self.expr(s) for s in (left, *rest)]
                pairs = zip(ops, sides, sides[1:], strict=False)
                return sympy.And(*(_COMPARE[type(o)](a, b) for o, a, b in pairs))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return self.call(node, name, [self.expr(a) for a in args])
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                tensor = self.name(node, name)
                items = index.elts if isinstance(index, ast.Tuple) else [index]
                function = F.readf if F.kind(tensor) == "float" else F.read
                return function(tensor, *(self.number(i) for i in items))
        raise self.fail(node, f"expressions cannot contain {ast.unparse(node)!r}")

    def terms(self, node: ast.expr) -> list[F.Expr]:
        """The parts of a sum; what is subtracted comes negated."""
        match node:
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [*self.terms(left), *self.terms(right)]
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return [*self.terms(left), sympy.Mul(-1, *self.factors(right))]
        return [self.number(node)]

    def factors(self, node: ast.expr) -> list[F.Expr]:
        """The parts of a product; what divides comes inverted."""
        match node:
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return [*self.factors(left), *self.factors(right)]
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return [*self.factors(left), sympy.Pow(self.number(right), -1)]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return [sympy.Integer(-1), *self.factors(operand)]
        return [self.number(node)]

    def number(self, node: ast.expr) -> F.Expr:
        value = self.expr(node)
        if isinstance(
            value, BooleanFunction | sympy.logic.boolalg.BooleanAtom | sympy.core.relational.Relational
        ):
            raise self.fail(node, f"expected a number; got the condition {ast.unparse(node)!r}")
        return value

    def truth(self, node: ast.expr) -> F.Expr:
        value = self.expr(node)
        if F.kind(value) != "bool":
            raise self.fail(node, f"expected a condition; got the number {ast.unparse(node)!r}")
        return value

    def power(self, node: ast.expr, base: F.Expr, exponent: F.Expr) -> F.Expr:
        if base.is_number and exponent.is_number and abs(exponent) > 64:
            raise self.fail(node, f"expected an exponent within 64 of 0 for a number; got {exponent}")
        return sympy.Pow(base, exponent)

    def call(self, node: ast.expr, name: str, args: list[Any]) -> F.Expr:
        if name not in F.FUNCTIONS:
            raise self.fail(node, f"unknown function {name!r}; known: {', '.join(sorted(F.FUNCTIONS))}")
        if name == "pow" and len(args) == 2:
            return self.power(node, args[0], args[1])
        try:
            return F.FUNCTIONS[name](*args)
        except (TypeError, ValueError, AttributeError) as error:
            raise self.fail(node, f"{ast.unparse(node)!r}: {error}") from None

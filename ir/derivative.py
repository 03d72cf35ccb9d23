"""Derivatives of expressions: of a score map by its score, by what it reads, by its runtime floats.

    d/dx f(g(x)) = f'(g(x)) * g'(x)            one rule a function, in RULES

Where a function has a corner the derivative is one of its one-sided ones, as in PyTorch: 0 for abs at 0,
half to each side of a minimum or maximum of equal arguments. Integers, what rounds or compares, and what
stands inside `stop_gradient`, are constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import sympy

from .errors import UnsupportedError
from .expr import (
    Expr,
    cast,
    erf,
    exp2,
    kind,
    log2,
    maximum,
    minimum,
    readf,
    sigmoid,
    stop_gradient,
    trunc,
    where,
)

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


def derivative(expr: Expr, x: Expr) -> Expr:
    """d expr / d x, where x is a float symbol or one read of a captured tensor of floats.

    >>> from .expr import parse, real, to_text
    >>> names = {"x": real("x"), "y": real("y")}
    >>> to_text(derivative(parse("y * tanh(x / y)", names), real("x")))
    '-tanh(x / y) ** 2 + 1'

    Raises UnsupportedError for a function without a rule."""
    known: dict[Expr, Expr] = {}

    def d(e: Expr) -> Expr:
        if e == x:
            return ONE
        if not e.args or kind(e) != "float" or not e.has(x) or isinstance(e, (readf, stop_gradient)):
            return ZERO
        if e not in known:
            known[e] = _chain(e, d)
        return known[e]

    return d(expr)


def _chain(e: Expr, d: Callable[[Expr], Expr]) -> Expr:
    if isinstance(e, sympy.Add):
        return sympy.Add(*map(d, e.args))
    if isinstance(e, where):
        condition, yes, no = e.args
        return where(condition, d(yes), d(no))
    slopes = _slopes(e)
    return sympy.Add(*(slope * d(a) for slope, a in zip(slopes, _varying(e), strict=True)))


def _varying(e: Expr) -> tuple[Expr, ...]:
    """The arguments by which a function has derivatives."""
    return e.args[1:] if isinstance(e, cast) else e.args


def _slopes(e: Expr) -> tuple[Expr, ...]:
    """The derivatives of a function by each of its arguments."""
    if isinstance(e, sympy.Mul):
        return tuple(sympy.Mul(*e.args[:n], *e.args[n + 1 :]) for n in range(len(e.args)))
    rule = RULES.get(e.func)
    if rule is None:
        raise UnsupportedError(f"{e.func.__name__} has no derivative rule. Write it with other functions")
    return rule(e)


def _power(e: Expr) -> tuple[Expr, ...]:
    base, exponent = e.args
    by_exponent = ZERO if exponent.is_number else e * sympy.log(base)
    return exponent * base ** (exponent - 1), by_exponent


def _sides(e: Expr, first: Expr, second: Expr) -> tuple[Expr, ...]:
    """1 for the argument that is taken, shared where they are equal."""
    half = sympy.Rational(1, 2)

    def side(taken: Expr, other: Expr) -> Expr:
        return where(taken, ONE, where(other, ZERO, half))

    return side(first, second), side(second, first)


def _minimum(e: Expr) -> tuple[Expr, ...]:
    a, b = e.args
    return _sides(e, a < b, b < a)


def _maximum(e: Expr) -> tuple[Expr, ...]:
    a, b = e.args
    return _sides(e, a > b, b > a)


def _abs(e: Expr) -> tuple[Expr, ...]:
    (a,) = e.args
    return (where(a > 0, ONE, where(a < 0, -ONE, ZERO)),)


RULES: dict[object, Callable[[Expr], tuple[Expr, ...]]] = {
    sympy.Pow: _power,
    sympy.Abs: _abs,
    minimum: _minimum,
    maximum: _maximum,
    cast: lambda e: (ONE,),
    trunc: lambda e: (ZERO,),
    sympy.floor: lambda e: (ZERO,),
    sympy.exp: lambda e: (e,),
    sympy.log: lambda e: (1 / e.args[0],),
    exp2: lambda e: (e * sympy.Float(math.log(2)),),
    log2: lambda e: (sympy.Float(1 / math.log(2)) / e.args[0],),
    sympy.tanh: lambda e: (1 - e**2,),
    sigmoid: lambda e: (e * (1 - e),),
    erf: lambda e: (sympy.Float(2 / math.sqrt(math.pi)) * sympy.exp(-(e.args[0] ** 2)),),
    sympy.sin: lambda e: (sympy.cos(e.args[0]),),
    sympy.cos: lambda e: (-sympy.sin(e.args[0]),),
    sympy.tan: lambda e: (1 + e**2,),
}
"""For each function, its derivatives by its arguments."""

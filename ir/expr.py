"""Scalar expressions: sympy trees with the handful of integer and tensor functions kernels need.

Every level of the IR (masks, score maps, index maps, loop bounds) uses these expressions. sympy
carries, substitutes and compares them; the functions of `ir/functions.py` add what sympy lacks and
stay unevaluated except on constants, because isl, not sympy, does the reasoning about integers.

Kinds are carried by sympy assumptions: `integer(name)` is an integer, `real(name)` a float,
`boolean(name)` a truth value. Text form: `to_text`; back: `parse` (no eval), which needs the
kinds of the free names.
"""

from __future__ import annotations

import sympy

from .expr_text import parse, to_text
from .functions import (
    DTYPES,
    FUNCTIONS,
    INF,
    Expr,
    bitand,
    bitor,
    bits_of_float,
    bitxor,
    boolean,
    cast,
    erf,
    exp2,
    float_of_bits,
    floordiv,
    floormod,
    integer,
    kind,
    log2,
    maximum,
    minimum,
    random_bits,
    read,
    readf,
    real,
    shl,
    shr,
    sigmoid,
    stop_gradient,
    trunc,
    where,
)

__all__ = [
    "DTYPES",
    "FUNCTIONS",
    "INF",
    "Expr",
    "all_of",
    "any_of",
    "bitand",
    "bitor",
    "bits_of_float",
    "bitxor",
    "boolean",
    "cast",
    "ceildiv",
    "erf",
    "exp2",
    "float_of_bits",
    "floordiv",
    "floormod",
    "fold_max",
    "fold_min",
    "integer",
    "kind",
    "log2",
    "maximum",
    "minimum",
    "parse",
    "random_bits",
    "read",
    "readf",
    "reads",
    "real",
    "shl",
    "shr",
    "sigmoid",
    "stop_gradient",
    "sum_of",
    "symbols",
    "to_text",
    "trunc",
    "where",
]


def reads(expr: Expr) -> tuple[Expr, ...]:
    """The reads of captured tensors in an expression, outermost first."""
    return tuple(e for e in sympy.preorder_traversal(expr) if isinstance(e, read | readf))


def symbols(expr: Expr) -> frozenset[sympy.Symbol]:
    """The values an expression depends on: its symbols without the names of tensors and dtypes."""
    if isinstance(expr, sympy.Symbol):
        return frozenset({expr})
    args = expr.args[1:] if isinstance(expr, read | readf | cast) else expr.args
    return frozenset().union(*(symbols(a) for a in args))


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

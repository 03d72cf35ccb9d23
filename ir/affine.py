"""Predicates as integer sets: from expressions (sympy) to isl, exact.

`to_sets` turns a predicate into two isl sets, `may` and `must`, and `to_pw_aff` an integer expression
into a piecewise quasi-affine function. Every integer symbol that is no dimension becomes an isl
parameter. Taken are `+ -`, products with numbers, `//` and `%` by numbers, shifts and bit masks by
numbers, `abs min max where`, comparisons and the connectives. Anything else (captured tensors, products
of symbols, floats) makes its comparison an *opaque atom*: true in may, false in must.

The way back is `to_expr`, `condition` and `bounds` (ir/closed.py). Callers that use islpy on their own
hold `ISL_LOCK` (ir/sets.py).
"""

from __future__ import annotations

import functools

import islpy as isl
import sympy

from .closed import bounds, condition, to_expr
from .expr import (
    Expr,
    bitand,
    bitor,
    bitxor,
    floordiv,
    floormod,
    kind,
    maximum,
    minimum,
    read,
    readf,
    shl,
    shr,
    where,
)
from .sets import DIV, IN, ISL_LOCK, OUT, PARAM, SET, QuotaExceeded, convex, flatten, locked, project, quota

__all__ = [
    "DIV",
    "IN",
    "ISL_LOCK",
    "OUT",
    "PARAM",
    "SET",
    "QuotaExceeded",
    "bounds",
    "condition",
    "convex",
    "flatten",
    "locked",
    "project",
    "quota",
    "to_expr",
    "to_pw_aff",
    "to_sets",
]

MAX_PIECES = 64  # a function or set with more pieces is opaque: exact geometry of it would not pay


@locked
def to_sets(predicate: Expr, dims: tuple[str, ...] = ("q", "k")) -> tuple[isl.Set, isl.Set]:
    """(may, must): the smallest and largest sets over `dims` between which the predicate is known to lie.

    They are equal when no atom of the predicate is opaque.
    """
    return _Out(predicate, dims).sets(predicate)


@locked
def to_pw_aff(expr: Expr, dims: tuple[str, ...] = ("q", "k")) -> isl.PwAff | None:
    """An integer expression as a function on the points of `dims`; None when it is opaque."""
    return _Out(expr, dims).function(sympy.sympify(expr))


MAX_RUNS = 2  # of ones in a bit mask: every run doubles what isl has to tell apart


def _runs(mask: int) -> int:
    ones = mask if mask >= 0 else ~mask
    return (ones & ~(ones << 1)).bit_count()


class _Out:
    """One translation: the space of its dimensions and parameters, and what was translated before."""

    def __init__(self, root: Expr, dims: tuple[str, ...]) -> None:
        root = sympy.sympify(root)
        tensors = {r.args[0] for r in root.atoms(read, readf)}
        params = sorted({s.name for s in root.free_symbols - tensors if kind(s) == "int"} - set(dims))
        self.space = isl.Space.create_from_names(isl.DEFAULT_CONTEXT, set=list(dims), params=params)
        self.local = isl.LocalSpace.from_space(self.space)
        self.at = {name: (SET, i) for i, name in enumerate(dims)} | {
            name: (PARAM, i) for i, name in enumerate(params)
        }
        self.universe, self.nothing = isl.Set.universe(self.space), isl.Set.empty(self.space)
        self.functions: dict[Expr, isl.PwAff | None] = {}

    # predicates

    def sets(self, predicate: Expr) -> tuple[isl.Set, isl.Set]:
        match predicate:
            case bool() | sympy.true | sympy.false:
                known = self.universe if predicate else self.nothing
                return known, known
            case sympy.Not():
                may, must = self.sets(predicate.args[0])
                return must.complement().coalesce(), may.complement().coalesce()
            case sympy.And() | sympy.Or():
                join = isl.Set.intersect if isinstance(predicate, sympy.And) else isl.Set.union
                parts = [self.sets(a) for a in predicate.args]
                may, must = (functools.reduce(join, side).coalesce() for side in zip(*parts, strict=True))
                return may, must
            case sympy.core.relational.Relational():
                known = self.relation(predicate)
                return (self.universe, self.nothing) if known is None else (known, known)
            case sympy.Xor() | sympy.Implies() | sympy.Equivalent() | sympy.ITE():
                return self.sets(sympy.to_nnf(predicate, simplify=False))
        return self.universe, self.nothing

    def relation(self, atom: Expr) -> isl.Set | None:
        left, right = (self.function(side) for side in atom.args)
        if left is None or right is None:
            return None
        compare = {
            sympy.Eq: isl.PwAff.eq_set,
            sympy.Ne: isl.PwAff.ne_set,
            sympy.Lt: isl.PwAff.lt_set,
            sympy.Le: isl.PwAff.le_set,
            sympy.Gt: isl.PwAff.gt_set,
            sympy.Ge: isl.PwAff.ge_set,
        }[type(atom)]
        known = compare(left, right).coalesce()
        return known if known.n_basic_set() <= MAX_PIECES else None

    # functions

    def function(self, expr: Expr) -> isl.PwAff | None:
        if expr not in self.functions:
            found = self.translate(expr)
            self.functions[expr] = None if found is None or found.n_piece() > MAX_PIECES else found
        return self.functions[expr]

    def number(self, value: int) -> isl.PwAff:
        return isl.PwAff.from_aff(isl.Aff.val_on_domain(self.local, isl.Val(value)))

    def translate(self, expr: Expr) -> isl.PwAff | None:
        if isinstance(expr, sympy.Symbol):
            at = self.at.get(expr.name) if kind(expr) == "int" else None
            return at and isl.PwAff.from_aff(isl.Aff.var_on_domain(self.local, *at))
        if expr.is_Integer:
            return self.number(int(expr))
        if isinstance(expr, where):
            return self.choice(*expr.args)
        args = [f for f in map(self.function, expr.args) if f is not None]
        if not args or len(args) < len(expr.args):
            return None
        match expr:
            case sympy.Add():
                return functools.reduce(isl.PwAff.add, args)
            case sympy.Mul():
                constant, rest = expr.as_coeff_Mul()
                inner = self.function(rest) if constant.is_Integer and constant != 1 else None
                return inner and inner.scale_val(isl.Val(int(constant)))
            case sympy.Abs():
                return args[0].max(args[0].neg())
            case minimum():
                return args[0].min(args[1]).coalesce()
            case maximum():
                return args[0].max(args[1]).coalesce()
        if len(args) == 2 and any(a.is_Integer for a in expr.args):
            return self.with_number(type(expr), *expr.args)
        return None

    def choice(self, predicate: Expr, yes: Expr, no: Expr) -> isl.PwAff | None:
        may, must = self.sets(predicate)
        a, b = self.function(yes), self.function(no)
        if a is None or b is None or not may.is_equal(must):
            return None
        return a.intersect_domain(may).union_add(b.subtract_domain(may)).coalesce()

    def with_number(self, op: type, a: Expr, b: Expr) -> isl.PwAff | None:
        if not b.is_Integer:
            return self.with_number(op, b, a) if op in (bitand, bitor, bitxor) else None
        x, n = self.function(a), int(b)
        assert x is not None
        if op in (floordiv, floormod) and n:
            quotient = (x if n > 0 else x.neg()).scale_down_val(isl.Val(abs(n))).floor()
            return quotient if op is floordiv else x.sub(quotient.scale_val(isl.Val(n)))
        if op is shl and 0 <= n < 63:
            return x.scale_val(isl.Val(2**n))
        if op is shr and 0 <= n < 63:
            return x.scale_down_val(isl.Val(2**n)).floor()
        if op in (bitand, bitor, bitxor) and _runs(n) > MAX_RUNS:
            return None
        if op is bitand:
            return self.bits(x, n)
        if op in (bitor, bitxor):  # x | n == x + n - (x & n), x ^ n == x + n - 2 (x & n)
            return x.add(self.number(n)).sub(self.bits(x, n).scale_val(isl.Val(1 if op is bitor else 2)))
        return None

    def bits(self, x: isl.PwAff, mask: int) -> isl.PwAff:
        """x & mask: each run of ones is a difference of remainders by powers of two."""
        if mask < 0:
            return x.sub(self.bits(x, ~mask))
        total, low = self.number(0), 0
        while mask >> low:
            if not (mask >> low) & 1:
                low += 1
                continue
            high = low
            while (mask >> high) & 1:
                high += 1
            total = total.add(x.mod_val(isl.Val(2**high))).sub(x.mod_val(isl.Val(2**low)))
            low = high
        return total

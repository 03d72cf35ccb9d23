"""Closed-form bounds of one loop variable: isl sets become `Span`s.

A basic set whose existential divisions do not involve the variable is exactly
{ lo <= n <= hi and guard }, with lo the maximum of its lower bounds and hi the minimum of its upper
bounds, read off the constraints. Otherwise isl's parametric minimum and maximum serve, where it
proves that nothing between them is missing.
"""

from __future__ import annotations

import islpy as isl
import sympy

from ..ir.affine import bounds, convex, flatten
from ..ir.errors import UnsupportedError
from ..ir.expr import Expr, all_of, floordiv, fold_max, fold_min, integer, minimum, where
from ..ir.kernel import Span

PARAM, SET, DIV = isl.dim_type.param, isl.dim_type.set, isl.dim_type.div


MAX_SPANS = 6  # beyond this a loop over the hull with a test is cheaper than choosing bounds


def spans_of(points: isl.Set, variable: str, context: isl.Set, end: Expr) -> tuple[tuple[Span, ...], bool]:
    """Disjoint spans of `variable` below `end` that cover `points`, and whether they are exact.

    context: a parameter set known to hold of the other coordinates. Inexact results are one span,
    the hull: whoever uses it tests each value."""
    flat = flatten(points, variable)
    pieces = flat.coalesce().make_disjoint().coalesce().get_basic_sets()
    found = [interval(p, context) or _extremes(p, variable) for p in pieces]
    if len(found) <= MAX_SPANS and all(f is not None for f in found):
        return tuple(_span(*f, end) for f in found if f is not None), True
    return (_hull(flat, context, end),), False


def interval(points: isl.BasicSet, context: isl.Set) -> tuple[Expr, Expr | None, Expr] | None:
    """(lo, hi, guard) of a one-dimensional basic set, hi None when unbounded above; None if it has holes."""
    exact = isl.Set.from_basic_set(points).compute_divs().coalesce()
    simple = exact.gist(_as_set(context, exact)).coalesce()
    basics = simple.get_basic_sets()
    if len(basics) != 1:
        return None
    basic = basics[0].remove_redundancies()
    lower: list[Expr] = [sympy.Integer(0)]
    upper: list[Expr] = []
    guard: list[Expr] = []
    for constraint in basic.get_constraints():
        aff = constraint.get_aff()
        a = int(aff.get_coefficient_val(isl.dim_type.in_, 0).to_python())
        rest = _rest(aff)
        if rest is None:
            return None
        if a == 0:
            guard.append(sympy.Eq(rest, 0) if constraint.is_equality() else rest >= 0)
            continue
        if constraint.is_equality() and abs(a) != 1:
            return None
        if a > 0 or constraint.is_equality():
            lower.append(floordiv(-rest * (1 if a > 0 else -1) + abs(a) - 1, sympy.Integer(abs(a))))
        if a < 0 or constraint.is_equality():
            upper.append(floordiv(rest * (1 if a < 0 else -1), sympy.Integer(abs(a))))
    return fold_max(_distinct(lower)), fold_min(_distinct(upper)) if upper else None, all_of(guard)


def _extremes(piece: isl.BasicSet, variable: str) -> tuple[Expr, Expr | None, Expr] | None:
    points = isl.Set.from_basic_set(piece)
    if not convex(points, variable):
        return None
    try:
        low, high, guard = bounds(points, variable)
    except (isl.Error, UnsupportedError):  # bounded above for some tiles or integers of the mask only
        return None
    return low, None if high == sympy.oo else high, guard


def _as_set(context: isl.Set, points: isl.Set) -> isl.Set:
    universe = isl.Set.universe(points.get_space())
    return universe.intersect_params(context.align_params(universe.get_space().params()))


def _distinct(values: list[Expr]) -> list[Expr]:
    values = list(dict.fromkeys(values))
    return [v for v in values if v != 0] if any(v.is_Integer and v > 0 for v in values) else values


def _rest(aff: isl.Aff) -> Expr | None:
    """The part of an affine form without the set variable; None when a division involves it."""
    total: Expr = sympy.Integer(aff.get_constant_val().to_python())
    for i in range(aff.dim(PARAM)):
        c = aff.get_coefficient_val(PARAM, i).to_python()
        if c:
            total += int(c) * integer(aff.get_dim_name(PARAM, i) or "")
    for i in range(aff.dim(DIV)):
        c = aff.get_coefficient_val(DIV, i).to_python()
        if c:
            inner = division(aff.get_div(i))
            if inner is None:
                return None
            total += int(c) * inner
    return total


def division(div: isl.Aff) -> Expr | None:
    """floor(numerator / denominator) as an expression; None when it involves the set variable."""
    denominator = int(div.get_denominator_val().to_python())
    numerator_aff = div.scale_val(isl.Val(denominator))
    if numerator_aff.get_coefficient_val(isl.dim_type.in_, 0).to_python() != 0:
        return None
    numerator = _rest(numerator_aff)
    return None if numerator is None else floordiv(numerator, sympy.Integer(denominator))


def _span(lo: Expr, hi: Expr | None, guard: Expr, end: Expr) -> Span:
    stop = end if hi is None else minimum(hi + 1, end)
    return Span(lo, stop if guard == sympy.true else where(guard, stop, lo))


def _hull(flat: isl.Set, context: isl.Set, end: Expr) -> Span:
    hull = flat.simple_hull()
    found = None if hull.is_empty() else interval(hull, context)
    return _span(*found, end) if found else Span(sympy.Integer(0), end)

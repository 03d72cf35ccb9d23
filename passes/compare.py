"""compare: comparisons over tiles with one operation an element.

A comparison of rows with columns is written with the columns alone on one side: what is on the other side is
computed once a row, and an element costs one comparison.

Before::  row - col <= p0 and abs(col - row) < 9
After::   col >= row - p0 and col < row + 9 and col > row - 9

Leaves alone: comparisons in which a product, a division or a table holds rows and columns together.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
from sympy.core.relational import Relational

from ..ir.expr import Expr, kind, sum_of

REVERSED = {sympy.Ge: sympy.Le, sympy.Gt: sympy.Lt, sympy.Le: sympy.Ge, sympy.Lt: sympy.Gt}


def separated(predicate: Expr, is_column: Callable[[Expr], bool]) -> Expr:
    """A predicate over tiles whose comparisons are between columns and rows, where they can be."""
    bounded = predicate.replace(lambda e: isinstance(e, Relational), _without_abs)
    return bounded.replace(lambda e: isinstance(e, Relational), lambda e: _separate(e, is_column))


def _without_abs(comparison: Relational) -> Expr:
    """|x| <= y as two comparisons, each of which may be separated."""
    less = {sympy.Ge: sympy.Le, sympy.Gt: sympy.Lt}.get(comparison.func)
    small, large = comparison.args if less is None else reversed(comparison.args)
    relation = comparison.func if less is None else less
    if relation not in (sympy.Le, sympy.Lt) or not isinstance(small, sympy.Abs) or kind(small) != "int":
        return comparison
    return sympy.And(relation(small.args[0], large), relation(-small.args[0], large))


def _separate(comparison: Relational, is_column: Callable[[Expr], bool]) -> Expr:
    left: Expr = comparison.args[0]
    right: Expr = comparison.args[1]
    if kind(left) != "int" or kind(right) != "int":
        return comparison
    columns: list[Expr] = []
    others: list[Expr] = []
    for term in sympy.Add.make_args(sympy.expand(left - right)):
        of_column = [is_column(s) for s in term.free_symbols]
        if any(of_column) and not _alone(term, is_column):
            return comparison
        (columns if any(of_column) else others).append(term)
    if not columns or not others:
        return comparison
    turned = all(t.as_coeff_Mul()[0] < 0 for t in columns)
    if turned:
        columns, others = [-t for t in columns], [-t for t in others]
    relation = REVERSED.get(comparison.func, comparison.func) if turned else comparison.func
    return relation(sum_of(columns), sum_of([-t for t in others]))


def _alone(term: Expr, is_column: Callable[[Expr], bool]) -> bool:
    """Whether a term with a column has nothing else in it that differs within a tile."""
    return not any(
        s.name.startswith("row") or s.name == "head" for s in term.free_symbols if not is_column(s)
    )

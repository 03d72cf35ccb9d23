"""rounding: scores whose integers are taken together before they meet floats.

sympy writes 0.5 * (score + (q - k)) as a flat sum of products. Summed in f32, a distance of two far
positions would be the difference of two large, rounded numbers; kept together, it is exact.

    >>> from ..ir.expr import integer, parse, real, to_text
    >>> names = {"score": real("score"), "q": integer("q"), "k": integer("k")}
    >>> to_text(together(parse("0.5 * (score + (q - k))", names), "f32"))
    '0.5 * cast(f32, q - k) + 0.5 * score'

Leaves alone: integer expressions, and sums with at most one integer part a coefficient.
"""

from __future__ import annotations

import sympy

from ..ir.expr import Expr, cast, kind


def together(expr: Expr, floats: str) -> Expr:
    """expr with the integer parts of each sum cast to the dtype `floats` as one."""
    if not expr.args or expr.is_Relational or kind(expr) != "float":
        return expr
    args = [together(a, floats) for a in expr.args]
    if isinstance(expr, sympy.Add):
        args = _grouped(args, floats)
    return expr if tuple(args) == expr.args else expr.func(*args)


def _grouped(terms: list[Expr], floats: str) -> list[Expr]:
    """Terms c * integer of one |c| added up in integers."""
    parts: dict[Expr, list[Expr]] = {}
    rest: list[Expr] = []
    for term in terms:
        factor, value = term.as_coeff_Mul()
        if factor.is_Integer:
            factor, value = sympy.Integer(1), term
        if kind(value) == "int" and not value.is_number:
            parts.setdefault(abs(factor), []).append(value if factor > 0 else -value)
        else:
            rest.append(term)
    for factor, values in parts.items():
        whole = cast(sympy.Symbol(floats), sympy.Add(*values)) if len(values) > 1 else values[0]
        rest.append(factor * whole)
    return rest

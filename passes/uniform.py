"""uniform: what a mask reads once a batch and head becomes an integer that isl can hold.

    >>> print(uniform(Mask.parse("mask(; c0: i32[1]) { k <= q and q - k <= c0[b] }")))
    mask(; c0: i32[1]) { let u0 = min(max(-c0[b], -268435456), 268435456); k <= q and q + u0 - k <= 0 }

A term without q and k has one value in a kernel's program: a window or a length by batch or head, a bound
of a sequence, a product of runtime integers. As a parameter of the mask's sets it gives loops and full
tiles in closed form, as a runtime integer of the mask does. It is clamped, so that kernels add to it in 32
bits: no difference of positions comes near the limits, so comparisons stay what they are.

Leaves alone: terms that isl holds as they are, what is read at q or k, what is divided or reduced, where
a clamp would tell, and masks with many such terms.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
from sympy.core.relational import Relational

from ..ir.affine import ISL_LOCK, to_pw_aff
from ..ir.expr import Expr, integer, kind, maximum, minimum, where
from ..ir.mask import Mask

MAX_LETS = 8  # parameters that isl carries through every projection
LIMIT = sympy.Integer(2**28)  # beyond every length; the sum of a few fits 32 bits
PAIR = {integer("q"), integer("k")}


def uniform(mask: Mask) -> Mask:
    """The mask with uniform terms as `lets`, or the mask itself."""
    if mask.lets:
        return mask
    names: dict[Expr, Expr] = {}
    with ISL_LOCK:
        predicate = _predicate(mask.predicate, names)
    if not names or len(names) > MAX_LETS:
        return mask
    return replace(mask, predicate=predicate, lets=tuple((name.name, term) for term, name in names.items()))


def _predicate(expr: Expr, names: dict[Expr, Expr]) -> Expr:
    if isinstance(expr, (sympy.And, sympy.Or, sympy.Not)):
        return expr.func(*(_predicate(a, names) for a in expr.args))
    if not isinstance(expr, Relational):
        return expr
    if any(kind(a) == "float" for a in expr.args):
        chosen = where(expr, sympy.Integer(1), sympy.Integer(0))
        return expr if _varies(expr) else _named(chosen, names) > 0
    known = len(names)
    sides: tuple[Expr, ...] = expr.args
    difference = _integer(sides[0] - sides[1], names)
    return expr if len(names) == known else expr.func(difference, 0)


def _integer(expr: Expr, names: dict[Expr, Expr]) -> Expr:
    """expr with uniform terms named where they are added, compared or chosen."""
    if not _varies(expr):
        return _named(minimum(maximum(expr, -LIMIT), LIMIT), names) if to_pw_aff(expr) is None else expr
    if isinstance(expr, sympy.Add):
        fixed = [a for a in expr.args if not _varies(a) and to_pw_aff(a) is None]
        rest = [_integer(a, names) for a in expr.args if a not in fixed]
        return sympy.Add(*rest, *([_integer(sympy.Add(*fixed), names)] if fixed else []))
    if isinstance(expr, where):
        condition, *values = expr.args
        return where(_predicate(condition, names), *(_integer(a, names) for a in values))
    if isinstance(expr, (sympy.Mul, sympy.Abs, minimum, maximum)) and to_pw_aff(expr) is None:
        return expr.func(*(_integer(a, names) for a in expr.args))
    return expr


def _named(term: Expr, names: dict[Expr, Expr]) -> Expr:
    return names.setdefault(term, integer(f"u{len(names)}"))


def _varies(expr: Expr) -> bool:
    return not PAIR.isdisjoint(expr.free_symbols)

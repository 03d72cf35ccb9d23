"""normalize: a mask's predicate as an affine bound and an opaque rest, each as simple as isl can make it.

    >>> print(normalize_mask(Mask.parse("mask() { k <= q + 1 and not (k > q) and k < q + 7 }")))
    mask() { q >= k }

The affine bound is what all opaque parts leave: `mask.may`. Simplified text is taken when isl proves it
equal and it is shorter. `disjuncts` takes a predicate apart at its disjunctions.

Leaves alone: opaque atoms, and predicates that isl would only make longer.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import islpy as isl
import sympy

from ..ir.affine import condition, locked, to_sets
from ..ir.expr import Expr, to_text
from ..ir.mask import Mask

MAX_DISJUNCTS = 16


@locked
def normalize_mask(mask: Mask) -> Mask:
    """The same mask with a shorter predicate where isl finds one."""
    affine, opaque = split(mask.predicate)
    return replace(mask, predicate=sympy.And(simplified(affine), opaque))


def split(predicate: Expr) -> tuple[Expr, Expr]:
    """(affine, opaque): the conjuncts that isl holds exactly, and the others."""
    parts: dict[bool, list[Expr]] = {True: [], False: []}
    for part in sympy.And.make_args(predicate):
        may, must = to_sets(part)
        parts[may.is_equal(must)].append(part)
    return sympy.And(*parts[True]), sympy.And(*parts[False])


def simplified(predicate: Expr) -> Expr:
    """An affine predicate as isl would write it on q, k >= 0, when that is shorter."""
    quadrant = isl.Set("{ [q, k] : q >= 0 and k >= 0 }")
    may, _ = to_sets(predicate)
    short = condition(may.intersect(quadrant).coalesce().gist(quadrant).coalesce())
    if len(to_text(short)) >= len(to_text(predicate)):
        return predicate
    again, _ = to_sets(short)
    return short if again.intersect(quadrant).is_equal(may.intersect(quadrant)) else predicate


def disjuncts(predicate: Expr) -> tuple[Expr, ...]:
    """Predicates whose disjunction is the given one: disjunctions pulled outwards, as far as that pays."""
    nnf = sympy.to_nnf(predicate, simplify=False)
    found = _distribute(nnf)
    return tuple(dict.fromkeys(found)) if len(found) <= MAX_DISJUNCTS else (predicate,)


def _distribute(predicate: Expr) -> list[Expr]:
    if isinstance(predicate, sympy.Or):
        return [d for a in predicate.args for d in _distribute(a)]
    if isinstance(predicate, sympy.And):
        choices = [_distribute(a) for a in predicate.args]
        total = 1
        for c in choices:
            total *= len(c)
        if total <= MAX_DISJUNCTS:
            return [sympy.And(*c) for c in itertools.product(*choices)]
    return [predicate]

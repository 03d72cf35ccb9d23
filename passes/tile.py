"""tile: which key tiles a row tile visits, and which of them need no mask, in closed form.

Works on the unbounded quadrant: a tile is *touched* when it holds a point of the group, *full* when
every key of it attends to every row of it. Both are sets over (row tile, residue, key tile)
coordinates, parametric in the mask's integers, projected exactly by isl; loop bounds and the full
condition are read off them. Clipping to kv_len happens here too, as one more upper bound.

Leaves alone: groups whose loops are already there.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace

import islpy as isl
import sympy

from ..ir.affine import ISL_LOCK, QuotaExceeded, condition, flatten, quota
from ..ir.expr import Expr, all_of, ceildiv, integer
from ..ir.kernel import Span
from ..ir.order import Order
from ..ir.plan import Group, Loops, Schedule
from .bounds import spans_of
from .lists import listed
from .tilesets import (
    EVERYWHERE,
    SET,
    column_index,
    coordinates,
    dim_names,
    known_facts,
    linear,
    residue,
    simplify_tiles,
    start,
    tile_sets,
)
from .truth import TileTruth

NOTHING = "{ [q] -> [k] : false }"
# Of isl, for one dimension and for more: a few times what the pattern library takes.
MAX_OPERATIONS = (200_000, 1_500_000)


def plan(group: Group, schedule: Schedule, monotone: frozenset[str] = frozenset()) -> tuple[Group, Loops]:
    """The loops of one group under one schedule, and the group they were made for.

    That is the group itself, or, where closed forms would take isl too long, one with coarser bounds
    around the same predicate. monotone: captured tensors known to be sorted."""
    limit = MAX_OPERATIONS[len(group.order.dims) > 1]
    with ISL_LOCK:
        for bound in (lambda: group, lambda: _hull(group)):
            candidate = bound()
            with suppress(QuotaExceeded), quota(limit):
                found = _closed_forms(candidate, schedule)
                break
        else:
            candidate = replace(group, may=EVERYWHERE, must=NOTHING)
            found = _closed_forms(candidate, schedule)
        return candidate, _loops(candidate, schedule, monotone, *found)


def plan_loops(group: Group, schedule: Schedule, monotone: frozenset[str] = frozenset()) -> Loops:
    """The loops of one group, whatever they cost. monotone: captured tensors known to be sorted."""
    with ISL_LOCK:
        return _loops(group, schedule, monotone, *_closed_forms(group, schedule))


def _hull(group: Group) -> Group:
    """The group with the half-planes around its points as bounds from above, and none from below."""
    hull = EVERYWHERE
    with suppress(QuotaExceeded), quota(MAX_OPERATIONS[0]):
        hull = str(isl.Map.from_basic_map(isl.Map(group.may).remove_divs().simple_hull()))
    return replace(group, may=hull, must=NOTHING)


def _closed_forms(group: Group, schedule: Schedule) -> tuple[tuple[tuple[Span, ...], ...], Expr, Expr]:
    """Spans, which of their tiles are touched, and which of those are full as far as `must` knows."""
    touched, full = tile_sets(group, schedule)
    spans, exact = _spans(group.order, schedule, touched)
    skip = sympy.true if exact else condition(simplify_tiles(touched, group.order, schedule))
    whole = _condition(full.gist(touched), group.order, schedule) if group.exact else sympy.false
    return spans, skip, whole


def _loops(
    group: Group,
    schedule: Schedule,
    monotone: frozenset[str],
    spans: tuple[tuple[Span, ...], ...],
    skip: Expr,
    whole: Expr,
) -> Loops:
    """The loops from closed forms; of what has none, tiles are judged by their predicate."""
    within = _within(group.order, schedule)
    known = Loops(spans, skip, all_of([whole, within]) if group.exact else within)
    found = listed(group, schedule, known, monotone)
    if found is not None:
        return found
    if not group.exact:
        may, whole = TileTruth(group.order, schedule, monotone).of(group.predicate)
        skip = all_of([skip, may])
        if schedule.anchors or len(group.order.dims) > 1:
            everything = Group(group.order, EVERYWHERE, EVERYWHERE, sympy.true)
            valid = tile_sets(everything, schedule)[1]
            whole = all_of([whole, _condition(valid, group.order, schedule)])
    return Loops(spans, skip, all_of([whole, within]))


def _condition(tiles: isl.Set, order: Order, schedule: Schedule) -> Expr:
    return sympy.false if tiles.is_empty() else condition(simplify_tiles(tiles, order, schedule))


def _spans(order: Order, schedule: Schedule, touched: isl.Set) -> tuple[tuple[tuple[Span, ...], ...], bool]:
    """Spans of each key-tile coordinate given the row tile and the outer key tiles."""
    _, _, loops = coordinates(order)
    rank = len(order.dims)
    kept = touched.dim(SET) - rank
    names = dim_names(touched)[:kept]
    known = isl.Set(f"[{', '.join(names)}] -> {{ : {known_facts(order, schedule, names)} }}")
    out, exact = [], True
    for d, name in enumerate(loops):
        seen = touched.project_out(SET, kept + d + 1, rank - d - 1).coalesce()
        spans, sharp = spans_of(seen, name, known, _last(order, schedule, d))
        exact = exact and sharp
        out.append(spans or (Span(sympy.Integer(0), sympy.Integer(0)),))
        known = known.intersect(flatten(seen).params())
    return tuple(out), exact


def _last(order: Order, schedule: Schedule, d: int) -> Expr:
    """One past the last key tile of dimension d that can hold a key below kv_len or the width."""
    dim = order.dims[d]
    if dim.width is not None:
        extent: Expr = sympy.Integer(dim.width)
    else:
        inner = math.prod(other.width or 1 for other in order.dims[1:])
        extent = ceildiv(integer("kv_len"), inner)
    first = residue(order, d) + dim.col_stride * start(schedule, d)
    return ceildiv(extent - first, dim.col_stride * schedule.cols[d])


def _within(order: Order, schedule: Schedule) -> Expr:
    """No key of the tile lies at or beyond kv_len."""
    last = column_index(order, schedule, [sympy.Integer(c - 1) for c in schedule.cols])
    return linear(order, last) < integer("kv_len")

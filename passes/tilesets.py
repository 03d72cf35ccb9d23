"""Tiles as integer sets: the coordinates of row and key tiles, and which hold or miss points of a mask.

Works on the unbounded quadrant q, k >= 0. Sets range over (m0, ..: row tile; r0, ..: residue;
n0, ..: key tile) coordinates and are parametric in the mask's integers; isl projects them exactly.
"""

from __future__ import annotations

import islpy as isl
import sympy

from ..ir.expr import Expr, floormod, integer, to_text
from ..ir.order import Order
from ..ir.plan import Group, Schedule

SET = isl.dim_type.set
EVERYWHERE = "{ [q] -> [k] : q >= 0 and k >= 0 }"


def coordinates(order: Order) -> tuple[list[str], list[str], list[str]]:
    """Names of the row-tile, residue and key-tile coordinates of an order."""
    rank = range(len(order.dims))
    return (
        [f"m{d}" for d in rank],
        [f"r{d}" for d in rank if order.dims[d].row_stride > 1],
        [f"n{d}" for d in rank],
    )


def row_index(order: Order, schedule: Schedule, inner: list[Expr]) -> list[Expr]:
    """Per dimension, the row coordinate q_d of in-tile coordinates `inner`."""
    out = []
    for d, dim in enumerate(order.dims):
        at = schedule.rows[d] * integer(f"m{d}") + inner[d]
        out.append(dim.row_stride * at + integer(f"r{d}") if dim.row_stride > 1 else at)
    return out


def column_index(order: Order, schedule: Schedule, inner: list[Expr]) -> list[Expr]:
    """Per dimension, the key coordinate k_d of in-tile coordinates `inner`."""
    return [
        dim.col_stride * (start(schedule, d) + schedule.cols[d] * integer(f"n{d}") + inner[d])
        + residue(order, d)
        for d, dim in enumerate(order.dims)
    ]


def start(schedule: Schedule, d: int) -> Expr:
    """The step at which key tile 0 of a row tile begins: 0, or its anchor."""
    anchor = schedule.anchor(d)
    return sympy.Integer(0) if anchor is None else schedule.rows[d] * integer(f"m{d}") + anchor


def residue(order: Order, d: int) -> Expr:
    """(slope * r + shift) mod col_stride of dimension d."""
    dim = order.dims[d]
    if dim.row_stride == 1 or dim.slope == 0:
        return sympy.Integer(dim.shift % dim.col_stride)
    if (dim.slope, dim.shift, dim.row_stride) == (1, 0, dim.col_stride):
        return integer(f"r{d}")
    return floormod(dim.slope * integer(f"r{d}") + dim.shift, sympy.Integer(dim.col_stride))


def linear(order: Order, parts: list[Expr]) -> Expr:
    """The linear index of per-dimension coordinates."""
    total = parts[0]
    for dim, part in zip(order.dims[1:], parts[1:], strict=True):
        total = total * dim.width + part
    return sympy.expand(total)


def tile_sets(group: Group, schedule: Schedule) -> tuple[isl.Set, isl.Set]:
    """(touched, full): exact sets over (m.., r.., n..), unbounded in m and n from above."""
    may, must = isl.Map(group.may), isl.Map(group.must)
    inside, valid_rows, valid_cols = _tile_points(group.order, schedule)
    drop = 2 * len(group.order.dims)
    kept = inside.dim(SET) - drop

    def project(points: isl.Set) -> isl.Set:
        return points.project_out(SET, kept, drop).coalesce()

    pairs = _pairs(group.order, schedule)
    cells = inside.intersect(valid_rows)
    touched = project(cells.intersect(valid_cols).intersect(_preimage(pairs, may)))
    hit = cells.intersect(valid_cols).intersect(_preimage(pairs, must))
    full = touched.subtract(project(cells.subtract(hit))).coalesce()
    return touched, full


def _names(order: Order) -> list[str]:
    m, r, n = coordinates(order)
    rank = range(len(order.dims))
    return [*m, *r, *n, *(f"i{d}" for d in rank), *(f"j{d}" for d in rank)]


def _axis_text(order: Order, d: int, schedule: Schedule, side: str) -> str:
    dim = order.dims[d]
    if side == "q":
        at = f"({schedule.rows[d]} * m{d} + i{d})"
        return f"({dim.row_stride} * {at} + r{d})" if dim.row_stride > 1 else at
    shift = residue(order, d)
    offset = f"({dim.slope} * r{d} + {dim.shift}) mod {dim.col_stride}" if shift.free_symbols else str(shift)
    first = to_text(start(schedule, d))
    return f"({dim.col_stride} * ({first} + {schedule.cols[d]} * n{d} + j{d}) + ({offset}))"


def _linear_text(order: Order, parts: list[str]) -> str:
    text = parts[0]
    for dim, part in zip(order.dims[1:], parts[1:], strict=True):
        text = f"({dim.width} * {text} + {part})"
    return text


def _tile_points(order: Order, schedule: Schedule) -> tuple[isl.Set, isl.Set, isl.Set]:
    names = ", ".join(_names(order))
    rank = range(len(order.dims))
    box = [f"0 <= m{d} and 0 <= n{d}" for d in rank]
    box += [f"0 <= i{d} < {schedule.rows[d]} and 0 <= j{d} < {schedule.cols[d]}" for d in rank]
    box += [f"0 <= r{d} < {order.dims[d].row_stride}" for d in rank if order.dims[d].row_stride > 1]
    inner = [d for d in rank if order.dims[d].width is not None]
    rows = [f"{_axis_text(order, d, schedule, 'q')} < {order.dims[d].width}" for d in inner]
    cols = [f"{_axis_text(order, d, schedule, 'k')} < {order.dims[d].width}" for d in inner]
    cols += [f"{_axis_text(order, d, schedule, 'k')} >= 0" for d in rank if schedule.anchor(d) is not None]
    prefix = _params(schedule)
    return tuple(isl.Set(f"{prefix}{{ [{names}] : {' and '.join(c) or 'true'} }}") for c in (box, rows, cols))  # type: ignore[return-value]


def _params(schedule: Schedule) -> str:
    free = sorted({s.name for a in schedule.anchors if a is not None for s in a.free_symbols})
    return f"[{', '.join(free)}] -> " if free else ""


def _pairs(order: Order, schedule: Schedule) -> isl.Map:
    rank = range(len(order.dims))
    q = _linear_text(order, [_axis_text(order, d, schedule, "q") for d in rank])
    k = _linear_text(order, [_axis_text(order, d, schedule, "k") for d in rank])
    return isl.Map(f"{_params(schedule)}{{ [{', '.join(_names(order))}] -> [q, k] : q = {q} and k = {k} }}")


def _preimage(pairs: isl.Map, region: isl.Map) -> isl.Set:
    flat = region.move_dims(isl.dim_type.in_, 1, isl.dim_type.out, 0, 1).domain()
    return pairs.intersect_range(flat.reset_tuple_id() if flat.has_tuple_id() else flat).domain()


def known_facts(order: Order, schedule: Schedule, names: list[str]) -> str:
    """What holds of every coordinate: none is negative, residues and inner tiles are bounded."""
    facts = [f"{n} >= 0" for n in names]
    for d, dim in enumerate(order.dims):
        if dim.row_stride > 1:
            facts.append(f"r{d} < {dim.row_stride}")
        if dim.width is not None:
            facts.append(f"{dim.row_stride * schedule.rows[d]} * m{d} < {dim.width}")
    return " and ".join(facts)


def dim_names(points: isl.Set) -> list[str]:
    """The names of a set's dimensions."""
    return [points.get_dim_name(SET, i) or "" for i in range(points.dim(SET))]


def simplify_tiles(points: isl.Set, order: Order, schedule: Schedule) -> isl.Set:
    """`points` simplified under what holds of every coordinate."""
    names = dim_names(points)
    known = isl.Set(f"{{ [{', '.join(names)}] : {known_facts(order, schedule, names)} }}")
    return points.gist(known).coalesce()

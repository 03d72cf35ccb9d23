"""distance: how far keys lie from their row, k - q in each dimension of an order, proven by isl."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import islpy as isl

from ..ir.affine import ISL_LOCK, QuotaExceeded, quota, to_expr
from ..ir.expr import Expr, to_text
from ..ir.order import Order, OrderDim
from ..ir.plan import Group

MAX_OPERATIONS = 200_000  # of isl, to bound k - q in one dimension


def anchor(group: Group, d: int) -> Expr | None:
    """The least k_d - q_d of the group, in steps of the stride: an affine form of params, or None.

    Proven by isl to bound every pair. None when nothing bounds the distance, or when rows and
    columns of the dimension do not share their residue."""
    if not in_step(group.order.dims[d]):
        return None
    with ISL_LOCK, suppress(QuotaExceeded), quota(MAX_OPERATIONS):
        distance = _distances(group, d)
        if distance.is_empty():
            return None
        try:
            pieces = distance.dim_min(0).get_pieces()
        except isl.Error:  # unbounded for some parameters
            return None
        for _, least in pieces:
            form = to_expr(isl.PwAff.from_aff(least))
            if _bounds(form, distance):
                return form
    return None


def interval(group: Group, d: int) -> tuple[float, float]:
    """Least and largest k_d - q_d of the group, in steps of the dimension's stride; infinite if unbounded."""
    with ISL_LOCK, suppress(QuotaExceeded), quota(MAX_OPERATIONS):
        distance = _distances(group, d)
        return _number(distance.dim_min_val, -math.inf), _number(distance.dim_max_val, math.inf)
    return -math.inf, math.inf


def _number(bound: Callable[[int], isl.Val], unbounded: float) -> float:
    try:
        value = bound(0)
    except isl.Error:  # unbounded for some parameters
        return unbounded
    return int(value.to_python()) if value.is_int() else unbounded


def bounds(form: Expr, group: Group, d: int) -> bool:
    """Whether an affine form of params is at most every k_d - q_d, in steps of the stride."""
    with ISL_LOCK:
        return in_step(group.order.dims[d]) and _bounds(form, _distances(group, d))


def in_step(dim: OrderDim) -> bool:
    """Whether rows and columns of a tile share their residue, so that k - q is a number of steps."""
    return (dim.row_stride, dim.slope if dim.col_stride > 1 else 1, dim.shift) == (dim.col_stride, 1, 0)


def _bounds(form: Expr, distance: isl.Set) -> bool:
    """Whether no distance is below an affine form of params."""
    names = ", ".join(sorted(s.name for s in form.free_symbols))
    return distance.is_subset(isl.Set(f"[{names}] -> {{ [x] : x >= {to_text(form)} }}"))


def _distances(group: Group, d: int) -> isl.Set:
    """All values of (k_d - q_d) / stride."""
    order: Order = group.order
    inner = math.prod(x.width or 1 for x in order.dims[d + 1 :])

    def part(index: str) -> str:
        text = f"floor({index} / {inner})" if inner > 1 else index
        return f"({text} mod {order.dims[d].width})" if order.dims[d].width is not None else text

    steps = isl.Map(
        f"{{ [[q] -> [k]] -> [floor(({part('k')} - {part('q')}) / {order.dims[d].col_stride})] }}"
    )
    return isl.Map(group.may).wrap().apply(steps).coalesce()

"""align: give every part of a mask the row order in which it is dense.

Terms of stride s whose residue follows the row, k = slope * q + shift (mod s), run in residue order:
a row tile takes rows of one residue class, walks the columns of its class with the stride, and the
strided term is dense inside. Terms of stride 1 run in the natural order, terms of an n-d index space
in boxes. Terms that share an order share a group; groups merge by carrying the softmax.

Leaves alone: strides whose residue depends on a runtime integer or on a floor of q, and strides so long
that a residue class has few rows (natural order).
"""

from __future__ import annotations

import islpy as isl

from ..ir.affine import ISL_LOCK, condition
from ..ir.expr import all_of
from ..ir.formats import ACSR
from ..ir.mask import Mask
from ..ir.order import Order, OrderDim
from ..ir.plan import Group
from .decompose import Term
from .progression import as_set

PARAM = isl.dim_type.param
MAX_STRIDE = 4096  # a row tile of one residue class then spans 128k rows or more


def align_mask(mask: Mask, terms: tuple[Term, ...], *, whole: bool = True) -> tuple[Group, ...]:
    """Groups of a decomposed mask, natural order first. An empty mask is one group without points.

    whole: the terms make up the mask, so that a single group may keep the mask's own predicate."""
    with ISL_LOCK:
        by_order: dict[Order, isl.Map] = {}
        for term in terms:
            region = isl.Map(term.region)
            order = _box_order(term) if isinstance(term, ACSR) and term.widths else _plain_order(region)
            by_order[order] = by_order[order].union(region) if order in by_order else region
        if not by_order:
            by_order[Order()] = isl.Map("{ [q] -> [k] : false }")
        ranked = sorted(by_order.items(), key=lambda item: (not item[0].natural, str(item[0])))
        return tuple(
            _group(mask, order, region.coalesce(), alone=whole and len(ranked) == 1)
            for order, region in ranked
        )


def _plain_order(region: isl.Map) -> Order:
    info = region.get_range_stride_info(0)
    stride = int(info.get_stride().to_python())
    residue = _residue(info.get_offset(), stride)
    if not 1 < stride <= MAX_STRIDE or residue is None:
        return Order()
    slope, shift = residue
    return Order((OrderDim(None, stride if slope else 1, stride, slope, shift),))


def _residue(offset: isl.Aff, stride: int) -> tuple[int, int] | None:
    """(slope, shift) when the offset is slope * q + shift modulo the stride, else None."""
    if offset.dim(isl.dim_type.div) or not offset.get_denominator_val().is_one():
        return None
    if any(not offset.get_coefficient_val(PARAM, i).is_zero() for i in range(offset.dim(PARAM))):
        return None
    slope = int(offset.get_coefficient_val(isl.dim_type.in_, 0).to_python()) % stride
    return slope, int(offset.get_constant_val().to_python()) % stride


def _box_order(term: ACSR) -> Order:
    dims = []
    for width, p in zip((None, *term.widths), term.progressions, strict=True):
        own = p.stride > 1 and len(p.offset.free_symbols) == 1
        dims.append(OrderDim(width, p.stride, p.stride, 1, 0) if own else OrderDim(width))
    return Order(tuple(dims))


def _group(mask: Mask, order: Order, region: isl.Map, *, alone: bool) -> Group:
    may = str(region)
    must = may if mask.exact else str(region.intersect(mask.must).coalesce())
    if alone and (order.natural or len(order.dims) > 1 or not mask.exact):
        return Group(order, may, must, mask.predicate, mask.lets)
    here = condition(as_set(_known_stride(order, region)))
    return Group(order, may, must, here if mask.exact else all_of([mask.predicate, here]), mask.lets)


def _known_stride(order: Order, region: isl.Map) -> isl.Map:
    """The region without what holds of every pair in this order: no negative index, one congruence."""
    known = "q >= 0 and k >= 0"
    if len(order.dims) == 1 and order.dims[0].col_stride > 1:
        dim = order.dims[0]
        known += f" and (k - {dim.slope} q - {dim.shift}) mod {dim.col_stride} = 0"
    return region.gist(isl.Map(f"{{ [q] -> [k] : {known} }}")).coalesce()

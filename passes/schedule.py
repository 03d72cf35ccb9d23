"""schedule: tile sizes and backend hints of every group.

CPU tiles keep 32 rows (two AVX-512 registers of f32) in the lanes; the micro-kernels then hold 8 by
2 accumulators. For boxes the shape is the one that reads the fewest keys a row tile, counting what
misaligned key tiles waste, from the extents of k - q in each dimension. Where k - q is bounded from
below, key tiles are anchored there instead of on a grid.

Leaves alone: groups whose schedule is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import suppress

import islpy as isl
import sympy

from ..ir.affine import ISL_LOCK, QuotaExceeded, quota, to_expr
from ..ir.errors import InputError
from ..ir.expr import Expr, to_text
from ..ir.order import Order, OrderDim
from ..ir.plan import Group, Schedule
from .spec import AttentionSpec

MAX_EXTENT = 1024
CPU_ROWS, CPU_KEYS = 32, 32
BOX_ROWS = 64
MAX_OPERATIONS = 200_000  # of isl, to bound k - q in one dimension
TILE_COST = 24  # what starting a key tile costs, in keys


def choose(spec: AttentionSpec, group: Group) -> Schedule:
    """The default schedule of a group on a target."""
    if spec.target_kind != "cpu":
        rows, keys, meta = gpu_tiles(spec)
        shape = (
            ((rows,), (keys,)) if len(group.order.dims) == 1 else box_shape(group, rows, keys, aligned=True)
        )
        return Schedule(*shape, lazy_rescale=False, meta=meta)
    keys = CPU_KEYS // 2 if spec.dtype == "f64" else CPU_KEYS
    anchors = tuple(anchor(group, d) for d in range(len(group.order.dims)))
    if len(group.order.dims) == 1:
        return Schedule((CPU_ROWS,), (keys,), anchors)
    return Schedule(*box_shape(group, BOX_ROWS, keys, aligned=None in anchors), anchors)


# Rows, keys, warps, stages by kind of number and padded head size: no spills on sm_80, sm_90, sm_100 and
# gfx942, the fastest of those tried on an H100 (bf16, D 64 and 128: 64 x 64 beat 128 x 64 by 15 to 30 %).
GPU_TILES = {
    "16-bit": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2), 1024: (32, 16, 8, 1)},
    "f32": {64: (64, 32, 4, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2), 1024: (16, 16, 8, 1)},
    "f64": {64: (32, 16, 4, 1), 128: (32, 16, 8, 1), 1024: (16, 16, 8, 1)},
}


def gpu_tiles(spec: AttentionSpec) -> tuple[int, int, tuple[tuple[str, int], ...]]:
    """Rows, keys and hints (warps, stages) of a GPU kernel."""
    table = GPU_TILES[spec.dtype if spec.dtype in GPU_TILES else "16-bit"]
    size = max(spec.qk_size, spec.v_size)
    rows, keys, warps, stages = next(found for limit, found in table.items() if size <= limit)
    if spec.target_kind == "hip":
        stages = min(stages, 2)
    return rows, keys, (("stages", stages), ("warps", warps))


def box_shape(
    group: Group, rows: int, keys: int, *, aligned: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Row and key tile shapes of an n-d order: the cheapest factorisations of `rows` and about `keys`.

    aligned: key tiles start on their own grid, so that u - 1 keys a dimension are wasted on average."""
    dims = group.order.dims
    reach = [_reach(group, d) for d in range(len(dims))]
    limits = [math.inf if x.width is None else -(-x.width // x.row_stride) for x in dims]

    def cost(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> float:
        tiles, read, waste = 1.0, 1.0, 1.0
        for t, u, r, limit in zip(*shape, reach, limits, strict=True):
            span = min(t + r, limit)
            count = (span + u - 1) / u if aligned else math.ceil(span / u) if span < math.inf else span
            tiles, read = tiles * count, read * count * u
            waste *= -(-limit // t) * t / limit if limit < math.inf else 1
        return (read + TILE_COST * tiles) * waste / math.prod(shape[0])

    key_shapes = [k for size in (keys // 2, keys, 2 * keys) for k in _factorisations(size, len(dims))]
    shapes = itertools.product(_factorisations(rows, len(dims)), key_shapes)
    return min(shapes, key=lambda s: (cost(s), s))


def _factorisations(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in (1 << e for e in range(total.bit_length()) if total % (1 << e) == 0):
        for rest in _factorisations(total // first, parts - 1):
            yield (first, *rest)


def anchor(group: Group, d: int) -> Expr | None:
    """The least k_d - q_d of the group, in steps of the stride: an affine form of params, or None.

    Proven by isl to bound every pair. None when nothing bounds the distance, or when rows and
    columns of the dimension do not share their residue."""
    if not _in_step(group.order.dims[d]):
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


def check(group: Group, schedule: Schedule) -> None:
    """Whether a given schedule computes this group. Raises InputError."""
    rank = len(group.order.dims)
    for name, extents in (("rows", schedule.rows), ("cols", schedule.cols)):
        sizes = all(isinstance(n, int) and n >= 1 for n in extents)
        if len(extents) != rank or not sizes or math.prod(extents) > MAX_EXTENT:
            wanted = f"one extent a dimension ({rank}), at least 1 each, {MAX_EXTENT} together at most"
            raise InputError(f"schedule.{name}", wanted, extents)
    if len(schedule.anchors) not in (0, rank):
        raise InputError("schedule.anchors", f"none, or one anchor a dimension ({rank})", schedule.anchors)
    for d, form in enumerate(schedule.anchors):
        if form is None:
            continue
        with ISL_LOCK:
            fits = isinstance(form, sympy.Basic) and _in_step(group.order.dims[d])
            if not fits or not _bounds(form, _distances(group, d)):
                expected = "an expression of the mask's integers that bounds k - q from below"
                raise InputError(f"schedule.anchors[{d}]", expected, form, "Leave it out, or pass None")


def _in_step(dim: OrderDim) -> bool:
    """Whether rows and columns of a tile share their residue, so that k - q is a number of steps."""
    return (dim.row_stride, dim.slope if dim.col_stride > 1 else 1, dim.shift) == (dim.col_stride, 1, 0)


def _bounds(form: Expr, distance: isl.Set) -> bool:
    """Whether no distance is below an affine form of params."""
    names = ", ".join(sorted(s.name for s in form.free_symbols))
    return distance.is_subset(isl.Set(f"[{names}] -> {{ [x] : x >= {to_text(form)} }}"))


def _reach(group: Group, d: int) -> float:
    """max - min of k_d - q_d over the group, in steps of the dimension's stride; inf when unbounded."""
    with ISL_LOCK, suppress(QuotaExceeded), quota(MAX_OPERATIONS):
        distance = _distances(group, d)
        try:
            low, high = distance.dim_min_val(0), distance.dim_max_val(0)
        except isl.Error:  # unbounded for some parameters
            return math.inf
        return int(high.to_python()) - int(low.to_python()) if low.is_int() and high.is_int() else math.inf
    return math.inf


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

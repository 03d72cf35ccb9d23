"""schedule: tile sizes and backend hints of every group.

CPU tiles keep 32 rows (two AVX-512 registers of f32) in the lanes; the micro-kernels then hold 8 by
2 accumulators. For boxes the shape is the one that reads the fewest keys a row tile, counting what
misaligned key tiles waste, from the extents of k - q in each dimension.

Leaves alone: groups whose schedule is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import islpy as isl

from ..ir.affine import ISL_LOCK
from ..ir.order import Order
from ..ir.plan import Group, Schedule
from .spec import AttentionSpec

CPU_ROWS, CPU_KEYS = 32, 32
BOX_ROWS = 64
TILE_COST = 24  # what starting a key tile costs, in keys


def choose(spec: AttentionSpec, group: Group) -> Schedule:
    """The default schedule of a group on a target."""
    if spec.target_kind == "cpu":
        rows, keys, lazy, meta = CPU_ROWS, CPU_KEYS, True, ()
        if spec.dtype == "f64":
            rows = 16
    else:
        rows, keys, lazy, meta = gpu_tiles(spec)
    if len(group.order.dims) == 1:
        return Schedule((rows,), (keys,), lazy, meta)
    with ISL_LOCK:
        shape = box_shape(group, BOX_ROWS if spec.target_kind == "cpu" else rows, keys)
    return Schedule(*shape, lazy, meta)


def gpu_tiles(spec: AttentionSpec) -> tuple[int, int, bool, tuple[tuple[str, int], ...]]:
    """Rows, keys, lazy rescaling and hints (warps, stages) that compile for sm_80 and later without spills."""
    size = max(spec.qk_size, spec.v_size)
    if spec.dtype in ("f32", "f64"):
        return (64, 32, False, (("stages", 2), ("warps", 4))) if size <= 64 else (32, 32, False, (("stages", 2), ("warps", 4)))
    if size <= 64:
        return 128, 64, False, (("stages", 3), ("warps", 4))
    if size <= 128:
        return 128, 64, False, (("stages", 2), ("warps", 8))
    return 64, 32, False, (("stages", 2), ("warps", 4))


def box_shape(group: Group, rows: int, keys: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Row and key tile shapes of an n-d order: the cheapest factorisations of `rows` and about `keys`."""
    reach = [_reach(group, d) for d in range(len(group.order.dims))]
    widths = [dim.width for dim in group.order.dims]
    limits = [math.inf if w is None else max(1, -(-w // group.order.dims[d].row_stride)) for d, w in enumerate(widths)]

    def keys_read(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> float:
        tiles, read = 1.0, 1.0
        for d, (t, u) in enumerate(zip(*shape, strict=True)):
            span = min(t + reach[d] + u - 1, limits[d] + u - 1)
            tiles *= span / u
            read *= span
        waste = math.prod(-(-limit // t) * t / limit for t, limit in zip(shape[0], limits, strict=True) if limit < math.inf)
        return (read + TILE_COST * tiles) * waste / math.prod(shape[0])

    shapes = itertools.product(_factorisations(rows, len(reach)), [k for size in (keys // 2, keys) for k in _factorisations(size, len(reach))])
    return min(shapes, key=lambda s: (keys_read(s), s))


def _factorisations(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in (1 << e for e in range(total.bit_length()) if total % (1 << e) == 0):
        for rest in _factorisations(total // first, parts - 1):
            yield (first, *rest)


def _reach(group: Group, d: int) -> float:
    """max - min of k_d - q_d over the group, in steps of the dimension's stride; inf when unbounded."""
    order: Order = group.order
    steps = _steps(order, d)
    pairs = isl.Map(group.may).wrap().flatten()
    difference = pairs.apply(steps)
    try:
        low, high = difference.dim_min_val(0), difference.dim_max_val(0)
    except isl.Error:
        return math.inf
    if not (low.is_int() and high.is_int()):
        return math.inf
    return int(high.to_python()) - int(low.to_python())


def _steps(order: Order, d: int) -> isl.Map:
    """[q, k] -> [ (k_d - q_d) / stride ]."""
    inner = math.prod(x.width or 1 for x in order.dims[d + 1 :])

    def part(index: str) -> str:
        text = f"floor({index} / {inner})" if inner > 1 else index
        return f"({text} mod {order.dims[d].width})" if order.dims[d].width is not None else text

    return isl.Map(f"{{ [q, k] -> [floor(({part('k')} - {part('q')}) / {order.dims[d].col_stride})] }}")

"""moe_schedule: tile sizes of products by groups, as a Tiling on each.

Before::  %h = grouped_gemm ...
After::   %h = grouped_gemm ... {tiling = Tiling(rows=128, cols=128, inner=64, wide=8, meta=(...))}

CPUs keep rows in the vector lanes and all of the summed axis of a row tile in the cache; each matrix is read
once a row tile. On GPUs tiles follow how many rows an expert gets: few rows are bound by reading matrices,
many by the tensor cores.

Leaves alone: operations that have a tiling; all others.
"""

from __future__ import annotations

from ..ir.graph import Graph, Op
from ..ir.ragged import Tiling
from .moe_spec import ExpertsSpec

CPU_ROWS = {"few": 16, "some": 32, "many": 32}
CPU_COLS = 32
CPU_INNER = 256  # a row tile of so many features lies in the nearest cache
# (rows, columns of each half where there are two, summed extent of a step, warps, stages) by load
GPU = {
    "few": (16, 64, 128, 4, 4),
    "some": (64, 64, 64, 4, 4),
    "many": (128, 128, 64, 8, 3),
}
GPU_PLAIN = {  # products without halves have half the columns to hold
    "few": (16, 64, 256, 4, 4),
    "some": (64, 128, 64, 4, 4),
    "many": (128, 256, 64, 8, 3),
}


def schedule_experts(graph: Graph, spec: ExpertsSpec) -> Graph:
    """A tiling for every grouped_gemm that has none."""
    given = iter(spec.tiling or ())

    def rule(op: Op) -> Op | None:
        if op.kind != "grouped_gemm" or op.attr("tiling") is not None:
            return None
        return op.with_attrs(tiling=next(given, None) or choose(graph, op, spec))

    return graph.map_ops(rule)


def choose(graph: Graph, op: Op, spec: ExpertsSpec) -> Tiling:
    """The default tiling of one product."""
    columns = graph.values[op.output.name].shape[1]
    inner = graph.values[op.inputs[0]].shape[1]
    assert isinstance(inner, int) and isinstance(columns, int)
    if spec.is_cpu:
        step = _divisor(inner, CPU_INNER)
        meta = (("in_place", 1),)
        return Tiling(CPU_ROWS[spec.load], min(CPU_COLS, columns), step, True, blocked=True, meta=meta)
    rows, cols, step, warps, stages = (GPU if op.attr("halves") else GPU_PLAIN)[spec.load]
    size = {"f64": 4, "f32": 2}.get(spec.dtype, 1)
    cols = max(16, cols // size)
    step = max(32, step // size)
    wide = min(8 if spec.load == "many" else 1 << 20, -(-columns // cols))
    meta = (("stages", stages if size == 1 else 2), ("warps", warps))
    return Tiling(rows, cols, step, wide=wide, meta=meta)


def _divisor(extent: int, least: int) -> int:
    """The smallest divisor of an extent that is not below `least` and leaves at most 16 parts.

    >>> _divisor(512, 256), _divisor(7168, 256), _divisor(300, 256), _divisor(65536, 256)
    (256, 448, 300, 4096)
    """
    return next(n for n in range(min(least, extent), extent + 1) if extent % n == 0 and extent // n <= 16)

"""schedule, for gradients on a GPU: tiles by kind, dtype and head size.

The gradients of keys and values keep two accumulators of a row's features each, beside two tiles of pairs, so
their tiles are those that fit the registers: 128 keys by 64 queries on 8 warps for heads of 128 in 16 bits.

Leaves alone: CPUs, whose tiles are those of the forward.
"""

from __future__ import annotations

from ..ir.plan import Group, Schedule
from .boxes import Boxes
from .candidates import hints
from .footprint import padded
from .spec import AttentionSpec

# Rows, keys a tile, warps, stages by kind of operation and of number, and padded head size.
TILES = {
    ("rows", "16-bit"): {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2), 1024: (32, 16, 8, 1)},
    ("columns", "16-bit"): {
        64: (64, 64, 4, 2),
        128: (128, 64, 8, 2),
        256: (64, 32, 8, 1),
        1024: (32, 16, 8, 1),
    },
    ("rows", "f32"): {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 4, 1), 1024: (16, 16, 8, 1)},
    ("columns", "f32"): {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 4, 1), 1024: (16, 16, 8, 1)},
    ("rows", "f64"): {64: (16, 16, 4, 1), 1024: (16, 16, 8, 1)},
    ("columns", "f64"): {64: (16, 16, 4, 1), 1024: (16, 16, 8, 1)},
}


def choose_gradient(spec: AttentionSpec, group: Group, kind: str) -> Schedule:
    """The default schedule of a group of one gradient."""
    number = spec.dtype if spec.dtype in ("f32", "f64") else "16-bit"
    table = TILES["columns" if kind == "grad_columns" else "rows", number]
    size = padded(max(spec.qk_size, spec.v_size))
    rows, keys, warps, stages = next(tile for limit, tile in table.items() if size <= limit)
    one = len(group.order.dims) == 1
    shape = ((rows,), (keys,)) if one else Boxes.of(group).shape(rows, keys, aligned=True)
    return Schedule(*shape, lazy_rescale=False, meta=hints(spec, warps, stages))

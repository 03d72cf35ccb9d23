"""schedule, for gradients on a GPU: tile sizes by kind of operation, number, head size and spread of pairs.

The gradients of keys and values keep two accumulators of a row's features each, beside two tiles of pairs, so
their tiles are small: what does not fit the registers spills. Sizes are those that won sweeps on an H100
(bf16, B=4 H=16 S=4096, the masks of the benchmark); others fit by the same counts.

Leaves alone: CPUs, whose tiles are those of the forward.
"""

from __future__ import annotations

from ..ir.errors import UnsupportedError
from ..ir.plan import Group, Schedule
from . import devices
from .boxes import Boxes
from .candidates import Tile, hints
from .footprint import padded
from .spec import AttentionSpec
from .survey import Survey
from .tile_count import BYTES

LONG = 3072  # keys a row on the reference problem (passes/survey.py), from which on rows are called long
NUMBER = 32  # for the mask's integers there
LEAST_SHARED = 65_536  # bytes a program, of the targets that no device describes
SCRATCH = 4096  # bytes for reductions

# Rows, keys a tile, warps, stages by kind of operation, how products run, and padded head size.
TILES: dict[tuple[str, str], dict[int, Tile]] = {
    ("rows", "warp groups"): {
        64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2), 1024: (32, 16, 8, 1),
    },
    ("columns", "warp groups"): {
        64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 1), 1024: (32, 16, 8, 1),
    },
    ("rows", "warps"): {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 2), 1024: (16, 16, 8, 1)},
    ("columns", "warps"): {
        64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2), 1024: (16, 16, 8, 1),
    },
    ("rows", "f32"): {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 1024: (16, 16, 8, 1)},
    ("columns", "f32"): {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 1024: (16, 16, 8, 1)},
    ("rows", "f64"): {64: (16, 16, 4, 1), 1024: (16, 16, 8, 1)},
    ("columns", "f64"): {64: (16, 16, 4, 1), 1024: (16, 16, 8, 1)},
}  # fmt: skip
# The same in 16 bits where pairs lie in another way.
SPREADS: dict[str, dict[tuple[int, str], Tile]] = {
    "rows": {(64, "residues"): (64, 32, 4, 3), (128, "residues"): (64, 32, 4, 3)},
    "columns": {
        (64, "long"): (64, 128, 4, 2),
        (64, "residues"): (64, 32, 4, 3),
        (64, "box"): (64, 64, 4, 2),
        (64, "lists"): (64, 64, 4, 2),
        (128, "residues"): (64, 32, 4, 3),
        (128, "box"): (64, 16, 4, 3),
    },
}


def choose_gradient(spec: AttentionSpec, group: Group, kind: str) -> Schedule:
    """The default schedule of a group of one gradient."""
    narrow = "warp groups" if _described(spec) else "warps"
    number = spec.dtype if spec.dtype in ("f32", "f64") else narrow
    walk = "columns" if kind == "grad_columns" else "rows"
    size = padded(max(spec.qk_size, spec.v_size))
    tile = next(t for limit, t in TILES[walk, number].items() if size <= limit)
    if number == "warp groups":
        tile = SPREADS[walk].get((max(size, 64), _spread(spec, group)), tile)
    rows, keys, warps, stages = _fitting(spec, tile)
    one = len(group.order.dims) == 1
    shape = ((rows,), (keys,)) if one else Boxes.of(group).shape(rows, keys, aligned=True)
    return Schedule(*shape, lazy_rescale=False, meta=hints(spec, warps, stages))


def _fitting(spec: AttentionSpec, tile: Tile) -> Tile:
    """The tile with fewer stages, then fewer keys, then fewer rows, until the shared memory holds it."""
    device = devices.device_of(spec.target)
    most = LEAST_SHARED if device is None or device.chip is None else device.chip.shared_program
    rows, keys, warps, stages = tile
    features = BYTES[spec.dtype] * (padded(spec.qk_size) + padded(spec.v_size))

    def taken() -> int:
        copies = stages if _described(spec) else max(1, stages - 1)
        return (rows + copies * keys) * features + 2 * rows * keys * BYTES[spec.dtype] + SCRATCH

    while taken() > most:
        if stages > 1:
            stages -= 1
        elif keys > 16:
            keys //= 2
        elif rows > 16:
            rows //= 2
        else:
            raise UnsupportedError(
                f"gradients in {spec.dtype}, head sizes {spec.qk_size} and {spec.v_size}: no tile fits the "
                f"{most} bytes of shared memory of {spec.target}. Use a 16-bit dtype"
            )
    return rows, keys, warps, stages


def _described(spec: AttentionSpec) -> bool:
    """Whether tiles come through tensor descriptors, and products run on warp groups."""
    return "descriptors" in dict(hints(spec, 4, 1))


def _spread(spec: AttentionSpec, group: Group) -> str:
    """How the pairs of a group lie: "box", "residues", "lists", "long" rows, or "" for others."""
    first, *inner = group.order.dims
    if inner:
        return "box"
    if first.col_stride > 1:
        return "residues"
    if not group.exact:
        return "lists"
    rows = Schedule((64,), (64,))
    survey = Survey(spec.mask, group, NUMBER)
    tiles = survey.tiles(rows, survey.size(spec.product_dtype, spec.qk_size, spec.v_size))
    return "long" if 64 * tiles.visited >= LONG * tiles.rows else ""

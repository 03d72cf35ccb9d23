"""measured: tile sizes that won sweeps on a device, where they overrule the cost model.

A row of the table holds for one device, width of number and padded head size, and for one spread of a
group's keys: "box" in n-d orders, "near" where they stay within a runtime distance of their row on both
sides (windows), "before" where only keys up to the row attend (causal windows, which are long), else
"far". What no sweep has seen is left to the model.
"""

from __future__ import annotations

from ..ir.plan import Group
from .candidates import Tile
from .distance import anchor, interval
from .footprint import padded
from .machine import Device
from .spec import AttentionSpec
from .tile_count import BYTES

# H100 80GB HBM3, bf16, B=4 H=16 S=4096, the masks of the benchmark: the least geometric mean of time.
TABLE: dict[tuple[str, int, int, str], Tile] = {
    ("H100", 2, 64, "far"): (64, 64, 4, 3),
    ("H100", 2, 64, "before"): (64, 64, 4, 3),
    ("H100", 2, 64, "near"): (64, 64, 4, 3),
    ("H100", 2, 64, "box"): (64, 32, 4, 3),
    ("H100", 2, 128, "far"): (64, 64, 4, 3),
    ("H100", 2, 128, "before"): (64, 64, 4, 3),
    ("H100", 2, 128, "near"): (64, 32, 4, 3),
    ("H100", 2, 128, "box"): (64, 32, 4, 3),
}


def measured(spec: AttentionSpec, group: Group, device: Device) -> Tile | None:
    """The tile that won the sweeps for such a group, or None."""
    width, size = BYTES[spec.product_dtype], padded(max(spec.qk_size, spec.v_size))
    return TABLE.get((device.name, width, size, spread(group)))


def spread(group: Group) -> str:
    """How far the keys of a group lie from their row: "box", "near", "before" or "far"."""
    if len(group.order.dims) > 1:
        return "box"
    if anchor(group, 0) is None:
        return "far"
    return "before" if interval(group, 0)[1] <= 0 else "near"

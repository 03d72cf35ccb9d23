"""measured: tile sizes that won sweeps on a device, where they overrule the cost model.

A row of the table holds for one device, width of number and padded head size, and for groups whose keys
stay within a runtime distance of their row ("near", windows) or do not ("far"). Numbers that no sweep has
seen are left to the model.
"""

from __future__ import annotations

from ..ir.plan import Group
from .distance import anchor
from .footprint import padded
from .machine import Device
from .spec import AttentionSpec
from .tile_count import BYTES

Tile = tuple[int, int, int, int]  # rows, keys, warps, stages

# H100 80GB HBM3, bf16, B=4 H=16 S=4096, the masks of the benchmark: the least geometric mean of time.
TABLE: dict[tuple[str, int, int, str], Tile] = {
    ("H100", 2, 64, "near"): (64, 64, 4, 3),
    ("H100", 2, 64, "far"): (64, 64, 4, 3),
    ("H100", 2, 128, "near"): (64, 64, 4, 3),
    ("H100", 2, 128, "far"): (64, 64, 4, 3),
}


def measured(spec: AttentionSpec, group: Group, device: Device) -> Tile | None:
    """The tile of the table for one group, or None."""
    if spec.qk_size != spec.v_size:
        return None
    spread = "near" if anchor(group, 0) is not None else "far"
    return TABLE.get((device.name, BYTES[spec.product_dtype], padded(spec.qk_size), spread))

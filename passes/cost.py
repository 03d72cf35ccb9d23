"""cost: how long a planned attention should take, and the least that any kernel could.

    floor     = max(2 nnz (Dqk + Dv) B H / peak, bytes of q, k, v and o / bandwidth)
    predicted = max(compute, memory) + tiles + launches

`compute` is the arithmetic of every pair in a visited tile: two matrix products and one exponential,
spread over workers that start in waves. `memory` moves each operand once a kernel, and the softmax state
between kernels. `tiles` is what a worker pays to start a tile, `launches` what a kernel costs at all. It
is the roofline model (Williams, Waterman, Patterson, CACM 2009) with two overheads: good for ranking
schedules and for seeing what bounds a kernel, not for promising a time. GPUs with a `Chip` are predicted
kernel by kernel (`cost_gpu`), where what shares a multiprocessor, and how it overlaps, is known too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.plan import Schedule
from .cost_gpu import kernel_time
from .machine import Chip, Device
from .tile_count import Plan, Size, Tiles, count_tiles

__all__ = [
    "Chip",
    "Device",
    "Estimate",
    "Plan",
    "Size",
    "Tiles",
    "count_tiles",
    "estimate",
    "estimate_tiles",
    "floor",
]


@dataclass(frozen=True)
class Estimate:
    """Predicted seconds and what they are made of; see the module's notes.

    pairs: pairs computed, masked ones in partial tiles included."""

    compute: float
    memory: float
    tiles: float
    launches: float
    pairs: int
    bytes: int

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.tiles + self.launches

    @property
    def limit(self) -> str:
        """What most of the time goes to: 'compute', 'memory', 'tiles' or 'launches'."""
        return max(("compute", "memory", "tiles", "launches"), key=lambda name: getattr(self, name))


def floor(device: Device, size: Size, nnz: int) -> float:
    """Seconds that no kernel can beat on this device: nnz pairs in all, over batches and heads."""
    return max(nnz * size.pair_flops / device.peak(size.dtype), size.io_bytes / device.bandwidth)


def estimate(device: Device, size: Size, plans: Sequence[Plan]) -> Estimate:
    """Predicted time of an attention that runs as these kernels."""
    counted = [count_tiles(plan, size) for plan in plans]
    schedules = [schedule for _, schedule, _ in plans]
    return estimate_tiles(
        device, size, schedules, counted, sum(loops.lists is not None for *_, loops in plans)
    )


def estimate_tiles(
    device: Device, size: Size, schedules: Sequence[Schedule], counted: Sequence[Tiles], lists: int = 0
) -> Estimate:
    """`estimate`, for kernels of which the tiles are known. lists: kernels before them that list tiles."""
    cells = [math.prod(s.rows) * math.prod(s.cols) for s in schedules]
    pairs = sum(n * tiles.visited for n, tiles in zip(cells, counted, strict=True))
    moved = [size.io_bytes + size.state_bytes * (i > 0) for i in range(len(schedules))]
    launches = (len(schedules) + lists) * device.launch
    if device.chip is not None:
        kernels = [kernel_time(device, size, *each) for each in zip(schedules, counted, moved, strict=True)]
        compute, memory = sum(k.arithmetic for k in kernels), sum(k.memory for k in kernels)
        rest = sum(k.seconds - k.launch for k in kernels) - max(compute, memory)
        return Estimate(compute, memory, rest, launches, pairs, sum(moved))
    tiles = sum(t.visited + t.rows for t in counted)
    waves = max(1.0, *(_idle(t.rows, device.workers) for t in counted))
    work = pairs * (size.pair_flops / device.peak(size.dtype) + 1 / device.exps)
    return Estimate(
        compute=work * waves,
        memory=sum(moved) / device.bandwidth,
        tiles=tiles * device.tile / device.workers,
        launches=launches,
        pairs=pairs,
        bytes=sum(moved),
    )


def _idle(cells: int, workers: int) -> float:
    """How much longer whole waves take than an even spread."""
    return -(-cells // workers) * workers / cells if cells else 1.0

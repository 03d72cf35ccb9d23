"""cost_gpu: how long one attention kernel takes on a GPU, from its tiles and its footprint.

    key tile  = longest + overlap(resident) * (products + softmax - the longer), or longer for its copies
    row tile  = start / resident
    arithmetic = (key tiles * key tile + row tiles * row tile) / multiprocessors + tail
    seconds   = max(arithmetic, memory) + MIXED * min(arithmetic, memory) + launch

`longest` is the longest of tensor cores, softmax (elementwise work and exponentials) and the tile's bytes
from the last cache. Programs that share a multiprocessor overlap each other's phases, one alone runs its
phases one after the other: `overlap` says how much of the shorter phases still shows. The tail is what
multiprocessors idle at the end, about a program's time. It is a roofline per tile. The constants are fitted
to sweeps of tile shapes on one H100, to 10 % of the measured time on average, and carry over to other GPUs by
those GPUs' rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ir.plan import Schedule
from .boxes import UNALIGNED
from .footprint import footprint, padded, products
from .machine import Device
from .tile_count import BYTES, Size, Tiles

# Share of the matrix-product rate that tiles reach, by how products run (`footprint.products`). Warps reuse
# keys over the rows of a tile, scalar code over the numbers of S that a thread holds; half of the share is
# reached at HALF rows, or numbers.
EFFICIENCY = {"warp groups": 0.98, "warps": 0.8, "scalar": 0.6}
HALF = {"warp groups": 0, "warps": 16, "scalar": 8}
SERIAL, SHARED = 0.95, 0.67  # overlap = SERIAL / (1 + SHARED * (resident - 1))
SOFTMAX, MASK, RESCALE = 1.0, 11.0, 1.0  # instructions: a score, more in partial tiles; a number of O
START, FILL = 1.5e-6, 0.05e-6  # seconds until the first key tile runs: without stages, and more for each
FETCH = 0.55e-6  # seconds from asking for a key tile to having it
MIXED = 0.39  # of the shorter of arithmetic and memory, what the longer does not hide
TAIL = 1.24  # of a program that starts last
SPILL = 0.013  # of the time more, for each register short


@dataclass(frozen=True)
class KernelTime:
    """Seconds of one kernel."""

    arithmetic: float
    memory: float
    launch: float

    @property
    def seconds(self) -> float:
        longer, shorter = max(self.arithmetic, self.memory), min(self.arithmetic, self.memory)
        return longer + MIXED * shorter + self.launch


def kernel_time(
    device: Device, size: Size, schedule: Schedule, tiles: Tiles, moved: int, *, heavy_first: bool = True
) -> KernelTime:
    """The time of one kernel that visits these tiles and moves these bytes; inf where it does not fit.

    heavy_first: row tiles with many key tiles start before others (`Loops.programs` sees to that).
    The device needs a chip."""
    chip = device.chip
    assert chip is not None, "kernel_time is asked of GPUs with a chip only"
    rows, cols = math.prod(schedule.rows), math.prod(schedule.cols)
    taken = footprint(chip, schedule, size.dtype, size.qk_size, size.v_size)
    programs = tiles.visited if schedule.split else tiles.rows
    resident = min(taken.resident(chip), max(1, -(-programs // device.workers)))
    if resident == 0:
        return KernelTime(math.inf, math.inf, device.launch)
    qk, v, width = padded(size.qk_size), padded(size.v_size), BYTES[size.dtype]
    share = device.workers  # from rates of the device to those of one multiprocessor
    how = products(chip, rows, size.dtype)
    unaligned = UNALIGNED if schedule.anchor(-1) is not None else 1.0
    reuse = rows if how == "warps" else rows * cols / taken.threads
    efficiency = EFFICIENCY[how] * reuse / (reuse + HALF[how])
    product = 2 * rows * cols * (qk + v) * share / (device.peak(size.dtype) * efficiency)
    partial = tiles.partial / max(1, tiles.visited)
    elementwise = rows * cols * (SOFTMAX + MASK * partial) + rows * v * RESCALE
    softmax = (elementwise / chip.alu + rows * cols / device.exps) * share
    cached = cols * (qk + v) * width * share / chip.l2
    stages = dict(schedule.meta).get("stages", 2)

    def tile(programs: int) -> float:
        """Seconds that a multiprocessor takes for a key tile, with so many programs on it."""
        overlap = SERIAL / (1 + SHARED * (programs - 1))
        work = max(product, softmax, cached) + overlap * (product + softmax - max(product, softmax))
        return unaligned * _waiting(work * programs, stages) / programs

    start = START + FILL * (stages - 1)
    mean = tiles.visited / max(1, tiles.rows)
    heaviest = max(tiles.heaviest, mean)
    if schedule.split:  # programs share the key tiles of a row tile, as evenly as they can
        mean = heaviest = tiles.visited / (resident * share)
    longest = heaviest * tile(1) + start
    last = mean * tile(1) + start if heavy_first else longest
    busy = (tiles.visited * tile(resident) + tiles.rows * start / resident) / share
    arithmetic = (1 + SPILL * taken.short) * max(busy + TAIL * last, longest)
    return KernelTime(arithmetic, moved / device.bandwidth, device.launch)


def _waiting(tile: float, stages: int) -> float:
    """Seconds of a key tile on one program, with the copies that it waits for.

    A copy takes FETCH from start to end; with s stages s - 1 of them are under way at once, of which more
    than two have not been seen to help."""
    if stages == 1:
        return tile + FETCH
    return math.hypot(tile, FETCH / min(2, stages - 1))

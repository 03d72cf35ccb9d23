"""footprint: what a GPU kernel of some tile sizes takes of a multiprocessor, before it is compiled.

Shared memory follows Triton's pipeliner exactly (for tf32 it is an upper bound). Where products run on
warp groups (Hopper, 16-bit, 64 rows or more), both operands come from shared memory: `stages` buffers of a
key and a value tile, beside Q. Elsewhere there is one buffer less, and the weights P stand beside Q.
Registers are linear fits to what ptxas reports, some tens off: a constant, the accumulators O and S in
f32, what more stages keep of S, and the vectors of a key tile that a thread copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ir.plan import Schedule
from .machine import Chip
from .tile_count import BYTES

REGISTERS = 255  # a thread has at most
RESERVED = 1024  # bytes of shared memory that the system takes for each program
VECTOR = 16  # bytes of a copy
SCALAR = ("f32", "f64")  # dtypes of IEEE products, which the tensor cores do not take

# Registers by how products run, and by the 16-row slices of a tile that one warp holds where that matters:
# a constant, then per f32 of O, per f32 of S, per f32 of S with three stages or more, per vector of a key
# tile; and the sum from which on ptxas spills.
FITS = {
    ("warp groups", 0.5): ((20, 1.52, 2.13, 0.48, 7.3), 320),
    ("warp groups", 1): ((25, 1.2, 1.44, 0.6, 6.8), 320),
    ("warp groups", 2): ((0, 1.47, 1.98, 0.26, 0.0), 310),
    ("warps", None): ((66, 1.1, 1.68, 0.3, 4.9), 295),
    ("scalar", None): ((45, 1.76, 1.59, 0.0, 4.9), 270),
}


@dataclass(frozen=True)
class Footprint:
    """shared: bytes a program. wanted: registers a thread would use if it had them. threads: a program.

    short: how many registers ptxas does not find, however it orders the code; they spill."""

    shared: int
    wanted: int
    threads: int
    short: int

    @property
    def registers(self) -> int:
        """Registers a thread gets."""
        return min(self.wanted, REGISTERS)

    def resident(self, chip: Chip) -> int:
        """Programs that run on one multiprocessor at once; 0: none fits."""
        if self.shared > chip.shared_program:
            return 0
        allocated = -(-self.registers // 8) * 8 * self.threads  # registers are handed out in eights
        by_shared = chip.shared // (self.shared + RESERVED)
        return min(by_shared, chip.registers // allocated, 32 * chip.warps // self.threads, chip.programs)


def footprint(chip: Chip, schedule: Schedule, dtype: str, qk_size: int, v_size: int) -> Footprint:
    """The footprint of an attention kernel with these tiles; head sizes are padded to powers of two."""
    rows, cols = math.prod(schedule.rows), math.prod(schedule.cols)
    hints = dict(schedule.meta)
    threads, stages = 32 * hints.get("warps", 4), hints.get("stages", 2)
    width, number = BYTES[dtype], 2 if dtype == "f64" else 1
    outputs = number * rows * padded(v_size) / threads
    scores = number * rows * cols / threads
    vectors = cols * padded(max(qk_size, v_size)) * width / VECTOR / threads
    vectors *= not hints.get("descriptors")  # which need no addresses
    how, slices = products(chip, rows, dtype), min(2, max(0.5, 2 * rows / threads))
    fit, limit = FITS[how, slices if how == "warp groups" else None]
    counts = (1, outputs, scores, scores if stages > 2 else 0, vectors)
    wanted = math.ceil(sum(a * n for a, n in zip(fit, counts, strict=True)))
    return Footprint(
        shared_bytes(chip, schedule, dtype, qk_size, v_size), wanted, threads, max(0, wanted - limit)
    )


def shared_bytes(chip: Chip, schedule: Schedule, dtype: str, qk_size: int, v_size: int) -> int:
    """Bytes of shared memory a program."""
    rows, cols, width = math.prod(schedule.rows), math.prod(schedule.cols), BYTES[dtype]
    hints = dict(schedule.meta)
    warps, stages = hints.get("warps", 4), hints.get("stages", 2)
    query, weights = rows * padded(qk_size) * width, rows * cols * width
    key, value = cols * padded(qk_size) * width, cols * padded(v_size) * width
    if chip.warp_groups and rows >= 64 and dtype not in SCALAR:
        # A warp holds 16 rows; where there are more warps than that takes, they share rows, and P too.
        weights = weights if 16 * warps > rows or dtype == "tf32" else 0
        return query + weights + (stages * (key + value) if stages > 1 else key)
    return query + weights + ((stages - 1) * (key + value) if stages > 1 else key)


def products(chip: Chip, rows: int, dtype: str) -> str:
    """How matrix products run: on warp groups, on single warps, or outside the tensor cores."""
    if dtype in SCALAR:
        return "scalar"
    return "warp groups" if chip.warp_groups and rows >= 64 and BYTES[dtype] == 2 else "warps"


def padded(size: int) -> int:
    """A head size as tiles hold it: a power of two, 16 at least."""
    return max(16, 1 << (size - 1).bit_length())

"""machine: what the cost model knows of a device."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import InputError


@dataclass(frozen=True)
class Chip:
    """What one multiprocessor of a GPU holds, and what feeds it.

    shared, shared_program: bytes of shared memory of a multiprocessor, and of those one program may have.
    warps, programs: at once on it. alu: elementwise f32 instructions a second, all multiprocessors
    together. l2: bytes a second from the last cache to the multiprocessors. warp_groups: products run on
    warp groups that read shared memory (Hopper)."""

    shared: int
    shared_program: int
    warps: int
    programs: int
    alu: float
    l2: float
    warp_groups: bool = False
    registers: int = 65536


@dataclass(frozen=True)
class Device:
    """What the model knows of a machine, in units of one second.

    flops: matrix-multiply rate by dtype. bandwidth: bytes moved. exps: exponentials. workers: tiles
    in flight (cores or multiprocessors). tile, launch: seconds that starting a tile on a worker, and a
    kernel, cost. source: where the numbers come from. chip: of a GPU that schedules are ranked for."""

    name: str
    flops: tuple[tuple[str, float], ...]
    bandwidth: float
    exps: float
    workers: int
    tile: float
    launch: float
    source: str = ""
    chip: Chip | None = None

    def peak(self, dtype: str) -> float:
        """FLOP/s of a matrix product in this dtype. Raises InputError when it is not known."""
        rates = dict(self.flops)
        if dtype not in rates:
            raise InputError("Device.peak", f"one of {', '.join(rates)} for {self.name}", repr(dtype))
        return rates[dtype]

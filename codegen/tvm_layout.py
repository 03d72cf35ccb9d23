"""Where tiles live and how wide vectors are: the storage side of the TVM backend.

Every tile is a slice of one workspace that the caller passes, with the lanes axis (else the last
axis) innermost. Registers are small local buffers, which LLVM keeps in vector registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..ir.errors import UnsupportedError, VerifyError
from ..ir.kernel import Compute, Dot, For, If, Kernel, Load, Reduce, Scan, Stmt

TENSOR_DTYPES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "bool": "bool",
}
"""The dtype of tensor elements in memory, as TVM calls it."""

TILE_DTYPES = {
    **TENSOR_DTYPES,
    "f16": "float32",
    "bf16": "float32",
    "i16": "int32",
    "i8": "int32",
    "u8": "int32",
}
"""What a tile's elements are held and computed in. Half-precision tiles are rounded at each write."""

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}

LINE = 64  # bytes of a cache line: tiles start on one
REGISTER_BYTES = 1024  # the largest local buffer that TVM puts on the stack
VECTOR_BYTES = 256  # the widest vector worth one loop: four AVX-512 registers


@dataclass(frozen=True)
class Tile:
    """A tile in the workspace: dtype as the kernel says, storage as TVM holds it; the innermost axis last."""

    name: str
    dtype: str
    storage: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.storage]


@dataclass(frozen=True)
class Piece:
    """A stretch of an axis: count vectors of `width` elements from `start`, numbers or what computes them."""

    start: int | str
    count: int | str
    width: int

    @property
    def lanes(self) -> int:
        """Elements of a vector proper: a width that is no power of two is several of them, side by side."""
        return self.width & -self.width


def pieces(extent: int, dtype: str) -> list[Piece]:
    """An axis cut into vectors of powers of two: one vector, equal ones, or equal ones and a tail.

    >>> pieces(64, "float32"), pieces(80, "float32")
    ([Piece(start=0, count=1, width=64)], [Piece(start=0, count=5, width=16)])
    >>> pieces(17, "float32")
    [Piece(start=0, count=1, width=16), Piece(start=16, count=1, width=1)]
    """
    widest = VECTOR_BYTES // max(4, BYTES[dtype])
    width = min(extent & -extent, widest)
    if width < min(16, extent):
        width = min(16, widest)
        while width > extent:
            width //= 2
    out, start = [], 0
    while start < extent:
        while start + width > extent:
            width //= 2
        count = (extent - start) // width
        out.append(Piece(start, count, width))
        start += count * width
    return out


def storage_order(axes: tuple[str, ...], lanes: str | None) -> tuple[str, ...]:
    """Axes outermost first: as declared, the lanes axis last."""
    if lanes not in axes:
        return axes
    return (*(a for a in axes if a != lanes), lanes)


class Workspace:
    """The tiles of a kernel and their places. Scratch tiles are added while code is emitted."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.tiles: dict[str, Tile] = {}
        self.scratch: dict[str, Tile] = {}
        self.end = 0
        for stmt in walk(kernel.body):
            if isinstance(stmt, (Compute, Load, Dot, Reduce, Scan)):
                self._declare(stmt)

    def _declare(self, stmt: Compute | Load | Dot | Reduce | Scan) -> None:
        if stmt.dtype not in TILE_DTYPES:
            raise UnsupportedError(
                f"tile {stmt.dst}: no dtype {stmt.dtype!r} on CPUs; use {', '.join(TILE_DTYPES)}"
            )
        axes = storage_order(stmt.axes, self.kernel.lanes)
        known = self.tiles.get(stmt.dst)
        if known is None:
            self.tiles[stmt.dst] = self._place(stmt.dst, stmt.dtype, TILE_DTYPES[stmt.dtype], axes)
        elif (known.dtype, known.axes) != (stmt.dtype, axes):
            raise VerifyError(
                f"tile {stmt.dst} is {known.dtype}{list(known.axes)} and {stmt.dtype}{list(axes)}"
            )

    def _place(self, name: str, dtype: str, storage: str, axes: tuple[str, ...]) -> Tile:
        shape = tuple(self.kernel.axis(a).extent for a in axes) or (1,)
        tile = Tile(name, dtype, storage, axes, shape, self.end)
        self.end += -(-tile.bytes // LINE) * LINE
        return tile

    def temporary(self, name: str, dtype: str, storage: str, axes: tuple[str, ...]) -> Tile:
        """A tile of codegen's own, made once a name."""
        if name not in self.scratch:
            self.scratch[name] = self._place(name, dtype, storage, axes)
        return self.scratch[name]


def walk(body: tuple[Stmt, ...]) -> Iterator[Stmt]:
    """All statements, nested ones included, in program order."""
    for stmt in body:
        yield stmt
        if isinstance(stmt, (For, If)):
            yield from walk(stmt.body)

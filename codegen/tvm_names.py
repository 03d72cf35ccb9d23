"""What the names of a kernel stand for while its text is written."""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..ir.expr import Expr
from ..ir.kernel import Kernel, Tensor
from .tvm_layout import TENSOR_DTYPES, Tile

RESERVED = {"T", "cell", "turn", "ws", "p_ws", "worker", "workers", "range"}


def safe(name: str) -> str:
    """A name of the IR as a name of the script."""
    return f"{name}_" if name in RESERVED or keyword.iskeyword(name) else name


class Names:
    """What the names of a kernel stand for at the current place: tiles, coordinates, scalars, tensors."""

    def __init__(self, kernel: Kernel, tiles: Mapping[str, Tile]) -> None:
        self.tiles = tiles
        self.tensors: dict[str, Tensor] = {t.name: t for t in kernel.tensors}
        self.floats = {s.name: TENSOR_DTYPES[s.dtype] for s in kernel.scalars if s.dtype[0] == "f"}
        self.truths: set[str] = set()
        self.never_negative = {n for t in kernel.tensors for n in t.shape if isinstance(n, str)}
        self.never_negative |= {g.name for g in kernel.grid} | {a.name for a in kernel.axes}
        self.coordinates: dict[str, str] = {}

    @contextmanager
    def at(self, **coordinates: str) -> Iterator[None]:
        """Axes have these coordinates inside the block."""
        saved = self.coordinates
        self.coordinates = {**saved, **coordinates}
        yield
        self.coordinates = saved

    def natural(self, expr: Expr) -> bool:
        """Whether an integer is known not to be negative."""
        if expr.is_Integer or expr.is_Symbol:
            return int(expr) >= 0 if expr.is_Integer else str(expr) in self.never_negative
        known = [self.natural(a) for a in expr.args]
        match type(expr).__name__:
            case "Add" | "Mul" | "floordiv" | "minimum" | "shr" | "Pow":
                return all(known)
            case "maximum" | "bitand":
                return any(known)
            case "floormod":
                return known[1]
            case "where":
                return known[1] and known[2]
        return type(expr).__name__ == "Abs"

    def element(self, tile: Tile) -> str:
        """The element of a tile at the current coordinates."""
        index = [self.coordinates[a] for a in tile.axes]
        return f"b_{tile.name}[{', '.join(index or ['0'])}]"

"""added: what `adds` adds to the sums of a product by groups: rows of a small rank by one more matrix.

Before::  %h = grouped_gemm %x, %w, %bounds, .. %t, %b {adds = 'rows'}
After::   T_added: [i, l] = load t ; for each part: B: [n, l] = load b ; acc += dot(T_added, B) over l

Where rows choose among several b, once for every choice of the tile's rows, in sums of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.expr import integer, real, where
from ...ir.graph import Value
from ...ir.kernel import Compute, Dot, Load, Stmt, Tensor
from .choice import ADAPTER, MINE, Choice
from .codes import EXPERT
from .tiles import ZERO, Part, Tiles

LOW = integer("l")


@dataclass(frozen=True)
class Added:
    """t [rows, R] and b, [E, N, R] if `by_rows`, else [E, R, N], or [A, E, ..] where there is a choice.

    operand, acc: the dtypes of tiles that are multiplied, and of sums."""

    t: Value
    b: Value
    by_rows: bool
    choice: Choice | None
    tiles: Tiles
    operand: str
    acc: str
    precision: str

    @property
    def rank(self) -> int:
        return int(self.t.shape[1])

    def matrix(self) -> Tensor:
        return Tensor(self.b.name, self.b.dtype, tuple(self.b.shape), unit=len(self.b.shape) - 1)

    def sums(self) -> list[Stmt]:
        """What is added to all parts of the product."""
        out: list[Stmt] = [Load("T_added", self.operand, ("i", "l"), self.t.name, (integer("row"), LOW))]
        products = [s for k, part in enumerate(self.tiles.parts) for s in self._product(k, part)]
        return [*out, *(self.choice.each(products) if self.choice else products)]

    def _product(self, k: int, part: Part) -> list[Stmt]:
        """One part's. Rows that chose another matrix take nothing of this one, whatever it holds."""
        index = (EXPERT, part.column, LOW) if self.by_rows else (EXPERT, LOW, part.column)
        index = (ADAPTER, *index) if self.choice else index
        axes = ("n", "l") if self.by_rows else ("l", "n")
        load = Load(f"B{k}", self.operand, axes, self.b.name, index, self.tiles.valid(part), ZERO)
        operands = (self.acc, ("i", "n"), "T_added", f"B{k}", "l")
        if self.choice is None:
            return [load, Dot(part.acc, *operands, True, False, self.precision)]
        whole = where(MINE, real(part.acc) + real(f"S{k}"), real(part.acc))
        return [
            load,
            Dot(f"S{k}", *operands, precision=self.precision),
            Compute(part.acc, self.acc, ("i", "n"), whole, declares=False),
        ]

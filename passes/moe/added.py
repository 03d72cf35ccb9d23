"""added: what `adds` adds to the sums of a product by groups: rows of a small rank by one more matrix.

Before::  %h = grouped_gemm %x, %w, %bounds, .. %t, %b {adds = 'rows'}
After::   T_added: [i, l] = load t ; for each part: B: [n, l] = load b ; acc += dot(T_added, B) over l

Where rows choose among several b, once for every choice of the tile's rows, with zeros for those of others.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

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
        row = integer("row")
        rows: list[Stmt] = [Load("T_added", self.operand, ("i", "l"), self.t.name, (row, LOW))]
        if self.choice is None:
            return [*rows, *self._products("T_added")]
        mine = where(MINE, real("T_added"), sympy.Float(0.0))
        work = [Compute("T_mine", self.operand, ("i", "l"), mine), *self._products("T_mine")]
        return [*rows, *self.choice.each(work)]

    def _products(self, rows: str) -> list[Stmt]:
        return [s for k, part in enumerate(self.tiles.parts) for s in self._product(k, part, rows)]

    def _product(self, k: int, part: Part, rows: str) -> list[Stmt]:
        index = (EXPERT, part.column, LOW) if self.by_rows else (EXPERT, LOW, part.column)
        index = (ADAPTER, *index) if self.choice else index
        axes = ("n", "l") if self.by_rows else ("l", "n")
        more = {"accumulate": True, "declares": False, "precision": self.precision}
        return [
            Load(f"B{k}", self.operand, axes, self.b.name, index, self.tiles.valid(part), ZERO),
            Dot(part.acc, self.acc, ("i", "n"), rows, f"B{k}", "l", **more),
        ]

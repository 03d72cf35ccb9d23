"""tiles: how a product by groups is cut: columns into tiles, the summed axis into steps.

Quantised matrices come in slices (ir/quantized.py): a step then takes as many columns of each slice of the
summed axis, or, where codes run along the columns of the product, a program has a tile of columns in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import sympy

from ...ir.expr import Expr, all_of, integer
from ...ir.ragged import Tiling

ZERO = sympy.Integer(0)
D, COL = integer("d"), integer("col")


@dataclass(frozen=True)
class Part:
    """One of the products of a program: its accumulator, and its columns in the matrix."""

    acc: str
    matrix: str
    column: Expr
    number: int


@dataclass(frozen=True)
class Tiles:
    """Tiles of [rows, inner] x [inner, columns].

    by_rows: the matrix is [columns, inner] in memory. sliced: slices of a row of it. halves: as of a
    grouped_gemm."""

    tiling: Tiling
    inner: int
    columns: int
    by_rows: bool
    sliced: int
    halves: str | None

    @property
    def step(self) -> int:
        return self.tiling.inner

    @property
    def slices(self) -> int:
        """Of the summed axis."""
        return self.sliced if self.by_rows else 1

    @property
    def blocks(self) -> int:
        """Slices of the columns."""
        return 1 if self.by_rows else self.sliced

    @property
    def stretch(self) -> int:
        """Features of a slice."""
        return -(-self.inner // self.slices)

    @property
    def width(self) -> int:
        """Columns of a block."""
        return -(-self.columns // self.blocks)

    @property
    def steps(self) -> int:
        return -(-self.stretch // self.step)

    @property
    def column_tiles(self) -> int:
        return -(-self.width // self.tiling.cols)

    @cached_property
    def parts(self) -> list[Part]:
        if self.blocks > 1:
            columns = [COL + k * self.width for k in range(self.blocks)]
        else:
            match self.halves:
                case None:
                    columns = [COL]
                case "split":
                    columns = [COL, COL + self.columns]
                case _:
                    columns = [2 * COL, 2 * COL + 1]
        return [Part(f"acc{k}", f"W{k}", column, k) for k, column in enumerate(columns)]

    @property
    def leaves_rest(self) -> bool:
        """Whether the last turn of the loop over steps reaches beyond a slice."""
        return bool(self.stretch % (self.step * self.tiling.unroll))

    def within(self, at: Expr, part: int = 0) -> Expr:
        """Whether the features of a step are there."""
        inside = [at + D < self.stretch] if self.leaves_rest else []
        if self.slices > 1 and (part + 1) * self.stretch > self.inner:
            inside.append(part * self.stretch + at + D < self.inner)
        return all_of(inside)

    @property
    def overhangs(self) -> bool:
        """Whether tiles of columns, or the last of `wide` tiles, reach beyond the columns."""
        t = self.tiling
        tiles = self.column_tiles
        return bool(self.width % t.cols or (tiles > t.wide and tiles % t.wide))

    def loaded(self, part: Part, rows: int) -> Expr:
        """Whether a row of a matrix [rows, inner] is loaded for a column of a part: where boxes are fetched,
        also those of the next half, which nothing stores."""
        if dict(self.tiling.meta).get("descriptors") and self.overhangs:
            inside: Expr = part.column < rows
            return inside
        return self.valid(part)

    def valid(self, part: Part) -> Expr:
        """Whether a column of a part is there."""
        inside = [self.width > COL] if self.overhangs else []
        if self.blocks > 1 and (part.number + 1) * self.width > self.columns:
            inside.append(part.column < self.columns)
        return all_of(inside)

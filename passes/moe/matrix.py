"""matrix: what a product by groups loads of its matrices: tiles as they lie there, or decoded ones."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.expr import Expr, all_of, real
from ...ir.graph import Value
from ...ir.kernel import Load, Stmt, Tensor
from .choice import ADAPTER
from .codes import EXPERT, Codes, is_uniform
from .tiles import COL, ZERO, D, Part, Tiles


@dataclass(frozen=True)
class DenseMatrix:
    """Matrices [E, out, in] or [E, in, out] in a float dtype, or, `stacked`, [A, E, ..] of them, of which
    `adapter` says one. operand: the dtype of tiles."""

    tiles: Tiles
    w: Value
    unit: int | None
    operand: str
    align: int
    stacked: bool = False
    scaled = ""  # by nothing
    scaled_by_step = False
    scale_tiles = ()
    hints = ()

    def arguments(self) -> list[Tensor]:
        unit = None if self.unit is None else self.unit + self.stacked
        return [Tensor(self.w.name, self.w.dtype, tuple(self.w.shape), unit=unit, align=self.align)]

    def widths(self) -> list[Stmt]:
        return []

    def rows(self, name: str, number: int) -> str:
        """The name of the tile of rows that meets slice `number`."""
        return name

    def tile(self, part: Part, name: str, number: int) -> str:
        """The name of the tile that meets slice `number` of the rows."""
        return name

    def load(self, part: Part, name: str, at: Expr, first: Expr, *, scales: bool = True) -> list[Stmt]:
        """The tiles of a part at a step. first: the first column of the tile. scales: theirs are to be
        loaded."""
        t, feature = self.tiles, at + D
        index = (EXPERT, part.column, feature) if t.by_rows else (EXPERT, feature, part.column)
        index = (ADAPTER, *index) if self.stacked else index
        there = t.loaded(part, int(self.w.shape[-2])) if t.by_rows else t.valid(part)
        guard = all_of([t.within(at), there])
        # Memory runs along the tile's last axis, so that a CPU copies vectors.
        axes = ("n", "d") if t.by_rows == (self.unit == 2) else ("d", "n")
        return [Load(name, self.operand, axes, self.w.name, index, guard, ZERO)]

    def scale(self, part: Part, name: str, number: int, at: Expr, *, ahead: bool = False) -> list[Stmt]:
        return []

    def scaled_product(self, value: Expr, name: str, number: int, rows: Expr) -> Expr:
        return value


@dataclass(frozen=True)
class CodedMatrix:
    """Quantised matrices [E, out, in]. acc: the dtype of scales."""

    tiles: Tiles
    codes: Codes
    operand: str
    acc: str
    aligned: bool

    @property
    def hints(self) -> tuple[tuple[str, int], ...]:
        """For the backend."""
        return self.codes.hints

    def arguments(self) -> list[Tensor]:
        return self.codes.tensors(aligned=self.aligned)

    def widths(self) -> list[Stmt]:
        return self.codes.widths()

    def rows(self, name: str, number: int) -> str:
        return f"{name}_{number}"

    def tile(self, part: Part, name: str, number: int) -> str:
        if self.tiles.by_rows:
            return f"{name}_{number}"
        return f"{name.replace(part.matrix, 'W', 1)}_{part.number}"

    @property
    def scaled(self) -> str:
        """What scales join: codes, products or sums."""
        t = self.tiles
        if not t.by_rows or not is_uniform(self.codes.q, t.step):
            return "codes"
        one = self.codes.q.groups == 1 and not self.codes.q.zero
        return t.tiling.scales if one or t.tiling.scales != "sums" else "products"

    @property
    def scaled_by_step(self) -> bool:
        """Whether every step of a row has one scale, and joins its codes or products."""
        return self.tiles.by_rows and is_uniform(self.codes.q, self.tiles.step) and self.scaled != "sums"

    def load(self, part: Part, name: str, at: Expr, first: Expr, *, scales: bool = True) -> list[Stmt]:
        t, codes = self.tiles, self.codes
        if t.by_rows:
            axes, place, numbers, steps = ("n", "d"), (part.column, at + D), range(t.slices), t.step
            there = t.loaded(part, codes.rows)
        else:  # the bytes of a tile hold those of all parts
            name = name.replace(part.matrix, "W", 1)
            axes, place, numbers, steps = ("d", "n"), (at + D, COL), [part.number], t.tiling.cols
            there = all_of([t.width > COL] if t.overhangs else [])
        guard = all_of([t.within(at), there])
        again = not t.by_rows and part.number > 0
        found = [] if again else codes.load(f"{name}_", self.operand, axes, place, guard)
        even = is_uniform(codes.q, steps)
        for number in numbers:
            scale: Expr | None = None
            if not even or self.scaled == "codes":
                found += self._scale(part, name, number, at, None if even else guard, first) if scales else []
                scale = real(f"S{name}_{number}")
            zero = codes.zero(f"S{name}_{number}") if scale is not None else None
            found += codes.decode(f"{name}_", number, self.operand, axes, scale, zero)
        return found

    def scaled_product(self, value: Expr, name: str, number: int, rows: Expr) -> Expr:
        """A product of codes with their scales. rows: the sums of what codes were multiplied by."""
        scale = f"S{name}_{number}"
        return self.codes.scaled(value, real(scale), self.codes.zero(scale), rows)

    @property
    def scale_tiles(self) -> tuple[str, ...]:
        """The tiles that `scale` makes, by what follows their name."""
        return ("", "_zero") if self.codes.q.zero else ("",)

    def scale(self, part: Part, name: str, number: int, at: Expr, *, ahead: bool = False) -> list[Stmt]:
        """The tile S{name}_{number}: scales of products of a step, all of one group, or of sums. ahead: the
        step may lie behind the last one."""
        return self._scale(part, name, number, at, None, ZERO, ahead=ahead)

    def _scale(
        self, part: Part, name: str, number: int, at: Expr, each: Expr | None, first: Expr,
        *, ahead: bool = False,
    ) -> list[Stmt]:  # fmt: skip
        """Scales of a tile: one for each of its rows, or, with a guard `each`, for each element."""
        t, q = self.tiles, self.codes.q
        start = number * q.stretch
        if each is not None:
            row, column = (part.column, at + D) if t.by_rows else (at + D, COL)
            axes = ("n", "d") if t.by_rows else ("d", "n")
            known = all_of([each, start + column < q.columns])
        elif t.by_rows:
            row, column, axes = part.column, at, ("n",)
            # Steps that lie behind a slice altogether could have groups that are not there.
            beyond = ahead or (t.leaves_rest and q.groups > 1)
            known = all_of([t.valid(part), *([at < t.stretch] if beyond else [])])
        else:
            row, column, axes = at + D, first, ("d",)
            beyond = t.overhangs and q.groups > 1
            known = all_of([t.within(at), *([start + first < q.columns] if beyond else [])])
        return self.codes.scale(f"S{name}_{number}", self.acc, axes, (row, start + column), known)


Matrix = DenseMatrix | CodedMatrix

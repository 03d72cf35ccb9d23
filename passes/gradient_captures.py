"""gradient_captures: the gradients of tensors that score and probability maps read."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from ..ir.expr import Expr, all_of, ceildiv, floordiv, floormod, integer, maximum, minimum, real, where
from ..ir.gradient_interpret import captured_reads
from ..ir.kernel import Compute, For, GridDim, Let, Reduce, Span, Stmt, Store, Tensor
from ..ir.score import ProbMap
from . import exact_sums
from .folds import Carried, P, Part, S
from .gradient_folds import DW, G, OverQueries, R
from .share import share

SLOTS, SLOT_OF = integer("slots"), integer("slot_of")


class GradCaptures(OverQueries):
    """The gradients of tensors that a map read: what pairs add, at the indices where they read.

    Pairs that read one element are added up along keys, or a whole tile of pairs, before they meet memory.
    Slots: the sums are kept in several copies, so that programs that run side by side use different ones."""

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.names: tuple[str, ...] = self.op.attr("captures")
        of = self.op.attr("of")
        self.of_prob = isinstance(of, ProbMap)
        named = {real("score"): R, real("prob"): P, real("grad"): DW if self.of_prob else G}
        self.parts: list[tuple[str, str, Expr, Expr]] = []  # tensor, tile, value of a pair, flat index
        for name, (grads, indices) in zip(self.names, captured_reads(of, self.names), strict=True):
            for grad, index in zip(grads, indices, strict=True):
                value = self._bound(grad.expr).xreplace(named)
                tile = f"A{len(self.parts)}"
                self.parts.append((f"d{name}", tile, value, self._flat(name, index)))

    def _flat(self, name: str, index: tuple[Expr, ...]) -> Expr:
        """The place of an element in a row-major copy of a captured tensor; inside it, whatever is read."""
        flat: Expr = sympy.Integer(0)
        for d, entry in enumerate(index):
            size = integer(f"{name}_{d}")
            inside = minimum(maximum(self.over.bind(entry, attending=True), sympy.Integer(0)), size - 1)
            flat = flat * size + inside
        return flat

    def _varies(self, index: Expr) -> tuple[bool, bool]:
        """Whether an index differs between rows, and between keys."""
        axes = _axes(index, self._tiles())
        return "i" in axes, "j" in axes

    def _tiles(self) -> dict[str, tuple[str, ...]]:
        """The axes of what expressions of pairs are over."""
        made = [*self.over.make_rows, *self.over.make_cols, *self.over.mask_cols]
        pairs = dict.fromkeys(map(str, (R, P, S, G, DW)), ("i", "j"))
        return {s.dst: s.axes for s in made if isinstance(s, Compute)} | {"i": ("i",), "j": ("j",)} | pairs

    def _shared(self) -> tuple[list[Stmt], list[Expr]]:
        """(statements, values of pairs): what the gradients of several reads have in common, once a tile."""
        parts, values = share([value for _, _, value, _ in self.parts], self.acc)
        tiles = self._tiles()
        made: list[Stmt] = []
        for name, value in parts:
            tiles[name] = _axes(value, tiles)
            made.append(Compute(name, self.acc, tiles[name], value))
        return made, values

    def state(self) -> list[Carried]:
        return [
            Carried(tile, ("i",), sympy.S.Zero, "")
            for _, tile, _, index in self.parts
            if not self._varies(index)[1]
        ]

    def begin(self) -> list[Stmt]:
        return [Compute(c.tile, self.acc, c.axes, c.start) for c in self.state()]

    def results(self) -> list[Tensor]:
        sums = [(f"d{name}", ("slots", f"d{name}_size")) for name in self.names]
        if self.spec.exact_sums:
            return [Tensor(name, "i64", (*shape, exact_sums.BINS), "inout", 2) for name, shape in sums]
        return [Tensor(name, self.acc, shape, "inout", 1) for name, shape in sums]

    def step(self) -> list[Stmt]:
        made = [*self._probabilities(), *self._prob_gradients()]
        if not self.of_prob:
            made += self._score_gradients()
        attends = all_of([self.lowest <= S, self.over.valid_row])
        shared, values = self._shared()
        made += shared
        for (tensor, tile, _, index), value in zip(self.parts, values, strict=True):
            rows, keys = self._varies(index)
            value = where(attends, value, 0)
            if rows and keys:
                made += self._add(tensor, index, tile, ("i", "j"), attends, value)
            elif keys:
                made.append(Reduce(f"{tile}_sum", self.acc, ("j",), "sum", value, ("i",)))
                made += self._add(tensor, index, f"{tile}_sum", ("j",), self.over.valid_col)
            else:
                made.append(Reduce(f"{tile}_sum", self.acc, ("i",), "sum", value, ("j",)))
                made.append(self._set(tile, ("i",), real(tile) + real(f"{tile}_sum")))
        return made

    def end(self) -> list[Stmt]:
        made: list[Stmt] = []
        for tensor, tile, _, index in self.parts:
            rows, keys = self._varies(index)
            if keys:
                continue
            if rows:
                made += self._add(tensor, index, tile, ("i",), self.over.valid_row)
            else:
                made.append(Reduce(f"{tile}_all", self.acc, (), "sum", real(tile), ("i",)))
                made += self._add(tensor, index, f"{tile}_all", (), sympy.true)
        return made

    def placed(
        self, grid: tuple[GridDim, ...], body: tuple[Stmt, ...]
    ) -> tuple[tuple[GridDim, ...], tuple[Stmt, ...]]:
        """A slot a program: on a CPU a program has all row tiles of its slot, one after the other."""
        cells = [integer(g.name) for g in grid]
        if self.spec.target_kind != "cpu":
            return grid, (Let("slot_of", floormod(sympy.Add(*cells), SLOTS)), *body)
        counts = [Let(f"{g.name}_count", g.extent) for g in grid]
        total = sympy.Mul(*(integer(c.name) for c in counts))
        rest: Expr = SLOT_OF + SLOTS * integer("turn")
        cell: list[Stmt] = []
        for name, count in zip(cells, counts, strict=True):
            cell.append(Let(name.name, floormod(rest, integer(count.name))))
            rest = floordiv(rest, integer(count.name))
        turns = Span(sympy.Integer(0), ceildiv(total - SLOT_OF, SLOTS))
        return (GridDim("slot_of", SLOTS),), (*counts, For("turn", (turns,), (*cell, *body)))

    def _add(
        self,
        tensor: str,
        index: Expr,
        tile: str,
        axes: tuple[str, ...],
        guard: Expr,
        value: Expr | None = None,
    ) -> list[Stmt]:
        """A tile, or the value that would be its elements, added to elements of a result."""
        if not self.spec.exact_sums:
            value = real(tile) if value is None else value
            return [Store(tensor, (SLOT_OF, index), value, axes, guard, adds=True)]
        made: list[Stmt] = [] if value is None else [Compute(tile, self.acc, axes, value)]
        return made + exact_sums.added(tensor, (SLOT_OF, index), tile, axes, guard)


def _axes(expr: Expr, tiles: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The axes of a tile that holds an expression over tiles."""
    found = {a for s in expr.free_symbols for a in tiles.get(str(s), ())}
    return tuple(axis for axis in ("i", "j") if axis in found)

"""gemm: a product by groups, planned, to a kernel.

Before::  %h = grouped_gemm %x, %w, %bounds, %tokens {gathers, halves, expr, tiling}
After::   kernel @up(..) grid(n0, slot, n1) { expert and rows of the slot; products; epilogue; store }

Row tiles cover groups of any size without padding rows: group e takes the slots bounds[e] // R + e and
following, up to those of the next group, which is at least as many as it needs; rows // R + E in all. A
program finds its group by counting the groups that begin at or before its slot.

Leaves alone: nothing; an operation without a tiling is an error.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from ...ir.errors import InputError
from ...ir.expr import Expr, all_of, floordiv, integer, maximum, minimum, read, real, where
from ...ir.graph import Graph, Op
from ...ir.kernel import (
    Axis,
    Compute,
    Dot,
    For,
    GridDim,
    If,
    Kernel,
    Let,
    Load,
    Reduce,
    Span,
    Stmt,
    Store,
    Tensor,
)
from ...ir.ragged import Tiling, storage_of
from ...ir.rename import apart
from .added import Added
from .choice import Choice, choice_of
from .codes import Codes, codes_of
from .matrix import CodedMatrix, DenseMatrix, Matrix
from .spec import ExpertsSpec
from .tiles import COL, D, Part, Tiles

ZERO = sympy.Integer(0)
ROW_AT, N, Z = map(integer, ("i", "n", "z"))
ENTRIES = integer("entries")
FEW = 32  # rows of the tiles on a GPU of which most may be missing
SLOT, EXPERT, ROW, ROW0, LAST, START = map(integer, ("slot", "expert", "row", "row0", "last", "start"))


def slots(rows: Expr, tile: int, experts: int | Expr) -> Expr:
    """Row tiles that groups of any sizes need at most."""
    whole: Expr = floordiv(rows, sympy.Integer(tile))
    return whole + experts


def gemm_kernel(graph: Graph, op: Op, spec: ExpertsSpec, blocked: frozenset[str]) -> Kernel:
    """The kernel of one grouped_gemm. blocked: intermediates that are stored by row tiles."""
    if not isinstance(op.attr("tiling"), Tiling):
        raise InputError("passes.moe.gemm", "a grouped_gemm that has passed passes.moe.schedule", op.kind)
    return _Builder(graph, op, spec, blocked).kernel()


class _Builder:
    def __init__(self, graph: Graph, op: Op, spec: ExpertsSpec, blocked: frozenset[str]) -> None:
        self.op, self.spec, self.blocked = op, spec, blocked
        self.tiling: Tiling = op.attr("tiling")
        plain, stored = storage_of(op)
        a, w, self.bounds, *rest = plain
        self.choice: Choice | None = choice_of(graph, replace(op, inputs=plain))
        self.chooses = op.attr("chooses")
        self.a, self.w, self.out = graph.values[a], graph.values[w], op.output
        self.tokens = rest.pop(0) if op.attr("gathers") else None
        added = [graph.values[rest.pop(0)] for _ in range(2)] if op.attr("adds") else []
        self.bias = rest.pop(0) if op.attr("biased") else None
        self.acc = spec.accumulator
        self.operand = self.acc if spec.is_cpu else spec.dtype
        self.matrix = self._matrix(codes_of(graph, op, stored, spec))
        self.tiles = self.matrix.tiles
        self.experts, self.parts = int(self.w.shape[-3]), self.tiles.parts
        self.added: Added | None = None
        if added:
            how = op.attr("adds") == "rows", self.choice, self.tiles
            self.added = Added(added[0], added[1], *how, self.operand, self.acc, spec.precision)
        # Through a descriptor come neighbouring rows: those of the next group too, which nothing stores.
        self.boxed = bool(dict(self.tiling.meta).get("descriptors")) and not self.tokens

    def _matrix(self, codes: Codes | None) -> Matrix:
        by_rows = bool(self.op.attr("transpose_b"))  # w is [E, out, in]
        _, rows, inner = self.w.shape[-3:]
        sizes = [rows, codes.q.columns if codes else inner]
        sliced = codes.q.slices if codes else 1
        columns, halves = int(self.out.shape[1]), self.op.attr("halves")
        tiles = Tiles(self.tiling, int(sizes[by_rows]), columns, by_rows, sliced, halves)
        if codes is not None:
            return CodedMatrix(tiles, codes, self.operand, self.acc, self.spec.aligned)
        unit = self.op.attr("unit")
        align = self.spec.align(int(self.w.shape[unit - 3])) if unit else 1
        return DenseMatrix(tiles, self.w, unit, self.operand, align, self.chooses == "w")

    # kernel -----------------------------------------------------------------------------------------

    def kernel(self) -> Kernel:
        t, cpu = self.tiling, self.spec.is_cpu
        tiles = self.tiles.column_tiles
        n_tile = integer("n0") if tiles <= t.wide else integer("n1") * t.wide + integer("n0")
        inner = self.tiles.inner
        grid = [GridDim("slot", slots(ENTRIES, t.rows, self.experts))]
        if t.resident:
            parts = [
                s
                for k in range(self.tiles.steps)
                for s in self._load_rows(f"A{k}", sympy.Integer(k * self.tiles.step))
            ]
            work: list[Stmt] = [*parts, self._for(tiles, self._column_tile(integer("u")))]
        else:
            grid.insert(0, GridDim("n0", sympy.Integer(min(t.wide, tiles))))
            if tiles > t.wide:
                grid.append(GridDim("n1", sympy.Integer(-(-tiles // t.wide))))
            work = self._column_tile(n_tile)
        return Kernel(
            name=self._name(),
            args=self._arguments(),
            grid=tuple(grid),
            axes=self._axes(),
            lanes="i" if cpu else None,
            body=(*self._find(), *self._tiles((*self._rows(), *work))),
            meta=tuple(sorted((*t.meta, *self.matrix.hints))),
            comment=(
                f"{self.experts} groups, [rows, {inner}] x [{inner}, {self.tiles.columns}]"
                f"{' x 2' if self.tiles.halves else ''}; {t.rows} rows, {t.cols} columns",
            ),
        )

    def _tiles(self, work: tuple[Stmt, ...]) -> list[Stmt]:
        """The work of a row tile that has rows: the last one of a group may be smaller than the others."""
        rest = self.tiling.rest
        if not rest:
            return [If(ROW0 < LAST, work)]
        few = all_of([ROW0 < LAST, ROW0 + rest >= LAST])
        return [If(ROW0 + rest < LAST, work), If(few, apart(work, {"i": "r", "s": "rs"}, "_rest"))]

    def _name(self) -> str:
        return f"experts_{self.out.name}"

    def _axes(self) -> tuple[Axis, ...]:
        t = self.tiling
        rows, columns = self._axis("i", t.rows), self._axis("n", t.cols)
        if self.spec.is_cpu:
            rows = replace(rows, live="here")
        rest = [self._axis("r", t.rest)] if t.rest else []
        tile = (columns, rows, *rest) if t.turned else (rows, *rest, columns)
        low = [self._axis("l", self.added.rank)] if self.added else []
        if self.choice:
            low += [self._axis("s", t.rows), *([self._axis("rs", t.rest)] if t.rest else [])]
        return (*tile, self._axis("d", self.tiles.step), self._axis("z", self.experts), *low)

    def _axis(self, name: str, extent: int) -> Axis:
        return Axis(name, extent, extent if self.spec.is_cpu else max(16, 1 << (extent - 1).bit_length()))

    def _for(self, count: int, body: list[Stmt]) -> Stmt:
        return For("u", (Span(ZERO, sympy.Integer(count)),), tuple(body))

    # arguments --------------------------------------------------------------------------------------

    def _arguments(self) -> tuple[Tensor, ...]:
        e = self.experts
        listed = self.tokens or self.choice
        tokens = [Tensor("tokens", "i32", ("entries",), unit=0)] if listed else []
        tokens += [self.choice.tensor()] if self.choice else []
        bias = [Tensor(self.bias, self.spec.dtype, (e, self._bias_columns()), unit=1)] if self.bias else []
        bounds = Tensor(self.bounds, "i32", (e + 1,), unit=0)
        kept = [self._stored(v.name, v.dtype, int(v.shape[1]), "out", "entries") for v in self.op.outputs[1:]]
        added: list[Tensor] = []
        if self.added:
            t = self.added.t
            added = [self._stored(t.name, t.dtype, self.added.rank, "in", "entries"), self.added.matrix()]
        return (self._a(), *self.matrix.arguments(), bounds, *tokens, *added, *bias, self._result(), *kept)

    def _bias_columns(self) -> int:
        return self.tiles.columns * len(self.parts)

    def _a(self) -> Tensor:
        return self._stored(
            self.a.name, self.a.dtype, self.tiles.inner, "in", "T" if self.tokens else "entries"
        )

    def _result(self) -> Tensor:
        return self._stored(self.out.name, self.out.dtype, self.tiles.columns, "out", "entries")

    def _stored(self, name: str, dtype: str, columns: int, role: str, rows: str) -> Tensor:
        if name in self.blocked:
            return Tensor(name, dtype, ("slots", columns, self.tiling.rows), role, unit=2)
        return Tensor(name, dtype, (rows, columns), role, unit=1, align=self.spec.align(columns))

    def _find(self) -> list[Stmt]:
        """The group of slot `slot`, the first row of its tile, and where the group's rows end."""
        unit = sympy.Integer(self.tiling.rows)
        begins = floordiv(integer("bound"), unit) + Z <= SLOT
        name, entries = integer(self.bounds), ENTRIES
        return [
            Load("bound", "i32", ("z",), self.bounds, (Z,)),
            Reduce("begun", "i32", (), "sum", where(begins, 1, 0), ("z",)),
            Let("expert", _between(integer("begun") - 1, ZERO, sympy.Integer(self.experts - 1))),
            Let("start", _between(read(name, EXPERT), ZERO, entries)),
            Let("last", _between(read(name, EXPERT + 1), ZERO, entries)),
            Let("row0", START + unit * (SLOT - EXPERT - floordiv(START, unit))),
            *self.matrix.widths(),
        ]

    def _rows(self) -> list[Stmt]:
        out: list[Stmt] = [Compute("row", "i32", ("i",), minimum(ROW0 + ROW_AT, LAST - 1))]
        if self.spec.is_cpu:
            out.insert(0, Let("here", minimum(LAST - ROW0, sympy.Integer(self.tiling.rows))))
        if self.tokens:
            out.append(Load("token", "i32", ("i",), "tokens", (ROW,)))
        return [*out, *(self.choice.of_rows(known=bool(self.tokens)) if self.choice else [])]

    def _load_rows(self, name: str, at: Expr) -> list[Stmt]:
        """The features at .. of the rows of the tile, of each slice."""
        found: list[Stmt] = []
        for number in range(self.tiles.slices):
            feature = number * self.tiles.stretch + at + D
            if self.a.name in self.blocked:
                place = (SLOT, feature, ROW_AT)
            else:
                row = integer("token") if self.tokens else ROW0 + ROW_AT if self.boxed else ROW
                place = (row, feature)
            tile, guard = self.matrix.rows(name, number), self.tiles.within(at, number)
            if self.boxed:
                guard = all_of([guard, ROW0 + ROW_AT < ENTRIES])
            elif self.tiling.rows <= FEW and not self.spec.is_cpu:
                guard = all_of([guard, ROW0 + ROW_AT < LAST])
            found.append(Load(tile, self.operand, ("i", "d"), self.a.name, place, guard, ZERO))
        return found

    def _column_tile(self, n_tile: Expr) -> list[Stmt]:
        first = n_tile * self.tiling.cols
        head: list[Stmt] = [Compute("col", "i32", ("n",), first + N)]
        sums = self._resident if self.tiling.resident else self._stepped
        if self.chooses != "w" or self.choice is None:
            return [*head, *sums(self.parts, first), *self._end()]
        each = self.choice.sum(self.parts, self.acc, lambda parts: sums(parts, first))
        return [*head, *self._zeros(self.parts), *each, *self._end()]

    def _zeros(self, parts: list[Part]) -> list[Stmt]:
        return [Compute(part.acc, self.acc, ("i", "n"), sympy.Float(0.0)) for part in parts]

    def _resident(self, parts: list[Part], first: Expr) -> list[Stmt]:
        """The products of a tile whose rows are loaded."""
        return [s for part in parts for k in range(self.tiles.steps) for s in self._sum_part(part, k, first)]

    def _stepped(self, parts: list[Part], first: Expr) -> list[Stmt]:
        """The products of a tile, a step of the summed axis after another."""
        head: list[Stmt] = []
        unroll, turn = self.tiling.unroll, []
        ahead = self.tiling.ahead and self.matrix.scaled_by_step
        for n in range(unroll):
            at, tag = self._at(integer("u"), n)
            turn += self._load_rows(f"A{tag}", at)
            for part in parts:
                turn += self.matrix.load(part, part.matrix + tag, at, first, scales=not ahead)
            turn += self._row_sums(f"A{tag}")
            for part in parts:
                turn += self._dots(part, f"A{tag}", part.matrix + tag, at, scales=not ahead)
        if ahead:
            head, next_ones, moves = self._scales_ahead()
            turn = [*next_ones, *turn, *moves]
        return [*head, *self._zeros(parts), self._for(-(-self.tiles.steps // unroll), turn)]

    def _at(self, turn: Expr, number: int) -> tuple[Expr, str]:
        """Where a step of a turn begins, and what its tiles' names have in addition."""
        unroll = self.tiling.unroll
        return self.tiles.step * (unroll * turn + number), str(number) if unroll > 1 else ""

    def _scales_ahead(self) -> tuple[list[Stmt], list[Stmt], list[Stmt]]:
        """Scales of the first turn; those of the next one, loaded while one is computed; and their taking
        the place of the ones before."""
        first: list[Stmt] = []
        later: list[Stmt] = []
        moves: list[Stmt] = []
        every = [
            (n, p, s) for n in range(self.tiling.unroll) for p in self.parts for s in range(self.tiles.slices)
        ]
        for n, part, number in every:
            (at, tag), (after, _) = self._at(ZERO, n), self._at(integer("u") + 1, n)
            name = f"{part.matrix}{tag}"
            first += self.matrix.scale(part, name, number, at)
            later += self.matrix.scale(part, f"next{name}", number, after, ahead=True)
            for what in self.matrix.scale_tiles:
                kept, new = f"S{name}_{number}{what}", f"Snext{name}_{number}{what}"
                moves.append(Compute(kept, self.acc, ("n",), real(new), declares=False))
        return first, later, moves

    def _row_sums(self, rows: str) -> list[Stmt]:
        """What products of codes take their zero points times of, for each slice of a step."""
        if self.matrix.scaled != "products" or "_zero" not in self.matrix.scale_tiles:
            return []
        tiles = [self.matrix.rows(rows, number) for number in range(self.tiles.slices)]
        return [Reduce(f"R{a}", self.acc, ("i",), "sum", real(a), ("d",)) for a in tiles]

    def _dots(self, part: Part, rows: str, name: str, at: Expr, *, scales: bool) -> list[Stmt]:
        """The products of a step, added to those before it. scales: theirs are to be loaded."""
        found: list[Stmt] = []
        for number in range(self.tiles.slices):
            a, b = self.matrix.rows(rows, number), self.matrix.tile(part, name, number)
            if self.matrix.scaled != "products":
                found.append(self._dot(part, a, b, accumulate=True))
                continue
            product = f"P{name}_{number}"
            more = real(part.acc) + self.matrix.scaled_product(real(product), name, number, real(f"R{a}"))
            found += [
                *(self.matrix.scale(part, name, number, at) if scales else ()),
                self._dot(replace(part, acc=product), a, b, accumulate=False),
                Compute(part.acc, self.acc, ("i", "n"), more, declares=False),
            ]
        return found

    def _sum_part(self, part: Part, k: int, first: Expr) -> list[Stmt]:
        """Part k of the sum of a product."""
        name = f"{part.matrix}_{k}"
        found = self.matrix.load(part, name, sympy.Integer(k * self.tiles.step), first)
        for number in range(self.tiles.slices):
            a, b = self.matrix.rows(f"A{k}", number), self.matrix.tile(part, name, number)
            found.append(self._dot(part, a, b, accumulate=k + number > 0))
        return found

    def _dot(self, part: Part, rows: str, matrix: str, *, accumulate: bool) -> Dot:
        more = {"accumulate": accumulate, "declares": not accumulate, "precision": self.spec.precision}
        return Dot(part.acc, self.acc, ("i", "n"), rows, matrix, "d", **more)

    def _end(self) -> list[Stmt]:
        out: list[Stmt] = []
        values: dict[Expr, Expr] = {}
        for k, part in enumerate(self.parts):
            values[real(f"x{k}")] = real(part.acc)
            if self.matrix.scaled == "sums":
                out += self.matrix.scale(part, part.matrix, 0, ZERO)
                values[real(f"x{k}")] *= real(f"S{part.matrix}_0")
        if self.added:
            for part, (x, value) in zip(self.parts, values.items(), strict=True):
                if value != real(part.acc):
                    out.append(Compute(part.acc, self.acc, ("i", "n"), value, declares=False))
                values[x] = real(part.acc)
            out += self.added.sums()
        if self.bias:
            for k, part in enumerate(self.parts):
                at, valid = (EXPERT, part.column), self.tiles.valid(part)
                out.append(Load(f"bias{k}", self.acc, ("n",), self.bias, at, valid, sympy.Float(0.0)))
                values[real(f"x{k}")] += real(f"bias{k}")
        out += self._keep(values)
        if self.tiles.blocks > 1:
            results = [values[real(f"x{k}")] for k in range(self.tiles.blocks)]
            return [*out, *(self._store(p, p.column, r) for p, r in zip(self.parts, results, strict=True))]
        expr = self.op.attr("expr")
        result = values[real("x0")] if expr is None else sympy.sympify(expr).xreplace(values)
        if result != real(self.parts[0].acc):
            out.append(Compute("R", self.acc, ("i", "n"), result))
            result = real("R")
        return [*out, self._store(self.parts[0], COL, result)]

    def _store(self, part: Part, column: Expr, result: Expr) -> Store:
        """A tile of the result."""
        if self.out.name in self.blocked:
            where = (SLOT, column, ROW_AT)
            return Store(self.out.name, where, result, ("i", "n"), self.tiles.valid(part))
        valid = all_of([ROW0 + ROW_AT < LAST, self.tiles.valid(part)])
        return Store(self.out.name, (ROW0 + ROW_AT, column), result, ("i", "n"), valid)

    def _keep(self, values: dict[Expr, Expr]) -> list[Stmt]:
        """What the activation is taken of, stored too."""
        here = ROW0 + ROW_AT < LAST
        return [
            Store(
                kept.name,
                (ROW0 + ROW_AT, part.column),
                values[real(f"x{k}")],
                ("i", "n"),
                all_of([here, self.tiles.valid(part)]),
            )
            for kept in self.op.outputs[1:]
            for k, part in enumerate(self.parts)
        ]


def _between(value: Expr, low: Expr, high: Expr) -> Expr:
    return minimum(maximum(value, low), high)

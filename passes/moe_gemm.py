"""moe_gemm: a product by groups, planned, to a kernel.

Before::  %h = grouped_gemm %x, %w, %bounds, %tokens {gathers, halves, expr, tiling}
After::   kernel @up(..) grid(n0, slot, n1) { expert and rows of the slot; products; epilogue; store }

Row tiles cover groups of any size without padding rows: group e takes the slots bounds[e] // R + e and
following, up to those of the next group, which is at least as many as it needs; rows // R + E in all. A
program finds its group by counting the groups that begin at or before its slot.

Leaves alone: nothing; an operation without a tiling is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from ..ir.errors import InputError
from ..ir.expr import Expr, all_of, floordiv, integer, maximum, minimum, read, real, where
from ..ir.graph import Graph, Op
from ..ir.kernel import (
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
from ..ir.ragged import Tiling, storage_of
from .moe_codes import Codes, codes_of, is_uniform
from .moe_spec import BYTES, ExpertsSpec

ZERO = sympy.Integer(0)
ROW_AT, N, D, Z, LOW = map(integer, ("i", "n", "d", "z", "l"))
ENTRIES = integer("entries")
SLOT, EXPERT, ROW, ROW0, LAST, START = map(integer, ("slot", "expert", "row", "row0", "last", "start"))


def slots(rows: Expr, tile: int, experts: int | Expr) -> Expr:
    """Row tiles that groups of any sizes need at most."""
    whole: Expr = floordiv(rows, sympy.Integer(tile))
    return whole + experts


def gemm_kernel(graph: Graph, op: Op, spec: ExpertsSpec, blocked: frozenset[str]) -> Kernel:
    """The kernel of one grouped_gemm. blocked: intermediates that are stored by row tiles."""
    if not isinstance(op.attr("tiling"), Tiling):
        raise InputError("moe_gemm", "a grouped_gemm that has passed moe_schedule", op.kind)
    return _Builder(graph, op, spec, blocked).kernel()


@dataclass(frozen=True)
class _Part:
    """One of the products of a program: its accumulator, and its columns in the matrix."""

    acc: str
    matrix: str
    column: Expr
    number: int


class _Builder:
    def __init__(self, graph: Graph, op: Op, spec: ExpertsSpec, blocked: frozenset[str]) -> None:
        self.op, self.spec, self.blocked = op, spec, blocked
        self.tiling: Tiling = op.attr("tiling")
        plain, stored = storage_of(op)
        a, w, self.bounds, *rest = plain
        self.a, self.w, self.out = graph.values[a], graph.values[w], op.output
        self.tokens = rest.pop(0) if op.attr("gathers") else None
        self.added = [graph.values[rest.pop(0)] for _ in range(2)] if op.attr("adds") else []
        self.bias = rest.pop(0) if op.attr("biased") else None
        self.by_rows = bool(op.attr("transpose_b"))  # w is [E, out, in]
        self.codes = codes_of(graph, op, stored, spec)
        experts, *sizes = self.w.shape
        if self.codes is not None:
            sizes[1] = self.codes.q.columns
        self.experts, self.inner = int(experts), int(sizes[self.by_rows])
        self.columns = int(self.out.shape[1])
        # Slices of quantised matrices: of the summed axis, or of the columns.
        slices = self.codes.q.slices if self.codes else 1
        self.slices, self.blocks = (slices, 1) if self.by_rows else (1, slices)
        self.stretch = -(-self.inner // self.slices)
        self.width = -(-self.columns // self.blocks)
        self.acc = spec.accumulator
        self.operand = self.acc if spec.is_cpu else spec.dtype
        self.step = self.tiling.inner
        self.steps = -(-self.stretch // self.step)
        self.col, self.first = integer("col"), ZERO
        self.parts = self._parts()

    def _parts(self) -> list[_Part]:
        if self.blocks > 1:
            columns = [self.col + k * self.width for k in range(self.blocks)]
        else:
            match self.op.attr("halves"):
                case None:
                    columns = [self.col]
                case "split":
                    columns = [self.col, self.col + self.columns]
                case _:
                    columns = [2 * self.col, 2 * self.col + 1]
        return [_Part(f"acc{k}", f"W{k}", column, k) for k, column in enumerate(columns)]

    # kernel -----------------------------------------------------------------------------------------

    def kernel(self) -> Kernel:
        t, cpu = self.tiling, self.spec.is_cpu
        tiles = -(-self.width // t.cols)
        n_tile = integer("n0") if tiles <= t.wide else integer("n1") * t.wide + integer("n0")
        rows = ENTRIES
        grid = [GridDim("slot", slots(rows, t.rows, self.experts))]
        if t.resident:
            parts = [
                s for k in range(self.steps) for s in self._load_rows(f"A{k}", sympy.Integer(k * self.step))
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
            body=(*self._find(), If(ROW0 < LAST, (*self._rows(), *work))),
            meta=t.meta,
            comment=(
                f"{self.experts} groups, [rows, {self.inner}] x [{self.inner}, {self.columns}]"
                f"{' x 2' if len(self.parts) > 1 else ''}; {t.rows} rows, {t.cols} columns",
            ),
        )

    def _name(self) -> str:
        return f"experts_{self.out.name}"

    def _axes(self) -> tuple[Axis, ...]:
        t = self.tiling
        rows, columns = self._axis("i", t.rows), self._axis("n", t.cols)
        tile = (columns, rows) if t.turned else (rows, columns)
        low = [self._axis("l", int(self.added[0].shape[1]))] if self.added else []
        return (*tile, self._axis("d", self.step), self._axis("z", self.experts), *low)

    def _axis(self, name: str, extent: int) -> Axis:
        return Axis(name, extent, extent if self.spec.is_cpu else max(16, 1 << (extent - 1).bit_length()))

    def _for(self, count: int, body: list[Stmt]) -> Stmt:
        return For("u", (Span(ZERO, sympy.Integer(count)),), tuple(body))

    # arguments --------------------------------------------------------------------------------------

    def _arguments(self) -> tuple[Tensor, ...]:
        e = self.experts
        tokens = [Tensor("tokens", "i32", ("entries",), unit=0)] if self.tokens else []
        bias = [Tensor(self.bias, self.spec.dtype, (e, self._bias_columns()), unit=1)] if self.bias else []
        matrix = self.codes.tensors(aligned=self.spec.aligned) if self.codes else [self._dense()]
        bounds = Tensor(self.bounds, "i32", (e + 1,), unit=0)
        kept = [self._stored(v.name, v.dtype, int(v.shape[1]), "out", "entries") for v in self.op.outputs[1:]]
        added = [self._stored(v.name, v.dtype, int(v.shape[1]), "in", "entries") for v in self.added[:1]]
        added += [Tensor(v.name, v.dtype, tuple(v.shape), unit=2) for v in self.added[1:]]
        return (self._a(), *matrix, bounds, *tokens, *added, *bias, self._result(), *kept)

    def _dense(self) -> Tensor:
        unit = self.op.attr("unit")
        align = self._align(int(self.w.shape[unit])) if unit else 1
        return Tensor(self.w.name, self.w.dtype, tuple(self.w.shape), unit=unit, align=align)

    def _bias_columns(self) -> int:
        return self.columns * len(self.parts)

    def _a(self) -> Tensor:
        return self._stored(self.a.name, self.a.dtype, self.inner, "in", "T" if self.tokens else "entries")

    def _result(self) -> Tensor:
        return self._stored(self.out.name, self.out.dtype, self.columns, "out", "entries")

    def _stored(self, name: str, dtype: str, columns: int, role: str, rows: str) -> Tensor:
        if name in self.blocked:
            return Tensor(name, dtype, ("slots", columns, self.tiling.rows), role, unit=2)
        return Tensor(name, dtype, (rows, columns), role, unit=1, align=self._align(columns))

    def _align(self, columns: int) -> int:
        if self.spec.is_cpu or not self.spec.aligned:
            return 1
        size = columns * BYTES[self.spec.dtype]
        return min(16, size & -size)

    # statements -------------------------------------------------------------------------------------

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
            *(self.codes.widths() if self.codes else []),
        ]

    def _rows(self) -> list[Stmt]:
        out: list[Stmt] = [Compute("row", "i32", ("i",), minimum(ROW0 + ROW_AT, LAST - 1))]
        if self.tokens:
            out.append(Load("token", "i32", ("i",), "tokens", (ROW,)))
        return out

    def _load_rows(self, name: str, at: Expr) -> list[Stmt]:
        """The features at .. of the rows of the tile, of each slice."""
        found: list[Stmt] = []
        for part in range(self.slices):
            feature = part * self.stretch + at + D
            if self.a.name in self.blocked:
                place = (SLOT, feature, ROW_AT)
            else:
                place = (integer("token") if self.tokens else ROW, feature)
            guard = self._within(at, part)
            found.append(
                Load(self._of(name, part), self.operand, ("i", "d"), self.a.name, place, guard, ZERO)
            )
        return found

    def _of(self, name: str, part: int) -> str:
        return f"{name}_{part}" if self.codes else name

    def _within(self, at: Expr, part: int = 0) -> Expr:
        """Whether the features of a step are there."""
        parts = []
        if self.stretch % (self.step * self.tiling.unroll):
            parts.append(at + D < self.stretch)
        if (part + 1) * self.stretch > self.inner and self.slices > 1:
            parts.append(part * self.stretch + at + D < self.inner)
        return all_of(parts)

    def _load_matrix(self, part: _Part, name: str, at: Expr) -> list[Stmt]:
        """Tiles of the matrix at a step: one, or one for each slice of it, named by `_tile`."""
        if self.codes is not None:
            return self._decoded(self.codes, part, name, at)
        feature = at + D
        index = (EXPERT, part.column, feature) if self.by_rows else (EXPERT, feature, part.column)
        guard = all_of([self._within(at), self._valid_column(part)])
        # Memory runs along the tile's last axis, so that a CPU copies vectors.
        axes = ("n", "d") if self.by_rows == (self.op.attr("unit") == 2) else ("d", "n")
        return [Load(name, self.operand, axes, self.w.name, index, guard, ZERO)]

    def _tile(self, part: _Part, name: str, of: int) -> str:
        """The name of the tile of a part that meets slice `of` of the rows."""
        if self.codes is None:
            return name
        return f"{name}_{of}" if self.by_rows else f"{name.replace(part.matrix, 'W', 1)}_{part.number}"

    def _decoded(self, codes: Codes, part: _Part, name: str, at: Expr) -> list[Stmt]:
        """Tiles of quantised matrices."""
        guard = all_of([self._within(at), self.col < self.width if self._overhangs() else sympy.true])
        if self.by_rows:
            axes, place, numbers, steps = ("n", "d"), (part.column, at + D), range(self.slices), self.step
            guard = all_of([self._within(at), self._valid_column(part)])
        else:
            name = name.replace(part.matrix, "W", 1)
            axes, place, numbers, steps = ("d", "n"), (at + D, self.col), [part.number], self.tiling.cols
        loads = codes.load(f"{name}_", self.operand, axes, place, guard)
        found = loads if self.by_rows or part.number == 0 or codes.is_plain else []
        even = is_uniform(codes.q, steps)
        for number in numbers:
            scale: Expr | None = None
            if not even or self._scales() == "codes":
                found += self._scale(codes, part, name, number, at, even, guard)
                scale = real(f"S{name}_{number}")
            found += codes.decode(f"{name}_", number, self.operand, axes, scale)
        return found

    def _scales(self) -> str:
        """What scales join: codes, products or sums."""
        assert self.codes is not None
        if not self.by_rows or not is_uniform(self.codes.q, self.step):
            return "codes"
        one = self.codes.q.groups == 1
        return self.tiling.scales if one or self.tiling.scales != "sums" else "products"

    def _scale(
        self, codes: Codes, part: _Part, name: str, number: int, at: Expr, even: bool, guard: Expr
    ) -> list[Stmt]:
        """The scales of a tile, by its row alone where they all lie in one group of it."""
        first = number * codes.q.stretch
        if self.by_rows:
            row, column, axes = part.column, first + at + (0 if even else D), ("n",) if even else ("n", "d")
            known = self._valid_column(part)
        else:
            row, axes = at + D, ("d",) if even else ("d", "n")
            column = first + (self.first if even else self.col)
            known = self._within(at)
        if even and codes.q.groups > 1:
            if self.by_rows:
                inside = at < self.stretch if self.stretch % (self.step * self.tiling.unroll) else sympy.true
            else:
                inside = column < self.columns if self._overhangs() else sympy.true
            known = all_of([known, inside])
        elif not even:
            known = all_of([guard, column < codes.q.columns])
        return codes.scale(f"S{name}_{number}", self.acc, axes, (row, column), known)

    def _overhangs(self) -> bool:
        """Whether tiles of columns, or the last of `wide` tiles, reach beyond the columns."""
        t = self.tiling
        tiles = -(-self.width // t.cols)
        return bool(self.width % t.cols or (tiles > t.wide and tiles % t.wide))

    def _valid_column(self, part: _Part) -> Expr:
        """Whether a column is there."""
        inside = [self.col < self.width] if self._overhangs() else []
        if self.blocks > 1 and (part.number + 1) * self.width > self.columns:
            inside.append(part.column < self.columns)
        return all_of(inside)

    def _column_tile(self, n_tile: Expr) -> list[Stmt]:
        self.first = n_tile * self.tiling.cols
        head: list[Stmt] = [Compute("col", "i32", ("n",), self.first + N)]
        if self.tiling.resident:
            products = [s for part in self.parts for k in range(self.steps) for s in self._sum_part(part, k)]
            return [*head, *products, *self._end()]
        unroll = self.tiling.unroll if self.codes else 1
        turn: list[Stmt] = []
        for n in range(unroll):
            at, tag = self.step * (unroll * integer("u") + n), str(n) if unroll > 1 else ""
            loads = [s for part in self.parts for s in self._load_matrix(part, part.matrix + tag, at)]
            dots = [s for part in self.parts for s in self._dots(part, f"A{tag}", part.matrix + tag, at)]
            turn += [*self._load_rows(f"A{tag}", at), *loads, *dots]
        zero = [Compute(part.acc, self.acc, ("i", "n"), sympy.Float(0.0)) for part in self.parts]
        return [*head, *zero, self._for(-(-self.steps // unroll), turn), *self._end()]

    def _dots(self, part: _Part, rows: str, matrix: str, at: Expr) -> list[Stmt]:
        """The products of a step, added to those before it."""
        found: list[Stmt] = []
        apart = self.codes is not None and self._scales() == "products"
        for number in range(self.slices):
            tile, name = self._of(rows, number), self._tile(part, matrix, number)
            if not apart:
                found.append(self._dot(part, tile, name, accumulate=True))
                continue
            assert self.codes is not None
            product = f"P{name}"
            found += self._scale(self.codes, part, matrix, number, at, True, sympy.true)
            more = real(part.acc) + real(product) * real(f"S{matrix}_{number}")
            found += [
                self._dot(replace(part, acc=product), tile, name, accumulate=False),
                Compute(part.acc, self.acc, ("i", "n"), more, declares=False),
            ]
        return found

    def _sum_part(self, part: _Part, k: int) -> list[Stmt]:
        """Part k of the sum of a product, added up on its own: errors of rounding grow with its length."""
        matrix = f"{part.matrix}_{k}"
        found = self._load_matrix(part, matrix, sympy.Integer(k * self.step))
        for number in range(self.slices):
            rows, tile = self._of(f"A{k}", number), self._tile(part, matrix, number)
            if k == number == 0:
                found.append(self._dot(part, rows, tile, accumulate=False))
                continue
            more = replace(part, acc=f"{part.acc}_{k}_{number}")
            total = Compute(part.acc, self.acc, ("i", "n"), real(part.acc) + real(more.acc), declares=False)
            found += [self._dot(more, rows, tile, accumulate=False), total]
        return found

    def _dot(self, part: _Part, rows: str, matrix: str, *, accumulate: bool) -> Dot:
        more = {"accumulate": accumulate, "declares": not accumulate, "precision": self.spec.precision}
        return Dot(part.acc, self.acc, ("i", "n"), rows, matrix, "d", **more)

    def _add(self) -> list[Stmt]:
        """What `adds` has added to the sums."""
        if not self.added:
            return []
        (t, b), by_rows = self.added, self.op.attr("adds") == "rows"
        out: list[Stmt] = [Load("T_added", self.operand, ("i", "l"), t.name, (ROW, LOW))]
        for k, part in enumerate(self.parts):
            index = (EXPERT, part.column, LOW) if by_rows else (EXPERT, LOW, part.column)
            axes = ("n", "l") if by_rows else ("l", "n")
            out.append(Load(f"B{k}", self.operand, axes, b.name, index, self._valid_column(part), ZERO))
            more = {"accumulate": True, "declares": False, "precision": self.spec.precision}
            out.append(Dot(part.acc, self.acc, ("i", "n"), "T_added", f"B{k}", "l", **more))
        return out

    def _end(self) -> list[Stmt]:
        out = self._add()
        values: dict[Expr, Expr] = {}
        for k, part in enumerate(self.parts):
            value = real(part.acc)
            if self.codes is not None and self._scales() == "sums":
                out += self._scale(self.codes, part, f"all{k}", 0, ZERO, True, sympy.true)
                value = value * real(f"Sall{k}_0")
            if self.bias:
                at = (EXPERT, part.column)
                zero = sympy.Float(0.0)
                out.append(Load(f"bias{k}", self.acc, ("n",), self.bias, at, self._valid_column(part), zero))
                value = value + real(f"bias{k}")
            values[real(f"x{k}")] = value
        out += self._keep(values)
        if self.blocks > 1:
            results = [values[real(f"x{k}")] for k in range(self.blocks)]
            return [*out, *(self._store(p, p.column, r) for p, r in zip(self.parts, results, strict=True))]
        expr = self.op.attr("expr")
        result = values[real("x0")] if expr is None else sympy.sympify(expr).xreplace(values)
        if result != real(self.parts[0].acc):
            out.append(Compute("R", self.acc, ("i", "n"), result))
            result = real("R")
        return [*out, self._store(self.parts[0], self.col, result)]

    def _store(self, part: _Part, column: Expr, result: Expr) -> Store:
        """A tile of the result."""
        if self.out.name in self.blocked:
            where = (SLOT, column, ROW_AT)
            return Store(self.out.name, where, result, ("i", "n"), self._valid_column(part))
        valid = all_of([ROW0 + ROW_AT < LAST, self._valid_column(part)])
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
                all_of([here, self._valid_column(part)]),
            )
            for kept in self.op.outputs[1:]
            for k, part in enumerate(self.parts)
        ]


def _between(value: Expr, low: Expr, high: Expr) -> Expr:
    return minimum(maximum(value, low), high)

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
from ..ir.ragged import Tiling
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


class _Builder:
    def __init__(self, graph: Graph, op: Op, spec: ExpertsSpec, blocked: frozenset[str]) -> None:
        self.op, self.spec, self.blocked = op, spec, blocked
        self.tiling: Tiling = op.attr("tiling")
        a, w, self.bounds, *rest = op.inputs
        self.a, self.w, self.out = graph.values[a], graph.values[w], op.output
        self.tokens = rest.pop(0) if op.attr("gathers") else None
        self.added = [graph.values[rest.pop(0)] for _ in range(2)] if op.attr("adds") else []
        self.bias = rest.pop(0) if op.attr("biased") else None
        self.by_rows = bool(op.attr("transpose_b"))  # w is [E, out, in]
        experts, *sizes = self.w.shape
        self.experts, self.inner = int(experts), int(sizes[self.by_rows])
        self.columns = int(self.out.shape[1])
        self.acc = spec.accumulator
        self.operand = self.acc if spec.is_cpu else spec.dtype
        self.step = self.tiling.inner
        self.steps = -(-self.inner // self.step)
        self.col = integer("col")
        self.parts = self._parts()

    def _parts(self) -> list[_Part]:
        match self.op.attr("halves"):
            case None:
                columns = [self.col]
            case "split":
                columns = [self.col, self.col + self.columns]
            case _:
                columns = [2 * self.col, 2 * self.col + 1]
        return [_Part(f"acc{k}", f"W{k}", column) for k, column in enumerate(columns)]

    # kernel -----------------------------------------------------------------------------------------

    def kernel(self) -> Kernel:
        t, cpu = self.tiling, self.spec.is_cpu
        tiles = -(-self.columns // t.cols)
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
            axes=(
                self._axis("i", t.rows),
                self._axis("n", t.cols),
                self._axis("d", self.step),
                self._axis("z", self.experts),
                *([self._axis("l", int(self.added[0].shape[1]))] if self.added else []),
            ),
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

    def _axis(self, name: str, extent: int) -> Axis:
        return Axis(name, extent, extent if self.spec.is_cpu else max(16, 1 << (extent - 1).bit_length()))

    def _for(self, count: int, body: list[Stmt]) -> Stmt:
        return For("u", (Span(ZERO, sympy.Integer(count)),), tuple(body))

    # arguments --------------------------------------------------------------------------------------

    def _arguments(self) -> tuple[Tensor, ...]:
        e = self.experts
        tokens = [Tensor("tokens", "i32", ("entries",), unit=0)] if self.tokens else []
        bias = [Tensor(self.bias, self.spec.dtype, (e, self._bias_columns()), unit=1)] if self.bias else []
        matrix = Tensor(
            self.w.name,
            self.w.dtype,
            tuple(self.w.shape),
            unit=self.op.attr("unit"),
            align=self._align(int(self.w.shape[self.op.attr("unit")])) if self.op.attr("unit") else 1,
        )
        bounds = Tensor(self.bounds, "i32", (e + 1,), unit=0)
        kept = [self._stored(v.name, v.dtype, int(v.shape[1]), "out", "entries") for v in self.op.outputs[1:]]
        added = [self._stored(v.name, v.dtype, int(v.shape[1]), "in", "entries") for v in self.added[:1]]
        added += [Tensor(v.name, v.dtype, tuple(v.shape), unit=2) for v in self.added[1:]]
        return (self._a(), matrix, bounds, *tokens, *added, *bias, self._result(), *kept)

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
        ]

    def _rows(self) -> list[Stmt]:
        out: list[Stmt] = [Compute("row", "i32", ("i",), minimum(ROW0 + ROW_AT, LAST - 1))]
        if self.tokens:
            out.append(Load("token", "i32", ("i",), "tokens", (ROW,)))
        return out

    def _load_rows(self, name: str, at: Expr) -> list[Stmt]:
        """The features at .. of the rows of the tile."""
        feature = at + D
        if self.a.name in self.blocked:
            return [Load(name, self.operand, ("i", "d"), self.a.name, (SLOT, feature, ROW_AT))]
        row = integer("token") if self.tokens else ROW
        return [
            Load(name, self.operand, ("i", "d"), self.a.name, (row, feature), self._within(feature), ZERO)
        ]

    def _within(self, feature: Expr) -> Expr:
        return sympy.true if self.inner % self.step == 0 else feature < self.inner

    def _load_matrix(self, part: _Part, name: str, at: Expr) -> Load:
        feature = at + D
        index = (EXPERT, part.column, feature) if self.by_rows else (EXPERT, feature, part.column)
        guard = all_of([self._within(feature), self._valid_column()])
        # Memory runs along the tile's last axis, so that a CPU copies vectors.
        axes = ("n", "d") if self.by_rows == (self.op.attr("unit") == 2) else ("d", "n")
        return Load(name, self.operand, axes, self.w.name, index, guard, ZERO)

    def _valid_column(self) -> Expr:
        """Whether a column is there: tiles of columns may hang over, and so may the last of `wide` tiles."""
        t = self.tiling
        tiles = -(-self.columns // t.cols)
        whole = self.columns % t.cols == 0 and (tiles <= t.wide or tiles % t.wide == 0)
        return sympy.true if whole else self.col < self.columns

    def _column_tile(self, n_tile: Expr) -> list[Stmt]:
        head: list[Stmt] = [Compute("col", "i32", ("n",), n_tile * self.tiling.cols + N)]
        if self.tiling.resident:
            products = [s for part in self.parts for k in range(self.steps) for s in self._sum_part(part, k)]
            return [*head, *products, *self._end()]
        at = self.step * integer("u")
        loads = [self._load_matrix(part, part.matrix, at) for part in self.parts]
        dots = [self._dot(part, "A", part.matrix, accumulate=True) for part in self.parts]
        zero = [Compute(part.acc, self.acc, ("i", "n"), sympy.Float(0.0)) for part in self.parts]
        return [*head, *zero, self._for(self.steps, [*self._load_rows("A", at), *loads, *dots]), *self._end()]

    def _sum_part(self, part: _Part, k: int) -> list[Stmt]:
        """Part k of the sum of a product, added up on its own: errors of rounding grow with its length."""
        matrix = f"{part.matrix}_{k}"
        load = self._load_matrix(part, matrix, sympy.Integer(k * self.step))
        if k == 0:
            return [load, self._dot(part, f"A{k}", matrix, accumulate=False)]
        more = replace(part, acc=f"{part.acc}_{k}")
        total = Compute(part.acc, self.acc, ("i", "n"), real(part.acc) + real(more.acc), declares=False)
        return [load, self._dot(more, f"A{k}", matrix, accumulate=False), total]

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
            out.append(Load(f"B{k}", self.operand, axes, b.name, index, self._valid_column(), ZERO))
            more = {"accumulate": True, "declares": False, "precision": self.spec.precision}
            out.append(Dot(part.acc, self.acc, ("i", "n"), "T_added", f"B{k}", "l", **more))
        return out

    def _end(self) -> list[Stmt]:
        out = self._add()
        values: dict[Expr, Expr] = {}
        for k, part in enumerate(self.parts):
            value = real(part.acc)
            if self.bias:
                at = (EXPERT, part.column)
                zero = sympy.Float(0.0)
                out.append(Load(f"bias{k}", self.acc, ("n",), self.bias, at, self._valid_column(), zero))
                value = value + real(f"bias{k}")
            values[real(f"x{k}")] = value
        out += self._keep(values)
        expr = self.op.attr("expr")
        result = values[real("x0")] if expr is None else sympy.sympify(expr).xreplace(values)
        if result != real(self.parts[0].acc):
            out.append(Compute("R", self.acc, ("i", "n"), result))
            result = real("R")
        if self.out.name in self.blocked:
            return [
                *out,
                Store(self.out.name, (SLOT, self.col, ROW_AT), result, ("i", "n"), self._valid_column()),
            ]
        valid = all_of([ROW0 + ROW_AT < LAST, self._valid_column()])
        return [*out, Store(self.out.name, (ROW0 + ROW_AT, self.col), result, ("i", "n"), valid)]

    def _keep(self, values: dict[Expr, Expr]) -> list[Stmt]:
        """What the activation is taken of, stored too."""
        valid = all_of([ROW0 + ROW_AT < LAST, self._valid_column()])
        return [
            Store(kept.name, (ROW0 + ROW_AT, part.column), values[real(f"x{k}")], ("i", "n"), valid)
            for kept in self.op.outputs[1:]
            for k, part in enumerate(self.parts)
        ]


def _between(value: Expr, low: Expr, high: Expr) -> Expr:
    return minimum(maximum(value, low), high)

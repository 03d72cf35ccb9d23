"""group: sorting entries by expert, by counting: two kernels, or one where entries are few.

Before::  %tokens, %bounds, %place = group %ids {experts = E}
After::   kernel @group_count   entries of each expert in each chunk of entries
          kernel @group_place   prefix sums of these; rank within the chunk by comparing; places

A program of the second kernel adds up the counts of all chunks, and of those before its own: no program
waits for another, nothing waits for the host, and the order is that of the entries, always.

Leaves alone: nothing; other operations are lowered elsewhere.
"""

from __future__ import annotations

import sympy

from ...ir.expr import all_of, ceildiv, floordiv, integer, where
from ...ir.graph import Graph, Op
from ...ir.kernel import (
    Axis,
    Compute,
    For,
    GridDim,
    If,
    Kernel,
    Load,
    Reduce,
    Scan,
    Span,
    Stmt,
    Store,
    Tensor,
)

BLOCK = 64  # entries that are compared with each other, and with all experts, at once
CHUNK = 8  # blocks of a program
COUNTS = 16  # chunks whose counts are added up at once
ZERO, ONE = sympy.Integer(0), sympy.Integer(1)
C, U, V, Z, Y, E_AXIS, B = map(integer, ("c", "u", "v", "z", "y", "e", "b"))
ENTRIES = integer("entries")


def group_kernels(graph: Graph, op: Op, *, padded: bool) -> tuple[tuple[Kernel, ...], tuple[Tensor, ...]]:
    """The kernels of one group, in launch order, and what they leave to each other.

    padded: axes have powers of two for sizes."""
    ids = graph.values[op.inputs[0]]
    assert isinstance(ids.shape[1], int)
    return _Builder(op.attr("experts"), ids.shape[1], ids.dtype, bool(op.attr("single")), padded).kernels()


class _Builder:
    def __init__(self, experts: int, top_k: int, ids: str, single: bool, padded: bool) -> None:
        self.experts, self.top_k, self.dtype, self.single = experts, top_k, ids, single
        size = max(16, 1 << (experts - 1).bit_length()) if padded else experts
        self.e = Axis("e", experts, size)
        self.meta = (("stages", 1), ("warps", 8 if experts > 64 else 4))
        self.ids = Tensor("ids", ids, ("entries",), unit=0)
        self.counts = ("chunks", experts)

    def kernels(self) -> tuple[tuple[Kernel, ...], tuple[Tensor, ...]]:
        if self.single:
            return (self._place(),), ()
        counts = Tensor("counts", "i32", (ceildiv(ENTRIES, BLOCK * CHUNK), self.experts), unit=1)
        return (self._count(), self._place()), (counts,)

    def _grid(self) -> GridDim:
        return GridDim("c", ONE if self.single else ceildiv(ENTRIES, BLOCK * CHUNK))

    def _blocks(self, var: str, body: list[Stmt]) -> For:
        """A loop over the blocks of this program's chunk."""
        last = ceildiv(ENTRIES, BLOCK) if self.single else sympy.Integer(CHUNK)
        return For(var, (Span(ZERO, last),), tuple(body))

    def _id(self, name: str, axis: str, block: sympy.Symbol) -> list[Stmt]:
        at = f"at_{name}"
        inside = integer(at) < ENTRIES
        return [
            Compute(at, "i32", (axis,), (C * CHUNK + block) * BLOCK + integer(axis)),
            Load(name, self.dtype, (axis,), "ids", (integer(at),), inside, sympy.Integer(-1)),
        ]

    def _count_block(self, name: str) -> Reduce:
        one = where(sympy.Eq(integer(name), E_AXIS), 1, 0)
        return Reduce("more", "i32", ("e",), "sum", one, ("z",))

    def _add(self, name: str, value: str) -> Compute:
        return Compute(name, "i32", ("e",), integer(name) + integer(value), declares=False)

    def _count(self) -> Kernel:
        body: list[Stmt] = [
            Compute("total", "i32", ("e",), ZERO),
            self._blocks("u", [*self._id("id", "z", U), self._count_block("id"), self._add("total", "more")]),
            Store("counts", (C, E_AXIS), integer("total"), ("e",)),
        ]
        out = Tensor("counts", "i32", self.counts, "out", unit=1)
        return self._kernel("count", (self.ids, out), [Axis("z", BLOCK, BLOCK)], body)

    def _totals(self) -> list[Stmt]:
        """total: entries of each expert; before: those in chunks before this one."""
        start: list[Stmt] = [Compute("total", "i32", ("e",), ZERO), Compute("before", "i32", ("e",), ZERO)]
        if self.single:
            count = [*self._id("id0", "z", U), self._count_block("id0"), self._add("total", "more")]
            return [*start, self._blocks("u", count)]
        chunk = COUNTS * U + B
        earlier = where(chunk < C, integer("part"), 0)
        add: tuple[Stmt, ...] = (
            Load("part", "i32", ("b", "e"), "counts", (chunk, E_AXIS), chunk < integer("chunks"), ZERO),
            Reduce("all_of_them", "i32", ("e",), "sum", integer("part"), ("b",)),
            Reduce("earlier", "i32", ("e",), "sum", earlier, ("b",)),
            self._add("total", "all_of_them"),
            self._add("before", "earlier"),
        )
        return [*start, For("u", (Span(ZERO, ceildiv(integer("chunks"), COUNTS)),), add)]

    def _place(self) -> Kernel:
        at, key, row = integer("at_id"), integer("id"), integer("row")
        same = all_of([sympy.Eq(integer("other"), key), Y < Z])
        valid = all_of([key >= 0, key < self.experts])
        block: list[Stmt] = [
            *self._id("id", "z", V),
            *self._id("other", "y", V),
            Reduce("rank", "i32", ("z",), "sum", where(same, 1, 0), ("y",)),
            Reduce("base", "i32", ("z",), "sum", where(sympy.Eq(key, E_AXIS), integer("next"), 0), ("e",)),
            Compute("row", "i32", ("z",), integer("rank") + integer("base")),
            Store("tokens", (row,), floordiv(at, sympy.Integer(self.top_k)), ("z",), valid),
            Store("place", (at,), where(valid, row, -1), ("z",), at < ENTRIES),
            self._count_block("id"),
            self._add("next", "more"),
        ]
        head = (
            Store("bounds", (E_AXIS + 1,), integer("upto"), ("e",)),
            Store("bounds", (ZERO,), ZERO, ()),
        )
        body: list[Stmt] = [
            *self._totals(),
            Scan("upto", "i32", ("e",), integer("total"), "e"),
            Compute("next", "i32", ("e",), integer("upto") - integer("total") + integer("before")),
            If(sympy.Eq(C, 0), head),
            self._blocks("v", block),
        ]
        counts = [] if self.single else [Tensor("counts", "i32", self.counts, unit=1)]
        made = (
            Tensor("tokens", "i32", ("entries",), "out", unit=0),
            Tensor("bounds", "i32", (self.experts + 1,), "out", unit=0),
            Tensor("place", "i32", ("entries",), "out", unit=0),
        )
        axes = [Axis("z", BLOCK, BLOCK), Axis("y", BLOCK, BLOCK)]
        axes += [] if self.single else [Axis("b", COUNTS, COUNTS)]
        return self._kernel("place", (self.ids, *counts, *made), axes, body)

    def _kernel(self, what: str, args: tuple[Tensor, ...], axes: list[Axis], body: list[Stmt]) -> Kernel:
        comment = (f"entries of {self.experts} experts, {self.top_k} a token",)
        return Kernel(
            f"group_{what}", args, (self._grid(),), (*axes, self.e), None, tuple(body), self.meta, comment
        )

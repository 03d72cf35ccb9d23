"""entries: products of a handful of entries, which `direct` leaves unsorted, to kernels.

Before::  %h = entry_gemm %x, %gate_up, %ids {halves, expr} ; %o = entry_combine %h, %down, %ids, %weights
After::   kernel @experts_h grid(n0, r) { an entry's expert; its row by some columns of the matrix }
          kernel @experts_o grid(n0, t) { for each entry of a token: the same, weighted and added }

Leaves alone: nothing; other operations are lowered elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from ...ir.expr import Expr, all_of, cast, floordiv, integer, maximum, minimum, real
from ...ir.graph import Graph, Op
from ...ir.kernel import Axis, Compute, For, GridDim, If, Kernel, Let, Load, Reduce, Span, Stmt, Store, Tensor
from ...ir.ragged import Tiling, storage_of
from .choice import ADAPTER, choice_of
from .codes import Codes, codes_of, is_uniform, steps_of
from .spec import BYTES, ExpertsSpec

META = (("stages", 3), ("warps", 4))
ZERO, NONE = sympy.Integer(0), sympy.Float(0.0)
N, C, D, R, T, U, K = map(integer, ("n", "c", "d", "r", "t", "u", "k"))
ID, EXPERT, COL = map(integer, ("id", "expert", "col"))
ENTRIES, T_EXTENT = integer("entries"), integer("T")
CPU_COLS, COLS, STEP = 16, 8, 512  # columns of a program, and how much of the summed axis GPUs take at once
LANE = 16  # bytes of x, the widest load
ADAPTED_COLS = 16  # columns of a program that reads an adapter's rows too
ADAPTED = 16  # numbers of these rows that a lane has at once


def entry_kernel(graph: Graph, op: Op, spec: ExpertsSpec) -> Kernel:
    """The kernel of an entry_gemm or an entry_combine."""
    return _Builder(graph, op, spec).kernel()


class _Builder:
    def __init__(self, graph: Graph, op: Op, spec: ExpertsSpec) -> None:
        self.op, self.spec, self.combines = op, spec, op.kind == "entry_combine"
        plain, stored = storage_of(op)
        a, w, ids, *rest = plain
        self.a, self.w, self.ids = graph.values[a], graph.values[w], graph.values[ids]
        self.weights = graph.values[rest.pop(0)] if self.combines else None
        self.bias = graph.values[rest.pop(0)] if op.attr("biased") else None
        self.added = [graph.values[rest.pop(0)] for _ in range(2)] if op.attr("adds") else []
        self.choice = choice_of(graph, replace(op, inputs=plain))
        self.top_k = int(self.ids.shape[1])
        self.by_rows = bool(op.attr("transpose_b"))
        self.codes = codes_of(graph, op, stored, spec)
        experts, *sizes = self.w.shape
        if self.codes is not None:
            sizes[1] = self.codes.q.columns
        self.experts, self.inner = int(experts), int(sizes[self.by_rows])
        self.stretch = self.codes.q.stretch if self.codes else self.inner
        self.slices = self.codes.q.slices if self.codes else 1
        self.unroll = 1
        self.columns = int(op.output.shape[1])
        self.tiling: Tiling | None = op.attr("tiling")
        self.lanes = LANE // BYTES[spec.dtype]
        self.cpu, self.acc = spec.is_cpu, spec.accumulator
        few, wide = COLS, STEP * 2 // BYTES[spec.dtype]
        if self.added and not self.combines:
            few, wide = ADAPTED_COLS, wide * COLS // ADAPTED_COLS
        self.cols = min(self.columns, CPU_COLS if self.cpu else few)
        if not self.cpu:
            self.cols = 1 << (self.cols - 1).bit_length()
        self.step = self.inner if self.cpu else min(wide, max(16, 1 << (self.inner - 1).bit_length()))
        if self.codes is not None:
            self.step, self.unroll = steps_of(self.codes.q, 64 if self.slices > 2 else 128, cpu=self.cpu)
            self.cols = self.cols if self.cpu else min(32, 1 << (self.columns - 1).bit_length())
        if self.tiling is not None:
            self.cols = self.tiling.cols
        match op.attr("halves"):
            case None:
                self.places: list[Expr] = [COL]
            case "split":
                self.places = [COL, COL + self.columns]
            case _:
                self.places = [2 * COL, 2 * COL + 1]

    def kernel(self) -> Kernel:
        entry = T * self.top_k + K if self.combines else R
        find: list[Stmt] = [
            Load("id", self.ids.dtype, (), "ids", (entry,)),
            Let(
                "expert", minimum(maximum(_narrow(ID, self.ids.dtype), ZERO), sympy.Integer(self.experts - 1))
            ),
            *(self.codes.widths() if self.codes else []),
        ]
        there = all_of([ID >= 0, self.experts > ID])
        head: list[Stmt] = [Compute("col", "i32", ("n",), integer("n0") * self.cols + N)]
        sums = [Compute(f"acc{k}", self.acc, ("n",), NONE) for k in range(len(self.places))]
        if self.combines:
            one = [*find, If(there, tuple(self._products(entry)))]
            loop = For("k", (Span(ZERO, sympy.Integer(self.top_k)),), tuple(one))
            body = [*head, *sums, loop, *self._end(T)]
        else:
            body = [*head, *find, If(there, (*sums, *self._products(R), *self._end(R)))]
        tiles = sympy.Integer(-(-self.columns // self.cols))
        rows = GridDim("t", T_EXTENT) if self.combines else GridDim("r", ENTRIES)
        t = self.tiling
        sizes = {"n": self.cols, "d": self.step}
        if t is not None:
            sizes = {"c": t.inner // self.lanes, "n": t.cols, "d": self.lanes}
        axes = [Axis(name, size, size) for name, size in sizes.items()]
        if self.added:
            axes += self._rank_axes()
        meta = t.meta if t else () if self.cpu else META
        return Kernel(
            f"experts_{self.op.output.name}",
            self._arguments(),
            (GridDim("n0", tiles), rows),
            tuple(axes),
            "d" if self.cpu else None,
            tuple(body),
            tuple(sorted((*meta, *(self.codes.hints if self.codes else ())))),
            (f"an entry at a time, [{self.inner}] x [{self.inner}, {self.columns}]",),
        )

    def _arguments(self) -> tuple[Tensor, ...]:
        unit = self.op.attr("unit")
        align = self.spec.align(int(self.w.shape[unit])) if unit else 1
        dense = Tensor(self.w.name, self.w.dtype, tuple(self.w.shape), unit=unit, align=align)
        matrix = self.codes.tensors(aligned=self.spec.aligned) if self.codes else [dense]
        rows = ("entries", "T") if self.combines else ("T", "entries")
        flat = [Tensor("ids", self.ids.dtype, ("entries",), unit=0)]
        flat += [Tensor(self.weights.name, self.weights.dtype, ("entries",), unit=0)] if self.weights else []
        return (
            Tensor(
                self.a.name, self.a.dtype, (rows[0], self.inner), unit=1, align=self.spec.align(self.inner)
            ),
            *matrix,
            *flat,
            *([Tensor(self.bias.name, self.bias.dtype, tuple(self.bias.shape), unit=1)] if self.bias else []),
            *(Tensor(v.name, v.dtype, tuple(v.shape), unit=len(v.shape) - 1) for v in self.added),
            *([self.choice.tensor()] if self.choice else []),
            Tensor(self.op.output.name, self.op.output.dtype, (rows[1], self.columns), "out", unit=1),
        )

    def _products(self, entry: Expr) -> list[Stmt]:
        """acc0 (and acc1) += the expert's matrix times the row of an entry, weighted where rows are added."""
        row = entry if self.combines else floordiv(R, sympy.Integer(self.top_k))
        parts = range(len(self.places))
        out: list[Stmt] = []
        if self.weights is not None:
            out.append(Load("weight", self.acc, (), self.weights.name, (entry,)))
        if self.codes is not None:
            t = self.tiling
            out += self._chunked(self.codes, t, row) if t else self._decoded(self.codes, row)
        elif self.cpu:
            out += [*self._load(row, ZERO)]
            for k in parts:
                term = real(f"W{k}") * real("A")
                out.append(Reduce(f"part{k}", self.acc, ("n",), "sum", term, ("d",)))
        else:
            whole = [Compute(f"P{k}", self.acc, ("n", "d"), NONE) for k in parts]
            step = [*self._load(row, U * self.step)]
            for k in parts:
                more = real(f"P{k}") + real(f"W{k}") * real("A")
                step.append(Compute(f"P{k}", self.acc, ("n", "d"), more, declares=False))
            out += [*whole, For("u", (Span(ZERO, sympy.Integer(-(-self.inner // self.step))),), tuple(step))]
            out += [Reduce(f"part{k}", self.acc, ("n",), "sum", real(f"P{k}"), ("d",)) for k in parts]
        for k, place in enumerate(self.places):
            value = real(f"part{k}")
            if self.bias is not None:
                index = (EXPERT, place)
                out.append(Load(f"bias{k}", self.acc, ("n",), self.bias.name, index, self._valid(), NONE))
                value = value + real(f"bias{k}")
            if self.weights is not None:
                value = value * real("weight")
            out.append(Compute(f"acc{k}", self.acc, ("n",), real(f"acc{k}") + value, declares=False))
        return [*out, *self._adapted(row)]

    def _rank_axes(self) -> list[Axis]:
        """Axes of an adapter: its rank and, of the summed axis, what GPUs take at once."""
        rank = int(self.added[0].shape[-2])
        if self.cpu:
            return [Axis("l", rank, rank)]
        size = 1 << (rank - 1).bit_length()
        lanes = 32 * dict(self.tiling.meta if self.tiling else META)["warps"]
        step = max(16, min(ADAPTED * lanes // size, 1 << (self.inner - 1).bit_length()))
        return [Axis("l", rank, size), Axis("f", step, step)]

    def _adapted(self, row: Expr) -> list[Stmt]:
        """acc0 (and acc1) += what an adapter adds: an entry's row by both its matrices."""
        if not self.added:
            return []
        (low, b), acc, prefix = self.added, self.acc, (ADAPTER, EXPERT) if self.choice else (EXPERT,)
        axis, step = ("d", self.step) if self.cpu else ("f", self._rank_axes()[1].extent)
        feature = integer("v") * step + integer(axis)
        within = sympy.true if self.inner % step == 0 else feature < self.inner
        more = real("L_all") + real("L_matrix") * real("L_row")
        turn: tuple[Stmt, ...] = (
            Load("L_row", acc, (axis,), self.a.name, (row, feature), within, NONE),
            Load("L_matrix", acc, ("l", axis), low.name, (*prefix, integer("l"), feature), within, NONE),
            Compute("L_all", acc, ("l", axis), more, declares=False),
        )
        turns = sympy.Integer(-(-self.inner // step))
        work: list[Stmt] = [
            Compute("L_all", acc, ("l", axis), NONE),
            For("v", (Span(ZERO, turns),), turn),
            Reduce("L_sum", acc, ("l",), "sum", real("L_all"), (axis,)),
            Compute("L", acc, ("l",), self.op.attr("low").xreplace({real("x0"): real("L_sum")})),
        ]
        for k, place in enumerate(self.places):
            value = real(f"added{k}") * (real("weight") if self.weights is not None else 1)
            work += [
                Load(f"B{k}", acc, ("n", "l"), b.name, (*prefix, place, integer("l")), self._valid(), NONE),
                Reduce(f"added{k}", acc, ("n",), "sum", real(f"B{k}") * real("L"), ("l",)),
                Compute(f"acc{k}", acc, ("n",), real(f"acc{k}") + value, declares=False),
            ]
        if self.choice is None:
            return work
        token = T if self.combines else row
        found = Let("adapter", integer("chosen"))
        return [*self.choice.of(token, ()), found, If(ADAPTER >= 0, tuple(work))]

    def _decoded(self, codes: Codes, row: Expr) -> list[Stmt]:
        """The products of a quantised matrix by tiles: a scale for each of their rows where a step lies in
        one group, else for each element."""
        parts, numbers = range(len(self.places)), range(self.slices)
        even, axes = is_uniform(codes.q, self.step), ("n", "d")
        turn: list[Stmt] = []
        for n in range(self.unroll):
            at = self.step * (self.unroll * U + n)
            here = [] if self.stretch % (self.step * self.unroll) == 0 else [at + D < self.stretch]
            for s in numbers:
                feature = s * self.stretch + at + D
                last = (s + 1) * self.stretch > self.inner
                within = all_of([*here, *([feature < self.inner] if last else [])])
                turn.append(Load(f"A{n}{s}", self.acc, ("d",), self.a.name, (row, feature), within, NONE))
            for k in parts:
                guard = all_of([*here, self._valid()])
                turn += codes.load(f"W{n}{k}", self.acc, axes, (self.places[k], at + D), guard)
                for s in numbers:
                    column = s * self.stretch + at + (0 if even else D)
                    there = [at < self.stretch] if here and codes.q.groups > 1 else []
                    known = all_of([self._valid(), *there])
                    if not even:
                        known = all_of([guard, column < codes.q.columns])
                    name, scale = f"W{n}{k}{s}", f"S{n}{k}{s}"
                    turn += codes.decode(f"W{n}{k}", s, self.acc, axes)
                    turn += codes.scale(
                        scale, self.acc, ("n",) if even else axes, (self.places[k], column), known
                    )
                    number = codes.scaled(real(name), real(scale), codes.zero(scale))
                    more = real(f"P{k}") + number * real(f"A{n}{s}")
                    turn.append(Compute(f"P{k}", self.acc, axes, more, declares=False))
        whole = [Compute(f"P{k}", self.acc, axes, NONE) for k in parts]
        turns = -(-self.stretch // (self.step * self.unroll))
        sums = [Reduce(f"part{k}", self.acc, ("n",), "sum", real(f"P{k}"), ("d",)) for k in parts]
        return [*whole, For("u", (Span(ZERO, sympy.Integer(turns)),), tuple(turn)), *sums]

    def _chunked(self, codes: Codes, t: Tiling, row: Expr) -> list[Stmt]:
        """The products of a quantised matrix. A lane takes `lanes` neighbouring bytes (axis d) of every row
        of the tile and adds up what they give, which is scaled then; chunks of lanes (axis c) meet at the
        end.

        What a number costs decides here: at 3 TB/s a multiprocessor of an H100 has 128 lanes for 28 numbers
        of 4 bits a clock, four and a half instructions each. They are taken out of a register (1), made a
        float (1), multiplied (1) and, with what the lane's other numbers share (loads, x, scales), are 3.5 to
        4.5. All loads of codes come before their use, so that as many are under way as registers hold."""
        parts, numbers = range(len(self.places)), range(self.slices)
        scaled, axes = codes.q.groups > 1 or codes.q.zero is not None, ("n", "c", "d")
        loads: list[Stmt] = []
        work: list[Stmt] = []
        for n in range(t.unroll):
            first = t.inner * (t.unroll * U + n)
            at = first + self.lanes * C
            here = [] if self.stretch % (t.inner * t.unroll) == 0 else [at < self.stretch]
            for k in parts:
                guard = all_of([*here, self._valid()])
                loads += codes.load(f"W{n}{k}", self.acc, axes, (self.places[k], at + D), guard)
                for s in numbers if scaled else ():
                    column = s * self.stretch + at
                    known = all_of([guard, *self._inside(s, column)])
                    loads += codes.scale(f"S{n}{k}{s}", self.acc, ("n", "c"), (self.places[k], column), known)
            for s in numbers:
                feature = s * self.stretch + at + D
                within = all_of([*here, *self._inside(s, feature)])
                loads.append(
                    Load(f"A{n}{s}", self.acc, ("c", "d"), self.a.name, (row, feature), within, NONE)
                )
                if codes.q.zero:
                    work.append(Reduce(f"R{n}{s}", self.acc, ("c",), "sum", real(f"A{n}{s}"), ("d",)))
                for k in parts:
                    name, dot = f"W{n}{k}{s}", f"T{n}{k}{s}"
                    work += codes.decode(f"W{n}{k}", s, self.acc, axes)
                    term = real(name) * real(f"A{n}{s}")
                    work.append(Reduce(dot, self.acc, ("n", "c"), "sum", term, ("d",)))
                    more, scale = real(dot), f"S{n}{k}{s}"
                    if scaled:
                        more = codes.scaled(more, real(scale), codes.zero(scale), real(f"R{n}{s}"))
                    work.append(Compute(f"P{k}", self.acc, ("n", "c"), real(f"P{k}") + more, declares=False))
        whole = [Compute(f"P{k}", self.acc, ("n", "c"), NONE) for k in parts]
        turns = -(-self.stretch // (t.inner * t.unroll))
        out: list[Stmt] = [*whole, For("u", (Span(ZERO, sympy.Integer(turns)),), (*loads, *work))]
        out += [Reduce(f"part{k}", self.acc, ("n",), "sum", real(f"P{k}"), ("c",)) for k in parts]
        for k in () if scaled else parts:
            out += codes.scale(f"S{k}", self.acc, ("n",), (self.places[k], ZERO), self._valid())
            more = real(f"part{k}") * real(f"S{k}")
            out.append(Compute(f"part{k}", self.acc, ("n",), more, declares=False))
        return out

    def _inside(self, number: int, feature: Expr) -> list[Expr]:
        """Whether features of a slice are there, where some are not."""
        return [feature < self.inner] if (number + 1) * self.stretch > self.inner else []

    def _load(self, row: Expr, at: Expr) -> list[Stmt]:
        feature = at + D
        within = sympy.true if self.inner % self.step == 0 else feature < self.inner
        guard = all_of([within, self._valid()])
        loads: list[Stmt] = [Load("A", self.acc, ("d",), self.a.name, (row, feature), within, NONE)]
        for k, place in enumerate(self.places):
            index = (EXPERT, place, feature) if self.by_rows else (EXPERT, feature, place)
            loads.append(Load(f"W{k}", self.acc, ("n", "d"), self.w.name, index, guard, NONE))
        return loads

    def _valid(self) -> Expr:
        return sympy.true if self.columns % self.cols == 0 else self.columns > COL

    def _end(self, row: Expr) -> list[Stmt]:
        expr = self.op.attr("expr")
        values = {real(f"x{k}"): real(f"acc{k}") for k in range(len(self.places))}
        result = real("acc0") if expr is None else sympy.sympify(expr).xreplace(values)
        return [Store(self.op.output.name, (row, COL), result, ("n",), self._valid())]


def _narrow(value: Expr, dtype: str) -> Expr:
    return cast(sympy.Symbol("i32"), value) if dtype == "i64" else value

"""direct: a handful of entries are not sorted; a program takes one entry, and matrices are read as
vectors are.

Before::

    %tokens, %bounds, %place = group %ids
    %h = grouped_gemm %x, %gate_up, %bounds, %tokens {gathers, halves, expr}
    %y = grouped_gemm %h, %down, %bounds
    %o = combine %y, %place, %weights

After, two kernels::

    %h = entry_gemm %x, %gate_up, %ids {halves, expr}        a row for each entry, in the order of ids
    %o = entry_combine %h, %down, %ids, %weights             all rows of a token in one program

Leaves alone: any other graph; one whose rows are used elsewhere or returned.
"""

from __future__ import annotations

import sympy

from ...ir.expr import Expr, all_of, cast, floordiv, integer, maximum, minimum, real
from ...ir.graph import Graph, Op
from ...ir.kernel import Axis, Compute, For, GridDim, If, Kernel, Let, Load, Reduce, Span, Stmt, Store, Tensor
from ...ir.ragged import Tiling, storage_of
from .codes import Codes, codes_of, is_uniform, steps_of
from .spec import BYTES, ExpertsSpec

KINDS = ["group", "grouped_gemm", "grouped_gemm", "combine"]
ZERO, NONE = sympy.Integer(0), sympy.Float(0.0)
N, C, D, R, T, U, K = map(integer, ("n", "c", "d", "r", "t", "u", "k"))
ID, EXPERT, COL = map(integer, ("id", "expert", "col"))
ENTRIES, T_EXTENT = integer("entries"), integer("T")
CPU_COLS, COLS, STEP = 16, 8, 512  # columns of a program, and how much of the summed axis GPUs take at once
LANE = 16  # bytes of x, the widest load


def direct(graph: Graph) -> Graph:
    """The layer without sorting, where that is all there is to the graph."""
    if [op.kind for op in graph.ops] != KINDS or len(graph.outputs) != 1:
        return graph
    _, up, down, combine = graph.ops
    place = combine.inputs[1]
    ids = graph.ops[0].inputs[0]
    if place != graph.ops[0].outputs[2].name or len(up.outputs) > 1:
        return graph
    kept = ("halves", "expr", "transpose_b", "unit", "biased", "quantized")
    first = {k: up.attr(k) for k in kept if up.attr(k) is not None}
    last = {k: down.attr(k) for k in kept if down.attr(k) is not None}
    (plain_up, codes_up), (plain_down, codes_down) = storage_of(up), storage_of(down)
    biases = [[plain[-1]] if op.attr("biased") else [] for op, plain in ((up, plain_up), (down, plain_down))]
    operands = (*plain_down[:2], ids, combine.inputs[2], *biases[1], *codes_down[1:])
    entries = (*plain_up[:2], ids, *biases[0], *codes_up[1:])
    ops = (
        Op("entry_gemm", entries, up.outputs, tuple(first.items())),
        Op("entry_combine", operands, combine.outputs, tuple(last.items())),
    )
    return Graph(graph.name, graph.inputs, ops, graph.outputs)


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
        self.bias = graph.values[rest[0]] if op.attr("biased") else None
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
        self.cols = min(self.columns, CPU_COLS if self.cpu else COLS)
        if not self.cpu:
            self.cols = 1 << (self.cols - 1).bit_length()
        wide = STEP * 2 // BYTES[spec.dtype]
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
        meta = t.meta if t else () if self.cpu else (("stages", 3), ("warps", 4))
        return Kernel(
            f"experts_{self.op.output.name}",
            self._arguments(),
            (GridDim("n0", tiles), rows),
            tuple(Axis(name, size, size) for name, size in sizes.items()),
            "d" if self.cpu else None,
            tuple(body),
            tuple(sorted((*meta, *(self.codes.hints if self.codes else ())))),
            (f"an entry at a time, [{self.inner}] x [{self.inner}, {self.columns}]",),
        )

    def _arguments(self) -> tuple[Tensor, ...]:
        unit = self.op.attr("unit")
        align = self._align(int(self.w.shape[unit])) if unit else 1
        dense = Tensor(self.w.name, self.w.dtype, tuple(self.w.shape), unit=unit, align=align)
        matrix = self.codes.tensors(aligned=self.spec.aligned) if self.codes else [dense]
        rows = ("entries", "T") if self.combines else ("T", "entries")
        flat = [Tensor("ids", self.ids.dtype, ("entries",), unit=0)]
        flat += [Tensor(self.weights.name, self.weights.dtype, ("entries",), unit=0)] if self.weights else []
        return (
            Tensor(self.a.name, self.a.dtype, (rows[0], self.inner), unit=1, align=self._align(self.inner)),
            *matrix,
            *flat,
            *([Tensor(self.bias.name, self.bias.dtype, tuple(self.bias.shape), unit=1)] if self.bias else []),
            Tensor(self.op.output.name, self.op.output.dtype, (rows[1], self.columns), "out", unit=1),
        )

    def _align(self, columns: int) -> int:
        size = columns * BYTES[self.spec.dtype]
        return 1 if self.cpu or not self.spec.aligned else min(16, size & -size)

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
        return out

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
                    more = real(f"P{k}") + real(name) * real(f"A{n}{s}") * real(scale)
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
        scaled, axes = codes.q.groups > 1, ("n", "c", "d")
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
                for k in parts:
                    name, dot = f"W{n}{k}{s}", f"T{n}{k}{s}"
                    work += codes.decode(f"W{n}{k}", s, self.acc, axes)
                    term = real(name) * real(f"A{n}{s}")
                    work.append(Reduce(dot, self.acc, ("n", "c"), "sum", term, ("d",)))
                    more = real(dot) * (real(f"S{n}{k}{s}") if scaled else 1)
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

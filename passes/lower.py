"""lower: one fused attention, planned, to tile programs: one kernel a group.

The first kernel starts the online softmax, the last one divides and stores the output; those in
between pass the unnormalised state (accumulator, row maximum, row sum) through memory, so that
groups merge exactly. Scores live in the base-2 domain: s * scale * log2(e).

Before (one group)::  %o, %lse = attention %q, %k, %v {mask, groups, schedule, loops}
After::               kernel @attention_acsr_fwd(q, k, v, o, lse, ...) grid(...) { ... }

Leaves alone: nothing; an attention without loops is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy

from ..ir.expr import INF, Expr, all_of, ceildiv, exp2, floordiv, floormod, integer, log2, maximum, minimum, real, where
from ..ir.kernel import Axis, Compute, Dot, For, GridDim, If, Kernel, Let, Load, Program, Reduce, Scalar, Stmt, Store, Tensor
from ..ir.plan import Group, Loops, Schedule
from .spec import AttentionSpec
from .tile import column_index, linear, row_index

LOG2E = sympy.Float(math.log2(math.e))
LN2 = sympy.Float(math.log(2))
STALE = 8  # a row maximum may lag by 2^8 before accumulators are rescaled


@dataclass(frozen=True)
class _Names:
    """Symbols the builder shares."""

    b = integer("b")
    h = integer("h")
    q_len = integer("q_len")
    kv_len = integer("kv_len")
    row = integer("row")
    col = integer("col")
    scale = real("scale")


N = _Names()


def lower_attention(spec: AttentionSpec, plans: tuple[tuple[Group, Schedule, Loops], ...]) -> Program:
    """Kernels of one attention in launch order, and the buffers that carry state between them."""
    kernels = tuple(
        _Builder(spec, group, schedule, loops, first=i == 0, last=i == len(plans) - 1, index=i, total=len(plans)).kernel()
        for i, (group, schedule, loops) in enumerate(plans)
    )
    state = _state(spec) if len(plans) > 1 else ()
    return Program(kernels, state)


def _state(spec: AttentionSpec) -> tuple[Tensor, ...]:
    shape = ("B", "Hq", "q_len")
    acc = spec.accumulator
    return (
        Tensor("acc_state", acc, (*shape, spec.v_size), "inout", 3),
        Tensor("max_state", acc, shape, "inout", 2),
        Tensor("sum_state", acc, shape, "inout", 2),
    )


class _Builder:
    """Builds the kernel of one group. Every method returns statements; nothing is decided here."""

    def __init__(self, spec: AttentionSpec, group: Group, schedule: Schedule, loops: Loops, *, first: bool, last: bool, index: int, total: int):
        self.spec, self.group, self.schedule, self.loops = spec, group, schedule, loops
        self.first, self.last, self.index, self.total = first, last, index, total
        self.order = group.order
        self.acc = spec.accumulator
        self.wide = spec.target_kind != "cpu"
        self.boxes = len(self.order.dims) > 1

    def kernel(self) -> Kernel:
        rows, cols = math.prod(self.schedule.rows), math.prod(self.schedule.cols)
        axes = [Axis("i", rows, rows), Axis("j", cols, cols)]
        axes += [self._feature("d", self.spec.qk_size), self._feature("e", self.spec.v_size)]
        body = [*self._rows(), *self._begin(), *self._loop(), *self._finish()]
        suffix = f"_{self.index}" if self.total > 1 else ""
        return Kernel(
            name=f"attention_{self.spec.format}_fwd{suffix}",
            args=self._arguments(),
            grid=self._grid(),
            axes=tuple(axes),
            lanes=None if self.wide else "i",
            body=tuple(body),
            meta=self.schedule.meta,
            comment=self._comment(),
        )

    def _feature(self, name: str, extent: int) -> Axis:
        return Axis(name, extent, max(16, 1 << (extent - 1).bit_length()) if self.wide else extent)

    def _comment(self) -> tuple[str, ...]:
        part = f"part {self.index + 1} of {self.total}" if self.total > 1 else "one part"
        s = self.schedule
        return (f"mask: {self.spec.mask_text}", f"{part}; rows {s.rows}, keys {s.cols}, order {self.order}")

    def _arguments(self) -> tuple[Tensor | Scalar, ...]:
        spec = self.spec
        unit_q, unit_k, unit_v = (3 if u else None for u in spec.contiguous)
        args: list[Tensor | Scalar] = [
            Tensor("q", spec.dtype, ("B", "Hq", "q_len", spec.qk_size), "in", unit_q),
            Tensor("k", spec.dtype, ("B", "Hk", "kv_len", spec.qk_size), "in", unit_k),
            Tensor("v", spec.dtype, ("B", "Hk", "kv_len", spec.v_size), "in", unit_v),
            *spec.capture_tensors,
        ]
        if self.last:
            args.append(Tensor("o", spec.dtype, ("B", "Hq", "q_len", spec.v_size), "out", 3))
            if spec.return_lse:
                args.append(Tensor("lse", spec.lse_dtype, ("B", "Hq", "q_len"), "out", 2))
        if self.total > 1:
            args += _state(spec)
        args += [Scalar(name, "i64") for name in spec.params]
        args += [Scalar(name, kind) for name, kind in spec.score_params]
        args.append(Scalar("scale", "f64" if self.acc == "f64" else "f32"))
        return tuple(args)

    def _grid(self) -> tuple[GridDim, ...]:
        grid = []
        for d, dim in enumerate(self.order.dims):
            extent: Expr = sympy.Integer(dim.width) if dim.width is not None else N.q_len
            if d == 0:
                extent = ceildiv(N.q_len, math.prod(x.width or 1 for x in self.order.dims[1:]))
            grid.append(GridDim(f"m{d}", ceildiv(extent, dim.row_stride * self.schedule.rows[d])))
        grid += [GridDim(f"r{d}", sympy.Integer(dim.row_stride)) for d, dim in enumerate(self.order.dims) if dim.row_stride > 1]
        return (*grid, GridDim("h", integer("Hq")), GridDim("b", integer("B")))

    # rows -----------------------------------------------------------------------------------------

    def _split(self, axis: str, sizes: tuple[int, ...]) -> list[Expr]:
        """In-tile coordinates per dimension of a flattened tile axis, the last dimension fastest."""
        rest: Expr = integer(axis)
        out: list[Expr] = []
        for d in reversed(range(len(sizes))):
            out.insert(0, rest if d == 0 else floormod(rest, sympy.Integer(sizes[d])))
            rest = floordiv(rest, sympy.Integer(sizes[d]))
        return out

    def _coordinates(self, stem: str, axis: str, parts: list[Expr]) -> tuple[list[Stmt], list[Expr], Expr]:
        """Tiles row0, row1, ... (or col0, ...) and row, and the condition that inner ones are inside their widths."""
        if not self.boxes:
            return [Compute(stem, "i32", (axis,), parts[0])], [integer(stem)], sympy.true
        made: list[Stmt] = []
        names: list[Expr] = []
        for d, part in enumerate(parts):
            made.append(Compute(f"{stem}{d}", "i32", (axis,), part))
            names.append(integer(f"{stem}{d}"))
        made.append(Compute(stem, "i32", (axis,), linear(self.order, names)))
        inside = [name < dim.width for name, dim in zip(names[1:], self.order.dims[1:], strict=True)]
        return made, names, all_of(inside)

    def _rows(self) -> list[Stmt]:
        parts = row_index(self.order, self.schedule, self._split("i", self.schedule.rows))
        made, self.row_names, inside = self._coordinates("row", "i", parts)
        self.valid_row = all_of([inside, N.row < N.q_len])
        self.safe_row = minimum(N.row, N.q_len - 1)
        tile = self.spec.dtype if self.wide else self.acc
        load = Load("Q", tile, ("i", "d"), "q", (N.b, N.h, self.safe_row, integer("d")))
        heads: list[Stmt] = [Let("hk", floordiv(N.h, floordiv(integer("Hq"), integer("Hk"))))]
        fold: list[Stmt] = [] if self.wide or self.spec.score is not None else [self._set("Q", tile, ("i", "d"), real("Q") * N.scale * LOG2E)]
        return [*heads, *made, load, *fold]

    def _begin(self) -> list[Stmt]:
        acc = self.acc
        if self.first:
            return [
                Compute("m", acc, ("i",), -INF),
                Compute("l", acc, ("i",), sympy.Integer(0)),
                Compute("O", acc, ("i", "e"), sympy.Integer(0)),
            ]
        at = (N.b, N.h, self.safe_row)
        return [
            Load("m", acc, ("i",), "max_state", at),
            Load("l", acc, ("i",), "sum_state", at),
            Load("O", acc, ("i", "e"), "acc_state", (*at, integer("e"))),
        ]

    # the loop over key tiles ------------------------------------------------------------------------

    def _loop(self) -> list[Stmt]:
        body = self._tile()
        if self.loops.touched != sympy.true:
            body = [If(self.loops.touched, tuple(body))]
        for d in reversed(range(len(self.loops.spans))):
            body = [For(f"n{d}", self.loops.spans[d], tuple(body))]
        return body

    def _tile(self) -> list[Stmt]:
        parts = column_index(self.order, self.schedule, self._split("j", self.schedule.cols))
        made, self.col_names, inside = self._coordinates("col", "j", parts)
        floating = [name >= 0 for d, name in enumerate(self.col_names) if self.schedule.anchor(d) is not None]
        valid_col = all_of([inside, *floating, N.col < N.kv_len])
        attends = all_of([self._bind(self.group.predicate), valid_col])
        if self.group.exact:
            guard: list[Stmt] = []
            if self.loops.full != sympy.true:
                masked = self._set("S", self.acc, ("i", "j"), where(attends, real("S"), -INF))
                guard = [If(sympy.Not(self.loops.full), (masked,))]
            return [*made, *self._scores(valid_col), *guard, *self._softmax(valid_col)]
        ok = sympy.Symbol("ok")
        wanted = attends if self.loops.full == sympy.false else sympy.Or(integer("whole") > 0, attends)
        whole = [] if self.loops.full == sympy.false else [Let("whole", where(self.loops.full, 1, 0))]
        return [
            *made,
            *whole,
            Compute("ok", "bool", ("i", "j"), wanted),
            Reduce("some", "bool", (), "any", ok, ("i", "j")),
            If(
                sympy.Symbol("some"),
                (*self._scores(valid_col), self._set("S", self.acc, ("i", "j"), where(ok, real("S"), -INF)), *self._softmax(valid_col)),
            ),
        ]

    def _bind(self, expr: Expr) -> Expr:
        """q and k (and their box coordinates) replaced by the tiles that hold them."""
        if self.boxes:
            expr = _delinearised(expr, self.order, "q", self.row_names)
            expr = _delinearised(expr, self.order, "k", self.col_names)
        return expr.xreplace({integer("q"): N.row, integer("k"): N.col})

    def _scores(self, valid_col: Expr) -> list[Stmt]:
        tile = self.spec.dtype if self.wide else self.acc
        key = (N.b, integer("hk"), N.col, integer("d"))
        out: list[Stmt] = [
            Load("K", tile, ("j", "d"), "k", key, valid_col),
            Dot("S", self.acc, ("i", "j"), "Q", "K", "d", precision=self.spec.precision),
        ]
        if self.spec.score is not None:
            score = self._bind(self.spec.score).xreplace({real("score"): real("S") * N.scale})
            out.append(self._set("S", self.acc, ("i", "j"), score * LOG2E))
        elif self.wide:
            out.append(self._set("S", self.acc, ("i", "j"), real("S") * N.scale * LOG2E))
        return out

    def _softmax(self, valid_col: Expr) -> list[Stmt]:
        acc, ij = self.acc, ("i", "j")
        m, peak, safe, alpha = real("m"), real("peak"), real("safe"), real("alpha")
        rescale: tuple[Stmt, ...] = (
            Compute("alpha", acc, ("i",), exp2(m - where(sympy.Eq(peak, -INF), 0, peak))),
            self._set("l", acc, ("i",), real("l") * alpha),
            self._set("O", acc, ("i", "e"), real("O") * alpha),
            self._set("m", acc, ("i",), peak),
        )
        lazy: list[Stmt] = list(rescale)
        if self.schedule.lazy_rescale:
            lazy = [Reduce("rose", "bool", (), "any", peak > m + STALE, ("i",)), If(sympy.Symbol("rose"), rescale)]
        tile = self.spec.dtype if self.wide else acc
        value = (N.b, integer("hk"), N.col, integer("e"))
        weights = "P"
        narrow: list[Stmt] = []
        if tile != acc:
            narrow, weights = [Compute("W", tile, ij, real("P"))], "W"
        return [
            Reduce("peak", acc, ("i",), "max", real("S"), ("j",)),
            self._set("peak", acc, ("i",), maximum(m, peak)),
            *lazy,
            Compute("safe", acc, ("i",), where(sympy.Eq(m, -INF), 0, m)),
            Compute("P", acc, ij, exp2(real("S") - safe)),
            Reduce("gain", acc, ("i",), "sum", real("P"), ("j",)),
            self._set("l", acc, ("i",), real("l") + real("gain")),
            *narrow,
            Load("V", tile, ("j", "e"), "v", value, valid_col),
            Dot("O", acc, ("i", "e"), weights, "V", "j", accumulate=True, declares=False, precision=self.spec.precision),
        ]

    # the end ----------------------------------------------------------------------------------------

    def _finish(self) -> list[Stmt]:
        at = (N.b, N.h, N.row)
        e = integer("e")
        if not self.last:
            return [
                Store("max_state", at, real("m"), ("i",), self.valid_row),
                Store("sum_state", at, real("l"), ("i",), self.valid_row),
                Store("acc_state", (*at, e), real("O"), ("i", "e"), self.valid_row),
            ]
        empty = sympy.Eq(real("l"), 0)
        out: list[Stmt] = [
            Compute("inv", self.acc, ("i",), 1 / where(empty, 1, real("l"))),
            self._set("O", self.acc, ("i", "e"), real("O") * real("inv")),
            Store("o", (*at, e), real("O"), ("i", "e"), self.valid_row),
        ]
        if self.spec.return_lse:
            lse = (real("m") + log2(where(empty, 1, real("l")))) * LN2
            out.append(Compute("L", self.acc, ("i",), where(empty, -INF, lse)))
            out.append(Store("lse", at, real("L"), ("i",), self.valid_row))
        return out

    def _set(self, name: str, dtype: str, axes: tuple[str, ...], expr: Expr) -> Compute:
        return Compute(name, dtype, axes, expr, declares=False)


def _delinearised(expr: Expr, order: object, index: str, names: list[Expr]) -> Expr:
    """index // W and index % W spelled by the coordinates that are already at hand."""
    widths = [d.width for d in order.dims[1:]]  # type: ignore[attr-defined]
    symbol = integer(index)
    known = {floordiv(symbol, sympy.Integer(widths[-1])): names[-2], floormod(symbol, sympy.Integer(widths[-1])): names[-1]}
    if len(widths) == 2:
        inner = widths[0] * widths[1]
        known |= {
            floordiv(symbol, sympy.Integer(inner)): names[0],
            floordiv(floordiv(symbol, sympy.Integer(widths[1])), sympy.Integer(widths[0])): names[0],
            floormod(floordiv(symbol, sympy.Integer(widths[1])), sympy.Integer(widths[0])): names[1],
            floordiv(floormod(symbol, sympy.Integer(inner)), sympy.Integer(widths[1])): names[1],
        }
        known.pop(floordiv(symbol, sympy.Integer(widths[1])))
    return expr.xreplace(known)

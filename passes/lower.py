"""lower: one fused attention, planned, to tile programs: one kernel a group.

Every kernel stores its output; one that is not the first starts its online softmax from what the one
before has stored, the output and the logarithm of its weights' sum, so that groups merge exactly. Scores
live in the base-2 domain: s * scale * log2(e).

Before (one group)::  %o, %lse = attention %q, %k, %v {mask, groups, schedule, loops}
After::               kernel @attention_acsr_fwd(q, k, v, o, lse, ...) grid(...) { ... }

Leaves alone: nothing; an attention without loops is an error.
"""

from __future__ import annotations

import math

import sympy

from ..ir.expr import INF, Expr, exp2, integer, log2, maximum, real, where
from ..ir.kernel import (
    Axis,
    Compute,
    Dot,
    If,
    Kernel,
    Let,
    Load,
    Program,
    Reduce,
    Scalar,
    Stmt,
    Store,
    Tensor,
)
from ..ir.plan import Group, Loops, Schedule
from .operands import Operands, per_row
from .rounding import together
from .scaffold import Scaffold
from .spec import SCALE, AttentionSpec

LOG2E = sympy.Float(math.log2(math.e))
LN2 = sympy.Float(math.log(2))
# Only -inf is below these (the least finite number itself is folded away by TVM's simplifier).
LOWEST = {"f32": sympy.Float(-3.4028232635611926e38), "f64": sympy.Float(-1.797693134862315e308)}
STALE = 8  # a row maximum may lag by 2^8 before accumulators are rescaled
E_AXIS, D_AXIS = integer("e"), integer("d")


def lower_attention(spec: AttentionSpec, plans: tuple[tuple[Group, Schedule, Loops], ...]) -> Program:
    """Kernels of one attention in launch order, and the buffers that carry state between them."""
    kernels = tuple(
        _Builder(
            spec, group, schedule, loops, first=i == 0, last=i == len(plans) - 1, index=i, total=len(plans)
        ).kernel()
        for i, (group, schedule, loops) in enumerate(plans)
    )
    state = _state(spec) if len(plans) > 1 else ()
    return Program(kernels, state)


def _state(spec: AttentionSpec) -> tuple[Tensor, ...]:
    """What passes from one kernel to the next beside the output: log2 of the sum of a row's weights."""
    return (per_row("log_sum", spec.accumulator, "inout"),)


class _Builder:
    """Builds the kernel of one group. Every method returns statements; nothing is decided here."""

    def __init__(
        self,
        spec: AttentionSpec,
        group: Group,
        schedule: Schedule,
        loops: Loops,
        *,
        first: bool,
        last: bool,
        index: int,
        total: int,
    ) -> None:
        self.spec, self.schedule, self.loops = spec, schedule, loops
        self.first, self.last, self.index, self.total = first, last, index, total
        self.over = Scaffold(group, schedule, loops, spec.accumulator, flat=spec.target_kind != "cpu")
        self.at = Operands(spec, self.over)
        self.acc = spec.accumulator
        self.wide = (
            spec.target_kind != "cpu"
        )  # tensor cores: operands keep their dtype, axes are powers of two
        self.operand = spec.dtype if self.wide else self.acc
        self.lowest = LOWEST[self.acc]
        assert spec.score_map is not None, "lower takes specs whose score map holds the scale"
        score = spec.score_map.expr
        plain = score == real("score") * SCALE
        self.folded = plain and not self.wide  # the scale goes into Q once
        self.late = plain and self.wide and spec.positive  # it follows the maximum, and joins the exponent
        self.score = self.over.bind(together(score, self.acc), attending=True).xreplace(
            {real("score"): real("S")}
        )

    def kernel(self) -> Kernel:
        axes = [Axis("i", self.over.rows, self.over.rows), Axis("j", self.over.cols, self.over.cols)]
        axes += [self._feature("d", self.spec.qk_size), self._feature("e", self.spec.v_size)]
        body = [*self._rows(), *self._begin(), *self.over.loop(self._tile()), *self._finish()]
        suffix = f"_{self.index}" if self.total > 1 else ""
        return Kernel(
            name=f"attention_{self.spec.format}_fwd{suffix}",
            args=self._arguments(),
            grid=self.over.grid(),
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
        return (
            f"mask: {self.spec.mask_text}",
            f"{part}; rows {s.rows}, keys {s.cols}, order {self.over.order}",
        )

    def _arguments(self) -> tuple[Tensor | Scalar, ...]:
        spec = self.spec
        args: list[Tensor | Scalar] = [*self.at.inputs, *spec.capture_tensors]
        role = "out" if self.first else "inout"
        args.append(per_row("o", spec.dtype, role, spec.v_size))
        if spec.return_lse and self.last:
            args.append(per_row("lse", spec.lse_dtype, "out"))
        if spec.return_max:
            args.append(per_row("max", spec.lse_dtype, role))
        if self.total > 1:
            args += _state(spec)
        args += [Scalar(name, "i64") for name in spec.params]
        args += [Scalar(name, kind) for name, kind in spec.score_params]
        return tuple(args)

    def _rows(self) -> list[Stmt]:
        load = Load("Q", self.operand, ("i", "d"), "q", self.at.query(D_AXIS))
        fold = self._set("Q", self.operand, ("i", "d"), real("Q") * SCALE * LOG2E)
        return [*self.over.head, *self.at.head, *self.over.make_rows, load, *([fold] if self.folded else [])]

    def _begin(self) -> list[Stmt]:
        acc = self.acc
        if self.first:
            out: list[Stmt] = [
                Compute("m", acc, ("i",), -INF),
                Compute("l", acc, ("i",), sympy.Integer(0)),
                Compute("O", acc, ("i", "e"), sympy.Integer(0)),
            ]
            return [*out, Compute("top", acc, ("i",), -INF)] if self.spec.return_max else out
        at = self.at.safe_row
        out = [
            Load("m", acc, ("i",), "log_sum", at),
            Compute("l", acc, ("i",), where(real("m") < self.lowest, 0, 1)),
            Load("O", acc, ("i", "e"), "o", (*at, E_AXIS)),
        ]
        return [*out, Load("top", acc, ("i",), "max", at)] if self.spec.return_max else out

    def _tile(self) -> list[Stmt]:
        """What happens to one key tile: scores, the mask where it cuts, the online softmax."""
        ij, full = ("i", "j"), self.loops.full
        if self.over.group.exact:
            masked = self._set("S", self.acc, ij, where(self.over.attends, real("S"), -INF))
            guard: list[Stmt] = [If(sympy.Not(full), (masked,))]
            if full in (sympy.true, sympy.false):
                guard = [] if full == sympy.true else [masked]
            return [*self._scores(), *guard, *self._softmax()]
        ok = sympy.Symbol("ok")
        whole: list[Stmt] = []
        attends = self.over.attends
        if full != sympy.false:
            whole = [Let("whole", where(full, 1, 0))]
            attends = sympy.Or(integer("whole") > 0, attends)
        masked = self._set("S", self.acc, ij, where(ok, real("S"), -INF))
        return [
            *whole,
            Compute("ok", "bool", ij, attends),
            Reduce("some", "bool", (), "any", ok, ij),
            If(sympy.Symbol("some"), (*self._scores(), masked, *self._softmax())),
        ]

    def _scores(self) -> list[Stmt]:
        out: list[Stmt] = [
            Load("K", self.operand, ("j", "d"), "k", self.at.key(D_AXIS), self.over.valid_col),
            Dot("S", self.acc, ("i", "j"), "Q", "K", "d", precision=self.spec.precision),
        ]
        if self.folded or self.late:
            return out
        if isinstance(self.score, sympy.Add):
            # As one product, sympy would distribute log2(e): differences of large, rounded numbers.
            out.append(self._set("S", self.acc, ("i", "j"), self.score))
            out.append(self._set("S", self.acc, ("i", "j"), real("S") * LOG2E))
        else:
            out.append(self._set("S", self.acc, ("i", "j"), self.score * LOG2E))
        return out

    def _softmax(self) -> list[Stmt]:
        acc, ij = self.acc, ("i", "j")
        m, peak, safe, alpha = real("m"), real("peak"), real("safe"), real("alpha")
        rescale: tuple[Stmt, ...] = (
            Compute("alpha", acc, ("i",), exp2(m - where(peak < self.lowest, 0, peak))),
            self._set("l", acc, ("i",), real("l") * alpha),
            self._set("O", acc, ("i", "e"), real("O") * alpha),
            self._set("m", acc, ("i",), peak),
        )
        lazy: list[Stmt] = list(rescale)
        if self.schedule.lazy_rescale:
            lazy = [
                Reduce("rose", "bool", (), "any", peak > m + STALE, ("i",)),
                If(sympy.Symbol("rose"), rescale),
            ]
        weights, narrow = "P", []
        if self.operand != acc:
            weights, narrow = "W", [Compute("W", self.operand, ij, real("P"))]
        scale = SCALE * LOG2E if self.late else sympy.Integer(1)
        highest = maximum(real("top"), scale * peak)
        return [
            Reduce("peak", acc, ("i",), "max", real("S"), ("j",)),
            *([self._set("top", acc, ("i",), highest)] if self.spec.return_max else []),
            self._set("peak", acc, ("i",), maximum(m, scale * peak)),
            *lazy,
            Compute("safe", acc, ("i",), where(m < self.lowest, 0, m)),
            Compute("P", acc, ij, exp2(scale * real("S") - safe)),
            Reduce("gain", acc, ("i",), "sum", real("P"), ("j",)),
            self._set("l", acc, ("i",), real("l") + real("gain")),
            *narrow,
            Load("V", self.operand, ("j", "e"), "v", self.at.key(E_AXIS), self.over.valid_col),
            Dot(
                "O",
                acc,
                ("i", "e"),
                weights,
                "V",
                "j",
                accumulate=True,
                declares=False,
                precision=self.spec.precision,
            ),
        ]

    # the end ----------------------------------------------------------------------------------------

    def _finish(self) -> list[Stmt]:
        at, valid = self.at.row, self.over.valid_row
        empty = sympy.Eq(real("l"), 0)
        log_sum = where(empty, -INF, real("m") + log2(where(empty, 1, real("l"))))
        out: list[Stmt] = [
            Compute("inv", self.acc, ("i",), sympy.Integer(1) / where(empty, 1, real("l"))),
            self._set("O", self.acc, ("i", "e"), real("O") * real("inv")),
            Store("o", (*at, E_AXIS), real("O"), ("i", "e"), valid),
        ]
        if not self.last:
            out.append(Store("log_sum", at, log_sum, ("i",), valid))
        elif self.spec.return_lse:
            out.append(Store("lse", at, log_sum * LN2, ("i",), valid))
        if self.spec.return_max:
            out.append(Store("max", at, real("top") * (LN2 if self.last else 1), ("i",), valid))
        return out

    def _set(self, name: str, dtype: str, axes: tuple[str, ...], expr: Expr) -> Compute:
        return Compute(name, dtype, axes, expr, declares=False)

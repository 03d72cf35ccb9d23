"""folds: what the kernels keep of the tiles of scores that they walk over, and what they store at the end.

A fold is the state of a row tile: how it begins, the step that a tile of scores S[i, j] makes, and how it
ends. Groups of one operation run one after the other; all but the last leave their state in memory for
the next, so that they merge exactly. Scores live in the base-2 domain: s * scale * log2(e).

    attention     the online softmax: running maximum m, sum l, weighted values O
    row_lse       the same without values
    weigh         sums of a softmax that are known: values weighed by mapped probabilities
    column_sums   likewise, with keys for rows: probabilities summed over queries
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy

from ..ir.expr import INF, Expr, exp2, integer, log2, maximum, minimum, real, where
from ..ir.kernel import Compute, Dot, If, Load, Reduce, Stmt, Store, Tensor
from ..ir.plan import Schedule
from .operands import Operands, Transposed
from .rounding import together
from .scaffold import H, Scaffold
from .spec import AttentionSpec

LOG2E = sympy.Float(math.log2(math.e))
LN2 = sympy.Float(math.log(2))
# Only -inf is below these (the least finite number itself is folded away by TVM's simplifier).
LOWEST = {"f32": sympy.Float(-3.4028232635611926e38), "f64": sympy.Float(-1.797693134862315e308)}
STALE = 8  # a row maximum may lag by 2^8 before accumulators are rescaled
E_AXIS = integer("e")
S, P, M, L, O, N = map(real, ("S", "P", "m", "l", "O", "N"))  # noqa: E741
SINK = real("sink")


@dataclass(frozen=True)
class Part:
    """One kernel of an operation: first and last say where it stands among those that share a state."""

    spec: AttentionSpec
    schedule: Schedule
    over: Scaffold
    at: Operands
    operand: str  # the dtype in which operands meet
    first: bool
    last: bool


@dataclass(frozen=True)
class Carried:
    """A tile of the state: its axes, where it is kept between kernels, and its value before any tile."""

    tile: str
    axes: tuple[str, ...]
    tensor: Tensor
    start: Expr


class Fold:
    """What a kernel does beside computing scores. Methods return statements; nothing is decided here."""

    values = False  # whether it reads v

    def __init__(self, part: Part) -> None:
        self.spec, self.over, self.at = part.spec, part.over, part.at
        self.first, self.last, self.schedule, self.operand = (
            part.first,
            part.last,
            part.schedule,
            part.operand,
        )
        self.acc = part.spec.accumulator
        self.lowest = LOWEST[self.acc]
        self.prob: Expr | None = None
        if self.spec.prob_map is not None:
            mapped = self.over.bind(together(self.spec.prob_map.expr, self.acc), attending=True)
            self.prob = mapped.xreplace({real("prob"): P})

    # what differs ---------------------------------------------------------------------------------

    def state(self) -> list[Carried]:
        raise NotImplementedError

    def results(self) -> list[Tensor]:
        """What the last kernel stores."""
        raise NotImplementedError

    def step(self) -> list[Stmt]:
        """What a tile of scores, -inf where pairs do not attend, adds to the state."""
        raise NotImplementedError

    def end(self) -> list[Stmt]:
        """From the whole state to results."""
        raise NotImplementedError

    def reads(self) -> list[Tensor]:
        """What it reads beside q, k, v and captured tensors."""
        return [Tensor("sinks", self.spec.sinks, ("Hq",), "in", 0)] if self.spec.sinks else []

    def prepare(self) -> list[Stmt]:
        """What is loaded before the loop."""
        if self.spec.sinks is None:
            return []
        # The largest sink that is finite in the base-2 domain takes every probability too.
        return [
            Load("sink", self.acc, (), "sinks", (H,)),
            self._set("sink", (), minimum(SINK, -self.lowest / 2) * LOG2E),
        ]

    # what is shared -------------------------------------------------------------------------------

    def begin(self) -> list[Stmt]:
        if self.first:
            starts: list[Stmt] = [Compute(c.tile, self.acc, c.axes, c.start) for c in self.state()]
            return [*self.prepare(), *starts]
        kept: list[Stmt] = [
            Load(c.tile, self.acc, c.axes, c.tensor.name, (*self.at.safe_row, *_inner(c)))
            for c in self.state()
        ]
        return [*self.prepare(), *kept]

    def finish(self) -> list[Stmt]:
        if self.last:
            return self.end()
        return [self._store(c.tensor.name, real(c.tile), *_inner(c)) for c in self.state()]

    def _store(self, tensor: str, value: Expr, *inner: Expr) -> Store:
        axes = ("i", *(str(x) for x in inner))
        return Store(tensor, (*self.at.row, *inner), value, axes, self.over.valid_row)

    def _set(self, name: str, axes: tuple[str, ...], expr: Expr) -> Compute:
        return Compute(name, self.acc, axes, expr, declares=False)

    def _weigh(self) -> list[Stmt]:
        """O += map(P) @ V; pairs that do not attend weigh nothing, whatever the map says."""
        made: list[Stmt] = []
        if self.prob is not None:
            made.append(self._set("P", ("i", "j"), where(self.lowest > S, 0, self.prob)))
        weights = "P"
        if self.operand != self.acc:
            weights = "W"
            made.append(Compute("W", self.operand, ("i", "j"), P))
        v, precision = self.at.values, self.spec.precision
        return [
            *made,
            Load(v.tile, self.operand, ("j", "e"), v.tensor, (*v.at, E_AXIS), self.over.valid_col),
            Dot(
                "O",
                self.acc,
                ("i", "e"),
                weights,
                v.tile,
                "j",
                accumulate=True,
                declares=False,
                precision=precision,
            ),
        ]

    def _values(self) -> Carried:
        size = self.spec.v_size
        return Carried("O", ("i", "e"), self.at.per_row("acc_state", self.acc, "inout", size), sympy.S.Zero)

    def _known_norm(self, axes: tuple[str, ...], load: Load) -> list[Stmt]:
        """N: the base-2 logarithm of the sum that a row's weights are divided by; 0 for rows without any."""
        made: list[Stmt] = [load, self._set("N", axes, N * LOG2E)]
        if self.spec.sinks is not None:
            top = real("top")
            made += [
                Compute("top", self.acc, axes, self._finite(maximum(N, SINK))),
                self._set("N", axes, top + log2(exp2(N - top) + exp2(SINK - top))),
            ]
        return [*made, self._set("N", axes, self._finite(N))]

    def _finite(self, exponent: Expr) -> Expr:
        """0 in place of -inf, so that differences of two are no NaN."""
        return where(exponent < self.lowest, 0, exponent)


def _inner(carried: Carried) -> list[Expr]:
    return [integer(axis) for axis in carried.axes[1:]]


class RowLse(Fold):
    """The online softmax without values."""

    def state(self) -> list[Carried]:
        return [
            Carried("m", ("i",), self.at.per_row("max_state", self.acc, "inout"), -INF),
            Carried("l", ("i",), self.at.per_row("sum_state", self.acc, "inout"), sympy.S.Zero),
        ]

    def results(self) -> list[Tensor]:
        asked = {"lse": self.spec.return_lse, "max": self.spec.return_max}
        return [self.at.per_row(name, self.spec.lse_dtype, "out") for name, there in asked.items() if there]

    def step(self) -> list[Stmt]:
        acc, peak, alpha = self.acc, real("peak"), real("alpha")
        scaled = [self._set(c.tile, c.axes, real(c.tile) * alpha) for c in self.state() if c.tile != "m"]
        rescale: tuple[Stmt, ...] = (
            Compute("alpha", acc, ("i",), exp2(M - self._finite(peak))),
            *scaled,
            self._set("m", ("i",), peak),
        )
        lazy: list[Stmt] = list(rescale)
        if self.schedule.lazy_rescale and not self.spec.return_max:
            lazy = [
                Reduce("rose", "bool", (), "any", peak > M + STALE, ("i",)),
                If(sympy.Symbol("rose"), rescale),
            ]
        return [
            Reduce("peak", acc, ("i",), "max", S, ("j",)),
            self._set("peak", ("i",), maximum(M, peak)),
            *lazy,
            Compute("safe", acc, ("i",), self._finite(M)),
            Compute("P", acc, ("i", "j"), exp2(S - real("safe"))),
            Reduce("gain", acc, ("i",), "sum", P, ("j",)),
            self._set("l", ("i",), L + real("gain")),
        ]

    def end(self) -> list[Stmt]:
        empty, out = sympy.Eq(L, 0), []
        if self.spec.return_lse:
            lse = (M + log2(where(empty, 1, L))) * LN2
            out.append(Compute("L", self.acc, ("i",), where(empty, -INF, lse)))
            out.append(self._store("lse", real("L")))
        if self.spec.return_max:
            out.append(self._store("max", M * LN2))
        return out


class Attention(RowLse):
    """The online softmax: values are weighed relative to the running maximum, and divided at the end."""

    values = True

    def state(self) -> list[Carried]:
        return [*super().state(), self._values()]

    def results(self) -> list[Tensor]:
        return [self.at.per_row("o", self.spec.dtype, "out", self.spec.v_size), *super().results()]

    def step(self) -> list[Stmt]:
        return [*super().step(), *self._weigh()]

    def end(self) -> list[Stmt]:
        return [
            *self._share(),
            self._set("O", ("i", "e"), O * real("inv")),
            self._store("o", O, E_AXIS),
            *super().end(),
        ]

    def _share(self) -> list[Stmt]:
        """inv: what the weighted values are multiplied by. A sink joins the sum here, at the end."""
        if self.spec.sinks is None:
            return [Compute("inv", self.acc, ("i",), sympy.Integer(1) / where(sympy.Eq(L, 0), 1, L))]
        top, share, total = real("top"), real("share"), real("total")
        return [
            Compute("top", self.acc, ("i",), self._finite(maximum(M, SINK))),
            Compute("share", self.acc, ("i",), exp2(M - top)),
            Compute("total", self.acc, ("i",), L * share + exp2(SINK - top)),
            Compute("inv", self.acc, ("i",), share / where(sympy.Eq(total, 0), 1, total)),
        ]


class Weigh(Fold):
    """Probabilities of rows whose log-sum-exp is known, mapped, times values."""

    values = True

    def reads(self) -> list[Tensor]:
        return [self.at.per_row("lse", self.spec.lse_dtype, "in"), *super().reads()]

    def prepare(self) -> list[Stmt]:
        load = Load("N", self.acc, ("i",), "lse", self.at.safe_row)
        return [*super().prepare(), *self._known_norm(("i",), load)]

    def state(self) -> list[Carried]:
        return [self._values()]

    def results(self) -> list[Tensor]:
        return [self.at.per_row("o", self.spec.dtype, "out", self.spec.v_size)]

    def step(self) -> list[Stmt]:
        return [Compute("P", self.acc, ("i", "j"), exp2(S - N)), *self._weigh()]

    def end(self) -> list[Stmt]:
        return [self._store("o", O, E_AXIS)]


class ColumnSums(Fold):
    """Rows are keys: the probabilities of a key summed over queries whose log-sum-exp is known."""

    at: Transposed

    def reads(self) -> list[Tensor]:
        return [Tensor("lse", self.spec.lse_dtype, ("B", "Hq", "kv_len"), "in", 2), *super().reads()]

    def state(self) -> list[Carried]:
        return [Carried("C", ("i",), self.at.per_row("column_state", self.acc, "inout"), sympy.S.Zero)]

    def results(self) -> list[Tensor]:
        return [self.at.per_row("column_sums", self.spec.lse_dtype, "out")]

    def step(self) -> list[Stmt]:
        load = Load("N", self.acc, ("j",), "lse", self.at.column, self.over.valid_col)
        return [
            *self._known_norm(("j",), load),
            Compute("P", self.acc, ("i", "j"), where(self.lowest > S, 0, exp2(S - N))),
            Reduce("gain", self.acc, ("i",), "sum", P, ("j",)),
            self._set("C", ("i",), real("C") + real("gain")),
        ]

    def end(self) -> list[Stmt]:
        return [self._store("column_sums", real("C"))]


FOLDS: dict[str, type[Fold]] = {
    "attention": Attention,
    "row_lse": RowLse,
    "weigh": Weigh,
    "column_sums": ColumnSums,
}
"""The fold of each fused operation."""

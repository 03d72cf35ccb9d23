"""folds: what the kernels keep of the tiles of scores that they walk over, and what they store at the end.

A fold is the state of a row tile: how it begins, the step that a tile of scores S[i, j] makes, and how it
ends. Groups of one operation run one after the other: each stores its results as if it were alone, and
the next one's state begins from them, so that they merge exactly. Scores live in the base-2 domain,
s * scale * log2(e); `Part.scale` is what is missing from S to that.

    attention     the online softmax: running maximum m, sum l, weighted values O
    row_lse       the same without values
    weigh         sums of a softmax that are known: values weighed by mapped probabilities
    column_sums   likewise, by the log-sum-exp, with keys for rows: probabilities summed over queries
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy

from ..ir.expr import INF, Expr, exp2, integer, log2, maximum, minimum, real, sum_of, where
from ..ir.graph import Op
from ..ir.kernel import Compute, Dot, GridDim, If, Load, Reduce, Stmt, Store, Tensor
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
    """One kernel of an operation: first and last say where it stands among those that share a state.

    op: the operation, for folds that its attributes describe further. folded: whether the features of queries
    are multiplied by scale * log2(e)."""

    spec: AttentionSpec
    schedule: Schedule
    over: Scaffold
    at: Operands
    operand: str  # the dtype in which operands meet
    scale: Expr
    first: bool
    last: bool
    op: Op | None = None
    folded: bool = False


@dataclass(frozen=True)
class Carried:
    """A tile of the state: its axes, its value before any tile, and where a kernel before left it.

    kept: a tensor, or an expression of the tiles that come before this one."""

    tile: str
    axes: tuple[str, ...]
    start: Expr
    kept: str | Expr


class Fold:
    """What a kernel does beside computing scores. Methods return statements; nothing is decided here."""

    values = False  # whether it reads v
    keeps_products = False  # whether it reads R, the products of queries and keys before the score map
    walks = True  # whether it looks at tiles of pairs
    members = False  # whether a program walks over all query heads of a key head
    direction = "fwd"

    def __init__(self, part: Part) -> None:
        self.spec, self.over, self.at = part.spec, part.over, part.at
        self.first, self.last, self.schedule = part.first, part.last, part.schedule
        self.operand, self.scale = part.operand, part.scale
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
        """What a kernel stores."""
        raise NotImplementedError

    def products(self) -> list[Stmt]:
        """Products that a step needs beside the scores: they run while those are masked and mapped."""
        return []

    def step(self) -> list[Stmt]:
        """What a tile of scores, -inf where pairs do not attend, adds to the state."""
        raise NotImplementedError

    def end(self) -> list[Stmt]:
        """From the whole state to results."""
        raise NotImplementedError

    def reads(self) -> list[Tensor]:
        """What it reads beside q, k, v and captured tensors."""
        return [Tensor("sinks", self.spec.sinks, ("Hq",))] if self.spec.sinks else []

    def prepare(self) -> list[Stmt]:
        """What is loaded before the loop."""
        if self.spec.sinks is None:
            return []
        axes = () if self.at.query_head == H else ("i",)
        # The largest sink that is finite in the base-2 domain takes every probability too.
        return [
            Load("sink", self.acc, axes, "sinks", (self.at.query_head,)),
            self._set("sink", axes, minimum(SINK, -self.lowest / 2) * LOG2E),
        ]

    @classmethod
    def walks_for(cls, op: Op) -> bool:
        """Whether the operation looks at tiles of pairs at all."""
        return True

    def placed(
        self, grid: tuple[GridDim, ...], body: tuple[Stmt, ...]
    ) -> tuple[tuple[GridDim, ...], tuple[Stmt, ...]]:
        """Grid and body of the kernel, from what they are for one row tile a program."""
        return grid, body

    # what is shared -------------------------------------------------------------------------------

    def begin(self) -> list[Stmt]:
        """The state before the first tile."""
        if self.first:
            return [Compute(c.tile, self.acc, c.axes, c.start) for c in self.state()]
        return [*map(self._resume, self.state())]

    def _resume(self, c: Carried) -> Stmt:
        if not isinstance(c.kept, str):
            return Compute(c.tile, self.acc, c.axes, c.kept)
        inner = (integer(axis) for axis in c.axes[1:])
        return Load(c.tile, self.acc, c.axes, c.kept, (*self.at.safe_row, *inner))

    def _result(self, name: str, dtype: str, *inner: int) -> Tensor:
        """A result that every kernel stores, and all but the first begin from."""
        return self.at.per_row(name, dtype, "out" if self.first else "inout", *inner)

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
        return Carried("O", ("i", "e"), sympy.S.Zero, "o")

    def _output(self) -> Tensor:
        return self._result("o", self.spec.dtype, self.spec.v_size)

    def _known_norm(self, axes: tuple[str, ...], load: Load) -> list[Stmt]:
        """N: the base-2 logarithm of the sum that a row's weights are divided by; 0 for rows without any."""
        made: list[Stmt] = [load, self._set("N", axes, N * LOG2E)]
        if self.spec.sinks is not None:
            top = real("top")
            parts: list[Expr] = [exp2(N - top), exp2(SINK - top)]
            made += [
                Compute("top", self.acc, axes, self._finite(maximum(N, SINK))),
                self._set("N", axes, top + log2(sum_of(parts))),
            ]
        return [*made, self._set("N", axes, self._finite(N))]

    def _finite(self, exponent: Expr) -> Expr:
        """0 in place of -inf, so that differences of two are no NaN."""
        return where(exponent < self.lowest, 0, exponent)


class RowLse(Fold):
    """The online softmax without values; between kernels, one number a row: log2 of the sum of weights.

    Where maximum and sum are asked for apart, these are what kernels leave to one another."""

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.apart = part.op is not None and bool(part.op.attr("apart"))

    def state(self) -> list[Carried]:
        known = where(self.lowest > M, 0, 1)
        tops, sums = ("tops", "sums") if self.apart else ("log_sum", known)
        out = [Carried("m", ("i",), -INF, tops), Carried("l", ("i",), sympy.S.Zero, sums)]
        return [*out, Carried("largest", ("i",), -INF, "max")] if self.spec.return_max else out

    def results(self) -> list[Tensor]:
        out = []
        if self.spec.return_lse and self.last:
            out.append(self.at.per_row("lse", self.spec.lse_dtype, "out"))
        if self.spec.return_max:
            out.append(self._result("max", self.spec.lse_dtype))
        if self.apart:
            out += [self._result("tops", self.acc), self._result("sums", self.acc)]
        elif not (self.first and self.last):
            out.append(self.at.per_row("log_sum", self.acc, "inout"))
        return out

    def step(self) -> list[Stmt]:
        acc, peak, alpha, largest = self.acc, real("peak"), real("alpha"), real("largest")
        sums = (c for c in self.state() if c.tile not in ("m", "largest"))
        scaled = [self._set(c.tile, c.axes, real(c.tile) * alpha) for c in sums]
        rescale: tuple[Stmt, ...] = (
            Compute("alpha", acc, ("i",), exp2(M - self._finite(peak))),
            *scaled,
            self._set("m", ("i",), peak),
        )
        lazy: list[Stmt] = list(rescale)
        if self.schedule.lazy_rescale:
            lazy = [
                Reduce("rose", "bool", (), "any", peak > M + STALE, ("i",)),
                If(sympy.Symbol("rose"), rescale),
            ]
        top = [self._set("largest", ("i",), maximum(largest, self.scale * peak))]
        return [
            Reduce("peak", acc, ("i",), "max", S, ("j",)),
            *(top if self.spec.return_max else []),
            self._set("peak", ("i",), maximum(M, self.scale * peak)),
            *lazy,
            Compute("safe", acc, ("i",), self._finite(M)),
            Compute("P", acc, ("i", "j"), exp2(self.scale * S - real("safe"))),
            Reduce("gain", acc, ("i",), "sum", P, ("j",)),
            self._set("l", ("i",), L + real("gain")),
        ]

    def end(self) -> list[Stmt]:
        empty, out = sympy.Eq(L, 0), []
        log_sum = where(empty, -INF, M + log2(where(empty, 1, L)))
        if self.apart:
            out += [self._store("tops", M), self._store("sums", L)]
        elif not self.last:
            out.append(self._store("log_sum", log_sum))
        if self.last and self.spec.return_lse:
            out.append(self._store("lse", log_sum * LN2))
        if self.spec.return_max:
            out.append(self._store("max", real("largest") * (LN2 if self.last else 1)))
        return out


class Attention(RowLse):
    """The online softmax: values are weighed relative to the running maximum, and divided at the end."""

    values = True

    def state(self) -> list[Carried]:
        return [*super().state(), self._values()]

    def results(self) -> list[Tensor]:
        return [self._output(), *super().results()]

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
        """inv: what the weighted values are multiplied by. A sink joins the sum at the very end."""
        if self.spec.sinks is None or not self.last:
            return [Compute("inv", self.acc, ("i",), sympy.Integer(1) / where(sympy.Eq(L, 0), 1, L))]
        top, share, total = real("top"), real("share"), real("total")
        return [
            Compute("top", self.acc, ("i",), self._finite(maximum(M, SINK))),
            Compute("share", self.acc, ("i",), exp2(M - top)),
            Compute("total", self.acc, ("i",), L * share + exp2(SINK - top)),
            Compute("inv", self.acc, ("i",), share / where(sympy.Eq(total, 0), 1, total)),
        ]


class Weigh(Fold):
    """Probabilities of rows whose maximum and sum are known, mapped, times values.

    The log-sum-exp would do but for its rounding, which all pairs of a row share and a map may enlarge."""

    values = True

    def reads(self) -> list[Tensor]:
        rows = [self.at.per_row(name, self.acc, "in") for name in ("tops", "sums")]
        return [*rows, *super().reads()]

    def prepare(self) -> list[Stmt]:
        axes, top, total = ("i",), real("top"), real("total")
        loads = [Load(n, self.acc, axes, t, self.at.safe_row) for n, t in (("N", "tops"), ("l", "sums"))]
        most, parts = N, L
        if self.spec.sinks is not None:
            most, parts = maximum(N, SINK), L * exp2(N - top) + exp2(SINK - top)
        return [
            *super().prepare(),
            *loads,
            Compute("top", self.acc, axes, self._finite(most)),
            Compute("total", self.acc, axes, parts),
            self._set("N", axes, top),
            Compute("inv", self.acc, axes, sympy.Integer(1) / where(sympy.Eq(total, 0), 1, total)),
        ]

    def state(self) -> list[Carried]:
        return [self._values()]

    def results(self) -> list[Tensor]:
        return [self._output()]

    def step(self) -> list[Stmt]:
        p = exp2(self.scale * S - N) * real("inv")
        return [Compute("P", self.acc, ("i", "j"), p), *self._weigh()]

    def end(self) -> list[Stmt]:
        return [self._store("o", O, E_AXIS)]


class ColumnSums(Fold):
    """Rows are keys: the probabilities of a key summed over queries whose log-sum-exp is known."""

    at: Transposed

    def reads(self) -> list[Tensor]:
        return [self.at.per_column("lse", self.spec.lse_dtype), *super().reads()]

    def state(self) -> list[Carried]:
        return [Carried("C", ("i",), sympy.S.Zero, "column_sums")]

    def _resume(self, c: Carried) -> Stmt:
        b, _, row = self.at.safe_row
        return Load("C", self.acc, ("i",), "column_sums", (b, H, row))

    def results(self) -> list[Tensor]:
        shape = ("B", "Hq", "q_len")
        return [Tensor("column_sums", self.spec.lse_dtype, shape, "out" if self.first else "inout", 2)]

    def step(self) -> list[Stmt]:
        load = Load("N", self.acc, ("j",), "lse", self.at.column, self.over.valid_col)
        return [
            *self._known_norm(("j",), load),
            Compute("P", self.acc, ("i", "j"), where(self.lowest > S, 0, exp2(self.scale * S - N))),
            Reduce("gain", self.acc, ("i",), "sum", P, ("j",)),
            self._set("C", ("i",), real("C") + real("gain")),
        ]

    def end(self) -> list[Stmt]:
        b, _, row = self.at.row
        return [Store("column_sums", (b, H, row), real("C"), ("i",), self.over.valid_row)]

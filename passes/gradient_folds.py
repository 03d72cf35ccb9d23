"""gradient_folds: what the kernels of gradients keep of the tiles of scores that they walk over.

    row_norm       rows are queries: what makes up for the rounding of their log-sum-exp, and for sinks
    grad_delta     likewise: delta, the sum of p * dp over keys, less the gradient of the log-sum-exp
    grad_rows      likewise: the gradient of q
    grad_columns   rows are keys: the gradients of k and v, of all query heads that read them
    grad_captures  rows are queries: the gradients of what a score or probability map read

All compute a tile of probabilities anew (P, from the rows' log-sum-exp), the gradient of what weighs the
values (dW, a product), that of the probabilities (dP) and that of the scores:

    G = P * (dP - delta)

then by the slope of the score map that of the products. A score map that only scales has its factor
applied once a row, at the end.
"""

from __future__ import annotations

import sympy

from ..ir.derivative import derivative
from ..ir.expr import (
    Expr,
    all_of,
    ceildiv,
    exp2,
    floordiv,
    floormod,
    integer,
    log2,
    maximum,
    minimum,
    real,
    where,
)
from ..ir.gradient_interpret import captured_reads
from ..ir.graph import Op
from ..ir.kernel import Compute, Dot, For, GridDim, Let, Load, Reduce, Span, Stmt, Store, Tensor
from ..ir.score import ProbMap
from .folds import E_AXIS, LN2, LOG2E, Carried, Fold, L, N, P, Part, S
from .operands import Transposed
from .rounding import together
from .spec import SCALE

D_AXIS = integer("d")
C, G, DP, DW, DELTA, R = (real(name) for name in ("C", "G", "dP", "dW", "D", "R"))
SINK = real("sink")
SLOTS, SLOT_OF = integer("slots"), integer("slot_of")


class Gradient(Fold):
    """What the gradients share. given: names of the tensors that they are given beside q, k and v."""

    values = True
    direction = "bwd"

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        assert part.op is not None, "gradients are lowered from operations"
        self.op = part.op
        self.given: tuple[str, ...] = self.op.attr("given")
        score, prob = self.spec.score_map, self.spec.prob_map
        assert score is not None
        self.plain = score.expr == real("score") * SCALE
        self.folded = part.folded
        self.precise = "norm" in self.given
        self.leaves_norm = any(v.name == "norm" for v in self.op.outputs)
        self.keeps_products = not self.plain
        named = {real("score"): R, real("prob"): P, real("grad"): G}
        self.slope = self._bound(real("grad") * derivative(score.expr, real("score"))).xreplace(named)
        self.prob_slope: Expr | None = None
        if prob is not None:
            slope = self._bound(real("grad") * derivative(prob.expr, real("prob")))
            self.prob_slope = slope.xreplace(named | {real("grad"): DW})

    def _bound(self, expr: Expr) -> Expr:
        return self.over.bind(together(expr, self.acc), attending=True)

    # statements over one tile -----------------------------------------------------------------------

    def _probabilities(self) -> list[Stmt]:
        ij = ("i", "j")
        exponent = self.scale * S - N
        return [Compute("P", self.acc, ij, exp2(exponent + C if self.precise else exponent))]

    def _norms(self, axes: tuple[str, ...], lse: Load, norm: Load) -> list[Stmt]:
        """N, subtracted from scores in the base-2 domain, and C, which is added to the difference."""
        if not self.precise and not self.leaves_norm:
            return self._known_norm(axes, lse)
        alone = [lse, self._set("N", axes, self._finite(N * LOG2E))]
        return [*alone, norm] if self.precise else alone

    def _prob_gradients(self) -> list[Stmt]:
        if self.prob_slope is None:
            return []
        return [Compute("dP", self.acc, ("i", "j"), where(self.lowest > S, 0, self.prob_slope))]

    @property
    def _dp(self) -> Expr:
        return DW if self.prob_slope is None else DP

    def _score_gradients(self) -> list[Stmt]:
        """G, the gradient of the mapped scores."""
        return [Compute("G", self.acc, ("i", "j"), P * (self._dp - DELTA))]

    def _product_gradients(self) -> list[Stmt]:
        """G becomes that of the products; its operand for the tensor cores is `self._narrow("G")`."""
        if self.plain:
            return []
        return [self._set("G", ("i", "j"), where(self.lowest > S, 0, self.slope))]

    def _narrowed(self, tile: str) -> tuple[list[Stmt], str]:
        """(statements, name): a tile of pairs in the dtype of operands."""
        if self.operand == self.acc:
            return [], tile
        return [Compute(f"{tile}h", self.operand, ("i", "j"), real(tile))], f"{tile}h"

    def _product(self, dst: str, axes: tuple[str, str], a: str, b: str, over: str, *, adds: bool) -> Dot:
        precision = self.spec.precision
        return Dot(dst, self.acc, axes, a, b, over, adds, not adds, precision)

    def _scaled(self, tile: str, axis: str) -> list[Stmt]:
        return [self._set(tile, ("i", axis), real(tile) * SCALE)] if self.plain else []

    def _added(self, tile: str, tensor: str, axis: Expr) -> list[Stmt]:
        """What the kernels before have stored, added to what this one found."""
        if self.first:
            return []
        axes = ("i", str(axis))
        load = Load(f"{tile}_before", self.acc, axes, tensor, (*self.at.safe_row, axis))
        return [load, self._set(tile, axes, real(tile) + real(f"{tile}_before"))]


class _OverQueries(Gradient):
    """Rows are queries: their gradients of results, log-sum-exp and delta are loaded once."""

    def reads(self) -> list[Tensor]:
        wide, rows = self.spec.lse_dtype, {"do", "o"}
        found = [
            self.at.per_row(name, self.spec.dtype, "in", self.spec.v_size)
            if name in rows
            else self.at.per_row(name, wide, "in")
            for name in self.given
            if name != "sinks"
        ]
        return [*found, *super().reads()]

    def _row(self, tile: str, tensor: str) -> Load:
        return Load(tile, self.acc, ("i",), tensor, self.at.safe_row)

    def _features(self, tile: str, tensor: str) -> Load:
        return Load(tile, self.operand, ("i", "e"), tensor, (*self.at.safe_row, E_AXIS))

    def prepare(self) -> list[Stmt]:
        made = [
            *super().prepare(),
            self._features("dO", "do"),
            *self._norms(("i",), self._row("N", "lse"), self._row("C", "norm")),
        ]
        if "delta" in self.given:
            return [*made, self._row("D", "delta")]
        if "o" in self.given:
            made += [
                self._features("Oo", "o"),
                Reduce("sums", self.acc, ("i",), "sum", real("Oo") * real("dO"), ("e",)),
                *self._shifted(real("sums")),
            ]
        return made

    def _shifted(self, sums: Expr) -> list[Stmt]:
        """D: the sums of rows less what the gradient of the log-sum-exp adds to scores, over p.

        With a sink the log-sum-exp is of fewer scores than p is normalised by."""
        if "dlse" not in self.given:
            return [Compute("D", self.acc, ("i",), sums)]
        alone = real("alone")
        more: Expr = exp2(SINK - alone * LOG2E) if self.spec.sinks else sympy.Integer(0)
        lost: Expr = where(alone < self.lowest, 0, real("dLse") * (1 + more))
        return [
            self._row("dLse", "dlse"),
            self._row("alone", "lse"),
            Compute("D", self.acc, ("i",), sums - lost),
        ]

    def _sink_rows(self, sums: Expr) -> list[Stmt]:
        """What rows add to the gradients of their heads' sinks."""
        if len(self.op.outputs) < self._sinks_at:
            return []
        others: Expr = exp2(real("only") * LOG2E - SINK)
        taken: Expr = 1 / (1 + others)
        return [self._row("only", "lse"), self._store("dsinks", -taken * sums)]

    @property
    def _sinks_at(self) -> int:
        """How many results there are where those of the sinks are the last."""
        return 0

    def _row_results(self, *names: str) -> list[Tensor]:
        wanted = [*names, *(["dsinks"] if len(self.op.outputs) >= self._sinks_at else [])]
        return [self.at.per_row(name, self.spec.lse_dtype, "out") for name in wanted]

    def _sum(self) -> list[Carried]:
        """The sum of a row's exp(score - log-sum-exp)."""
        return [Carried("l", ("i",), sympy.S.Zero, "norm")]

    def _gain(self) -> list[Stmt]:
        gain = Reduce("gain", self.acc, ("i",), "sum", P, ("j",))
        return [gain, self._set("l", ("i",), L + real("gain"))]

    def _norm_of_sum(self) -> Expr:
        """log2 of what makes that sum the part that sinks leave of 1."""
        taken: Expr = exp2(SINK - N) if self.spec.sinks else sympy.Integer(0)
        total: Expr = L * (1 + taken)
        empty = sympy.Eq(L, 0)
        taken_log: Expr = log2(where(empty, 1, total))
        return where(empty, 0, -taken_log)

    def products(self) -> list[Stmt]:
        v = self.at.values
        load = Load(v.tile, self.operand, ("j", "e"), v.tensor, (*v.at, E_AXIS), self.over.valid_col)
        return [load, self._product("dW", ("i", "j"), "dO", v.tile, "e", adds=False)]


class RowNorm(_OverQueries):
    """What exp(score - log-sum-exp) has to be multiplied by, as a logarithm to base 2.

    Without sinks that is 1, but for the rounding of the log-sum-exp, which all pairs of a row share."""

    values = False

    def prepare(self) -> list[Stmt]:
        return [*Fold.prepare(self), *self._norms(("i",), self._row("N", "lse"), self._row("C", "norm"))]

    def products(self) -> list[Stmt]:
        return []

    def state(self) -> list[Carried]:
        return self._sum()

    def results(self) -> list[Tensor]:
        return [self._result("norm", self.spec.lse_dtype)]

    def step(self) -> list[Stmt]:
        return [*self._probabilities(), *self._gain()]

    def end(self) -> list[Stmt]:
        return [self._store("norm", self._norm_of_sum() if self.last else L)]


class GradDelta(_OverQueries):
    """delta of every row, where the gradient of q is not wanted, or probabilities must be walked over."""

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.walks = self.walks_for(self.op)

    @property
    def _sinks_at(self) -> int:
        return 2

    @classmethod
    def walks_for(cls, op: Op) -> bool:
        return "o" not in op.attr("given")

    def state(self) -> list[Carried]:
        return [Carried("sums", ("i",), sympy.S.Zero, "delta")] if self.walks else []

    def results(self) -> list[Tensor]:
        if self.walks and not self.last:
            return [self._result("delta", self.spec.lse_dtype)]
        if not self.first and not self.walks:
            return []
        delta, *sinks = self._row_results("delta")
        return [self._result("delta", self.spec.lse_dtype) if self.walks else delta, *sinks]

    def step(self) -> list[Stmt]:
        return [
            *self._probabilities(),
            *self._prob_gradients(),
            Reduce("gain", self.acc, ("i",), "sum", P * self._dp, ("j",)),
            self._set("sums", ("i",), real("sums") + real("gain")),
        ]

    def end(self) -> list[Stmt]:
        if self.walks and not self.last:
            return [self._store("delta", real("sums"))]
        if not self.first and not self.walks:
            return []
        shift = self._shifted(real("sums")) if self.walks else []
        return [*shift, self._store("delta", DELTA), *self._sink_rows(real("sums"))]


class GradRows(_OverQueries):
    """The gradient of q; beside it delta, where that is a sum over features, and what `RowNorm` gives.

    The gradient is linear in probabilities then, so their sum, known at the end, mends it there."""

    @property
    def _sinks_at(self) -> int:
        return 4 if self.leaves_norm else 3

    def state(self) -> list[Carried]:
        return [Carried("dQ", ("i", "d"), sympy.S.Zero, "dq"), *(self._sum() if self.leaves_norm else [])]

    def begin(self) -> list[Stmt]:
        if self.leaves_norm:
            return super().begin()
        return [Compute("dQ", self.acc, ("i", "d"), sympy.S.Zero)]

    def results(self) -> list[Tensor]:
        own = [self._result("dq", self.spec.dtype, self.spec.qk_size)]
        own += [self._result("norm", self.spec.lse_dtype)] if self.leaves_norm else []
        return [*own, *self._row_results("delta")] if self._sums else own

    @property
    def _sums(self) -> bool:
        """Whether this kernel leaves delta behind."""
        return self.first and "delta" not in self.given

    def step(self) -> list[Stmt]:
        made = [*self._probabilities(), *(self._gain() if self.leaves_norm else [])]
        made += [*self._prob_gradients(), *self._score_gradients()]
        narrow, g = self._narrowed("G")
        dot = self._product("dQ", ("i", "d"), g, self.at.cols.tile, "j", adds=True)
        return [*made, *self._product_gradients(), *narrow, dot]

    def end(self) -> list[Stmt]:
        rows: list[Stmt] = []
        if self._sums:
            rows = [self._store("delta", DELTA), *self._sink_rows(real("sums"))]
        store = self._store("dq", real("dQ"), D_AXIS)
        if not self.leaves_norm:
            return [*self._scaled("dQ", "d"), *self._added("dQ", "dq", D_AXIS), store, *rows]
        if not self.last:
            return [store, self._store("norm", L), *rows]
        mended = self._set("dQ", ("i", "d"), real("dQ") * exp2(C))
        norm: list[Stmt] = [Compute("C", self.acc, ("i",), self._norm_of_sum()), self._store("norm", C)]
        return [*norm, mended, *self._scaled("dQ", "d"), store, *rows]


class GradColumns(Gradient):
    """Rows are keys: the gradients of k and v. A program walks over all query heads of its key head."""

    at: Transposed
    members = True

    def reads(self) -> list[Tensor]:
        wide = self.spec.lse_dtype
        found = [
            self.at.per_column("do", self.spec.dtype, self.spec.v_size)
            if name == "do"
            else self.at.per_column(name, wide)
            for name in self.given
            if name != "sinks"
        ]
        return [*found, *super().reads()]

    def begin(self) -> list[Stmt]:
        v = self.at.values
        return [
            Load(v.tile, self.operand, ("i", "e"), v.tensor, (*v.at, E_AXIS), self.at.row_exists),
            Compute("dK", self.acc, ("i", "d"), sympy.S.Zero),
            Compute("dV", self.acc, ("i", "e"), sympy.S.Zero),
        ]

    def state(self) -> list[Carried]:
        return [
            Carried("dK", ("i", "d"), sympy.S.Zero, "dk"),
            Carried("dV", ("i", "e"), sympy.S.Zero, "dv"),
        ]

    def results(self) -> list[Tensor]:
        sizes = {"dk": self.spec.qk_size, "dv": self.spec.v_size}
        return [self._result(name, self.spec.dtype, size) for name, size in sizes.items()]

    def products(self) -> list[Stmt]:
        place = (*self.at.column, E_AXIS)
        made: list[Stmt] = [Load("dO", self.operand, ("j", "e"), "do", place, self.over.valid_col)]
        if "delta" in self.given:
            made.append(self._product("dW", ("i", "j"), self.at.values.tile, "dO", "e", adds=False))
        return made

    def step(self) -> list[Stmt]:
        valid, column = self.over.valid_col, self.at.column
        weights: list[Stmt] = []
        if self.prob is not None:
            weights = [Compute("W", self.acc, ("i", "j"), where(self.lowest > S, 0, self.prob))]
        narrow_p, p = self._narrowed("W" if weights else "P")
        narrow_g, g = self._narrowed("G")
        made: list[Stmt] = [
            *self._norms(
                ("j",),
                Load("N", self.acc, ("j",), "lse", column, valid),
                Load("C", self.acc, ("j",), "norm", column, valid),
            ),
            *self._probabilities(),
            *weights,
            *narrow_p,
            self._product("dV", ("i", "e"), p, "dO", "j", adds=True),
        ]
        if "delta" in self.given:
            made += [
                *self._prob_gradients(),
                Load("D", self.acc, ("j",), "delta", column, valid),
                *self._score_gradients(),
                *self._product_gradients(),
                *narrow_g,
                self._product("dK", ("i", "d"), g, self.at.cols.tile, "j", adds=True),
            ]
        return made

    def end(self) -> list[Stmt]:
        # Queries that hold scale * log2(e) already lack ln(2).
        scaled = [self._set("dK", ("i", "d"), real("dK") * LN2)] if self.folded else self._scaled("dK", "d")
        return [
            *scaled,
            *self._added("dK", "dk", D_AXIS),
            self._store("dk", real("dK"), D_AXIS),
            *self._added("dV", "dv", E_AXIS),
            self._store("dv", real("dV"), E_AXIS),
        ]


class GradCaptures(_OverQueries):
    """The gradients of tensors that a map read: what pairs add, at the indices where they read.

    Pairs that read one element are added up along keys, or a whole tile of pairs, before they meet memory.
    Slots: the sums are kept in several copies, so that programs that run side by side use different ones."""

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.names: tuple[str, ...] = self.op.attr("captures")
        of = self.op.attr("of")
        self.of_prob = isinstance(of, ProbMap)
        named = {real("score"): R, real("prob"): P, real("grad"): DW if self.of_prob else G}
        self.parts: list[tuple[str, str, Expr, Expr]] = []  # tensor, tile, value of a pair, flat index
        for name, (grads, indices) in zip(self.names, captured_reads(of, self.names), strict=True):
            for grad, index in zip(grads, indices, strict=True):
                value = self._bound(grad.expr).xreplace(named)
                tile = f"A{len(self.parts)}"
                self.parts.append((f"d{name}", tile, value, self._flat(name, index)))

    def _flat(self, name: str, index: tuple[Expr, ...]) -> Expr:
        """The place of an element in a row-major copy of a captured tensor; inside it, whatever is read."""
        flat: Expr = sympy.Integer(0)
        for d, entry in enumerate(index):
            size = integer(f"{name}_{d}")
            inside = minimum(maximum(self.over.bind(entry, attending=True), sympy.Integer(0)), size - 1)
            flat = flat * size + inside
        return flat

    def _varies(self, index: Expr) -> tuple[bool, bool]:
        """Whether an index differs between rows, and between keys."""
        made = [*self.over.make_rows, *self.over.make_cols, *self.over.mask_cols]
        over = {s.dst: s.axes for s in made if isinstance(s, Compute)} | {"i": ("i",), "j": ("j",)}
        axes = {a for s in index.free_symbols for a in over.get(str(s), ())}
        return "i" in axes, "j" in axes

    def state(self) -> list[Carried]:
        return [
            Carried(tile, ("i",), sympy.S.Zero, "")
            for _, tile, _, index in self.parts
            if not self._varies(index)[1]
        ]

    def begin(self) -> list[Stmt]:
        return [Compute(c.tile, self.acc, c.axes, c.start) for c in self.state()]

    def results(self) -> list[Tensor]:
        return [Tensor(f"d{name}", self.acc, ("slots", f"d{name}_size"), "inout", 1) for name in self.names]

    def step(self) -> list[Stmt]:
        made = [*self._probabilities(), *self._prob_gradients()]
        if not self.of_prob:
            made += self._score_gradients()
        attends = all_of([self.lowest <= S, self.over.valid_row])
        for tensor, tile, value, index in self.parts:
            rows, keys = self._varies(index)
            value = where(attends, value, 0)
            if rows and keys:
                made.append(self._add(tensor, index, value, ("i", "j"), attends))
            elif keys:
                made.append(Reduce(f"{tile}_sum", self.acc, ("j",), "sum", value, ("i",)))
                made.append(self._add(tensor, index, real(f"{tile}_sum"), ("j",), self.over.valid_col))
            else:
                made.append(Reduce(f"{tile}_sum", self.acc, ("i",), "sum", value, ("j",)))
                made.append(self._set(tile, ("i",), real(tile) + real(f"{tile}_sum")))
        return made

    def end(self) -> list[Stmt]:
        made: list[Stmt] = []
        for tensor, tile, _, index in self.parts:
            rows, keys = self._varies(index)
            if keys:
                continue
            if rows:
                made.append(self._add(tensor, index, real(tile), ("i",), self.over.valid_row))
            else:
                made.append(Reduce(f"{tile}_all", self.acc, (), "sum", real(tile), ("i",)))
                made.append(self._add(tensor, index, real(f"{tile}_all"), (), sympy.true))
        return made

    def placed(
        self, grid: tuple[GridDim, ...], body: tuple[Stmt, ...]
    ) -> tuple[tuple[GridDim, ...], tuple[Stmt, ...]]:
        """A slot a program: on a CPU a program has all row tiles of its slot, one after the other."""
        cells = [integer(g.name) for g in grid]
        if self.spec.target_kind != "cpu":
            return grid, (Let("slot_of", floormod(sympy.Add(*cells), SLOTS)), *body)
        counts = [Let(f"{g.name}_count", g.extent) for g in grid]
        total = sympy.Mul(*(integer(c.name) for c in counts))
        rest: Expr = SLOT_OF + SLOTS * integer("turn")
        cell: list[Stmt] = []
        for name, count in zip(cells, counts, strict=True):
            cell.append(Let(name.name, floormod(rest, integer(count.name))))
            rest = floordiv(rest, integer(count.name))
        turns = Span(sympy.Integer(0), ceildiv(total - SLOT_OF, SLOTS))
        return (GridDim("slot_of", SLOTS),), (*counts, For("turn", (turns,), (*cell, *body)))

    def _add(self, tensor: str, index: Expr, value: Expr, axes: tuple[str, ...], guard: Expr) -> Store:
        return Store(tensor, (SLOT_OF, index), value, axes, guard, adds=True)

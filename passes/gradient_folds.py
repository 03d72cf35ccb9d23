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
from ..ir.expr import Expr, exp2, integer, log2, real, where
from ..ir.kernel import Compute, Dot, Load, Reduce, Stmt, Tensor
from .folds import E_AXIS, LOG2E, Carried, Fold, L, N, P, Part, S
from .rounding import together
from .spec import SCALE

D_AXIS = integer("d")
C, G, DP, DW, DELTA, R = (real(name) for name in ("C", "G", "dP", "dW", "D", "R"))
SINK = real("sink")


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
        left = {value.name for value in self.op.outputs}
        self.leaves_norm, self.leaves_sinks = "norm" in left, "dsinks" in left
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


class OverQueries(Gradient):
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
        if not self.leaves_sinks:
            return []
        others: Expr = exp2(real("only") * LOG2E - SINK)
        taken: Expr = 1 / (1 + others)
        return [self._row("only", "lse"), self._store("dsinks", -taken * sums)]

    def _row_results(self, *names: str) -> list[Tensor]:
        wanted = [*names, *(["dsinks"] if self.leaves_sinks else [])]
        return [self.at.per_row(name, self.spec.lse_dtype, "out") for name in wanted]

    def _sum(self) -> list[Carried]:
        """The sum of a row's exp(score - log-sum-exp)."""
        return [Carried("l", ("i",), sympy.S.Zero, "norm")]

    def _gain(self) -> list[Stmt]:
        gain = Reduce("gain", self.acc, ("i",), "sum", P, ("j",))
        return [gain, self._set("l", ("i",), L + real("gain"))]

    def _norm_of_sum(self) -> Expr:
        """log2 of what makes that sum the part that sinks leave of 1."""
        sink: Expr = exp2(SINK - N) if self.spec.sinks else sympy.Integer(0)
        empty = sympy.Eq(L, 0)
        total: Expr = log2(where(empty, 1, L * (1 + sink)))
        return where(empty, 0, -total)

    def products(self) -> list[Stmt]:
        v = self.at.values
        load = Load(v.tile, self.operand, ("j", "e"), v.tensor, (*v.at, E_AXIS), self.over.valid_col)
        return [load, self._product("dW", ("i", "j"), "dO", v.tile, "e", adds=False)]

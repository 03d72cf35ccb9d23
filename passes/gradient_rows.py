"""gradient_rows: what the kernels of gradients leave of each query row: norm, delta and the gradient of q."""

from __future__ import annotations

import sympy

from ..ir.expr import exp2, real
from ..ir.graph import Op
from ..ir.kernel import Compute, Reduce, Stmt, Tensor
from .folds import Carried, Fold, L, P, Part
from .gradient_folds import D_AXIS, DELTA, C, OverQueries


class RowNorm(OverQueries):
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


class GradDelta(OverQueries):
    """delta of every row, where the gradient of q is not wanted, or probabilities must be walked over."""

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.walks = self.walks_for(self.op)

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


class GradRows(OverQueries):
    """The gradient of q; beside it delta, where that is a sum over features, and what `RowNorm` gives.

    The gradient is linear in probabilities then, so their sum, known at the end, mends it there."""

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

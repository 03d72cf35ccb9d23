"""gradient_columns: the gradients of keys and values, whose kernels have keys for rows."""

from __future__ import annotations

import sympy

from ..ir.expr import real, where
from ..ir.kernel import Compute, Load, Stmt, Tensor
from .folds import E_AXIS, LN2, Carried, S
from .gradient_folds import D_AXIS, Gradient
from .operands import Transposed


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

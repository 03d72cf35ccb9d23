"""gradient_columns: the gradients of keys and values, whose kernels have keys for rows."""

from __future__ import annotations

from dataclasses import replace

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
        columns = [name for name in self.given if name != "sinks"]
        return [*map(self._read, columns), *super().reads()]

    def _read(self, name: str) -> Tensor:
        """A number a query is read by tile, as queries are: their rows start where those do."""
        if name == "do":
            return self.at.per_column(name, self.spec.dtype, self.spec.v_size)
        return replace(self.at.per_column(name, self.spec.lse_dtype), align=self.spec.align)

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

    def _column(self, tile: str, tensor: str) -> Load:
        return Load(tile, self.acc, ("j",), tensor, self.at.column, self.over.valid_col)

    def step(self) -> list[Stmt]:
        """The products that add up come last: waiting for a load while one runs has ptxas run all in turn."""
        weights: list[Stmt] = []
        if self.prob is not None:
            weights = [Compute("W", self.acc, ("i", "j"), where(self.lowest > S, 0, self.prob))]
        narrow_p, p = self._narrowed("W" if weights else "P")
        narrow_g, g = self._narrowed("G")
        sums = [self._product("dV", ("i", "e"), p, "dO", "j", adds=True)]
        made: list[Stmt] = [
            *self._norms(("j",), self._column("N", "lse"), self._column("C", "norm")),
            *self._probabilities(),
            *weights,
            *narrow_p,
        ]
        if "delta" in self.given:
            made += [
                *self._prob_gradients(),
                self._column("D", "delta"),
                *self._score_gradients(),
                *self._product_gradients(),
                *narrow_g,
            ]
            sums.append(self._product("dK", ("i", "d"), g, self.at.cols.tile, "j", adds=True))
        return [*made, *sums]

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

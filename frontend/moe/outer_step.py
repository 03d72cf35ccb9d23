"""Sums over each group's rows of outer products, as a step of `frontend/moe/operator.py`."""

from __future__ import annotations

from torch import Tensor

from .operator import Arguments, Made
from .product_step import outer, product


class Outer:
    """a [rows, M], b [rows, N], bounds [G + 1] -> o [G, M, N]: the sum of each group's rows."""

    def made(self, call: Arguments) -> list[Made]:
        a, b, bounds = (call.tensors[name] for name in ("a", "b", "bounds"))
        return [Made("o", (bounds.shape[0] - 1, a.shape[1], b.shape[1]), a.dtype)]

    def evaluate(self, call: Arguments) -> list[Tensor]:
        return [outer(*(call.tensors[name] for name in ("a", "b", "bounds")))]

    def differentiate(
        self, call: Arguments, results: dict[str, Tensor], slopes: dict[str, Tensor], wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        a, b, bounds = (call.tensors[name] for name in ("a", "b", "bounds"))
        do, found = slopes["o"], {}
        if "a" in wanted:
            found["a"] = product(b, do.transpose(1, 2), bounds, None)
        if "b" in wanted:
            found["b"] = product(a, do, bounds, None)
        return found


STEP = Outer()

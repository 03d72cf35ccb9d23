"""Rows by the matrices of their groups as a step of `frontend/moe/operator.py`, and the kernels it takes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from .layer import load_of, unit_of
from .layer_kernels import are_rows_aligned, product_executable
from .operator import Arguments, Made


class Product:
    """a [rows, K], b [G, K, N], bounds [G + 1] (, bias [G, N]) -> o [rows, N]; zeros behind the groups."""

    def made(self, call: Arguments) -> list[Made]:
        a, b = call.tensors["a"], call.tensors["b"]
        return [Made("o", (a.shape[0], b.shape[2]), a.dtype)]

    def evaluate(self, call: Arguments) -> list[Tensor]:
        given = call.tensors
        return [product(given["a"], given["b"], given["bounds"], given.get("bias"))]

    def differentiate(
        self, call: Arguments, results: dict[str, Tensor], slopes: dict[str, Tensor], wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        a, b, bounds = (call.tensors[name] for name in ("a", "b", "bounds"))
        do, found = slopes["o"], {}
        if "a" in wanted:
            found["a"] = product(do, b.transpose(1, 2), bounds, None)
        if "b" in wanted:
            found["b"] = outer(a, do, bounds)
        if "bias" in wanted:
            found["bias"] = outer(do.new_ones((do.shape[0], 1)), do, bounds)[:, 0]
        return found


def product(a: Any, b: Any, bounds: Any, bias: Any) -> Tensor:
    """(rows, N): each group's rows by its matrix; zeros behind the last group."""
    rows, out = a.shape[0], a.new_zeros((a.shape[0], b.shape[2]))
    if not rows or not b.shape[2]:
        return out
    if not a.shape[1]:  # sums of nothing, which a bias may follow
        a, b = a.new_zeros((rows, 1)), b.new_zeros((b.shape[0], 1, b.shape[2]))
    unit = unit_of(b)
    values = {"a": _plain(a), "w": b.detach(), "bounds": bounds, "o": out}
    if bias is not None:
        values["bias"] = _plain(bias)
    turned = b if unit == 2 else b.transpose(1, 2)
    aligned = unit is not None and all(map(are_rows_aligned, (values["a"], turned, out)))
    load = load_of(rows / b.shape[0], a.device)
    _run(values, tuple(b.shape), unit, load, biased=bias is not None, outer=False, aligned=aligned)
    return out


def outer(a: Any, b: Any, bounds: Any) -> Tensor:
    """(G, M, N): the sums over each group's rows of those of a (rows, M) times those of b (rows, N)."""
    groups = bounds.shape[0] - 1
    out = a.new_zeros((groups, a.shape[1], b.shape[1]))
    values = {"a": _plain(a), "b": _plain(b), "bounds": bounds, "o": out}
    aligned = all(map(are_rows_aligned, (values["a"], values["b"])))
    if a.shape[0] and out.numel():
        _run(values, tuple(out.shape), 2, "many", biased=False, outer=True, aligned=aligned)
    return out


def _plain(matrix: Any) -> Any:
    matrix = matrix.detach()
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _run(values: dict[str, Any], sizes: tuple[int, ...], unit: int | None, load: str, **facts: bool) -> None:
    from ..prepare import allocate

    groups, rows, columns = sizes
    executable = product_executable(values["a"], (groups, rows, columns), unit, load, **facts)
    executable(values, allocate=partial(allocate, device=values["a"].device))


STEP = Product()

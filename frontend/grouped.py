"""Products by groups alone, in the conventions of others: torch's `grouped_mm`, JAX's `ragged_dot`."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..ir.errors import InputError, MissingDependencyError
from .layer import MOST_EXPERTS, load_of
from .layer_kernels import are_rows_aligned, product_executable
from .layers import check_like, check_tensor

try:
    import torch
    from torch.autograd.function import once_differentiable
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.grouped_mm") from None


def grouped_mm(
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    *,
    offs: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Products of groups of rows with a matrix each, as `torch.nn.functional.grouped_mm` computes them.

    Args:
        mat_a: (rows, K), float16, bfloat16, float32 or float64; or (M, rows) where mat_b is (rows, N).
        mat_b: (G, K, N), any strides; a transposed view of (G, N, K) is as fast.
        offs: (G,) int32 or int64: where each group ends, never decreasing.
        bias: (G, N), added to the rows of each group.

    Returns (rows, N); rows behind offs[-1] are zeros. Of two matrices (G, M, N), the product of each group's
    columns and rows: the gradient of mat_b. Sums run in float32 (float64 for float64), in a fixed order.
    Gradients flow to all but offs. Nothing waits for the device. Raises InputError."""
    where = "grouped_mm"
    check_tensor(f"{where}.mat_a", mat_a, 2, "(rows, K)")
    if not isinstance(mat_b, torch.Tensor) or mat_b.dim() not in (2, 3):
        got = tuple(mat_b.shape) if isinstance(mat_b, torch.Tensor) else type(mat_b).__name__
        raise InputError(f"{where}.mat_b", "(groups, K, N), or (rows, N)", got)
    check_tensor(f"{where}.mat_b", mat_b, mat_b.dim(), "(groups, K, N)")
    check_like(f"{where}.mat_b", mat_b, mat_a)
    check_tensor(f"{where}.offs", offs, 1, "(groups,)")
    if offs.dtype not in (torch.int32, torch.int64) or offs.device != mat_a.device:
        raise InputError(
            f"{where}.offs", f"int32 or int64 on {mat_a.device}", f"{offs.dtype} on {offs.device}"
        )
    inner, across = (mat_a.shape[1], mat_b.shape[1]) if mat_b.dim() == 3 else (mat_a.shape[1], mat_b.shape[0])
    if inner != across:
        raise InputError(f"{where}.mat_b", f"{inner} in the summed dimension, as mat_a has", across)
    groups = offs.shape[0]
    if not 1 <= groups <= MOST_EXPERTS or (mat_b.dim() == 3 and mat_b.shape[0] != groups):
        expected = (
            f"1 to {MOST_EXPERTS} groups" if mat_b.dim() == 2 else f"{mat_b.shape[0]} groups, as mat_b has"
        )
        raise InputError(f"{where}.offs", expected, groups)
    if bias is not None:
        check_tensor(f"{where}.bias", bias, 2, "(groups, N)")
        check_like(f"{where}.bias", bias, mat_a)
        if mat_b.dim() == 2 or tuple(bias.shape) != (groups, mat_b.shape[-1]):
            raise InputError(f"{where}.bias", f"shape ({groups}, {mat_b.shape[-1]})", tuple(bias.shape))
    bounds = torch.cat((offs.new_zeros(1), offs)).to(torch.int32)
    if mat_b.dim() == 2:
        return _Outer.apply(mat_a.T, mat_b, bounds)
    return _Product.apply(mat_a, mat_b, bias, bounds)


def ragged_dot(lhs: torch.Tensor, rhs: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Products of groups of rows with a matrix each, as `jax.lax.ragged_dot` computes them.

    lhs (m, k), rhs (g, k, n), group_sizes (g,) integers -> (m, n); rows behind the last group are zeros.
    Otherwise as `grouped_mm`."""
    check_tensor("ragged_dot.group_sizes", group_sizes, 1, "(groups,)")
    return grouped_mm(lhs, rhs, offs=group_sizes.cumsum(0).to(torch.int32))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Any, b: Any, bias: Any, bounds: Any) -> torch.Tensor:
        ctx.save_for_backward(a, b, bounds)
        return product(a, b, bounds, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[Any, ...]:
        a, b, bounds = ctx.saved_tensors
        wants_a, wants_b, wants_bias, _ = ctx.needs_input_grad
        ones = do.new_ones((do.shape[0], 1))
        return (
            product(do, b.transpose(1, 2), bounds, None) if wants_a else None,
            outer(a, do, bounds) if wants_b else None,
            outer(ones, do, bounds)[:, 0] if wants_bias else None,
            None,
        )


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Any, b: Any, bounds: Any) -> torch.Tensor:
        ctx.save_for_backward(a, b, bounds)
        return outer(a, b, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[Any, ...]:
        a, b, bounds = ctx.saved_tensors
        wants_a, wants_b, _ = ctx.needs_input_grad
        return (
            product(b, do.transpose(1, 2), bounds, None) if wants_a else None,
            product(a, do, bounds, None) if wants_b else None,
            None,
        )


def product(a: Any, b: Any, bounds: Any, bias: Any) -> torch.Tensor:
    """(rows, N): each group's rows by its matrix; zeros behind the last group."""
    rows, out = a.shape[0], a.new_zeros((a.shape[0], b.shape[2]))
    unit = next((d for d in (2, 1) if b.stride(d) == 1 or b.shape[d] == 1), None)
    values = {"a": _plain(a), "w": b.detach(), "bounds": bounds, "o": out}
    if bias is not None:
        values["bias"] = _plain(bias)
    turned = b if unit == 2 else b.transpose(1, 2)
    aligned = unit is not None and all(map(are_rows_aligned, (values["a"], turned, out)))
    if rows and a.shape[1]:
        load = load_of(rows / b.shape[0], a.device)
        _run(values, tuple(b.shape), unit, load, biased=bias is not None, outer=False, aligned=aligned)
    return out


def outer(a: Any, b: Any, bounds: Any) -> torch.Tensor:
    """(G, M, N): the sums over each group's rows of those of a (rows, M) times those of b (rows, N)."""
    groups = bounds.shape[0] - 1
    out = a.new_zeros((groups, a.shape[1], b.shape[1]))
    values = {"a": _plain(a), "b": _plain(b), "bounds": bounds, "o": out}
    aligned = all(map(are_rows_aligned, (values["a"], values["b"])))
    if a.shape[0]:
        sizes = (groups, a.shape[1], b.shape[1])
        _run(values, sizes, 2, "many", biased=False, outer=True, aligned=aligned)
    return out


def _plain(matrix: Any) -> Any:
    matrix = matrix.detach()
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _run(
    values: dict[str, Any], sizes: tuple[int, int, int], unit: int | None, load: str, **facts: bool
) -> None:
    from .prepare import allocate

    executable = product_executable(values["a"], sizes, unit, load, **facts)
    executable(values, allocate=partial(allocate, device=values["a"].device))

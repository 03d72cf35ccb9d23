"""Products by groups alone, in the conventions of others: torch's `grouped_mm`, JAX's `ragged_dot`."""

from __future__ import annotations

from typing import Any

from ...ir.errors import InputError, MissingDependencyError, UnsupportedError
from .form import MoeForm
from .layer import MOST_EXPERTS
from .layers import FLOATS, check_like, check_tensor
from .operator import call, learns

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.grouped_mm") from None

INTEGERS = (torch.int32, torch.int64)


def grouped_mm(
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    *,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Products of groups of rows with a matrix each, as `torch.nn.functional.grouped_mm` computes them.

    | mat_a | mat_b | result | groups |
    |---|---|---|---|
    | (rows, K) | (G, K, N) | (rows, N) | of rows; those behind offs[-1] are zeros |
    | (M, rows) | (rows, N) | (G, M, N) | of the summed dimension: the gradient of mat_b above |
    | (G, M, K) | (K, rows) | (M, rows) | of columns; those behind offs[-1] are zeros |
    | (G, M, K) | (G, K, N) | (G, M, N) | no offs |

    Args:
        mat_a, mat_b: float16, bfloat16, float32 or float64. A transposed view (G, N, K) is as fast.
        offs: (G,) int32 or int64: where each group ends, never decreasing; what lies outside of the rows is
            taken for their first or their last.
        bias: (G, N), added to the rows of each group, where mat_b is (G, K, N).
        out_dtype: None, or that of mat_a.

    Sums run in float32 (float64 for float64), in a fixed order. Gradients flow to all but offs. Nothing waits
    for the device; torch.compile, torch.export and torch.func see one operator. Raises InputError,
    UnsupportedError."""
    where = "grouped_mm"
    for name, matrix, meaning in (("mat_a", mat_a, "(rows, K)"), ("mat_b", mat_b, "(groups, K, N)")):
        if not isinstance(matrix, torch.Tensor) or matrix.dim() not in (2, 3):
            got = tuple(matrix.shape) if isinstance(matrix, torch.Tensor) else type(matrix).__name__
            raise InputError(f"{where}.{name}", f"{meaning}, or 2 or 3 dimensions as torch has them", got)
        check_tensor(f"{where}.{name}", matrix, matrix.dim(), meaning)
    if mat_a.dtype not in FLOATS:
        raise InputError(f"{where}.mat_a", "float16, bfloat16, float32 or float64", mat_a.dtype)
    check_like(f"{where}.mat_b", mat_b, mat_a, "mat_a")
    if out_dtype not in (None, mat_a.dtype):
        raise UnsupportedError(f"{where}.out_dtype={out_dtype}: results have mat_a's dtype. Cast them")
    stacks = mat_a.dim() == 3, mat_b.dim() == 3
    inner, across = mat_a.shape[-1], mat_b.shape[-2]
    if inner != across:
        raise InputError(f"{where}.mat_b", f"{inner} in the summed dimension, as mat_a has", across)
    if all(stacks):
        bounds = _even(mat_a, mat_b, offs)
    else:
        rows = mat_b.shape[1] if stacks[0] else mat_a.shape[0] if stacks[1] else inner
        bounds = _bounds(offs, mat_a, mat_b, rows)
    if bias is not None:
        check_tensor(f"{where}.bias", bias, 2, "(groups, N)")
        check_like(f"{where}.bias", bias, mat_a, "mat_a")
        if not stacks[1]:
            raise InputError(f"{where}.bias", "none where mat_b has no groups", tuple(bias.shape))
        if bias.shape != (mat_b.shape[0], mat_b.shape[2]):
            expected = f"shape ({mat_b.shape[0]}, {mat_b.shape[2]})"
            raise InputError(f"{where}.bias", expected, tuple(bias.shape))
    match stacks:
        case (False, True):
            return _step("product", mat_a, mat_b, bounds, bias)
        case (True, True):
            return _step("product", mat_a.flatten(0, 1), mat_b, bounds, bias).unflatten(0, mat_a.shape[:2])
        case (True, False):
            return _step("product", mat_b.T, mat_a.transpose(1, 2), bounds, None).T
        case _:
            return _step("outer", mat_a.T, mat_b, bounds, None)


def ragged_dot(lhs: torch.Tensor, rhs: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Products of groups of rows with a matrix each, as `jax.lax.ragged_dot` computes them.

    lhs (m, k), rhs (g, k, n), group_sizes (g,) int32 or int64 -> (m, n); rows behind the last group are
    zeros. Otherwise as `grouped_mm`."""
    where = "ragged_dot.group_sizes"
    check_tensor(where, group_sizes, 1, "(groups,)")
    if group_sizes.dtype not in INTEGERS:
        raise InputError(where, "int32 or int64", group_sizes.dtype)
    for name, matrix, rank, meaning in (("lhs", lhs, 2, "(m, k)"), ("rhs", rhs, 3, "(groups, k, n)")):
        check_tensor(f"ragged_dot.{name}", matrix, rank, meaning)
    return grouped_mm(lhs, rhs, offs=group_sizes.cumsum(0))


def _bounds(offs: Any, mat_a: Any, mat_b: Any, rows: int) -> torch.Tensor:
    """Where groups begin and end (G + 1,), within so many rows. Raises InputError."""
    where = "grouped_mm.offs"
    check_tensor(where, offs, 1, "(groups,)")
    if offs.dtype not in INTEGERS or offs.device != mat_a.device:
        raise InputError(where, f"int32 or int64 on {mat_a.device}", f"{offs.dtype} on {offs.device}")
    stack = next((name for name, m in (("mat_a", mat_a), ("mat_b", mat_b)) if m.dim() == 3), None)
    groups, wanted = offs.shape[0], {"mat_a": mat_a, "mat_b": mat_b, None: offs}[stack].shape[0]
    if groups != wanted:
        raise InputError(where, f"{wanted} groups, as {stack} has", groups)
    _check_number(where, groups)
    return torch.nn.functional.pad(offs, (1, 0)).clamp(0, rows).to(torch.int32)


def _even(mat_a: Any, mat_b: Any, offs: Any) -> torch.Tensor:
    if offs is not None:
        raise InputError("grouped_mm.offs", "None beside two stacks of matrices", tuple(offs.shape))
    groups, rows = mat_a.shape[:2]
    if mat_b.shape[0] != groups:
        raise InputError("grouped_mm.mat_b", f"{groups} groups, as mat_a has", mat_b.shape[0])
    _check_number("grouped_mm.mat_a", groups)
    return torch.arange(groups + 1, device=mat_a.device, dtype=torch.int32) * rows


def _check_number(where: str, groups: int) -> None:
    if not 1 <= groups <= MOST_EXPERTS:
        raise InputError(where, f"1 to {MOST_EXPERTS} groups", groups)


def _step(kind: str, a: Any, b: Any, bounds: Any, bias: Any) -> torch.Tensor:
    tensors = {"a": a, "b": b, "bounds": bounds} | ({} if bias is None else {"bias": bias})
    given = [*tensors.values()]
    return call(MoeForm(kind, tuple(tensors), learns=learns(given)), given)[0]

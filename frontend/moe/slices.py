"""`gossamer.slice_experts`: the inner features of a dense feed-forward network as experts."""

from __future__ import annotations

import torch

from ...ir.errors import InputError
from ..problem import as_integer
from .layers import check_like, check_tensor


def slice_experts(
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    num_experts: int,
    *,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts that are slices of a dense network's inner features (Dense2MoE, Zheng et al., 2025).

    Args:
        gate_up_proj, down_proj: (2 I, H), gate first, then up, and (H, I); without a gate (I, H).
        num_experts: E, which divides I.
        order: (I,) int32 or int64: inner features in the order in which they are dealt out, such as the most
            important ones first, so that the first slice can be a shared expert. By default as they are.

    Returns the matrices of `experts`, (E, 2 I / E, H) or (E, I / E, H), and (E, H, I / E): new tensors,
    through which gradients flow. A token that takes every expert with weight 1 gets what the dense network
    gives.

    Raises InputError."""
    where = "slice_experts"
    check_tensor(f"{where}.gate_up_proj", gate_up_proj, 2, "(2 I, H) or (I, H)")
    check_tensor(f"{where}.down_proj", down_proj, 2, "(H, I)")
    check_like(f"{where}.down_proj", down_proj, gate_up_proj, "gate_up_proj")
    (columns, hidden), inner = gate_up_proj.shape, down_proj.shape[1]
    if down_proj.shape[0] != hidden or columns not in (inner, 2 * inner):
        got = f"{tuple(gate_up_proj.shape)} and {tuple(down_proj.shape)}"
        raise InputError(f"{where}.gate_up_proj, down_proj", "(2 I, H) or (I, H), and (H, I)", got)
    count = as_integer(num_experts)
    if count is None or count < 1 or inner % count:
        raise InputError(f"{where}.num_experts", f"a divisor of {inner} inner features", num_experts)
    halves = gate_up_proj.unflatten(0, (-1, inner))
    if order is not None:
        check_tensor(f"{where}.order", order, 1, "(I,)")
        if order.dtype not in (torch.int32, torch.int64) or order.shape[0] != inner:
            expected = f"int32 or int64 of shape ({inner},)"
            raise InputError(f"{where}.order", expected, f"{order.dtype} of shape {tuple(order.shape)}")
        halves, down_proj = halves.index_select(1, order), down_proj.index_select(1, order)
    up = halves.unflatten(1, (count, -1)).transpose(0, 1).flatten(1, 2)
    return up.contiguous(), down_proj.unflatten(1, (count, -1)).transpose(0, 1).contiguous()

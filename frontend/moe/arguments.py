"""What `gossamer.experts` is given beside a layer, checked: adapters, routings by token, shared experts."""

from __future__ import annotations

from typing import Any

import torch

from ...ir.errors import InputError, UnsupportedError
from .layers import check_like, check_routing
from .quantized import QuantizedWeight
from .routing import Routing


def pair_of(name: str, lora: Any) -> list[Any]:
    """The two matrices of an adapter, None for none. Raises InputError."""
    if lora is None:
        return [None, None]
    if not isinstance(lora, (tuple, list)) or len(lora) != 2:
        got = f"{len(lora)} of them" if isinstance(lora, (tuple, list)) else type(lora).__name__
        raise InputError(f"experts.{name}", "two tensors, a (E, r, in) and b (E, out, r)", got)
    return [*lora]


def by_token(ids: Any, weights: Any, x: Any, experts: int, *, validate: bool) -> tuple[Any, Any]:
    """ids and weights [T, k] for so many experts. Raises InputError, UnsupportedError."""
    if isinstance(ids, Routing):
        if ids.topk_ids is None or ids.is_list:
            raise UnsupportedError(
                "experts.topk_ids: a Routing by rows beside zero, copy or constant experts is not built yet. "
                "Pass one by token, or ids and weights"
            )
        ids.check(x.shape[0], experts, x.device, validate=False)
        ids, weights = ids.topk_ids, ids.topk_weights
    names = ("experts.topk_ids", "experts.topk_weights")
    check_routing(names, ids, weights, x.shape[0], experts, validate=validate)
    return ids, weights


def shared_by_token(
    x: Any, gate_up: Any, down: Any, weights: Any, *, gated: bool
) -> tuple[dict[str, Any], Any, Any] | None:
    """Shared experts as a layer of one that all tokens take: its tensors by name, ids and weights (T, 1).

    None where there are none. gated: whether experts have a gate. Raises InputError."""
    given = {"shared_gate_up_proj": gate_up, "shared_down_proj": down}
    if gate_up is None and down is None:
        if weights is not None:
            raise InputError("experts.shared_weights", "shared_gate_up_proj and shared_down_proj too", None)
        return None
    for name, matrix in given.items():
        rank = 3 if isinstance(matrix, QuantizedWeight) else 2
        if not isinstance(matrix, (torch.Tensor, QuantizedWeight)) or len(matrix.shape) != rank:
            shape = getattr(matrix, "shape", None)
            got = type(matrix).__name__ if shape is None else tuple(shape)
            raise InputError(f"experts.{name}", "two matrices, (2 S, H) and (H, S)", got)
        if rank == 3 and matrix.shape[0] != 1:
            raise InputError(f"experts.{name}", "codes of one matrix, (1, out, in)", tuple(matrix.shape))
        if isinstance(matrix, torch.Tensor):
            check_like(f"experts.{name}", matrix, x)
    up, two = (given[name].shape[-2:] for name in given)
    factor = 2 if gated else 1
    plain = up[1] == two[0] == x.shape[1] and up[0] == factor * two[1]
    if not plain and not (up[0] == two[1] == x.shape[1] and up[1] == factor * two[0]):
        expected = f"({'2 S' if gated else 'S'}, H) and (H, S), or both transposed, with H = {x.shape[1]}"
        raise InputError(
            "experts.shared_gate_up_proj, shared_down_proj", expected, f"{tuple(up)} and {tuple(two)}"
        )
    stacks = (m if isinstance(m, QuantizedWeight) else m.unsqueeze(0) for m in given.values())
    tokens = x.shape[0]
    if weights is None:
        weights = torch.ones((tokens, 1), device=x.device)
    elif not isinstance(weights, torch.Tensor) or tuple(weights.shape) not in ((tokens,), (tokens, 1)):
        got = tuple(weights.shape) if isinstance(weights, torch.Tensor) else type(weights).__name__
        raise InputError("experts.shared_weights", f"a weight for each of {tokens} tokens", got)
    ids = torch.zeros((tokens, 1), dtype=torch.int32, device=x.device)
    return dict(zip(("x", "gate_up", "down"), (x, *stacks), strict=True)), ids, weights.reshape(tokens, 1)

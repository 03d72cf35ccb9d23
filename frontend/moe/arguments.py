"""What `gossamer.experts` is given beside a layer, checked: adapters, routings by token, shared experts."""

from __future__ import annotations

from typing import Any

import torch

from ...ir.errors import InputError
from .layers import LORA, check_like, check_routing
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


def beside_light(
    ids: Any, weights: Any, x: Any, first: int, light: int, *, validate: bool
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """What the experts with matrices are given, and ids and weights [T, k] of `light` experts that multiply
    nothing, whose ids begin at `first`. Raises InputError."""
    if isinstance(ids, Routing):
        ids.check(x.shape[0], first + light, x.device, validate=validate)
        if ids.topk_ids is None or ids.is_list:
            return _rows_beside(ids, first, light)
        ids, weights = ids.topk_ids, ids.topk_weights
    names = ("experts.topk_ids", "experts.topk_weights")
    check_routing(names, ids, weights, x.shape[0], first + light, validate=validate)
    return (ids, weights), (ids, weights)


def _rows_beside(routing: Routing, first: int, light: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The rows of experts with matrices, and of the others a weight for each token and expert, the sum of
    what the token's rows weigh, in float32 or float64."""
    tokens, weights, counts = routing.token_ids, routing.weights, routing.counts
    many, bounds = routing.num_tokens, counts.clamp(min=0).cumsum(0)
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    number = torch.searchsorted(bounds, rows, right=True) - first  # counts say whose a row is
    inside = (number >= 0) & (number < light) & (tokens >= 0) & (tokens < many)
    place = torch.where(inside, tokens * light + number, many * light)
    wide = weights.to(torch.float64 if weights.dtype == torch.float64 else torch.float32)
    sums = wide.new_zeros(many * light + 1)
    sums = sums.index_put((place,), torch.where(inside, wide, 0), accumulate=True)[:-1]
    ids = torch.arange(first, first + light, device=tokens.device).expand(many, light).contiguous()
    heavy = Routing(tokens, routing.expert_ids, weights, counts[:first], many)
    return (heavy, None), (ids, sums.view(many, light))


def refuse_alone(weights: Any, more: dict[str, Any]) -> None:
    """Raise InputError for what belongs to shared experts, where there are none."""
    for name, tensor in {"weights": weights, **more}.items():
        if tensor is not None and name != "adapter_ids":
            where = f"experts.shared_{name[:-2] + '_lora' if name[-2:] in ('_a', '_b') else name}"
            raise InputError(where, "shared_gate_up_proj and shared_down_proj too", None)


def shared_by_token(
    x: Any, gate_up: Any, down: Any, weights: Any, more: dict[str, Any], *, gated: bool, flipped: bool
) -> tuple[dict[str, Any], Any, Any]:
    """Shared experts as a layer of one that all tokens take: its tensors by name, ids and weights (T, 1).

    more: biases and adapters, by the kernels' names. gated, flipped: whether the experts beside them have a
    gate, and are laid out as (H, 2 I) and (I, H). Raises InputError."""
    given = {"shared_gate_up_proj": gate_up, "shared_down_proj": down}
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
    hidden = x.shape[1]
    (out, fed), (back, held) = (up[::-1], two[::-1]) if flipped else (up, two)
    if fed != hidden or back != hidden or out != (2 if gated else 1) * held:
        wide = "2 S" if gated else "S"
        shapes = f"(H, {wide}) and (S, H)" if flipped else f"({wide}, H) and (H, S)"
        raise InputError(
            "experts.shared_gate_up_proj, shared_down_proj",
            f"{shapes} with H = {hidden}, as the experts are laid out",
            f"{tuple(up)} and {tuple(two)}",
        )
    stacks = (m if isinstance(m, QuantizedWeight) else m.unsqueeze(0) for m in given.values())
    tokens = x.shape[0]
    if weights is None:
        weights = torch.ones((tokens, 1), device=x.device)
    elif not isinstance(weights, torch.Tensor) or tuple(weights.shape) not in ((tokens,), (tokens, 1)):
        got = tuple(weights.shape) if isinstance(weights, torch.Tensor) else type(weights).__name__
        raise InputError("experts.shared_weights", f"a weight for each of {tokens} tokens", got)
    ids = torch.zeros((tokens, 1), dtype=torch.int32, device=x.device)
    named = dict(zip(("x", "gate_up", "down"), (x, *stacks), strict=True)) | _of_one(more)
    return named, ids, weights.reshape(tokens, 1)


def _of_one(more: dict[str, Any]) -> dict[str, Any]:
    """Biases and adapters of one network as those of one expert. Raises InputError."""
    stacked, found = more.get("adapter_ids") is not None, {}
    if (more["gate_up_bias"] is None) != (more["down_bias"] is None):
        missing = "gate_up_bias" if more["gate_up_bias"] is None else "down_bias"
        raise InputError(
            f"experts.shared_{missing}", "both biases or neither", None, "Pass zeros for the other"
        )
    for name, tensor in more.items():
        if tensor is None or (name == "adapter_ids" and not any(more[n] is not None for n in LORA)):
            continue
        if name == "adapter_ids":
            found[name] = tensor
            continue
        rank = 1 if name.endswith("bias") else 2 + stacked
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != rank:
            got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            where = f"experts.shared_{name}" if rank == 1 else f"experts.shared_{name[:-2]}_lora"
            shapes = "(2 S,) and (H,)" if rank == 1 else f"{'(A, ..) of ' * stacked}(r, in) and (out, r)"
            raise InputError(where, f"tensors {shapes}", got)
        found[name] = tensor.unsqueeze(-3 if rank > 1 else 0)
    return found

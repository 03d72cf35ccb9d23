"""Gradients of `gossamer.experts`: the kernels of `passes/moe_gradient.py` behind a torch function.

The forward keeps its inputs, the sorted rows and, unless told to recompute it, the first product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .layer import Layer
from .moe import forward, launch
from .routing import grouped

NAMES = ("x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")


def differentiable(x: Any, given: dict[str, Any], layer: Layer, term: Any, recompute: bool) -> torch.Tensor:
    """`moe.compute`, with gradients."""
    rest = {name: tensor for name, tensor in given.items() if name != "weights"}
    biases = (layer.gate_up_bias, layer.down_bias)
    return _Experts.apply(
        x, given["weights"], layer.gate_up, layer.down, *biases, rest, layer, term, recompute
    )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Any, weights: Any, up: Any, down: Any, up_bias: Any, down_bias: Any, rest: Any,
        layer: Layer, term: Any, recompute: bool,
    ) -> torch.Tensor:  # fmt: skip
        ctx.layer, ctx.term, ctx.names = layer, term, tuple(rest)
        if not weights.numel():
            ctx.save_for_backward(x, weights)
            return torch.zeros_like(x)
        if "ids" in rest:
            ids = rest["ids"]
            tokens, bounds, place = grouped(ids, layer.experts)
            rest = {"tokens": tokens, "bounds": bounds, "place": place}
            ctx.names = tuple(rest)
        found = forward(x, {**rest, "weights": weights}, layer, term, keeps=not recompute)
        ctx.save_for_backward(x, weights, *rest.values(), *found[1:])
        return found[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[Any, ...]:
        x, weights, *kept = ctx.saved_tensors
        layer: Layer = ctx.layer
        wanted = tuple(n for n, asked in zip(NAMES, ctx.needs_input_grad, strict=False) if asked)
        if not weights.numel():
            inputs = {"x": x, "weights": weights, **layer.tensors}
            return (*(torch.zeros_like(inputs[n]) if n in wanted else None for n in NAMES), *[None] * 4)
        routing = dict(zip(ctx.names, kept, strict=False))
        found = gradients(x, do, weights, routing, kept[len(routing) :], layer, ctx.term, wanted)
        return (*(found.get(name) for name in NAMES), *[None] * 4)


def gradients(
    x: Any,
    do: Any,
    weights: Any,
    routing: dict[str, Any],
    kept: list[Any],
    layer: Layer,
    term: Any,
    wanted: tuple[str, ...],
) -> dict[str, Any]:
    """The gradients of the wanted inputs by name. routing: tokens, bounds and place (, starts)."""
    rows, hidden, device = routing["tokens"].shape[0], layer.hidden, x.device
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    ragged = "starts" in routing
    by_row = weights.to(wide)
    if not ragged:
        spread = torch.where(routing["place"] < 0, rows, routing["place"]).reshape(-1).long()
        by_row = by_row.new_zeros(rows + 1).index_put((spread,), by_row.reshape(-1))[:-1]
    do = do if do.stride(1) == 1 or hidden == 1 else do.contiguous()
    values = {name: tensor.reshape(-1) for name, tensor in routing.items()}
    values |= {"x": x.detach(), "do": do, "row_weights": by_row}
    values |= {"gate_up": layer.gate_up.detach(), "down": layer.down.detach()}
    if kept:
        values["g"] = kept[0]
    elif layer.gate_up_bias is not None:
        values["gate_up_bias"] = layer.gate_up_bias.detach()
    if "x" in wanted:
        values["ones"] = torch.ones(rows, dtype=wide, device=device)
    if "gate_up_bias" in wanted:
        values["ones_of_rows"] = torch.ones((rows, 1), dtype=wide, device=device)
    if "down_bias" in wanted:
        values["weights_of_rows"] = by_row.reshape(rows, 1)
    biased = layer.down_bias is not None
    if "weights" in wanted and biased:
        values["down_bias_matrix"] = layer.down_bias.detach().unsqueeze(1)
    experts = layer.experts
    shapes = {
        "x": tuple(x.shape),
        "gate_up": tuple(layer.gate_up.shape),
        "down": tuple(layer.down.shape),
        "gate_up_bias": (experts, 1, layer.columns),
        "down_bias": (experts, 1, hidden),
    }
    outputs = tuple((f"d{name}", shape, x.dtype) for name, shape in shapes.items() if name in wanted)
    if "weights" in wanted:
        outputs += (("dw", (rows,), wide), *([("dwb", (rows, 1), wide)] if biased else []))
    top_k = 0 if ragged else weights.shape[1]
    made = launch("gradients", values, outputs, layer, (top_k, term, True, bool(kept)), wanted)
    found = {name: tensor for (name, *_), tensor in zip(outputs, made, strict=True)}
    result = {name: found[f"d{name}"] for name in wanted if name != "weights"}
    for name in {"gate_up_bias", "down_bias"} & set(result):
        result[name] = result[name].squeeze(1)
    if "weights" in wanted:
        dw = found["dw"] + found["dwb"][:, 0] if biased else found["dw"]
        if ragged:
            inside = torch.arange(rows, device=device) < routing["bounds"][-1]
            dw = torch.where(inside, dw, 0)
        else:
            place = routing["place"]
            dw = torch.where(place < 0, 0, dw[place.clamp(min=0).long()])
        result["weights"] = dw.to(weights.dtype)
    return result

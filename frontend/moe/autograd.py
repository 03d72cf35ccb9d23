"""Gradients of `gossamer.experts`: the kernels of `passes/moe/gradient.py` behind a torch function.

The forward keeps its inputs, the sorted rows and, unless told to recompute it, the first product.
"""

from __future__ import annotations

from typing import Any

import torch

from ..operators.step_autograd import once_differentiable
from .experts import forward, launch
from .layer import Layer
from .layers import LORA
from .routing import grouped

NAMES = ("x", "weights", "gate_up", "down", "gate_up_bias", "down_bias", *LORA)


def differentiable(x: Any, given: dict[str, Any], layer: Layer, term: Any, recompute: bool) -> torch.Tensor:
    """`moe.compute`, with gradients."""
    rest = {name: tensor for name, tensor in given.items() if name != "weights"}
    biases, lora = (layer.gate_up_bias, layer.down_bias), (layer.lora.get(name) for name in LORA)
    matrices = (layer.gate_up, layer.down, *biases, *lora)
    return _Experts.apply(rest, layer, term, recompute, x, given["weights"], *matrices)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rest: Any, layer: Layer, term: Any, recompute: bool, x: Any, weights: Any, *matrices: Any
    ) -> torch.Tensor:
        ctx.layer, ctx.term, ctx.names = layer, term, tuple(rest)
        if not weights.numel() or not x.shape[0]:
            ctx.save_for_backward(x, weights)
            return torch.zeros_like(x)
        found, rest, kept = sorted_forward(x, weights, rest, layer, term, recompute)
        ctx.names = tuple(rest)
        ctx.save_for_backward(x, weights, *rest.values(), *kept)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[Any, ...]:
        x, weights, *kept = ctx.saved_tensors
        layer: Layer = ctx.layer
        wanted = tuple(n for n, asked in zip(NAMES, ctx.needs_input_grad[4:], strict=True) if asked)
        if not weights.numel() or not x.shape[0]:
            inputs = {"x": x, "weights": weights, **layer.tensors}
            return (*[None] * 4, *(torch.zeros_like(inputs[n]) if n in wanted else None for n in NAMES))
        routing = dict(zip(ctx.names, kept, strict=False))
        found = gradients(x, do, weights, routing, kept[len(routing) :], layer, ctx.term, wanted)
        return (*[None] * 4, *(found.get(name) for name in NAMES))


def sorted_forward(
    x: Any, weights: Any, rest: dict[str, Any], layer: Layer, term: Any, recompute: bool
) -> tuple[Any, dict[str, Any], tuple[Any, ...]]:
    """The result, its rows (tokens, bounds, place), and what was kept of the first product."""
    if "ids" in rest:
        tokens, bounds, place = grouped(rest["ids"], layer.experts)
        rest = {"tokens": tokens, "bounds": bounds, "place": place}
    found = forward(x, {**rest, "weights": weights}, layer, term, keeps=not recompute)
    return found[0], rest, found[1:]


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
    values = {name: tensor.reshape(-1).contiguous() for name, tensor in routing.items()}
    values |= {"x": x.detach(), "do": do, "row_weights": by_row}
    values |= {name: tensor.detach() for name, tensor in layer.matrices.items()}
    values |= {name: tensor.detach() for name, tensor in layer.lora.items()} | layer.choices
    if kept:
        values["g"] = kept[0]
    elif layer.gate_up_bias is not None:
        values["gate_up_bias"] = layer.gate_up_bias.detach()
    if "x" in wanted:
        values["ones"] = torch.ones(values["place"].shape, dtype=wide, device=device)
    if "gate_up_bias" in wanted:
        values["ones_of_rows"] = torch.ones((rows, 1), dtype=wide, device=device)
    if "down_bias" in wanted:
        values["weights_of_rows"] = by_row.reshape(rows, 1)
    if layer.trains is not None:
        values["trains"] = layer.trains.to(torch.int32)
    biased = layer.down_bias is not None
    if "weights" in wanted and biased:
        values["down_bias_matrix"] = layer.down_bias.detach().unsqueeze(1)
    experts = layer.experts
    shapes = {
        "x": tuple(x.shape),
        "gate_up": tuple(layer.gate_up.shape),
        "down": tuple(layer.down.shape),
        "gate_up_bias": (experts, 1, layer.inner * (2 if layer.gated else 1)),
        "down_bias": (experts, 1, hidden),
        **{name: tuple(tensor.shape) for name, tensor in layer.lora.items()},
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

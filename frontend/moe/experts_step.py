"""Layers of experts as a step of `frontend/moe/operator.py`: what tracers see of `gossamer.experts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activation import activation_term
from .layer import Layer
from .layers import check_adapter_ids, check_routing, layer_by_name
from .operator import Arguments, Made
from .quantized import QuantizedWeight

ROUTING = ("ids", "tokens", "bounds", "place", "starts")
NAMES = ("experts.topk_ids", "experts.topk_weights")


class Experts:
    """o [T, H]; where a gradient may be asked for, also the rows of ids, sorted, and what the activation was
    taken of, g [rows, C], unless it is to be computed again."""

    def made(self, call: Arguments) -> list[Made]:
        given, x, layer = call.tensors, call.tensors["x"], layer_from(call)
        if "ids" in given:
            check_routing(NAMES, given["ids"], given["weights"], x.shape[0], layer.experts, validate=False)
        found = [Made("o", tuple(x.shape), x.dtype)]
        if not call.form.learns:
            return found
        rows = given["tokens"].shape[0] if "tokens" in given else given["weights"].numel()
        if "ids" in given:
            found += [
                Made("tokens", (rows,), torch.int32),
                Made("bounds", (layer.experts + 1,), torch.int32),
                Made("place", tuple(given["ids"].shape), torch.int32),
            ]
        if not call.facts["recompute"]:
            found.append(Made("g", (rows, layer.inner * (2 if layer.gated else 1)), x.dtype))
        return found

    def evaluate(self, call: Arguments) -> list[Tensor]:
        from .autograd import sorted_forward
        from .experts import forward

        given, layer, facts = call.tensors, layer_from(call), call.facts
        x, term = _rows(given["x"]), term_of(call, layer)
        routing = {name: given[name] for name in ROUTING if name in given}
        if facts["validate"]:
            check_adapter_ids(layer)
        if facts["validate"] is True and "ids" in given:
            check_routing(NAMES, given["ids"], given["weights"], x.shape[0], layer.experts, validate=True)
        if not given["weights"].numel() or not x.shape[0]:
            return [x.new_zeros(one.shape, dtype=one.dtype) for one in self.made(call)]
        if not call.form.learns:
            return list(forward(x, routing | {"weights": given["weights"]}, layer, term))
        found, rows, kept = sorted_forward(x, given["weights"], routing, layer, term, facts["recompute"])
        return [found, *(rows.values() if "ids" in given else ()), *kept]

    def differentiate(
        self, call: Arguments, results: dict[str, Tensor], slopes: dict[str, Tensor], wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        from .autograd import gradients

        given, layer = call.tensors, layer_from(call)
        if not given["weights"].numel() or not given["x"].shape[0]:
            return {name: torch.zeros_like(given[name]) for name in wanted}
        routing = {name: given[name] for name in ROUTING[1:] if name in given}
        routing |= {name: results[name] for name in ROUTING[1:] if name in results}
        kept = [results["g"]] if "g" in results else []
        settings = (routing, kept, layer, term_of(call, layer), wanted)
        return gradients(_rows(given["x"]), slopes["o"], given["weights"], *settings)


def layer_from(call: Arguments) -> Layer:
    """The layer of a call, checked."""
    given: dict[str, Any] = dict(call.tensors)
    facts = call.facts
    for name, key in zip(("gate_up", "down"), facts["quantized"], strict=True):
        if key is not None:
            given[name] = QuantizedWeight.joined(key, name, given)
    settings = (facts["transposed"], facts["interleaved"], call.numbers["lora_scale"])
    return layer_by_name(given, *settings)


def term_of(call: Arguments, layer: Layer) -> Any:
    activation = call.facts["activation"]
    return activation_term(activation, gated=layer.gated) if isinstance(activation, str) else activation[0]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


STEP = Experts()

"""The reference of `experts`: float64, one expert after another, in torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from ..term import float_of
from .layer import Layer

_UNARY = {
    "sigmoid",
    "erf",
    "tanh",
    "exp",
    "log",
    "sqrt",
    "abs",
    "neg",
    "sin",
    "cos",
    "tan",
    "exp2",
    "log2",
    "floor",
    "trunc",
}
_BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "min": torch.minimum,
    "max": torch.maximum,
    **{name: getattr(torch, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "and": torch.logical_and,
    "or": torch.logical_or,
}


def evaluate_term(term: Any, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """A term of an activation on tensors; differentiable. Raises KeyError for what has no torch form."""
    like = values["x0"]

    def build(t: Any) -> torch.Tensor:
        if isinstance(t, str):
            return values[t] if t in values else torch.tensor(t == "true")
        if isinstance(t, int):
            return like.new_tensor(t)
        if t[0] == "f":
            return like.new_tensor(float_of(t))
        parts = [build(p) for p in t[1:]]
        if t[0] == "where":
            return torch.where(*parts)
        if t[0] == "not":
            return ~parts[0]
        if t[0] == "stop_gradient":
            return parts[0].detach()
        return getattr(torch, t[0])(parts[0]) if t[0] in _UNARY else _BINARY[t[0]](*parts)

    return build(term)


def reference_experts(x: Any, given: dict[str, Any], layer: Layer, term: Any) -> torch.Tensor:
    """The layer in float64, rounded to x's dtype once; differentiable. Waits for the device."""
    wide, (first, second) = x.double(), map(_stack, (layer.gate_up, layer.down))
    out = torch.zeros_like(wide)
    for e, (tokens, weights) in enumerate(_rows(given, layer.experts)):
        if not len(tokens):
            continue
        h = _product(wide[tokens], first[e], layer, "gate_up", e, tokens)
        if layer.gate_up_bias is not None:
            h = h + layer.gate_up_bias[e].double()
        values = {"x0": h}
        if layer.gated:
            halves = (h[:, 0::2], h[:, 1::2]) if layer.interleaved else h.chunk(2, -1)
            values = {"x0": halves[0], "x1": halves[1]}
        y = _product(evaluate_term(term, values), second[e], layer, "down", e, tokens)
        if layer.down_bias is not None:
            y = y + layer.down_bias[e].double()
        out = out.index_add(0, tokens, y * weights.double()[:, None])
    return out.to(x.dtype)


def _stack(matrices: Any) -> torch.Tensor:
    return matrices if isinstance(matrices, torch.Tensor) else matrices.dequantize(torch.float64)


def _product(rows: Any, w: Any, layer: Layer, name: str, e: int, tokens: Any) -> Any:
    """Rows of tokens by an expert's matrix, and by what adapters add to it."""
    out = rows @ (w.double() if layer.transposed else w.double().T)
    if f"{name}_a" not in layer.lora:
        return out
    a, b = (layer.lora[f"{name}_{of}"].double() for of in "ab")
    if layer.adapter_ids is None:
        return out + layer.lora_scale * rows @ a[e].T @ b[e].T
    for number in range(a.shape[0]):
        mine = torch.where(layer.adapter_ids[tokens] == number)[0]
        out = out.index_add(0, mine, layer.lora_scale * rows[mine] @ a[number, e].T @ b[number, e].T)
    return out


def _rows(given: dict[str, Any], experts: int) -> list[tuple[Any, Any]]:
    """Tokens and weights of each expert."""
    if "ids" in given:
        found = [torch.where(given["ids"] == e) for e in range(experts)]
        return [(tokens, given["weights"][tokens, place]) for tokens, place in found]
    spans = [slice(*pair) for pair in pairwise(given["bounds"].tolist())]
    tokens, weights = [given["tokens"][span].long() for span in spans], given["weights"]
    if weights.dim() == 2:  # experts have chosen: (T, E)
        return [(rows, weights[rows, e]) for e, rows in enumerate(tokens)]
    return [(rows, weights[span]) for rows, span in zip(tokens, spans, strict=True)]


def reference_light(base: Any, x: Any, ids: Any, weights: Any, first: int, light: Any) -> torch.Tensor:
    """What experts that multiply nothing add, in float64, rounded once more; differentiable."""
    wide, weights, copies = x.double(), weights.double(), first + light.zeros
    copied = (ids >= copies) & (ids < copies + light.copies)
    out = base.double() + torch.where(copied, weights, 0).sum(1, keepdim=True) * wide
    vectors: Any = () if light.vectors is None else light.vectors.double()
    for c, vector in enumerate(vectors):
        weight = torch.where(ids == copies + light.copies + c, weights, 0).sum(1, keepdim=True)
        a = torch.zeros_like(weight)
        if light.gates is not None:
            apart: Any = light.gates[c].double()
            a = (wide @ apart.T).softmax(-1)[:, :1]
        out = out + weight * (a * wide + (1 - a) * vector)
    return out.to(x.dtype)

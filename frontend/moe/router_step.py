"""Routers as a step of `frontend/moe/operator.py`: tensors in, ids and weights out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..plan import launched
from . import router_form
from .operator import Arguments, Made
from .router_form import spec_of


def wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def facts_of(call: Arguments) -> tuple[tuple[str, Any], ...]:
    """What kernels depend on, sizes of experts and dtypes included."""
    return router_form.facts_of(call.facts, call.tensors, call.form.learns)


def plain(tensors: Any) -> dict[str, Tensor]:
    """Tensors as kernels take them: detached, rows with unit stride."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        dense = tensor.dim() == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        found[name] = tensor if dense else tensor.contiguous()
    return found


def results(values: Any, made: list[Made]) -> list[Tensor]:
    """Empty tensors, where there is nothing to compute."""
    return [values["logits"].new_empty(one.shape, dtype=one.dtype) for one in made]


class Router:
    """weights and ids [T, top_k]; `scored` [T, E], the logits, where they are made of features; `chosen`
    [T, top_k], ids before a table or a limit changed them, where a gradient may be asked for."""

    def made(self, call: Arguments) -> list[Made]:
        logits, facts = call.tensors["logits"], call.facts
        tokens, by_token = logits.shape[0], (logits.shape[0], facts["top_k"])
        found = [Made("weights", by_token, wide(logits)), Made("ids", by_token, torch.int32)]
        if "vectors" in call.tensors:
            found.append(Made("scored", (tokens, call.tensors["vectors"].shape[0]), wide(logits)))
        if call.form.learns and (facts.get("limited") or facts.get("remapped")):
            found.append(Made("chosen", by_token, torch.int32))
        return found

    def evaluate(self, call: Arguments) -> list[Tensor]:
        made, values = self.made(call), plain(call.tensors)
        if not values["logits"].shape[0]:
            return results(values, made)
        facts = facts_of(call)

        def make() -> Any:
            from ...passes.moe.router import compile_router

            return compile_router(spec_of(facts))

        scalars = {**call.integers, **call.numbers}
        return list(launched(("router", facts), values, scalars, made, make))

    def differentiate(
        self, call: Arguments, results: dict[str, Tensor], slopes: dict[str, Tensor], wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        tensors = dict(call.tensors)
        logits = results.get("scored", tensors["logits"])
        found: dict[str, Tensor] = {}
        if "weights" not in slopes or not logits.shape[0]:
            found["logits"] = torch.zeros_like(logits)
        else:
            found = self._behind_weights(call, results, slopes["weights"])
        if "group_logits" in wanted and "group_logits" not in found:
            found["group_logits"] = torch.zeros_like(tensors["group_logits"])
        if "vectors" not in tensors:
            return found
        slope = found["logits"] + slopes["scored"] if "scored" in slopes else found["logits"]
        return cosine_gradients(tensors, results["scored"], slope)

    def _behind_weights(self, call: Arguments, results: Any, slope: Tensor) -> dict[str, Tensor]:
        facts = facts_of(call)
        tensors = {k: v for k, v in call.tensors.items() if k in ("group_logits", "token_ids")}
        tensors["logits"] = results.get("scored", call.tensors["logits"])
        tensors["chosen"] = results.get("chosen", results["ids"])
        values = plain(tensors | {"dweights": slope.to(wide(tensors["logits"]))})
        logits = values["logits"]
        made = [Made("dlogits", tuple(logits.shape), logits.dtype)]
        if "group_logits" in values:
            shape = tuple(values["group_logits"].shape)
            made.append(Made("dgroup_logits", shape, values["group_logits"].dtype))

        def make() -> Any:
            from ...passes.moe.router_gradient import compile_router_gradient

            return compile_router_gradient(spec_of(facts))

        scalars = {"scale": call.numbers["scale"]} | {k: v for k, v in call.integers.items() if k == "seed"}
        found = launched(("router_gradient", facts), values, scalars, made, make)
        return {one.name[1:]: tensor for one, tensor in zip(made, found, strict=True)}


def cosine_gradients(tensors: Any, logits: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """Gradients of features, vectors and temperature from those of the logits that they make."""
    x, v, t = (tensors[name].to(logits.dtype) for name in ("logits", "vectors", "temperature"))
    lengths = [m.norm(dim=1, keepdim=True).clamp(min=1e-12) for m in (x, v)]
    x, v = x / lengths[0], v / lengths[1]
    scale = t.clamp(max=LARGEST).exp()
    along = slope * logits
    dx = (slope @ v * scale - along.sum(1, keepdim=True) * x) / lengths[0]
    dv = (slope.T @ x * scale - along.sum(0)[:, None] * v) / lengths[1]
    dt = torch.where(t <= LARGEST, along.sum(), 0.0)
    found = {"logits": dx, "vectors": dv, "temperature": dt}
    return {name: value.to(tensors[name].dtype) for name, value in found.items()}


LARGEST = 4.605170185988092  # log 100, as passes/moe/router_scores.py has it

STEP = Router()

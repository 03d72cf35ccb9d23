"""`torch.ops.gossamer.linear_attention` and its gradient: see frontend/step_operator.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .feature_maps import FeatureMap
from .linear_launch import NAMES, Settings, forward, gradients
from .moe_form import MoeForm
from .operators import is_traced
from .step_operator import Arguments, Made, define, learns, refuse

define("linear_attention", {"linear_attention": "linear_operator"})


def watched(tensors: Sequence[Tensor]) -> bool:
    """Whether a tracer of torch sees a call with these tensors."""
    return torch.compiler.is_compiling() or is_traced(tensors)


def call(
    q: Tensor, k: Tensor, v: Tensor, states: Sequence[Tensor], settings: Settings, enable_gqa: bool
) -> tuple[Tensor, ...]:
    """(out, *new states) by the operator. q, k: prepared rows."""
    tensors = [q, k, v, *states]
    facts = (
        ("q_map", settings.q_map.key),
        ("k_map", settings.k_map.key),
        ("causal", settings.causal),
        ("final", settings.final),
        ("enable_gqa", enable_gqa),
    )
    learning = learns(tensors)
    numbers = [] if settings.eps is None else [settings.eps]
    form = MoeForm("linear_attention", NAMES[: len(tensors)], (), ("eps",)[: len(numbers)], facts, learning)
    if not torch.compiler.is_compiling():
        refuse(form, tensors)
    out, *more = torch.ops.gossamer.linear_attention(tensors, [], numbers, form.text)
    return (out, *more[1:]) if learning and settings.eps is not None else (out, *more)


class LinearStep:
    """o (B, Hq, L, Dv); where a gradient may be asked for, its denominators den (B, Hq, L); the states behind
    the last key, new_state (B, Hk, F, Dv) and new_sums (B, Hk, F), if asked for. Contiguous."""

    def made(self, call: Arguments) -> list[Made]:
        from .linear import check

        q, k, v = (call.tensors[name] for name in ("q", "k", "v"))
        settings = _settings(call)
        check(q, k, v, causal=settings.causal, enable_gqa=call.facts["enable_gqa"])
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        found = [Made("o", (*q.shape[:3], v.shape[3]), q.dtype)]
        if call.form.learns and settings.eps is not None:
            found.append(Made("den", tuple(q.shape[:3]), wide))
        if settings.final:
            state = (*k.shape[:2], k.shape[3] * len(settings.k_map.parts), v.shape[3])
            found.append(Made("new_state", state, wide))
            if settings.eps is not None:
                found.append(Made("new_sums", state[:3], wide))
        return found

    def evaluate(self, call: Arguments) -> list[Tensor]:
        settings, made = _settings(call), self.made(call)
        values = {name: tensor.detach() for name, tensor in call.tensors.items()}
        if not _is_empty(values):
            return list(forward(values, settings, keeps=call.form.learns, contiguous=True))
        out, *states = _reference(values, settings)
        den = [values["q"].new_zeros(m.shape, dtype=m.dtype) for m in made if m.name == "den"]
        return [t.contiguous() for t in (out, *den, *states)]

    def differentiate(
        self, call: Arguments, results: dict[str, Tensor], slopes: dict[str, Tensor], wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        settings = _settings(call)
        values = {name: tensor.detach() for name, tensor in call.tensors.items()}
        given = {n: slopes.get(n, torch.zeros_like(t)) for n, t in results.items() if n != "den"}
        if _is_empty(values):
            leaves = {n: t.requires_grad_(n in wanted) for n, t in values.items()}
            with torch.enable_grad():
                made = _reference(leaves, settings)
            asked = [leaves[n] for n in wanted]
            found = torch.autograd.grad(made, asked, [*given.values()], materialize_grads=True)
            return dict(zip(wanted, found, strict=True))
        values |= {n: results[n] for n in ("o", "den") if settings.eps is not None}
        values |= {f"d{n}": t for n, t in given.items()}
        order = tuple(n for n in NAMES if n in wanted)
        return dict(zip(order, gradients(values, settings, order, contiguous=True), strict=True))


def _settings(call: Arguments) -> Settings:
    facts = call.facts
    q_map, k_map = (FeatureMap(*facts[name]) for name in ("q_map", "k_map"))
    return Settings(
        q_map, k_map, facts["causal"], call.numbers.get("eps"), "state" in call.tensors, facts["final"]
    )


def _is_empty(values: dict[str, Tensor]) -> bool:
    return any(0 in values[name].shape for name in ("q", "k", "v"))


def _reference(values: dict[str, Tensor], settings: Settings) -> tuple[Any, ...]:
    from .linear import reference

    q, k, v, *states = (values[name] for name in NAMES if name in values)
    return reference(q, k, v, tuple(states), settings)


STEP = LinearStep()

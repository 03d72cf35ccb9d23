"""`torch.ops.gossamer.linear_attention` and its gradient: see frontend/operators/step.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..moe.form import MoeForm
from ..operators.rules import is_traced
from ..operators.step import Arguments, Made, define, learns, refuse
from ..operators.step_autograd import recording
from .feature_maps import FeatureMap
from .form import DTYPES, NAMES, Settings, shapes_of
from .launch import forward, gradients

define("linear_attention", {"linear_attention": "linear.operator"})


def watched(tensors: Sequence[Tensor]) -> bool:
    """Whether a tracer of torch sees a call with these tensors."""
    return torch.compiler.is_compiling() or is_traced(tensors)


def call(given: Sequence[Tensor], settings: Settings, enable_gqa: bool) -> tuple[Tensor, ...]:
    """(out, *new states) by the operator. given: prepared rows of q and k, v, states."""
    tensors = [*given]
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
    found = torch.ops.gossamer.linear_attention(tensors, [], numbers, form.text)
    names = settings.results(keeps=learning)
    return tuple(t for name, t in zip(names, found, strict=True) if settings.given(name))


class LinearStep:
    """o (B, Hq, L, Dv); the states behind the last key, new_state (B, Hk, F, Dv) and new_sums (B, Hk, F), if
    asked for; and where a gradient may be asked for, what that reads besides: denominators den (B, Hq, L) or,
    without `causal`, the states as key_state and key_sums. Contiguous."""

    def made(self, call: Arguments) -> list[Made]:
        from .attention import check

        q, k, v = (call.tensors[name] for name in ("q", "k", "v"))
        settings = _settings(call)
        check(q, k, v, causal=settings.causal, enable_gqa=call.facts["enable_gqa"])
        made = shapes_of(call.tensors, settings, keeps=call.form.learns)
        return [Made(name, shape, getattr(torch, DTYPES[dtype])) for name, shape, dtype in made]

    def evaluate(self, call: Arguments) -> list[Tensor]:
        settings, made = _settings(call), self.made(call)
        values = {name: tensor.detach() for name, tensor in call.tensors.items()}
        if not _is_empty(values):
            return list(forward(values, settings, keeps=call.form.learns))
        found = iter(_reference(values, settings))
        zeros = values["q"].new_zeros
        return [
            next(found).contiguous() if settings.given(m.name) else zeros(m.shape, dtype=m.dtype)
            for m in made
        ]

    def differentiate(
        self, call: Arguments, results: dict[str, Tensor], slopes: dict[str, Tensor], wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        settings = _settings(call)
        values = {name: tensor.detach() for name, tensor in call.tensors.items()}
        given = {n: slopes.get(n, torch.zeros_like(t)) for n, t in results.items() if settings.given(n)}
        if _is_empty(values):
            leaves = {n: t.requires_grad_(n in wanted) for n, t in values.items()}
            asked = [leaves[n] for n in wanted]
            with recording(), torch.enable_grad():
                made = _reference(leaves, settings)
                found = torch.autograd.grad(made, asked, [*given.values()], materialize_grads=True)
            return dict(zip(wanted, found, strict=True))
        values |= {n: results[n] for n in settings.kept}
        values |= {f"d{n}": t for n, t in given.items()}
        order = tuple(n for n in NAMES if n in wanted)
        return dict(zip(order, gradients(values, settings, order), strict=True))


def _settings(call: Arguments) -> Settings:
    facts = call.facts
    q_map, k_map = (FeatureMap(*facts[name]) for name in ("q_map", "k_map"))
    return Settings(
        q_map, k_map, facts["causal"], call.numbers.get("eps"), "state" in call.tensors, facts["final"]
    )


def _is_empty(values: dict[str, Tensor]) -> bool:
    return any(0 in values[name].shape for name in ("q", "k", "v"))


def _reference(values: dict[str, Tensor], settings: Settings) -> tuple[Any, ...]:
    from .attention import reference

    return reference(tuple(values[name] for name in NAMES if name in values), settings)


STEP = LinearStep()

"""Eager attention whose gradient may be asked for: what calls like one another share.

The first call goes the long way (`rules.attend`) and leaves plans; later ones only look at their tensors,
allocate and launch, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ...runtime.driver import driver
from ...runtime.recent import Recent
from ..device import precision_of
from ..form import Form, Parts
from ..gradients import known_rows
from ..plan import Recalled, place, recall
from .attention import INPUTS
from .rules import gradients_of, is_traced, operator_of, with_lse
from .step_autograd import apply

if TYPE_CHECKING:
    from ..form import Call
    from ..gradients import GradientPlan
    from ..plan import Plan

_LAYOUTS = 8  # of gradients that a call keeps kernels for


def look_up(query: Any, key: Any, value: Any, call: Call) -> Recalled:
    """What an earlier call like this one has left."""
    return recall(driver().plans, {"q": query, "k": key, "v": value, **call.held}, call, "learns")


def remember(known: Recalled, parts: Parts) -> None:
    """Have later calls find what this one, which was checked and has run, left in pieces."""
    form = with_lse(parts.form)
    derived = any(recipe is not None for _, part in form.parts for recipe in part.recipes)
    if known.key is None or derived:
        return
    ran = _left(form, parts, [known.tensors[name] for name in INPUTS], parts.tensors, {})
    if ran.plan is not None:
        driver().plans.put(known.key, Learned(parts, ran.plan))


def _left(
    form: Form, parts: Parts, inputs: Sequence[Any], others: Sequence[Any], rows: dict[str, Any], *what: str
) -> Recalled:
    """What the kernels of a call have left: those of `evaluate`; of `differentiate`, where rows are given."""
    call = form.join([t.detach() for t in others], parts.integers, parts.floats)
    named = {name: t.detach() for name, t in zip(INPUTS, inputs, strict=True)}
    return recall(driver().plans, {**named, **call.held, **rows}, call, *what)


class Learned:
    """The kernels of a forward, and of gradients as these are asked for.

    names: of the tensors that autograd sees, in its order."""

    def __init__(self, parts: Parts, plan: Plan) -> None:
        self._parts, self.form = parts._replace(tensors=[]), with_lse(parts.form)
        self.call = self.form, parts.integers, parts.floats
        self.plan = plan
        self.asks = self.form is parts.form  # for the LSE
        self.names = (*INPUTS, *self.form.names)
        self._gradients: Recent[tuple[GradientPlan, bool]] = Recent(_LAYOUTS)

    def __call__(self, tensors: dict[str, Any]) -> tuple[Tensor, ...]:
        """(out, *extra)"""
        return apply(_Learned, self, *[tensors[name] for name in self.names])

    def gradients(
        self, ctx: Any, needs: tuple[bool, ...], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """A gradient, or None, for each tensor. grads: those of the output, the LSE and further results."""
        out, lse, *tensors = ctx.saved_tensors
        do, dlse, *others = grads
        odd = do is None or is_legacy_batchedtensor(do) or any(grad is not None for grad in others)
        if odd or do is None or torch.is_grad_enabled() or is_traced(grads):
            return gradients_of(ctx, needs, grads, operator_of(grads))
        given = (out, lse, do) if dlse is None else (out, lse, do, dlse)
        kinds = (
            do.dtype,
            dlse is None or dlse.dtype,
            out.dtype is torch.float32 and precision_of(out.device, "f32"),
        )
        key = (needs, kinds, *map(place, tensors), *map(place, given))
        known = self._gradients.get(key)
        if known is None:
            found = gradients_of(ctx, needs, grads, operator_of(grads))
            self._remember(key, needs, (out, lse, do, dlse), tensors)
            return found
        plan, plain = known
        values = dict(zip(self.names, tensors, strict=True))
        values |= dict(zip(_ROWS, given, strict=False)) if plain else known_rows(out, lse, do, dlse)
        made, shaped = plan(values), zip(self.names, needs, tensors, strict=True)
        return [_shaped(made[name], like) if need else None for name, need, like in shaped]

    def _remember(self, key: Any, needs: tuple[bool, ...], rows: Any, tensors: Sequence[Tensor]) -> None:
        """Have later gradients find the plan that `differentiate` has left."""
        values = known_rows(*rows)
        wanted = [name for name, need in zip(self.names, needs, strict=True) if need]
        inputs, others = tensors[: len(INPUTS)], tensors[len(INPUTS) :]
        ran = _left(self.form, self._parts, inputs, others, values, "gradients", *wanted)
        if ran.plan is not None:
            given: dict[str, Any] = dict(zip(_ROWS, rows, strict=True))
            plain = all(given[name].data_ptr() == row.data_ptr() for name, row in values.items())
            self._gradients.put(key, (ran.plan, plain))


_ROWS = ("o", "lse", "do", "dlse")


def _shaped(found: Tensor, like: Tensor) -> Tensor:
    return found if found.shape == like.shape else found.reshape(like.shape)


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, learned: Learned, *tensors: Tensor) -> tuple[Tensor, ...]:
        out, lse, *others = learned.plan(dict(zip(learned.names, tensors, strict=True)))
        ctx.learned, ctx.call = learned, learned.call
        ctx.save_for_backward(out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return (out, lse, *others) if learned.asks else (out, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        learned = ctx.learned
        whole = grads if learned.asks else (grads[0], None, *grads[1:])
        return None, *learned.gradients(ctx, ctx.needs_input_grad[1:], whole)

"""Operators of steps: what torch's tracers see of a computation that a form says in text.

    NAME(tensors, integers, numbers, form) -> what the step gives, then what its gradient will want
    NAME_backward(tensors, integers, numbers, form, results, slopes, wanted) -> the gradients wanted

form: `MoeForm.text`, which names tensors and numbers and says the rest. results: all of NAME's. slopes: of
the results that `wanted` names, before a bar; behind it are the names of the tensors whose gradients are
wanted.

A step is a value that can say what it gives, compute it and differentiate it. Calls that no tracer watches
compute without the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...ir.errors import UnsupportedError
from ..moe.form import MoeForm
from .step_autograd import once_differentiable, register
from .vmap import each

LIBRARY = torch.library.Library("gossamer", "FRAGMENT")
CALL = "Tensor[] tensors, SymInt[] integers, float[] numbers, str form"
STEPS: dict[str, str] = {}  # kind of form -> the module that holds its STEP, loaded when it is asked for


class Made(NamedTuple):
    """A result of a step: its name, shape and dtype."""

    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype


class Arguments(NamedTuple):
    """A call: its form, its tensors and numbers by name."""

    form: MoeForm
    tensors: Mapping[str, Tensor]
    integers: Mapping[str, int]
    numbers: Mapping[str, float]

    @property
    def facts(self) -> dict[str, Any]:
        return dict(self.form.facts)


class Step(Protocol):
    """What computes one kind of form. `made` sees shapes only, and checks what it is given."""

    def made(self, call: Arguments) -> list[Made]: ...

    def evaluate(self, call: Arguments) -> list[Tensor]: ...

    def differentiate(
        self, call: Arguments, results: dict[str, Tensor], slopes: dict[str, Tensor], wanted: tuple[str, ...]
    ) -> dict[str, Tensor]: ...


def step_of(form: MoeForm) -> Step:
    return import_module(f"..{STEPS[form.kind]}", __package__).STEP


def _arguments(form: MoeForm, tensors: Any, integers: Any, numbers: Any) -> Arguments:
    named = (
        dict(zip(names, values, strict=True))
        for names, values in zip(form[1:4], (tensors, integers, numbers), strict=True)
    )
    return Arguments(form, *named)


# eager calls ----------------------------------------------------------------------------------------


def at_once(
    form: MoeForm, tensors: Sequence[Tensor], integers: Sequence[int] = (), numbers: Sequence[float] = ()
) -> Sequence[Tensor]:
    """The results of a step that nobody watches."""
    if form.learns:
        return _Step.apply(form, integers, numbers, *tensors)  # type: ignore[return-value]
    return step_of(form).evaluate(_arguments(form, tensors, integers, numbers))


def refuse(form: MoeForm, tensors: Sequence[Tensor]) -> None:
    """Raise UnsupportedError for tangents."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in zip(form.tensors, tensors, strict=True):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise UnsupportedError(
                f"{form.kind}: {name} has a tangent, and forward-mode gradients are not built. "
                f"Pass forward_ad.unpack_dual({name}).primal"
            )


def learns(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: MoeForm, integers: Any, numbers: Any, *tensors: Tensor) -> tuple[Any, ...]:
        given = [t.detach() for t in tensors]
        found = step_of(form).evaluate(_arguments(form, given, integers, numbers))
        _save(ctx, (tensors, integers, numbers, form), found)
        ctx.mark_non_differentiable(*(t for t in found if not t.is_floating_point()))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Any) -> tuple[Any, ...]:
        found = _gradients(ctx, slopes, ctx.needs_input_grad[3:], _differentiate)
        return (None, None, None, *found)


def _save(ctx: Any, inputs: Any, results: Sequence[Tensor]) -> None:
    tensors, integers, numbers, form = inputs
    ctx.call = list(integers), list(numbers), form
    ctx.many = len(tensors)
    ctx.save_for_backward(*tensors, *results)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, slopes: Sequence[Any], needs: Sequence[bool], compute: Callable[..., Sequence[Tensor]]
) -> list[Tensor | None]:
    """A gradient, or None, for each tensor."""
    integers, numbers, form = ctx.call
    tensors, results = ctx.saved_tensors[: ctx.many], ctx.saved_tensors[ctx.many :]
    known = _arguments(form, tensors, integers, numbers)
    names = [made.name for made in step_of(form).made(known)]
    given = {n: s for n, s in zip(names, slopes, strict=True) if s is not None}
    asked = [n for n, need in zip(form.tensors, needs, strict=True) if need]
    if not asked or not given:
        return [None] * len(tensors)
    wanted = f"{','.join(given)}|{','.join(asked)}"
    found = compute(list(tensors), integers, numbers, form, list(results), list(given.values()), wanted)
    by_name = dict(zip(asked, found, strict=True))
    return [by_name.get(name) for name in form.tensors]


def _differentiate(
    tensors: Any, integers: Any, numbers: Any, form: MoeForm, results: Any, slopes: Any, wanted: str
) -> list[Tensor]:
    step, known = step_of(form), _arguments(form, [t.detach() for t in tensors], integers, numbers)
    names = [made.name for made in step.made(known)]
    have, want = (tuple(part.split(",")) for part in wanted.split("|"))
    by_name = dict(zip(names, results, strict=True))
    found = step.differentiate(known, by_name, dict(zip(have, slopes, strict=True)), want)
    return [found[name] for name in want]


# the operators --------------------------------------------------------------------------------------


def define(name: str, steps: Mapping[str, str]) -> None:
    """Register `torch.ops.gossamer.NAME` and its gradient. steps: kind of form -> the module of its step."""
    STEPS.update(steps)
    forward, backward = f"gossamer::{name}", f"gossamer::{name}_backward"
    LIBRARY.define(f"{name}({CALL}) -> Tensor[]")
    LIBRARY.define(f"{name}_backward({CALL}, Tensor[] results, Tensor[] slopes, str wanted) -> Tensor[]")
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, _evaluate, device)
        LIBRARY.impl(f"{name}_backward", _evaluate_backward, device)
    torch.library.register_fake(forward, _fake, lib=LIBRARY)
    torch.library.register_fake(backward, _fake_backward, lib=LIBRARY)
    operators = getattr(torch.ops.gossamer, name), getattr(torch.ops.gossamer, f"{name}_backward")

    register(LIBRARY, name, _prepared, _save, _gradients)
    for full, operator in zip((forward, backward), operators, strict=True):

        def mapped(info: Any, dims: Any, *given: Any, operator: Any = operator) -> Any:
            return each(operator, info.batch_size, dims, given)

        torch.library.register_vmap(full, mapped, lib=LIBRARY)


def _evaluate(tensors: Any, integers: Any, numbers: Any, form: str) -> list[Tensor]:
    parsed = MoeForm.parse(form)
    return list(step_of(parsed).evaluate(_arguments(parsed, tensors, integers, numbers)))


def _evaluate_backward(
    tensors: Any, integers: Any, numbers: Any, form: str, results: Any, slopes: Any, wanted: str
) -> list[Tensor]:
    return _differentiate(tensors, integers, numbers, MoeForm.parse(form), results, slopes, wanted)


def _fake(tensors: Any, integers: Any, numbers: Any, form: str) -> list[Tensor]:
    parsed = MoeForm.parse(form)
    made = step_of(parsed).made(_arguments(parsed, tensors, integers, numbers))
    return [tensors[0].new_empty(one.shape, dtype=one.dtype) for one in made]


def _fake_backward(
    tensors: Any, integers: Any, numbers: Any, form: str, results: Any, slopes: Any, wanted: str
) -> list[Tensor]:
    named = dict(zip(MoeForm.parse(form).tensors, tensors, strict=True))
    return [named[name].new_empty(named[name].shape) for name in wanted.split("|")[1].split(",")]


def _prepared(tensors: Any, integers: Any, numbers: Any, form: str) -> tuple[MoeForm, int]:
    """The form that also gives what the gradient wants, and how many results a call asked for."""
    parsed = MoeForm.parse(form)
    asked = step_of(parsed).made(_arguments(parsed, tensors, integers, numbers))
    return parsed._replace(learns=True), len(asked)

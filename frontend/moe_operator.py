"""`torch.ops.gossamer.moe` and its gradient: what torch's tracers see of the steps of a mixture of experts.

    moe(tensors, integers, numbers, form) -> what the step gives, then what its gradient will want
    moe_backward(tensors, integers, numbers, form, results, slopes, wanted) -> a gradient for each name wanted

form: `MoeForm.text`, which names tensors and numbers and says the rest. results: all of moe's. slopes: of the
results that `wanted` names, before a bar; behind it are the names of the tensors whose gradients are wanted.

A step is a value that can say what it gives, compute it and differentiate it; STEPS holds them by their kind.
Calls that no tracer watches compute without the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevel
from torch.autograd.function import once_differentiable

from ..ir.errors import UnsupportedError
from .moe_form import MoeForm
from .operator_vmap import each
from .operators import is_traced

LIBRARY = torch.library.Library("gossamer", "FRAGMENT")
CALL = "Tensor[] tensors, SymInt[] integers, float[] numbers, str form"
LIBRARY.define(f"moe({CALL}) -> Tensor[]")
LIBRARY.define(f"moe_backward({CALL}, Tensor[] results, Tensor[] slopes, str wanted) -> Tensor[]")
FORWARD, BACKWARD = "gossamer::moe", "gossamer::moe_backward"


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


# The modules of steps, loaded when they are asked for: each holds a STEP.
STEPS = {
    "route": "router_step",
    "expert_choice": "expert_choice_step",
    "groups": "group_step",
    "experts": "experts_step",
    "light": "light_step",
}


def step_of(form: MoeForm) -> Step:
    return import_module(f".{STEPS[form.kind]}", __package__).STEP


def _arguments(form: MoeForm, tensors: Any, integers: Any, numbers: Any) -> Arguments:
    named = (
        dict(zip(names, values, strict=True))
        for names, values in zip(form[1:4], (tensors, integers, numbers), strict=True)
    )
    return Arguments(form, *named)


# eager calls ----------------------------------------------------------------------------------------


def call(
    form: MoeForm, tensors: Sequence[Tensor], integers: Sequence[int] = (), numbers: Sequence[float] = ()
) -> Sequence[Tensor]:
    """The results of a step: by its operator where somebody watches, else at once."""
    if torch.compiler.is_compiling() or is_traced(tensors):
        if not torch.compiler.is_compiling():
            _refuse(form, tensors)
        return torch.ops.gossamer.moe(list(tensors), list(integers), list(numbers), form.text)
    if form.learns:
        return _Step.apply(form, integers, numbers, *tensors)  # type: ignore[return-value]
    return step_of(form).evaluate(_arguments(form, tensors, integers, numbers))


def _refuse(form: MoeForm, tensors: Sequence[Tensor]) -> None:
    """Raise UnsupportedError for tangents."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in zip(form.tensors, tensors, strict=True):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise UnsupportedError(
                f"{form.kind}: {name} has a tangent, and forward-mode gradients are not built for layers of "
                f"experts. Pass forward_ad.unpack_dual({name}).primal"
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


def _moe(tensors: Any, integers: Any, numbers: Any, form: str) -> list[Tensor]:
    parsed = MoeForm.parse(form)
    return list(step_of(parsed).evaluate(_arguments(parsed, tensors, integers, numbers)))


def _moe_backward(
    tensors: Any, integers: Any, numbers: Any, form: str, results: Any, slopes: Any, wanted: str
) -> list[Tensor]:
    return _differentiate(tensors, integers, numbers, MoeForm.parse(form), results, slopes, wanted)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("moe", _moe, _device)
    LIBRARY.impl("moe_backward", _moe_backward, _device)


@torch.library.register_fake(FORWARD, lib=LIBRARY)
def _fake(tensors: Any, integers: Any, numbers: Any, form: str) -> list[Tensor]:
    parsed = MoeForm.parse(form)
    made = step_of(parsed).made(_arguments(parsed, tensors, integers, numbers))
    return [tensors[0].new_empty(one.shape, dtype=one.dtype) for one in made]


@torch.library.register_fake(BACKWARD, lib=LIBRARY)
def _fake_backward(
    tensors: Any, integers: Any, numbers: Any, form: str, results: Any, slopes: Any, wanted: str
) -> list[Tensor]:
    named = dict(zip(MoeForm.parse(form).tensors, tensors, strict=True))
    return [named[name].new_empty(named[name].shape) for name in wanted.split("|")[1].split(",")]


# autograd, at one level of torch.func ---------------------------------------------------------------


class _Forward(SingleLevel):
    """The operator's autograd. Takes the dispatch keys below, then a call."""

    @staticmethod
    def forward(
        ctx: Any, keys: Any, form: MoeForm, integers: Any, numbers: Any, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():  # for the levels of torch.func below: this runs under no_grad
            found = _below(MOE, keys, list(tensors), integers, numbers, form.text)
        _save(ctx, (tensors, integers, numbers, form), found)
        ctx.mark_non_differentiable(*(t for t in found if not t.is_floating_point()))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Any, ...]:
        def compute(tensors: Any, integers: Any, numbers: Any, form: MoeForm, *rest: Any) -> Sequence[Tensor]:
            return MOE_BACKWARD(tensors, integers, numbers, form.text, *rest)

        return (None, None, None, None, *_gradients(ctx, slopes, ctx.needs_input_grad[4:], compute))


class _Backward(SingleLevel):
    """The gradient of a gradient, which there is not. Takes the dispatch keys below, what the operator takes,
    and all tensors among that once more, for autograd to see."""

    @staticmethod
    def forward(ctx: Any, keys: Any, arguments: Sequence[Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return tuple(_below(MOE_BACKWARD, keys, *arguments))

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        raise UnsupportedError(
            "layers of experts: gradients of gradients are not built. Differentiate once (create_graph=False)"
        )


MOE, MOE_BACKWARD = torch.ops.gossamer.moe.default, torch.ops.gossamer.moe_backward.default


def _below(operator: Any, keys: Any, *arguments: Any) -> list[Tensor]:
    """An operator by what comes after autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys, *arguments)


def _autograd(keys: Any, tensors: Any, integers: Any, numbers: Any, form: str) -> list[Tensor]:
    keys = keys & torch._C._after_autograd_keyset
    if not learns(tensors):
        return _below(MOE, keys, tensors, integers, numbers, form)
    parsed = MoeForm.parse(form)
    asked = len(step_of(parsed).made(_arguments(parsed, tensors, integers, numbers)))
    with enable_single_level_autograd_function():
        whole = parsed._replace(learns=True)  # with what the gradient wants
        return list(_Forward.apply(keys, whole, integers, numbers, *tensors))[:asked]  # type: ignore[call-overload]


def _autograd_backward(keys: Any, *arguments: Any) -> list[Tensor]:
    keys = keys & torch._C._after_autograd_keyset
    tensors = [t for place in (0, 4, 5) for t in arguments[place]]
    if not learns(tensors):
        return _below(MOE_BACKWARD, keys, *arguments)
    with enable_single_level_autograd_function():
        return list(_Backward.apply(keys, arguments, *tensors))  # type: ignore[call-overload]


LIBRARY.impl("moe", _autograd, "Autograd", with_keyset=True)
LIBRARY.impl("moe_backward", _autograd_backward, "Autograd", with_keyset=True)


# torch.func -----------------------------------------------------------------------------------------


def _vmap(info: Any, dims: Any, *arguments: Any) -> tuple[list[Tensor], list[int]]:
    return each(torch.ops.gossamer.moe, info.batch_size, dims, arguments)


def _vmap_backward(info: Any, dims: Any, *arguments: Any) -> tuple[list[Tensor], list[int]]:
    return each(torch.ops.gossamer.moe_backward, info.batch_size, dims, arguments)


torch.library.register_vmap(FORWARD, _vmap, lib=LIBRARY)
torch.library.register_vmap(BACKWARD, _vmap_backward, lib=LIBRARY)

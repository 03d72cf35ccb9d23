"""The operators of steps (`frontend/operators/step.py`) in torch's autograd, at one level of `torch.func`.

A gradient of a gradient, which there is not, is refused at every level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction as SingleLevel

from ...ir.errors import UnsupportedError

Save = Callable[[Any, Any, Sequence[Tensor]], None]
Gradients = Callable[..., Sequence[Tensor | None]]


class _Refused(torch.autograd.Function):
    """Gradients whose own gradients are asked for in vain."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        raise UnsupportedError(NO_SECOND)


NO_SECOND = "gradients of gradients are not built. Differentiate once (create_graph=False)"


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward whose results refuse to be differentiated: with create_graph=True a penalty on them would
    otherwise have no gradient, and nobody would be told. (torch's decorator of this name refuses only where
    the gradients that come in are differentiated too.)"""

    @wraps(backward)
    def run(ctx: Any, *slopes: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *slopes)
        with torch.no_grad():
            found = backward(ctx, *slopes)
        there = [t.detach().requires_grad_() for t in found if t is not None]
        refused = iter(_Refused.apply(*there) if there else ())  # type: ignore[arg-type]
        return tuple(None if t is None else next(refused) for t in found)

    return run


def apply(function: Any, *arguments: Any) -> Any:
    """`function.apply`, without its look for transforms of torch.func: there are none (`rules.is_traced`)."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


class _Forward(SingleLevel):
    """Takes the operator and that of its gradient, how to save and to differentiate; the dispatch keys below;
    and a call."""

    @staticmethod
    def forward(
        ctx: Any, how: Any, keys: Any, form: Any, integers: Any, numbers: Any, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        (operator, _), save, _ = ctx.how = how
        with torch.enable_grad():  # for the levels of torch.func below: this runs under no_grad
            found = _below(operator, keys, list(tensors), integers, numbers, form.text)
        save(ctx, (tensors, integers, numbers, form), found)
        ctx.mark_non_differentiable(*(t for t in found if not t.is_floating_point()))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Any, ...]:
        (_, operator), _, gradients = ctx.how

        def compute(tensors: Any, integers: Any, numbers: Any, form: Any, *rest: Any) -> Sequence[Tensor]:
            return operator(tensors, integers, numbers, form.text, *rest)

        return (*[None] * 5, *gradients(ctx, slopes, ctx.needs_input_grad[5:], compute))


class _Backward(SingleLevel):
    """Takes the operator, the dispatch keys below, what the operator takes, and all tensors among that once
    more, for autograd to see."""

    @staticmethod
    def forward(ctx: Any, operator: Any, keys: Any, arguments: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return tuple(_below(operator, keys, *arguments))

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        raise UnsupportedError(NO_SECOND)


def register(
    library: Any, name: str, prepared: Callable[..., tuple[Any, int]], save: Save, gradients: Gradients
) -> None:
    """Differentiate `torch.ops.gossamer.NAME`.

    prepared: (tensors, integers, numbers, form's text) -> the form of a call whose results hold what the
    gradient wants, and how many of them the call asked for. save, gradients: as `step_operator` has them."""
    operators = tuple(getattr(torch.ops.gossamer, part).default for part in (name, f"{name}_backward"))

    def forward(keys: Any, tensors: Any, integers: Any, numbers: Any, form: str) -> list[Tensor]:
        keys = keys & torch._C._after_autograd_keyset
        if not _learns(tensors):
            return _below(operators[0], keys, tensors, integers, numbers, form)
        whole, asked = prepared(tensors, integers, numbers, form)
        with enable_single_level_autograd_function():
            given = ((operators, save, gradients), keys, whole, integers, numbers, *tensors)
            return list(_Forward.apply(*given))[:asked]  # type: ignore[attr-defined]

    def backward(keys: Any, *arguments: Any) -> list[Tensor]:
        keys = keys & torch._C._after_autograd_keyset
        tensors = [t for place in (0, 4, 5) for t in arguments[place]]
        if not _learns(tensors):
            return _below(operators[1], keys, *arguments)
        with enable_single_level_autograd_function():
            return list(_Backward.apply(operators[1], keys, arguments, *tensors))  # type: ignore[attr-defined]

    library.impl(name, forward, "Autograd", with_keyset=True)
    library.impl(f"{name}_backward", backward, "Autograd", with_keyset=True)


def recording() -> Any:
    """In it autograd records, in an operator's kernel too, which is called below autograd."""
    key, excluded = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for one in (key.AutogradFunctionality, key.AutogradOther, key.AutogradNestedTensor):
        excluded = excluded.remove(one)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _learns(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _below(operator: Any, keys: Any, *arguments: Any) -> list[Tensor]:
    """An operator by what comes after autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys, *arguments)

"""How calls take part in torch's autograd and autocast: eager ones, and those of the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, maybe_current_level
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevel

from ...ir.errors import UnsupportedError
from ..form import Form
from .attention import INPUTS, LIBRARY, attention_backward, differentiate, evaluate

_TENSORS = (Tensor, torch.nn.Parameter)


def is_traced(tensors: Iterable[Any]) -> bool:
    """Whether torch watches what becomes of tensors: a tracer, a transform, a mode, a subclass."""
    if (
        torch._C._len_torch_dispatch_stack() > 0
        or maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    for tensor in tensors:  # noqa: SIM110  each call comes here, and a generator takes longer
        if type(tensor) not in _TENSORS and isinstance(tensor, Tensor):
            return True
    return False


# autograd -------------------------------------------------------------------------------------------


def wants_gradient(tensors: Iterable[Any]) -> bool:
    """Whether a gradient may be asked for."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # each call comes here, and a generator takes longer
            if getattr(tensor, "requires_grad", False):
                return True
    return False


def _save(
    ctx: Any, form: Form, integers: Any, numbers: Any, tensors: Sequence[Tensor], found: Sequence[Tensor]
) -> None:
    """Keep what the gradient needs: the inputs, the output and the LSE."""
    ctx.call = form, integers, numbers
    ctx.save_for_backward(found[0], found[1], *tensors)
    ctx.set_materialize_grads(False)


def gradients_of(
    ctx: Any, needs: Sequence[bool], grads: Sequence[Tensor | None], compute: Callable[..., Sequence[Tensor]]
) -> list[Tensor | None]:
    """A gradient, or None, for query, key, value and each of the other tensors.

    needs: whether it is wanted. compute: `differentiate`, or the operator."""
    form, *numbers = ctx.call
    out, lse, query, key, value, *tensors = ctx.saved_tensors
    grad_out, grad_lse, *others = grads
    for name, grad in zip(form.options.extra[1:], others, strict=True):
        if grad is not None:
            what = {"max": "the largest scores have", "column_sums": "column sums have"}[name]
            raise UnsupportedError(f"attention: {what} no gradient. Use them detached: result.detach()")
    names = (*INPUTS, *form.names)
    wanted = [name for name, need in zip(names, needs, strict=True) if need]
    if not wanted or (grad_out is None and grad_lse is None):
        return [None] * len(names)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    results = (out, lse, grad_out, grad_lse)
    found = compute(form, query, key, value, tensors, *numbers, *results, wanted)
    by_name = dict(zip(wanted, found, strict=True))
    return [by_name.get(name) for name in names]


def with_lse(form: Form) -> Form:
    """The form whose results hold the LSE, second, as a gradient wants it."""
    if form.options.extra[:1] == ("lse",):
        return form
    return form._replace(options=form.options._replace(extra=("lse", *form.options.extra)))


def _asked(form: Form, found: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of results with the LSE, those of the form."""
    return tuple(found) if len(found) == 1 + len(form.options.extra) else (found[0], *found[2:])


def attend(form: Form, integers: Any, numbers: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(out, *extra) of an eager call whose gradient may be asked for. tensors: query, key, value, others."""
    return _asked(form, _Attention.apply(with_lse(form), integers, numbers, *tensors))  # type: ignore[arg-type]


class _Attention(torch.autograd.Function):
    """An eager call, without text and dispatcher.

    Takes a form, integers, numbers, query, key, value and the other tensors."""

    @staticmethod
    def forward(ctx: Any, form: Form, integers: Any, numbers: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *others = tensors
        found = evaluate(form, query, key, value, others, integers, numbers)
        _save(ctx, form, integers, numbers, tensors, found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        found = gradients_of(ctx, ctx.needs_input_grad[3:], grads, operator_of(grads))
        return None, None, None, *found


def operator_of(grads: Sequence[Tensor | None]) -> Callable[..., Sequence[Tensor]]:
    """What computes the gradients of an eager call, given those of its results.

    With gradients on, somebody may differentiate what it returns: the operator knows how to refuse; and it
    knows how to map over gradients that come in batches. Raises UnsupportedError for torch.autograd's own."""
    for grad in grads:
        if grad is not None and is_legacy_batchedtensor(grad):
            raise UnsupportedError(
                "attention: torch.autograd maps over gradients (is_grads_batched, vectorize) by "
                "a vmap that takes no operators of libraries. Use torch.func.jacrev, or torch.func.vmap "
                "over torch.func.vjp"
            )
    return attention_backward if torch.is_grad_enabled() or is_traced(grads) else differentiate


class _Forward(SingleLevel):
    """The operator's autograd, at one level of `torch.func`. Takes the dispatch keys below, then as above."""

    @staticmethod
    def forward(
        ctx: Any, keys: Any, form: Form, integers: Any, numbers: Any, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        query, key, value, *others = tensors
        with torch.enable_grad():  # for the levels of torch.func below: this runs under no_grad
            found = _below(FORWARD, keys, query, key, value, others, integers, numbers, form.text)
        _save(ctx, form, integers, numbers, tensors, found)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, None, None, *gradients_of(ctx, ctx.needs_input_grad[4:], grads, attention_backward)


class _Backward(SingleLevel):
    """The gradient of a gradient, which there is not. Takes the dispatch keys below, what the operator takes,
    and all tensors among that once more, for autograd to see."""

    @staticmethod
    def forward(ctx: Any, keys: Any, arguments: Sequence[Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return tuple(_below(BACKWARD, keys, *arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError(
            "attention: gradients of gradients are not built. Differentiate once (create_graph=False), or "
            "compute this attention with torch.nn.functional.scaled_dot_product_attention"
        )


FORWARD = torch.ops.gossamer.attention.default
BACKWARD = torch.ops.gossamer.attention_backward.default


def _below(operator: Any, keys: Any, *arguments: Any) -> list[Tensor]:
    """An operator by what comes after autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys, *arguments)


def _autograd(
    keys: Any, query: Tensor, key: Tensor, value: Tensor, tensors: Any, integers: Any, numbers: Any, form: str
) -> list[Tensor]:
    keys = keys & torch._C._after_autograd_keyset
    if not wants_gradient((query, key, value, *tensors)):
        return _below(FORWARD, keys, query, key, value, tensors, integers, numbers, form)
    parsed = Form.parse(form)
    with enable_single_level_autograd_function():
        given = (with_lse(parsed), integers, numbers, query, key, value, *tensors)
        return list(_asked(parsed, _Forward.apply(keys, *given)))  # type: ignore[attr-defined]


def _autograd_backward(keys: Any, *arguments: Any) -> list[Tensor]:
    keys = keys & torch._C._after_autograd_keyset
    tensors = [t for t in (*arguments[:3], *arguments[3], *arguments[7:11]) if t is not None]
    if not wants_gradient(tensors):
        return _below(BACKWARD, keys, *arguments)
    with enable_single_level_autograd_function():
        return list(_Backward.apply(keys, arguments, *tensors))  # type: ignore[attr-defined]


LIBRARY.impl("attention", _autograd, "Autograd", with_keyset=True)
LIBRARY.impl("attention_backward", _autograd_backward, "Autograd", with_keyset=True)

# autocast -------------------------------------------------------------------------------------------


def autocast(first: Tensor, *others: Any) -> tuple[Any, ...]:
    """Tensors as torch.autocast wants them where the first one is: in its dtype, but for float64. What else
    comes is passed on."""
    kind, given = first.device.type, (first, *others)
    if not torch.is_autocast_enabled(kind):
        return given
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if _casts(t) else t for t in given)


def _casts(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64


def _autocast(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> list[Tensor]:
    kind = query.device.type
    query, key, value = autocast(query, key, value)
    with torch.autocast(kind, enabled=False):
        return FORWARD(query, key, value, *arguments)


for _key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("attention", _autocast, _key)

"""`gossamer.operators`: loading it registers `torch.ops.gossamer`, which exported programs call.

Also decided here: which calls of `gossamer.attention` go through the operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from ..ir.errors import UnsupportedError
from . import operator_vmap as operator_vmap
from .form import Call, take_apart
from .operator import attention
from .operator_rules import attend, wants_gradient

_TENSORS = (Tensor, torch.nn.Parameter)


def is_traced(tensors: Any) -> bool:
    """Whether torch watches what becomes of tensors: a tracer, a transform, a mode, a subclass."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or not all(type(t) in _TENSORS for t in tensors if isinstance(t, Tensor))
    )


def call_operator(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, ...]:
    """(out, *extra) of a call that is traced, or whose gradient may be asked for.

    Raises UnsupportedError for a gradient that does not exist."""
    differentiable = wants_gradient((query, key, value, *call.tensors))
    if "block_table" not in call.held and key.shape[0] == 1 and query.shape[0] != 1:
        key, value = (t.expand(query.shape[0], -1, -1, -1) for t in (key, value))
    form, tensors, integers, floats = take_apart(call, query.device)
    _refuse((query, key, value, *tensors), ("query", "key", "value", *form.names), differentiable)
    if is_traced((query, key, value, *tensors)):
        return attention(form, query, key, value, tensors, integers, floats)
    return attend(form, integers, floats, query, key, value, *tensors)


def _refuse(tensors: Any, names: Any, differentiable: bool) -> None:
    """Raise UnsupportedError for tangents, and for gradients that do not exist."""
    for name, tensor in zip(names, tensors, strict=True):
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise UnsupportedError(
                f"attention.{name} has a tangent, and forward-mode gradients are not built. "
                f"Pass forward_ad.unpack_dual({name}).primal"
            )
        if differentiable and tensor.requires_grad and name[0] == "c":
            raise UnsupportedError(
                f"attention: {name}, a tensor that the mask captured, requires a gradient, and there is "
                "none: a pair attends or does not. Capture tensor.detach(), or let a score_mod add what "
                "should learn to the scores"
            )

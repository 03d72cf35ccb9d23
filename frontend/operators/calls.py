"""Which calls of `gossamer.attention` go through its operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from ...ir.errors import UnsupportedError
from ..form import Call, take_apart
from ..plan import Recalled
from . import vmap as vmap  # registers how the operators are mapped
from .attention import attention
from .learned import remember
from .rules import attend


def call_operator(
    query: Tensor, key: Tensor, value: Tensor, call: Call, known: Recalled | None, learns: bool
) -> tuple[Tensor, ...]:
    """(out, *extra) of a call whose gradient may be asked for, or that is traced (by the operator).

    known: what is known of the former (`learned.look_up`); None for the latter.

    Raises UnsupportedError for a gradient that does not exist."""
    if known is None and "block_table" not in call.held and key.shape[0] == 1 and query.shape[0] != 1:
        key, value = (t.expand(query.shape[0], -1, -1, -1) for t in (key, value))
    parts = form, tensors, integers, floats = take_apart(call, query.device)
    _refuse((query, key, value, *tensors), ("query", "key", "value", *form.names), learns)
    if known is None:
        return attention(form, query, key, value, tensors, integers, floats)
    found = attend(form, integers, floats, query, key, value, *tensors)
    remember(known, parts)
    return found


def _refuse(tensors: Any, names: Any, learns: bool) -> None:
    """Raise UnsupportedError for tangents, and for gradients that do not exist."""
    for name, tensor in zip(names, tensors, strict=True):
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise UnsupportedError(
                f"attention.{name} has a tangent, and forward-mode gradients are not built. "
                f"Pass forward_ad.unpack_dual({name}).primal"
            )
        if learns and name == "block_table":
            raise UnsupportedError(
                "attention: pages of keys have no gradient. Call under torch.no_grad(), or detach query, key "
                "and value"
            )
        if learns and name[0] == "c" and tensor.requires_grad:
            raise UnsupportedError(
                f"attention: {name}, a tensor that the mask captured, requires a gradient, and there is "
                "none: a pair attends or does not. Capture tensor.detach(), or let a score_mod add what "
                "should learn to the scores"
            )

"""The operators under `torch.func.vmap`: mapped examples become more batches, or one call each.

Batches serve where only query, key and value (and what follows from them) are mapped and nothing tells one
batch from another. Everything else, such as mapped captured tensors, runs example by example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..form import Form
from ..term import mentions
from .attention import BACKWARD, FORWARD, INPUTS, LIBRARY


def _batches_are_alike(form: Form) -> bool:
    """Whether nothing that the call reads depends on the batch."""
    return not any(mentions(part.term, "b") for _, part in form.parts) and set(form.held) <= {"sinks"}


def _folded(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(B, ...) of every example, mapped or not, as (size * B, ...)."""
    if tensor is None:
        return None
    whole = tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
    return whole.flatten(0, 1)


def each(
    operator: Any, size: int, dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[list[Tensor], list[int]]:
    """One call for each example."""

    def at(i: int, dim: Any, argument: Any) -> Any:
        if isinstance(dim, (list, tuple)):
            return [at(i, d, a) for d, a in zip(dim, argument, strict=True)]
        return argument if dim is None else argument.select(dim, i)

    found = [operator(*(at(i, d, a) for d, a in zip(dims, arguments, strict=True))) for i in range(size)]
    results = [torch.stack(parts) for parts in zip(*found, strict=True)]
    return results, [0] * len(results)


def _is_mapped(dim: Any) -> bool:
    return any(map(_is_mapped, dim)) if isinstance(dim, (list, tuple)) else dim is not None


def _vmap(info: Any, dims: Any, *arguments: Any) -> tuple[list[Tensor], list[int]]:
    operator, size = torch.ops.gossamer.attention, info.batch_size
    if _is_mapped(dims[3]) or not _batches_are_alike(Form.parse(arguments[6])):
        return each(operator, size, dims, arguments)
    inputs = [_folded(t, d, size) for t, d in zip(arguments[:3], dims[:3], strict=True)]
    found = operator(*inputs, *arguments[3:])
    return [t.unflatten(0, (size, -1)) for t in found], [0] * len(found)


def _vmap_backward(info: Any, dims: Any, *arguments: Any) -> tuple[list[Tensor], list[int]]:
    operator, size = torch.ops.gossamer.attention_backward, info.batch_size
    *_, wanted = arguments
    shared = not set(wanted.split(",")) <= set(
        INPUTS
    )  # of a tensor that examples share, each has its gradient
    if _is_mapped(dims[3]) or shared or not _batches_are_alike(Form.parse(arguments[6])):
        return each(operator, size, dims, arguments)
    inputs = [_folded(t, d, size) for t, d in zip(arguments[:3], dims[:3], strict=True)]
    results = [_folded(t, d, size) for t, d in zip(arguments[7:11], dims[7:11], strict=True)]
    found = operator(*inputs, *arguments[3:7], *results, wanted)
    return [t.unflatten(0, (size, -1)) for t in found], [0] * len(found)


torch.library.register_vmap(FORWARD, _vmap, lib=LIBRARY)
torch.library.register_vmap(BACKWARD, _vmap_backward, lib=LIBRARY)

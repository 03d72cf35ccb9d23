"""Loads through tensor descriptors: the copy engine of NVIDIA GPUs (TMA) fetches a box of a tensor.

A kernel asks for them by the hint `descriptors`. A load is spelled so when it is a box: every index is a
scalar, or a scalar plus the coordinate of one tile axis, and what its guard leaves out is what lies outside
the tensor, which the engine fills with zeros. Any other load keeps its addresses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy

from ..ir.expr import Expr, integer
from ..ir.kernel import Load, Tensor
from .triton_expr import Speller
from .triton_scope import BYTES, Scope

MAX_RANK = 5
MAX_EXTENT = 256  # of a box, in elements
ALIGN = 16  # bytes
SHARED_ALIGN = 128  # bytes, of where the engine writes: whatever precedes a box in shared memory is a box too


@dataclass(frozen=True)
class Box:
    """A load of a box: where it starts, its extents by dimension of the tensor, those of them that a tile
    has, and which of these is which dimension of the tile."""

    start: tuple[Expr, ...]
    extents: tuple[int, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]


def box_of(load: Load, axes: tuple[str, ...], speller: Speller, scope: Scope) -> Box | None:
    """The box that a load fetches; None when it is none, or when the engine cannot fetch it.

    axes: those of the tile, in the order of its dimensions."""
    tensor = scope.tensors[load.tensor]
    last = len(tensor.shape) - 1
    described = tensor.unit == last and tensor.align >= ALIGN and last < MAX_RANK
    if not described or tensor.dtype != load.dtype or not load.other.is_zero:
        return None
    starts, extents, found = [], [], []
    for entry in load.index:
        scalar, varying = speller.split(entry)
        axis = _axis(varying, axes)
        if varying != 0 and axis is None:
            return None
        if axis is not None:
            found.append(axis)
        starts.append(scalar)
        extents.append(scope.axis(axis).size if axis is not None else 1)
    whole = math.prod(extents) * BYTES[tensor.dtype] % SHARED_ALIGN == 0
    fits = max(extents) <= MAX_EXTENT and extents[last] > 1 and whole
    if sorted(found) != sorted(axes) or not fits or not _bounded(load, tensor):
        return None
    shape = tuple(scope.axis(a).size for a in found)
    return Box(tuple(starts), tuple(extents), shape, tuple(map(found.index, axes)))


def _axis(varying: Expr, axes: tuple[str, ...]) -> str | None:
    return next((a for a in axes if varying == integer(a)), None)


def _bounded(load: Load, tensor: Tensor) -> bool:
    """Whether the guard says no more than that indices lie within the tensor."""
    known = {entry >= 0 for entry in load.index}
    for entry, extent in zip(load.index, tensor.shape, strict=True):
        size = sympy.Integer(extent) if isinstance(extent, int) else integer(str(extent))
        known.add(entry < size)
    return all(part == sympy.true or part in known for part in sympy.And.make_args(load.guard))

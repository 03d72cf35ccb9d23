"""Tensors of a model that hold a mask: their closed form, for as long as nobody writes to them.

A buffer of two values, such as `torch.tril(torch.ones(n, n))` or 0 and -inf, is read once and recovered by
`Mask.from_dense`; reads of it become conditions on indices. Each call compares the identity and the version
of the buffer, and looks again at one that has changed.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..captured import as_numpy
from ..term import Term, constant, rename
from ..term_expr import from_expr
from .terms import names_in, reads_in, replaced, tidy

MOST = 1 << 26  # entries of a buffer that is still worth looking at
MOST_FORMS = 4096
_FORMS: dict[tuple[int, int], Term | None] = {}
_SERIALS: dict[int, tuple[Any, StorageWeakRef, int]] = {}
_COUNTER = itertools.count()


def identity(tensor: torch.Tensor) -> tuple[int, int] | None:
    """What changes when a tensor is replaced or written to; None where torch does not count."""
    try:
        version = tensor._version
    except RuntimeError:  # torch's inference tensors
        return None
    place, memory = id(tensor), StorageWeakRef(tensor.untyped_storage())
    known = _SERIALS.get(place)
    if known is None or known[0]() is not tensor or known[1] != memory:  # `.data = other` counts nothing
        _SERIALS[place] = known = (weakref.ref(tensor), memory, next(_COUNTER))
    return known[2], version


def closed_form(tensor: torch.Tensor) -> Term | None:
    """The element [q, k] of a buffer as a term, by its only two dimensions; None where none is found."""
    now = identity(tensor)
    if now is None:
        return None
    if now not in _FORMS:
        if len(_FORMS) >= MOST_FORMS:
            _FORMS.clear()
        _FORMS[now] = _look(tensor)
    return _FORMS[now]


def _look(tensor: torch.Tensor) -> Term | None:
    shape = tuple(n for n in tensor.shape if n != 1)
    if len(shape) != 2 or tensor.numel() > MOST:
        return None
    array = as_numpy(tensor).reshape(shape)
    low, high = array.min(), array.max()
    if low == high:
        return None
    chosen = array == high
    if not (chosen | (array == low)).all():
        return None
    condition = _recovered(shape, np.packbits(chosen).tobytes())
    if condition is None or array.dtype == np.bool_:
        return condition and ("where", condition, 1, 0)
    return ("where", condition, _number(array.dtype, high), _number(array.dtype, low))


def _number(dtype: Any, value: Any) -> Term:
    return constant(float(value)) if dtype.kind == "f" else int(value)


class _Bits:
    """The bits of a matrix, compared by their digest."""

    def __init__(self, bits: bytes) -> None:
        self.bits, self.digest = bits, hashlib.sha256(bits).digest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bits) and self.digest == other.digest


def _recovered(shape: tuple[int, int], bits: bytes) -> Term | None:
    return _recover(shape, _Bits(bits))


@lru_cache(maxsize=256)
def _recover(shape: tuple[int, int], bits: _Bits) -> Term | None:
    from ...passes.recover import recover

    count = shape[0] * shape[1]
    chosen = np.unpackbits(np.frombuffer(bits.bits, np.uint8), count=count).reshape(shape).astype(bool)
    mask, tables = recover(chosen)
    return None if tables else from_expr(mask.predicate)


def with_closed_forms(term: Term, constants: dict[str, torch.Tensor]) -> Term:
    """The term in which reads of constant tensors are conditions, where they have a closed form."""
    for read in reads_in(term):
        tensor = constants.get(read[1])
        form = None if tensor is None else closed_form(tensor)
        if tensor is None or form is None:
            continue
        at = [index for index, n in zip(read[2:], tensor.shape, strict=True) if n != 1]
        depends = [names_in(index) & {"q", "k"} for index in at]
        if len(at) == 2 and sorted(map(sorted, depends)) == [["k"], ["q"]]:
            term = replaced(term, read, rename(form, dict(zip(("q", "k"), at, strict=True))))
    return tidy(term)

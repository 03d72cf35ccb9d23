"""Ids of experts in a graph: what is known of them from the operation that gives them."""

from __future__ import annotations

from typing import Any

from ..term import Term
from .expert import first_argument, name_of
from .ops import arguments, value_of
from .sums import as_integer
from .tensor import AT, Reader

PLACE = "?"  # how the names of places start


def choice_of(factor: Term) -> tuple[Any, Term]:
    """(the read of ids, what it is equal to) of a condition; (None, None) for another."""
    if isinstance(factor, tuple) and factor[0] == "eq":
        for a, b in (factor[1:], factor[:0:-1]):
            a = as_integer(a)
            if isinstance(a, tuple) and a[0] == "read" and a[1][0] != PLACE:
                return a, as_integer(b)
    return None, None


def is_choice(reader: Reader, name: str) -> int | None:
    """The dimension along which a leaf of ids has different ones: that of `topk`, `sort` or `argsort`."""
    leaf = reader.leaves.get(name)
    if leaf is None or AT in name:
        return None
    source: Any = leaf
    if name_of(leaf) in ("getitem", "indices"):
        source = first_argument(leaf)
        if name_of(leaf) == "getitem" and leaf.args[1] != 1:
            return None
        if name_of(source) not in ("topk", "sort"):
            return None
    elif name_of(leaf) != "argsort":
        return None
    first = ("input", "k", "dim") if name_of(source) == "topk" else ("input", "dim")
    dim = arguments(source, *first)[-1]
    return (
        None
        if not isinstance(dim, (int, type(None)))
        else (-1 if dim is None else dim) % value_of(leaf).dim()
    )


def count_of(reader: Reader, ids: Term) -> int:
    """How many numbers ids may be, from 0 on; 0 where that is not known."""
    leaf = reader.leaves.get(ids[1]) if isinstance(ids, tuple) and ids[0] == "read" else None
    if leaf is None or AT in ids[1]:
        return 0
    source: Any = leaf
    if name_of(leaf) in ("getitem", "indices"):
        source = first_argument(leaf)
        if name_of(source) not in ("topk", "max", "sort") or (
            name_of(leaf) == "getitem" and leaf.args[1] != 1
        ):
            return 0
    elif name_of(leaf) != "argmax":
        return 0
    given, *rest = arguments(source, "input", *(("k", "dim") if name_of(source) == "topk" else ("dim",)))
    dim = rest[-1]
    if dim is None and name_of(source) in ("argmax", "max"):
        return 0
    size = value_of(given).shape[-1 if dim is None else dim]
    return size if isinstance(size, int) else 0

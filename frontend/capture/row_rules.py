"""Operations whose elements are sums of products: tensors behind each other, what is spread over experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..term import FALSE, Term
from .expert import name_of
from .ops import Operation, arguments, operation, value_of
from .sums import Summand
from .tensor import Opaque, is_one, same_size, size_term
from .terms import is_minus_infinity, number, tidy

if TYPE_CHECKING:
    from .rows import Rows


def _stacked(rows: Rows, leaf: fx.Node, indices: list[Term]) -> list[Summand] | None:
    """Tensors behind each other, along a new dimension or one of theirs."""
    parts, dim = arguments(leaf, "tensors", "dim")
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, fx.Node) for p in parts):
        return None
    d = (dim or 0) % len(indices)
    if name_of(leaf) == "stack":
        which, inner = indices[d], indices[:d] + indices[d + 1 :]
    else:
        sizes = [value_of(p).shape[d] for p in parts]
        if not all(same_size(n, sizes[0]) for n in sizes):
            return None
        try:
            size = size_term(sizes[0])
        except Opaque:
            return None
        which = rows.tidied(("floordiv", indices[d], size))
        inner = [*indices[:d], rows.tidied(("mod", indices[d], size)), *indices[d + 1 :]]
    found: list[Summand] = []
    for n, part in enumerate(parts):
        condition = tidy(("eq", which, n))
        if condition == FALSE:
            continue
        here = rows.expand(condition)
        found += [c.times(p) for c in here for p in rows.expand(rows.element(part, leaf, inner))]
    return found


def _any(rows: Rows, leaf: fx.Node, indices: list[Term]) -> list[Summand] | None:
    """Whether a condition holds anywhere along a dimension, where it does once at most."""
    source, dim, keeps = arguments(leaf, "input", "dim", "keepdim")
    if not isinstance(dim, int) or value_of(source).dtype != torch.bool:
        return None
    shape = value_of(source).shape
    d = dim % len(shape)
    name = rows.fresh(shape[d])
    rest = indices[:d] + indices[d + 1 if keeps else d :]
    inner = rows.expand(rows.element(source, leaf, [*rest[:d], name, *rest[d:]]))
    if len(inner) != 1 or inner[0].bound or not rows.is_exclusive(Summand(inner[0].factors, (name,))):
        return None
    return [Summand(inner[0].factors, (name,))]


def _scattered(rows: Rows, leaf: fx.Node, indices: list[Term]) -> list[Summand] | None:
    """What is written to the places of a token's choices in zeros."""
    base, dim, ids, given = arguments(leaf, "input", "dim", "index", "src")
    given = leaf.kwargs.get("value", given)
    if not isinstance(dim, int) or not isinstance(ids, fx.Node) or leaf.kwargs.get("reduce") is not None:
        return None
    if operation(leaf) != Operation("scatter"):
        memory = rows.reader.memory
        if memory.writes[memory.group[leaf]] != [leaf] or memory.group[leaf] is not base:
            return None
    if number(rows.plain.operand(base, leaf).term) not in (0, False):
        return None
    spread = _spread(rows, leaf, indices)
    if spread is None:
        return None
    condition, name, places = spread
    if isinstance(given, fx.Node):
        value = rows.expand(rows.element(given, leaf, places))
    elif isinstance(given, (bool, int, float)):
        value = [Summand(scale=float(given))] if given else []
    else:
        return None
    return [Summand((condition,), (name,)).times(v) for v in value]


def _spread(rows: Rows, leaf: fx.Node, indices: list[Term]) -> tuple[Term, str, list[Term]] | None:
    """(the condition under which a scatter writes an element, the index of choices in it, what is read)."""
    base, dim, ids = arguments(leaf, "input", "dim", "index")
    shape = value_of(ids).shape
    d = dim % len(shape)
    if len(shape) != len(indices) or not all(
        same_size(m, n) for i, (m, n) in enumerate(zip(shape, value_of(base).shape, strict=True)) if i != d
    ):
        return None
    name = rows.fresh(shape[d])
    places = [*indices[:d], 0 if is_one(shape[d]) else name, *indices[d + 1 :]]
    condition = tidy(("eq", rows.element(ids, leaf, places), indices[d]))
    if not is_one(shape[d]) and not rows.excludes(condition, name):
        return None
    return condition, name, places


def _softmax(rows: Rows, leaf: fx.Node, indices: list[Term]) -> list[Summand] | None:
    """A softmax of -inf everywhere but at the places of a token's choices, where it is not 0."""
    source, dim = arguments(leaf, "input", "dim")
    if not isinstance(source, fx.Node) or not isinstance(dim, int):
        return None
    source, whole = rows.reader.memory.current(source, leaf)
    if not whole or name_of(source) != "scatter" or source.kwargs:
        return None
    base, along, ids, given = arguments(source, "input", "dim", "index", "src")
    if not isinstance(along, int) or not isinstance(ids, fx.Node) or not isinstance(given, fx.Node):
        return None
    if (along - dim) % len(indices) or not is_minus_infinity(rows.plain.operand(base, source).term):
        return None
    spread = _spread(rows, source, indices)
    if spread is None:
        return None
    name = f"%{leaf.name}"
    return [Summand((spread[0], ("readf", name, *indices)), (spread[1],))]


RULES: dict[str, Callable[[Rows, fx.Node, list[Term]], list[Summand] | None]] = {
    "stack": _stacked,
    "cat": _stacked,
    "any": _any,
    "scatter": _scattered,
    "softmax": _softmax,
}

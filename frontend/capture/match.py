"""What every kind of attention in a graph is matched to, and how its tensors are given roles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..term import Term, children
from .operand import Axes, Operand, parts_of
from .ops import value_of
from .tensor import LeftAlone, Reader, axis, is_one, same_size, size_term
from .terms import divided, tidy


@dataclass
class Attention:
    """One attention of a graph.

    node: what its output replaces. tensors: query, key and value, with their roles in operands; out: the
    roles of the output. score, prob: what becomes of a score and a probability, over b, h, q, k, score, prob,
    the graph's tensors and its sizes. sizes: of the batch axes, q, k, d and e. empty: what the original gives
    rows of nothing but -inf, "nan" or "zero". inside: nodes that exist only when the original runs; aside:
    those that only make a shift by row, whose gradients are 0. sinks: the name of a tensor of one more score
    a head, which takes part in the softmax and has no value.
    least: the lowest number of the softmax's dtype; what is lower is -inf to it."""

    node: fx.Node
    tensors: tuple[fx.Node, fx.Node, fx.Node]
    operands: tuple[Operand, Operand, Operand]
    out: tuple[Term, ...]
    axes: Axes
    sizes: dict[str, Any]
    score: Term
    prob: Term = "prob"
    empty: str = "nan"
    inside: set[fx.Node] = field(default_factory=set)
    aside: set[fx.Node] = field(default_factory=set)
    sinks: str | None = None
    least: float = -math.inf


def named_batch(shape: tuple[Any, ...]) -> tuple[Axes, dict[str, str], dict[str, Any]]:
    """The batch axes of scores (..., q_len, kv_len), the role of each index, and the sizes by role."""
    rank = len(shape)
    roles = {axis(rank - 2): "q", axis(rank - 1): "k"}
    batch = [axis(d) for d in range(rank - 2) if not is_one(shape[d])]
    roles |= {name: f"a{i}" for i, name in enumerate(batch)}
    sizes = {roles[axis(d)]: n for d, n in enumerate(shape) if axis(d) in roles}
    return Axes(tuple(f"a{i}" for i in range(len(batch)))), roles, sizes


def operand_roles(
    shapes: Sequence[tuple[Any, ...]], batch: tuple[Any, ...], roles: dict[str, str], gqa: bool
) -> list[Operand]:
    """Query, key and value of shapes (..., length, size) whose leading dimensions broadcast to `batch`."""
    operands = []
    for shape, ends in zip(shapes, (("q", "d"), ("k", "d"), ("k", "e")), strict=True):
        first = len(batch) + 2 - len(shape)
        own: list[Term] = []
        for d, n in enumerate(shape[:-2], first):
            name, size = roles.get(axis(d), 0), batch[d]
            shares = gqa and d == len(batch) - 1 and isinstance(n, int) and isinstance(size, int) and n < size
            own.append(0 if is_one(n) else ("floordiv", name, size // n) if shares else name)  # type: ignore[operator]
        operands.append(Operand((*own, *ends)))
    return operands


def shared(
    reader: Reader, node: fx.Node, operand: Operand, at: fx.Node, sizes: dict[str, Any]
) -> tuple[fx.Node, Operand]:
    """The tensor whose heads an operand repeats, if it repeats heads; else the operand."""
    tensor = reader.operand(node, at)
    term = simplified(tensor.at(list(operand.roles)), sizes)
    if not isinstance(term, tuple) or term[0] != "readf" or not any(map(_is_shared, term[2:])):
        return checked(reader, node, at), operand
    base, roles = reader.leaves[term[1]], tuple(term[2:])
    if not all(is_role(role) for role in roles) or not is_whole(base, roles, sizes):
        return checked(reader, node, at), operand
    return reader.tensor_of(term[1]), Operand(roles)


def is_role(index: Term) -> bool:
    try:
        return index == 0 or bool(parts_of(index))
    except ValueError:
        return False


def _is_shared(index: Term) -> bool:
    return isinstance(index, tuple) and index[0] == "floordiv"


def is_whole(node: fx.Node, roles: Sequence[Term], sizes: dict[str, Any]) -> bool:
    """Whether indices of these roles reach every element of a tensor."""
    return all(
        same_size(n, 1) if role == 0 else size_term(n) == _extent(role, sizes)
        for n, role in zip(value_of(node).shape, roles, strict=True)
    )


def _extent(role: Term, sizes: dict[str, Any]) -> Term:
    extent: Term = 1
    for name, _ in parts_of(role):
        n = size_term(sizes[name[1] if isinstance(name, tuple) else name])
        extent = tidy(("mul", extent, divided(n, name[2], {})[0] if isinstance(name, tuple) else n))
    return extent


def check_whole(node: fx.Node, roles: Sequence[Term], sizes: dict[str, Any], what: str) -> None:
    if not is_whole(node, roles, sizes):
        raise LeftAlone(f"its {what} are used in part")


def checked(reader: Reader, node: fx.Node, at: fx.Node) -> fx.Node:
    reader.check(node, at)
    return node


def simplified(term: Term, sizes: dict[str, Any]) -> Term:
    """The term with quotients and remainders worked out for indices below these sizes."""
    if not isinstance(term, tuple) or term[0] == "f":
        return term
    kept = len(term) - len(children(term))
    parts = [simplified(t, sizes) for t in term[kept:]]
    if term[0] in ("floordiv", "mod") and isinstance(parts[1], int) and parts[1] > 0:
        return divided(parts[0], parts[1], sizes)[term[0] == "mod"]
    return tidy((*term[:kept], *parts))

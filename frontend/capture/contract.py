"""Products of a graph that sum over one dimension of two tensors, however they are spelled.

`matmul`, `bmm`, `mm`, `einsum` and the product in `baddbmm` become a Contraction: a label for every dimension
of both operands and of the result. Dimensions of size 1 that broadcast have the label None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .ops import operation, value_of
from .tensor import is_one

Labels = tuple[str | None, ...]


@dataclass(frozen=True)
class Contraction:
    """result[out] = sum over `summed` of left[left_labels] * right[right_labels]."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: Labels
    right_labels: Labels
    out: tuple[str, ...]
    summed: str

    def operand(self, which: int) -> tuple[fx.Node, Labels]:
        return ((self.left, self.left_labels), (self.right, self.right_labels))[which]


def contraction(node: fx.Node) -> Contraction | None:
    """The product that a node computes; None where it is none, or none of this kind."""
    did = operation(node)
    if did is None or did.writes:
        return None
    if did.name in ("matmul", "bmm", "mm"):
        return _matmul(node)
    if did.name == "baddbmm":
        return _matmul(node, first=1)
    return _einsum(node) if did.name == "einsum" else None


_NAMES = ("input", "other", "mat2", "tensor2", "batch1", "batch2")


def _operands(node: fx.Node, first: int) -> tuple[fx.Node, fx.Node] | None:
    given = [*node.args, *(node.kwargs[k] for k in _NAMES if k in node.kwargs)][first:]
    nodes = [x for x in given if isinstance(x, fx.Node) and isinstance(value_of(x), torch.Tensor)]
    return (nodes[0], nodes[1]) if len(nodes) == len(given) == 2 else None


def _matmul(node: fx.Node, first: int = 0) -> Contraction | None:
    operands = _operands(node, first)
    if operands is None:
        return None
    shapes = [tuple(value_of(x).shape) for x in operands]
    if min(map(len, shapes)) < 2:
        return None
    rank = max(map(len, shapes))
    batch = tuple(f"n{d}" for d in range(rank - 2))
    labels: list[Labels] = []
    for shape, ends in zip(shapes, (("r", "x"), ("x", "c")), strict=True):
        own = batch[rank - len(shape) :]
        labels.append((*_broadcast(own, shape, node), *ends))
    return Contraction(node, *operands, labels[0], labels[1], (*batch, "r", "c"), "x")


def _broadcast(labels: tuple[str, ...], shape: tuple[Any, ...], node: fx.Node) -> Labels:
    result = tuple(value_of(node).shape)[-2 - len(labels) : -2]
    sizes = zip(labels, shape, result, strict=False)
    return tuple(None if is_one(n) and not is_one(m) else label for label, n, m in sizes)


def _einsum(node: fx.Node) -> Contraction | None:
    given: tuple[Any, ...] = node.args
    equation, *operands = given
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
        return None
    equation = equation.replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    left, comma, right = inputs.partition(",")
    if not arrow or not comma or "," in right:
        return None
    if any(len(set(part)) < len(part) for part in (left, right, out)):
        return None
    summed = (set(left) | set(right)) - set(out)
    if len(summed) != 1 or not summed <= set(left) & set(right):
        return None
    sizes: dict[str, Any] = {}
    for part, x in zip((left, right), operands, strict=True):
        if not isinstance(x, fx.Node):
            return None
        for label, n in zip(part, value_of(x).shape, strict=True):
            if sizes.setdefault(label, n) is not n and (is_one(n) != is_one(sizes[label])):
                return None
    first, second = operands
    return Contraction(node, first, second, tuple(left), tuple(right), tuple(out), summed.pop())

"""Attention in a graph, found by what it computes, and why some of it is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx

from .contract import Contraction, contraction
from .flex import flex, is_flex
from .fused import fused
from .match import Attention
from .ops import arguments, operation
from .softmax import softmax_of
from .tensor import LeftAlone, Opaque, Reader
from .terms import reads_in
from .written import weights_of, written


def find_attention(reader: Reader, graph: fx.Graph) -> Iterator[tuple[fx.Node, Attention | str]]:
    """Every attention of a graph, or why it is left alone, with the node that stands for it."""
    seen: set[fx.Node] = set()
    for node in list(graph.nodes):
        did = operation(node)
        if did is None:
            if is_flex(node):
                yield node, _attempt(lambda node=node: flex(reader, node))
            continue
        if did.name == "scaled_dot_product_attention":
            yield node, _attempt(lambda node=node: fused(reader, node))
            continue
        product = contraction(node)
        if product is None:
            continue
        try:
            weights = weights_of(reader, product)
        except LeftAlone:
            continue
        if weights is not None:
            seen.add(weights[1])
            if not _has_columns(product, weights[0]):
                continue
            yield weights[1], _attempt(lambda p=product, w=weights: written(reader, p, *w))
    for node in graph.nodes:
        found = softmax_of(node)
        if found is not None and node not in seen and _of_products(reader, node, found[0]):
            yield node, _why_alone(reader, node)


def _has_columns(product: Contraction, which: int) -> bool:
    """Whether what probabilities weigh has columns of its own, as values have; a router's has none."""
    (_, labels), (_, its) = product.operand(which), product.operand(1 - which)
    return any(label is not None and label not in labels for label in its)


def _attempt(match: Callable[[], Attention]) -> Attention | str:
    try:
        return match()
    except (LeftAlone, Opaque, ValueError) as reason:
        return str(reason)


def _of_products(reader: Reader, softmax: fx.Node, given: fx.Node) -> bool:
    try:
        term = reader.operand(given, softmax).term
    except LeftAlone:
        return False
    return any(contraction(reader.leaves[r[1]]) is not None for r in reads_in(term))


def _why_alone(reader: Reader, softmax: fx.Node) -> str:
    for user in _descendants(softmax, 6):
        did = operation(user)
        if did is not None and did.name == "dropout":
            training = arguments(user, "input", "p", "training")[2]
            if training is not False:
                return "dropout in training, whose random numbers are the framework's"
    return "its probabilities are not summed over the keys with values"


def _descendants(node: fx.Node, depth: int) -> Iterator[fx.Node]:
    for user in node.users if depth else ():
        yield user
        yield from _descendants(user, depth - 1)

"""Routers in a graph whose experts nothing else has found: reports say so, whatever programs do with ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from .adapters import adapted
from .expert import first_argument, name_of

UNKNOWN = (
    "what is done with the ids of topk is no mixture of experts that is known: a sum over experts whose rows "
    "are chosen by ids == e or weighed by what one_hot or scatter spreads; slots; rows sorted for grouped_mm"
)
_LINEAR = ("linear", "addmm", "mm", "matmul")


def unknown_routers(graph: fx.Graph, found: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, str]]:
    """Every `topk` of what a matrix makes of tokens, whose ids are used before the next one, by no node that
    was found."""
    known, order = set(found), {node: n for n, node in enumerate(graph.nodes)}
    routers = [node for node in graph.nodes if name_of(node) == "topk" and _is_linear(node)]
    ends = [*(order[node] for node in routers[1:]), len(order)]
    for router, end in zip(routers, ends, strict=False):  # no routers, one end
        reached = _reached([u for u in router.users if 1 in u.args], order, end)
        products = any(name_of(node) in _LINEAR for node in order if order[router] < order[node] < end)
        if reached and products and not any(n in known or n.target is adapted for n in reached):
            yield router, UNKNOWN


def _is_linear(choice: fx.Node) -> bool:
    """Whether numbers come from a product with a matrix, by operations on each. What begins with the same
    tensor on both sides is no such product, but one of queries and keys."""
    node: fx.Node | None = choice
    while node is not None and name_of(node) not in _LINEAR:
        node = first_argument(node)
    if node is None:
        return False
    operands = [_origin(a) for a in node.args[:3] if isinstance(a, fx.Node)]
    return len(set(operands)) == len(operands) > 1


def _origin(node: fx.Node) -> fx.Node:
    while (source := first_argument(node)) is not None:
        node = source
    return node


def _reached(nodes: Iterable[fx.Node], order: dict[fx.Node, int], end: int) -> set[fx.Node]:
    """What is computed from nodes, before a place in the graph."""
    reached: set[fx.Node] = set()
    left = [user for node in nodes for user in node.users]
    while left:
        node = left.pop()
        if node not in reached and order[node] < end:
            reached.add(node)
            left += node.users
            if name_of(node) == "setitem":
                left += node.all_input_nodes[0].users
    return reached

"""Mixtures of experts in a graph, found by what they compute.

An expert is two products with a function of the first one's elements between them; which tokens it gets, and
with which weights, says a tensor of ids. Four ways to put experts together are known:

    a loop       `rows.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, places, None])` for every
                 expert e, where (places, tokens) are those of the ids that are e
    slots        every expert computes the tokens in its slots (GShard)
    groups       rows sorted by expert, and `grouped_mm`
    all tokens   every expert computes all tokens, and the sum over experts weighs them by the weights of the
                 ids, spread by `one_hot` or `scatter` over the experts, zeros elsewhere

As in attention, elements are terms (frontend/capture/tensor.py), so the order of dimensions and of operations
between products makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from .dispatch import combines, dispatched
from .expert import Experts, name_of
from .expert_gates import dense, weighs_experts
from .expert_loop import ends_loop, loop
from .grouped import MM, grouped, sums_groups
from .routers import unknown_routers
from .tensor import LeftAlone, Opaque, Reader

WAYS = ((sums_groups, grouped), (ends_loop, loop), (weighs_experts, dense), (combines, dispatched))


def find_experts(reader: Reader, graph: fx.Graph) -> Iterator[tuple[fx.Node, Experts | str]]:
    """Every mixture of experts of a graph, or why it is left alone, with the node that stands for it."""
    nodes, found = list(graph.nodes), []
    ways = WAYS if any(name_of(node) in MM for node in nodes) else WAYS[1:]
    for node in nodes:
        for is_one_of, match in ways:
            if is_one_of(reader, node):
                found.append(node)
                try:
                    yield node, match(reader, node)
                except (LeftAlone, Opaque, ValueError) as reason:
                    yield node, str(reason)
                break
    yield from unknown_routers(graph, found)

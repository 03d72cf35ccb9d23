"""Mixtures of experts in a graph, found by what they compute.

An expert is two products with a function of the first one's elements between them; which tokens it gets, and
with which weights, says a tensor of ids. Three ways to put experts together are known:

    mixtures     what is computed for every token is a sum over its ids and experts, as loops over experts
                 and sums over all of them are, however rows are chosen and put back (mixture.py)
    slots        every expert computes the tokens in its slots (GShard)
    groups       rows sorted by expert, and `grouped_mm`

As in attention, elements are terms (frontend/capture/tensor.py), so the order of dimensions and of operations
between products makes no difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import fx

from .dispatch import combines, dispatched
from .expert import Experts, name_of
from .grouped import MM, grouped, sums_groups
from .mixture import Mixtures
from .routers import unknown_routers
from .tensor import LeftAlone, Opaque, Reader

MOST = 4  # ends of one chain of sums that are looked at: what follows experts is added in few steps
WAYS = ((sums_groups, grouped), (combines, dispatched))


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
    for node, match in _mixtures(reader, graph, list(found)):
        found.append(node)
        yield node, match
    yield from unknown_routers(graph, found)


def _mixtures(
    reader: Reader, graph: fx.Graph, others: list[fx.Node]
) -> Iterator[tuple[fx.Node, Experts | str]]:
    """The largest sums that are mixtures; of those that are none, the reason of the smallest.

    others: nodes that something else was found to stand for, whose experts are not looked at again."""
    mixtures, known, failed = Mixtures(reader, graph), set(), []
    tried: Counter[fx.Node] = Counter()
    for node in (*others, *mixtures.candidates()):
        chain = mixtures.chain(node)
        if tried[chain] >= MOST:
            continue
        tried[chain] += 1
        try:
            match = mixtures.match(node)
        except (LeftAlone, Opaque, ValueError, RecursionError) as reason:
            match = None
            failed.append((node, str(reason)))
        if node in others:
            known |= mixtures.seen.get(node, set())
        elif match is not None and not mixtures.seen[node] & known:
            known |= mixtures.seen[node]
            tried[chain] = MOST
            yield node, match
    for node, why in reversed(failed):
        rows = mixtures.seen.get(node, set())
        if rows and not rows & known:
            known |= rows
            yield node, why

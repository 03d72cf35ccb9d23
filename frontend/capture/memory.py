"""Writes to tensors in a graph: what a tensor holds at a node, and whether it still does so at the end.

Tensors that may share memory form a group, named by the node that made it. A node that writes to a group is
a new value of what it wrote to; what was derived from the group before is out of date from there on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .ops import VIEWS, operation, value_of


class Memory:
    """The groups of a graph and the writes to them, in order."""

    def __init__(self, graph: fx.Graph) -> None:
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.group: dict[fx.Node, fx.Node] = {}
        self.writes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            did = operation(node)
            first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            shares = did is not None and (did.writes or did.name in VIEWS)
            if did is not None and first is not None and shares and not _is_apart(node, did.name, first):
                self.group[node] = self.group[first]
                if did.writes:
                    self.writes[self.group[first]].append(node)
            else:
                self.group[node] = node

    def settled(self, node: fx.Node, at: fx.Node) -> bool:
        """Whether nothing writes to a tensor after the node `at`."""
        return all(self.place[w] <= self.place[at] for w in self.writes[self.group[node]])

    def replace(self, node: fx.Node, call: fx.Node) -> None:
        """Let a call, inserted before a node, give what the node gave.

        What is written to later is a copy: the call keeps its result for gradients, as the node did not."""
        call.meta, self.place[call], self.group[call] = dict(node.meta), self.place[node], call
        if value_of(node).requires_grad and not self.settled(node, node):
            with node.graph.inserting_after(call):
                call = node.graph.call_method("clone", (call,))
            call.meta, self.place[call], self.group[call] = dict(node.meta), self.place[node], call
        node.replace_all_uses_with(call)

    def sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes whose work a node sees: those of its inputs, and those that wrote to them before."""
        for source in node.all_input_nodes:
            yield source
            yield from (w for w in self.writes[self.group[source]] if self.place[w] < self.place[node])

    def is_last_word(self, write: fx.Node) -> bool:
        """Whether nobody sees what a node writes to a tensor that the graph has made."""
        group = self.group[write]
        members = [node for node, its in self.group.items() if its is group]
        seen = any(self.place[user] > self.place[write] for node in members for user in node.users)
        return not seen and group.op not in ("placeholder", "get_attr")

    def current(self, node: fx.Node, at: fx.Node) -> tuple[fx.Node, bool]:
        """(the node that gives what `node` holds when `at` reads it, whether it gives all of that).

        False: something wrote to a part of it, so that only reading the tensor itself tells."""
        group = self.group[node]
        between = [w for w in self.writes[group] if self.place[node] < self.place[w] < self.place[at]]
        if not between:
            return node, True
        last = between[-1]
        chain = {group, *self.writes[group]}
        names = {did.name for w in between if (did := operation(w)) is not None}
        whole = node in chain and "setitem" not in names and all(w.args[0] in chain for w in between)
        return (last, True) if whole and group.op != "placeholder" else (node, False)


def _is_apart(node: fx.Node, name: str, source: fx.Node) -> bool:
    """Whether a node takes one of the results of an operation, each of which has memory of its own, or copies
    what it reads by tensors of indices or conditions."""
    if name != "getitem":
        return False
    did = operation(source)
    if did is not None and did.name in _SEVERAL and isinstance(value_of(source), tuple):
        return True
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return any(isinstance(item, fx.Node) and _copies(value_of(item)) for item in items)


def _copies(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and (index.dim() > 0 or index.dtype == torch.bool)


_SEVERAL = frozenset(("topk", "sort", "max", "min", "kthvalue", "median", "cummax", "cummin", "aminmax"))

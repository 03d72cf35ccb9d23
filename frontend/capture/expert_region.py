"""The part of a graph that only computes a mixture of experts, and what takes its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .expert import Experts, name_of
from .memory import Memory
from .ops import operation, value_of
from .tensor import LeftAlone

RANDOM = ("dropout", "bernoulli", "multinomial", "rand", "randn", "rand_like", "randn_like", "randint")


def written(node: fx.Node) -> fx.Node:
    """The tensor that a node writes to, where it gives none itself; else the node."""
    return node.args[0] if name_of(node) == "setitem" else node  # type: ignore[return-value]


class Region:
    """The nodes that nobody needs once something else gives the result of a mixture of experts.

    writes: those to the tensor that holds the result, if it is written to. dead: all nodes."""

    def __init__(self, match: Experts, memory: Memory) -> None:
        self.match, self.memory = match, memory
        last = memory.place[match.node]
        root = match.root
        self.writes = [] if root is None else [w for w in memory.writes[root] if memory.place[w] <= last]
        self.dead = self._dead()

    def _dead(self) -> set[fx.Node]:
        ends = {self.match.node, *self.writes}
        above, stack = set(ends), list(ends)
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in self.memory.group:  # what stands for a part that was compiled
                    continue
                for node in (source, *self.memory.writes[self.memory.group[source]]):
                    if node not in above and self.memory.place[node] < self.memory.place[self.match.node]:
                        above.add(node)
                        stack.append(node)
        dead = {node for node in above if _is_removable(node)} | ends
        stack = list(dead)
        while stack:  # what asserts something of numbers of rows goes with the rows
            for user in stack.pop().users:
                if user not in dead and _is_of_sizes(user):
                    dead.add(user)
                    stack.append(user)
        while True:
            alive = {node for node in dead - ends if not self._may_go(node, dead)}
            if not alive:
                return dead
            dead -= alive

    def _may_go(self, node: fx.Node, dead: set[fx.Node]) -> bool:
        did = operation(node)
        if did is not None and did.writes and self.memory.group[node] not in dead:
            return False
        if _is_of_sizes(node) and not node.users:
            return all(source in dead for source in node.all_input_nodes)
        last = self.memory.place[self.match.node]
        root = self.match.root
        return all(
            user in dead or (self.memory.group[node] is root and self.memory.place.get(user, last) > last)
            for user in node.users
        )

    def check(self) -> None:
        """Raise LeftAlone where something else needs what experts compute, or a sum of some of them."""
        for network in self.match.networks:
            for product in (*network.firsts, network.second):
                if product.node not in self.dead:
                    raise LeftAlone("what some of its experts compute is used elsewhere too")
        if not self.writes:
            return
        first, last = (self.memory.place[w] for w in (self.writes[0], self.writes[-1]))
        for member in self._members():
            for user in member.users:
                between = first < self.memory.place.get(user, last) < last
                if between and user not in self.dead and self.memory.group[user] is not self.match.root:
                    raise LeftAlone("a sum of some of its experts is used elsewhere too")
                if (
                    between
                    and operation(user) is not None
                    and user not in self.dead
                    and name_of(user) == "clone"
                ):
                    raise LeftAlone("a sum of some of its experts is used elsewhere too")

    def _members(self) -> list[fx.Node]:
        return [node for node, group in self.memory.group.items() if group is self.match.root]

    def replace(self, call: fx.Node) -> None:
        """Let a call give the result, and remove what nobody needs then."""
        node, root, graph = self.match.node, self.match.root, self.match.node.graph
        if root is not None:
            last = self.memory.place[node]
            kept = {m for m in self._members() if m not in (root, *self.writes)}
            kept = {m for m in kept if self.memory.place[m] < last}
            target: Any = node.args[0]
            while target in self.writes:
                target = target.args[0]
            if target is not root or any(self.memory.place.get(u, 0) > last for m in kept for u in m.users):
                with graph.inserting_after(call):  # views share what is written to
                    made = graph.call_method("copy_", (target, call))
                made.meta = dict(call.meta)
                self._note(made, root)
                self.memory.writes[root].append(made)
                for write in self.writes:
                    write.replace_all_uses_with(made)
            else:
                for member in (root, *self.writes):
                    for user in list(member.users):
                        if user is not call and self.memory.place.get(user, last + 1) > last:
                            user.replace_input_with(member, call)
        else:
            node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
        self._note(call, call)
        for gone in reversed(list(graph.nodes)):
            if gone in self.dead and not gone.users:
                graph.erase_node(gone)
                self.memory.group.pop(gone, None)

    def _note(self, node: fx.Node, group: fx.Node) -> None:
        self.memory.place[node], self.memory.group[node] = self.memory.place[self.match.node], group


def _is_removable(node: fx.Node) -> bool:
    did = operation(node)
    return (did is not None and did.name not in RANDOM) or _is_of_sizes(node)


def _is_of_sizes(node: fx.Node) -> bool:
    """Whether a node computes a number of rows, or asserts something of one."""
    if node.op not in ("call_function", "call_method"):
        return False
    value, name = value_of(node), getattr(node.target, "__name__", str(node.target))
    asserts = value is None and ("assert" in name or "check" in name)
    return asserts or isinstance(value, (torch.SymInt, torch.SymBool))

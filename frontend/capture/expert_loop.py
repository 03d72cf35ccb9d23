"""Experts in a graph whose rows are added up, one expert after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..term import Term
from .expert import Experts, Network, behind, first_argument, name_of, network, same_node
from .memory import Memory
from .ops import arguments, operation, value_of
from .product import linear_product
from .tensor import LeftAlone, Reader, same_size
from .terms import number, reads_in, tidy

ADD = "index_add"


def ends_loop(reader: Reader, node: fx.Node) -> bool:
    """Whether a node adds rows to a tensor, and nothing adds more to it."""
    did = operation(node)
    if did is None or did.name != ADD:
        return False
    if did.writes:
        writes = reader.memory.writes[reader.memory.group[node]]
        return [w for w in writes if name_of(w) == ADD][-1] is node
    return not any(name_of(user) == ADD and user.args[0] is node for user in node.users)


def loop(reader: Reader, last: fx.Node) -> Experts:
    """The experts whose loop a node ends. Raises LeftAlone."""
    memory, did = reader.memory, operation(last)
    assert did is not None
    if did.writes:
        root, adds = memory.group[last], list(memory.writes[memory.group[last]])
        _check_unseen(memory, root, adds)
    else:
        root, adds = _chain(last)
    if number(reader.of(root).term) != 0:
        raise LeftAlone("its rows are added to a tensor that is not zeros")
    found: dict[int, _One] = {}
    for add in adds:
        one = _one(reader, add)
        if one.expert in found:
            raise LeftAlone(f"expert {one.expert} comes twice")
        found[one.expert] = one
    if sorted(found) != list(range(len(found))):
        raise LeftAlone("its experts are not numbered from 0 on")
    first, *rest = ordered = [found[e] for e in sorted(found)]
    if any(one.same != first.same for one in rest):
        raise LeftAlone("its experts take different tokens, ids or weights, or compute something different")
    if not same_size(value_of(first.x).shape[0], value_of(root).shape[0]):
        raise LeftAlone("its result has other rows than its tokens")
    networks, scales = [one.network for one in ordered], [one.scale for one in ordered]
    return Experts(last, root if did.writes else None, first.x, first.ids, first.weights, networks, scales)


@dataclass
class _One:
    """One expert of a loop: its number, and what a node of graph_expert.Experts has."""

    expert: int
    network: Network
    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    scale: fx.Node

    @property
    def same(self) -> tuple[Any, ...]:
        return self.x, self.ids, self.weights, self.network.activation, self.network.halves


def _chain(last: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """(what rows are added to first, the additions)."""
    found = [last]
    while (source := first_argument(found[0])) is not None and name_of(source) == ADD:
        if len(source.users) > 1:
            raise LeftAlone("a sum of some of its experts is used elsewhere too")
        found.insert(0, source)
    if source is None:
        raise LeftAlone("its rows are added to a tensor that is not zeros")
    return source, found


def _check_unseen(memory: Memory, root: fx.Node, adds: list[fx.Node]) -> None:
    """Raise LeftAlone where something else writes to the sum, or sees it before its last expert."""
    last = memory.place[adds[-1]]
    for member in [node for node, group in memory.group.items() if group is root]:
        early = [u for u in member.users if u not in adds and memory.place[u] < last]
        if early or (member in adds and name_of(member) != ADD):
            raise LeftAlone("a sum of some of its experts is used elsewhere too")


def _one(reader: Reader, add: fx.Node) -> _One:
    """The expert whose rows a node adds."""
    _, dim, tokens, rows, alpha = arguments(add, "input", "dim", "index", "source", "alpha")
    if dim not in (0, -2) or alpha not in (None, 1) or not isinstance(tokens, fx.Node):
        raise LeftAlone("rows are added along another dimension, or scaled")
    term = tidy(reader.operand(rows, add).term)
    reads = reads_in(term)
    products = [r for r in reads if r[2:] == ("i0", "i1")]
    scales = [r for r in reads if r[2:] in (("i0", 0), ("i0",))]
    if not (len(products) == len(scales) == 1) or term not in (
        ("mul", products[0], scales[0]),
        ("mul", scales[0], products[0]),
    ):
        raise LeftAlone("what it adds is no product of an expert's rows and weights")
    leaf, scale = reader.made(products[0][1]), reader.made(scales[0][1])
    second = linear_product(leaf)
    if second is None:
        raise LeftAlone("its rows are no product with a matrix")
    expert, given = network(reader, second, leaf, ("i0",), linear_product)
    x = same_node([_rows_of(node, tokens) for node in given])
    weights, places = _weights_of(scale, tokens)
    ids, which = _chosen(reader, tokens, places)
    return _One(which, expert, x, ids, weights, scale)


def _rows_of(node: fx.Node, at: fx.Node) -> fx.Node:
    """x, where a node is x[at], or a view of the same rows of it."""
    rows = behind(node, ("reshape", "view", "to", "contiguous"))
    source = first_argument(rows)
    if source is not None and name_of(rows) == "getitem":
        items: Any = rows.args[1] if isinstance(rows.args[1], tuple) else (rows.args[1],)
        first, *rest = [item for item in items if item is not None] or [None]
        shape = value_of(source).shape
        whole = first is at and all(item is Ellipsis or item == slice(None) for item in rest)
        if whole and len(shape) == 2 and same_size(shape[1], value_of(node).shape[-1]):
            return source
    if name_of(rows) == "index_select" and arguments(rows, "input", "dim", "index")[1:] == [0, at]:
        return arguments(rows, "input")[0]
    raise LeftAlone("its first product is not of the tokens that its rows are added to")


def _weights_of(node: fx.Node, tokens: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(weights, places), where a node is weights[tokens, places], with a dimension of size 1 or without."""
    source = first_argument(node)
    if source is not None and name_of(node) == "getitem" and isinstance(node.args[1], tuple):
        items: Any = [item for item in node.args[1] if item is not None]
        if len(items) == 2 and items[0] is tokens and isinstance(items[1], fx.Node):
            return source, items[1]
    raise LeftAlone("its rows are not scaled by one weight for each token and choice")


def _chosen(reader: Reader, tokens: fx.Node, places: fx.Node) -> tuple[fx.Node, int]:
    """(ids, an expert), where tokens and places are those of the ids that are that expert."""
    source = first_argument(tokens)
    if (
        source is None
        or first_argument(places) is not source
        or {*map(name_of, (tokens, places))} != {"getitem"}
    ):
        raise LeftAlone("its tokens and places are not found together")
    condition = first_argument(source)
    in_parts = name_of(source) == "where" and len(source.args) == 1 and not source.kwargs
    if condition is None or not (
        in_parts or (name_of(source) == "nonzero" and source.kwargs == {"as_tuple": True})
    ):
        raise LeftAlone("its tokens are not those where a condition holds")
    ids, expert, order = _is_expert(reader, reader.operand(condition, source).term)
    if order != (f"i{tokens.args[1]}", f"i{places.args[1]}"):
        raise LeftAlone("its tokens and places are exchanged")
    return ids, expert


def _is_expert(reader: Reader, term: Term) -> tuple[fx.Node, int, tuple[Term, ...]]:
    """(ids, an expert, the indices of ids), where a term says which ids are that expert."""
    if isinstance(term, tuple) and term[0] == "ne" and term[2] == 0:
        term = term[1]
    expert: Any = None
    ids, order = None, ()
    if isinstance(term, tuple) and term[0] == "read" and name_of(reader.made(term[1])) == "one_hot":
        *order, expert = term[2:]
        ids = first_argument(reader.leaves[term[1]])
    elif isinstance(term, tuple) and term[0] == "eq" and isinstance(term[1], tuple) and term[1][0] == "read":
        order, expert, ids = term[1][2:], term[2], reader.leaves[term[1][1]]
    if not isinstance(expert, int) or ids is None or len(order) != 2:
        raise LeftAlone("its tokens are not those whose ids are an expert")
    return ids, expert, tuple(order)

"""Mixtures of experts in a graph, found by what they compute.

An expert is two products with a function of the first one's elements between them; which tokens it gets, and
with which weights, says a tensor of ids. Two ways to put experts together are known:

    a loop       `rows.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, places, None])` for every
                 expert e, where (places, tokens) are those of the ids that are e
    all tokens   every expert computes all tokens, and the sum over experts weighs them by the weights of the
                 ids, spread by `one_hot` or `scatter` over the experts, zeros elsewhere

As in attention, elements are terms (frontend/graph_tensor.py), so the order of dimensions and of operations
between products makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .graph_contract import contraction
from .graph_memory import Memory
from .graph_ops import Operation, arguments, operation, value_of
from .graph_product import Product, linear_product, stacked_product
from .graph_tensor import LeftAlone, Opaque, Reader, Tensor, same_size
from .graph_terms import number, reads_in, replaced, tidy
from .term import Term


@dataclass
class Network:
    """What an expert computes: the first products, whose elements are x0 and x1, a term of these, the second.

    halves: how one product holds both of x0 and x1: "split", "interleaved"; None: it does not."""

    firsts: tuple[Product, ...]
    activation: Term
    halves: str | None
    second: Product


@dataclass
class Experts:
    """The experts of a graph. node: what gives the result. root: the tensor that it is written to, if it is.

    networks: one of every expert, or one whose products hold all experts. x: (T, H). ids, weights: (T, k)."""

    node: fx.Node
    root: fx.Node | None
    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    networks: list[Network]


def find_experts(reader: Reader, graph: fx.Graph) -> Iterator[tuple[fx.Node, Experts | str]]:
    """Every mixture of experts of a graph, or why it is left alone, with the node that stands for it."""
    for node in list(graph.nodes):
        for is_one_of, match in ((_ends_loop, _loop), (_weighs_experts, _dense)):
            if is_one_of(reader, node):
                try:
                    yield node, match(reader, node)
                except (LeftAlone, Opaque, ValueError) as reason:
                    yield node, str(reason)


# ---- one expert ----


def network(
    reader: Reader, second: Product, at: fx.Node, rows: tuple[Term, ...]
) -> tuple[Network, list[fx.Node]]:
    """(the expert whose second product is known, what its first products take).

    rows: the indices of a row of the second product's input, whose last index is that of the summed one."""
    tensor = reader.operand(second.source, at)
    inner, place = tensor.shape[-1], f"i{len(tensor.shape) - 1}"
    firsts: dict[str, Product] = {}
    used: dict[Term, tuple[str, str]] = {}
    for read in reads_in(tensor.term):
        leaf = reader.leaves[read[1]]
        product = linear_product(leaf) if len(rows) == 1 else stacked_product(leaf)
        if read[0] != "readf" or product is None or tuple(read[2:-1]) != rows:
            raise LeftAlone(f"between its products stands {leaf.name}, which is no product of its tokens")
        part = _part(read[-1], place, inner)
        if part is None:
            raise LeftAlone("the columns of its first product are rearranged")
        firsts[read[1]] = product
        used[read] = read[1], part
    names, halves = _names(used)
    wide = 1 if halves is None else 2
    if not firsts or any(not same_size(p.columns, inner * wide) for p in firsts.values()):
        raise LeftAlone("the columns of its first product are used in part")
    term = tensor.term
    for read, key in used.items():
        term = replaced(term, read, names[key])
    order = sorted(firsts, key=lambda name: min(v for k, v in names.items() if k[0] == name))
    products = tuple(firsts[name] for name in order)
    return Network(products, tidy(term), halves, second), [p.source for p in products]


def _same(nodes: list[fx.Node]) -> fx.Node:
    if len(set(nodes)) > 1:
        raise LeftAlone("its first products are of different tokens")
    return nodes[0]


def _part(index: Term, place: str, inner: Any) -> str | None:
    """Which part of a first product's columns an index of the second's input reads."""
    if not isinstance(inner, int):
        return "whole" if index == place else None
    known = {
        "whole": place,
        "upper": ("add", inner, place),
        "even": ("mul", 2, place),
        "odd": ("add", 1, ("mul", 2, place)),
    }
    return next((name for name, term in known.items() if tidy(term) == tidy(index)), None)


def _names(used: dict[Term, tuple[str, str]]) -> tuple[dict[tuple[str, str], str], str | None]:
    keys = list(dict.fromkeys(used.values()))
    parts = {part for _, part in keys}
    if len({name for name, _ in keys}) == 1 and parts in ({"whole", "upper"}, {"even", "odd"}):
        names = {key: "x1" if key[1] in ("upper", "odd") else "x0" for key in keys}
        return names, "split" if "whole" in parts else "interleaved"
    if parts != {"whole"} or len(keys) > 2:
        raise LeftAlone("the columns of its first product are rearranged")
    return {key: f"x{i}" for i, key in enumerate(keys)}, None


# ---- loops ----


def _ends_loop(reader: Reader, node: fx.Node) -> bool:
    """Whether a node adds rows to a tensor, and nothing adds more to it."""
    did = operation(node)
    if did is None or did.name != "index_add":
        return False
    if did.writes:
        return [w for w in reader.memory.writes[reader.memory.group[node]] if _adds(w)][-1] is node
    return not any(_adds(user) and user.args[0] is node for user in node.users)


def _adds(node: fx.Node) -> bool:
    did = operation(node)
    return did is not None and did.name == "index_add"


def _loop(reader: Reader, last: fx.Node) -> Experts:
    memory, adds = reader.memory, _added(reader.memory, last)
    root = memory.group[last] if operation(last).writes else adds[0].args[0]  # type: ignore[union-attr]
    assert isinstance(root, fx.Node)
    if number(reader.of(root).term) != 0:
        raise LeftAlone("its rows are added to a tensor that is not zeros")
    if operation(last).writes:  # type: ignore[union-attr]
        _check_unseen(memory, root, adds)
    found: dict[int, tuple[Network, fx.Node, fx.Node, fx.Node]] = {}
    for add in adds:
        expert, *parts = _one_of_loop(reader, add)
        if expert in found:
            raise LeftAlone(f"expert {expert} comes twice")
        found[expert] = tuple(parts)  # type: ignore[assignment]
    if sorted(found) != list(range(len(found))):
        raise LeftAlone("its experts are not numbered from 0 on")
    networks, *others = zip(*(found[e] for e in sorted(found)), strict=True)
    if any(len(set(nodes)) > 1 for nodes in others) or len({(n.activation, n.halves) for n in networks}) > 1:
        raise LeftAlone("its experts take different tokens, ids or weights, or compute something different")
    x, ids, weights = (nodes[0] for nodes in others)
    if not same_size(value_of(x).shape[0], value_of(root).shape[0]):
        raise LeftAlone("its result has other rows than its tokens")
    return Experts(last, root if operation(last).writes else None, x, ids, weights, list(networks))  # type: ignore[union-attr]


def _added(memory: Memory, last: fx.Node) -> list[fx.Node]:
    if operation(last).writes:  # type: ignore[union-attr]
        return list(memory.writes[memory.group[last]])
    found = [last]
    while isinstance(found[0].args[0], fx.Node) and _adds(found[0].args[0]):
        if len(found[0].args[0].users) > 1:
            raise LeftAlone("a sum of some of its experts is used elsewhere too")
        found.insert(0, found[0].args[0])
    return found


def _check_unseen(memory: Memory, root: fx.Node, adds: list[fx.Node]) -> None:
    """Raise LeftAlone where something else writes to the sum, or sees it before its last expert."""
    last = memory.place[adds[-1]]
    for member in [node for node, group in memory.group.items() if group is root]:
        early = [u for u in member.users if u not in adds and memory.place[u] < last]
        if early or (member in adds and not _adds(member)):
            raise LeftAlone("a sum of some of its experts is used elsewhere too")


def _one_of_loop(reader: Reader, add: fx.Node) -> tuple[int, Network, fx.Node, fx.Node, fx.Node]:
    """(the number of an expert, the expert, its x, ids and weights)."""
    _, dim, tokens, rows, alpha = arguments(add, "input", "dim", "index", "source", "alpha")
    if dim not in (0, -2) or alpha not in (None, 1) or not isinstance(tokens, fx.Node):
        raise LeftAlone("rows are added along another dimension, or scaled")
    term = reader.operand(rows, add).term
    reads = reads_in(term)
    products = [r for r in reads if r[2:] == ("i0", "i1")]
    scales = [r for r in reads if r[2:] in (("i0", 0), ("i0",))]
    if len(reads) != 2 or len(products) != 1 or len(scales) != 1:
        raise LeftAlone("what it adds is no product of an expert's rows and weights")
    if tidy(term) not in (("mul", products[0], scales[0]), ("mul", scales[0], products[0])):
        raise LeftAlone("what it adds is no product of an expert's rows and weights")
    second = linear_product(reader.leaves[products[0][1]])
    if second is None:
        raise LeftAlone("its rows are no product with a matrix")
    expert, given = network(reader, second, reader.leaves[products[0][1]], ("i0",))
    x = _same([_rows_of(node, (tokens,)) for node in given])
    weights, places = _weights_of(reader.leaves[scales[0][1]], tokens)
    ids, which = _chosen(reader, tokens, places)
    if value_of(weights).shape != value_of(ids).shape:
        raise LeftAlone("its weights have another shape than its ids")
    return which, expert, x, ids, weights


def _rows_of(node: fx.Node, at: tuple[fx.Node, ...]) -> fx.Node:
    """x, where a node is x[at], or a view of the same shape of it."""
    given = node
    while (did := operation(node)) is not None and did.name in ("reshape", "view", "to", "contiguous"):
        node = node.args[0]  # type: ignore[assignment]
    if did is not None and did.name == "getitem":
        source, items = node.args
        items = items if isinstance(items, tuple) else (items,)
        if tuple(i for i in items if i is not None and i != slice(None) and i is not Ellipsis) == at:
            first = value_of(source)  # type: ignore[arg-type]
            if first.dim() == 2 and same_size(first.shape[1], value_of(given).shape[-1]):
                return source  # type: ignore[return-value]
    if did is not None and did.name == "index_select" and arguments(node, "input", "dim", "index")[1:] == [0, at[0]]:
        return node.args[0]  # type: ignore[return-value]
    raise LeftAlone("its first product is not of the tokens that its rows are added to")


def _weights_of(node: fx.Node, tokens: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(weights, places), where a node is weights[tokens, places], with a dimension of size 1 or without."""
    did = operation(node)
    if did is not None and did.name in ("unsqueeze", "view", "reshape") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        did = operation(node)
    if did is not None and did.name == "getitem" and isinstance(node.args[1], tuple):
        items = [i for i in node.args[1] if i is not None]
        if len(items) == 2 and items[0] is tokens and isinstance(items[1], fx.Node):
            return node.args[0], items[1]  # type: ignore[return-value]
    raise LeftAlone("its rows are not scaled by one weight for each token and choice")


def _chosen(reader: Reader, tokens: fx.Node, places: fx.Node) -> tuple[fx.Node, int]:
    """(ids, an expert), where tokens and places are those of the ids that are that expert."""
    source = tokens.args[0] if tokens.args else None
    did = operation(source) if isinstance(source, fx.Node) else None
    if did is None or not isinstance(source, fx.Node) or places.args[:1] != (source,):
        raise LeftAlone("its tokens and places are not found together")
    if did.name not in ("where", "nonzero") or len(source.args) != 1:
        raise LeftAlone("its tokens are not those where a condition holds")
    held = reader.operand(source.args[0], source)  # type: ignore[arg-type]
    ids, expert, order = _is_expert(reader, held)
    if order != (f"i{tokens.args[1]}", f"i{places.args[1]}"):
        raise LeftAlone("its tokens and places are exchanged")
    return ids, expert


def _is_expert(reader: Reader, tensor: Tensor) -> tuple[fx.Node, int, tuple[Term, Term]]:
    """(ids, an expert, the indices of ids), where a tensor says which ids are that expert."""
    term = tensor.term
    if isinstance(term, tuple) and term[0] == "ne" and term[2] == 0:
        term = term[1]
    if isinstance(term, tuple) and term[0] == "read" and _did(reader, term) == "one_hot":
        *order, expert = term[2:]
        ids = reader.leaves[term[1]].args[0]
    elif isinstance(term, tuple) and term[0] == "eq" and isinstance(term[1], tuple) and term[1][0] == "read":
        order, expert, ids = term[1][2:], term[2], reader.leaves[term[1][1]]
    else:
        raise LeftAlone("its tokens are not those whose ids are an expert")
    if not isinstance(expert, int) or len(order) != 2 or not isinstance(ids, fx.Node):
        raise LeftAlone("its tokens are not those whose ids are an expert")
    return ids, expert, tuple(order)  # type: ignore[return-value]


def _did(reader: Reader, read: Term) -> str | None:
    did = operation(reader.leaves[read[1]])
    return None if did is None else did.name


# ---- every expert for all tokens ----


def _weighs_experts(reader: Reader, node: fx.Node) -> bool:
    """Whether a node sums the results of stacked products, by tensors of one number a token and expert."""
    product = contraction(node)
    if product is None or value_of(node).dim() != 2:
        return False
    sides = [product.operand(0), product.operand(1)]
    return any(_gates(reader, side[0], node) is not None for side in sides)


def _dense(reader: Reader, node: fx.Node) -> Experts:
    product = contraction(node)
    assert product is not None
    sides = [product.operand(0), product.operand(1)]
    which = next(i for i in (0, 1) if _gates(reader, sides[i][0], node) is not None)
    (gates, gate_labels), (outs, labels) = sides[which], sides[1 - which]
    ids, weights = _gates(reader, gates, node)  # type: ignore[misc]
    token, expert = gate_labels
    if expert != product.summed or set(labels) != {token, expert, product.out[1]} or product.out[0] != token:
        raise LeftAlone("its sum over experts is not by token")
    while (did := operation(outs)) is not None and did.name in ("to", "contiguous"):
        outs = outs.args[0]  # type: ignore[assignment]
    second = stacked_product(outs)
    if second is None or [labels.index(x) for x in (expert, token)] != list(second.places[:2]):
        raise LeftAlone("what it weighs are no products of every expert's rows with a matrix")
    at = second.node
    rows = tuple(f"i{d}" for d in range(2))
    found, given = network(reader, second, at, rows)
    x = _same(given)
    order = second.read  # the places of expert and token in the second product's input
    if any(p.places[:2] != order or p.places[2] != 2 for p in found.firsts) or second.read_last != 2:
        raise LeftAlone("the dimensions of its products are exchanged between them")
    if value_of(x).dim() != 2:
        raise LeftAlone("its first products are not of tokens (T, H)")
    return Experts(node, None, x, ids, weights, [found])


def _gates(reader: Reader, node: fx.Node, at: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(ids, weights), where a node (T, E) has the weights of the ids, and zeros elsewhere."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() != 2:
        return None
    while (did := operation(node)) is not None and did.name in ("to", "type_as", "float", "contiguous"):
        node = node.args[0]  # type: ignore[assignment]
    if did is None or did.writes and did.name != "scatter":
        return None
    if did.name == "scatter":
        return _scattered(reader, node)
    if did.name == "sum":
        source, dim = arguments(node, "input", "dim")
        dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
        if value_of(source).dim() != 3 or not isinstance(dim, int) or dim % 3 != 1:
            return None
        return _spread(reader, source)
    product = contraction(node)
    if product is None:
        return None
    for one, other in ((0, 1), (1, 0)):
        (hot, hot_labels), (weights, labels) = product.operand(one), product.operand(other)
        term = reader.operand(hot, node).term
        if hot_labels[1:2] == (product.summed,) and labels == hot_labels[:2] and len(hot_labels) == 3:
            found = _one_hot(reader, term)
            return None if found is None else (found, weights)
    return None


def _spread(reader: Reader, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(ids, weights), where a node is one_hot(ids)[i0, i1, i2] * weights[i0, i1]."""
    did = operation(node)
    if did is None or did != Operation("mul"):
        return None
    for hot, scale in (node.args, node.args[::-1]):
        ids = _one_hot(reader, reader.operand(hot, node).term) if isinstance(hot, fx.Node) else None
        view = operation(scale) if isinstance(scale, fx.Node) else None
        if ids is None or view is None or view.name not in ("getitem", "unsqueeze", "view", "reshape"):
            continue
        weights: Any = scale.args[0]  # type: ignore[union-attr]
        whole, seen = reader.operand(weights, node), reader.operand(scale, node)  # type: ignore[arg-type]
        if len(whole.shape) == 2 and len(seen.shape) == 3 and whole.term == seen.term:
            return ids, weights
    return None


def _one_hot(reader: Reader, term: Term) -> fx.Node | None:
    """ids, where a term is one_hot(ids)[i0, i1, i2]."""
    if isinstance(term, tuple) and term[0] == "cast":
        term = term[2]
    if not isinstance(term, tuple) or term[0] != "read" or term[2:] != ("i0", "i1", "i2"):
        return None
    leaf = reader.leaves[term[1]]
    ids = leaf.args[0] if _did(reader, term) == "one_hot" else None
    return ids if isinstance(ids, fx.Node) else None


def _scattered(reader: Reader, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(ids, weights) of weights that are written to zeros; ids are those of topk, and so differ."""
    base, dim, ids, weights = arguments(node, "input", "dim", "index", "src")
    if dim not in (1, -1) or not isinstance(weights, fx.Node) or not isinstance(ids, fx.Node):
        return None
    source: Any = ids.args[0] if operation(ids) is not None and ids.args else None
    did = operation(source) if isinstance(source, fx.Node) else None
    if did is None or did.name != "topk" or ids.args[1] != 1:
        return None
    if operation(node).writes and reader.memory.writes[reader.memory.group[node]] != [node]:  # type: ignore[union-attr]
        return None
    return (ids, weights) if number(reader.of(base).term) == 0 else None

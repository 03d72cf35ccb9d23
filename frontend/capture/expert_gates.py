"""Experts in a graph that compute every token, and whose results are weighed by numbers that are mostly 0."""

from __future__ import annotations

import torch
from torch import fx

from ..term import Term
from .contract import Labels, contraction
from .expert import Experts, behind, first_argument, name_of, network, same_node
from .ops import Operation, arguments, operation, value_of
from .product import stacked_product
from .tensor import AT, LeftAlone, Reader
from .terms import number

Weighed = tuple[fx.Node, fx.Node]  # ids and weights


def weighs_experts(reader: Reader, node: fx.Node) -> bool:
    """Whether a node sums the results of stacked products, by tensors of one number a token and expert."""
    return _sides(reader, node) is not None


def _sides(
    reader: Reader, node: fx.Node
) -> tuple[Weighed, tuple[fx.Node, Labels], tuple[fx.Node, Labels]] | None:
    """(ids and weights, the operand of a product that has their weights, the one of experts' results)."""
    product = contraction(node)
    if product is None or value_of(node).dim() != 2:
        return None
    for which in (0, 1):
        gates, outs = product.operand(which), product.operand(1 - which)
        found = _gates(reader, gates[0], node) if len(outs[1]) == 3 else None
        if found is not None:
            return found, gates, outs
    return None


def dense(reader: Reader, node: fx.Node) -> Experts:
    """The experts whose results a node sums. Raises LeftAlone."""
    product, sides = contraction(node), _sides(reader, node)
    assert product is not None and sides is not None
    (ids, weights), (gates, (token, expert)), (outs, labels) = sides
    if expert != product.summed or set(labels) != {token, expert, product.out[1]} or product.out[0] != token:
        raise LeftAlone("its sum over experts is not by token")
    second = stacked_product(behind(outs, ("to", "contiguous")))
    if second is None or [labels.index(x) for x in (expert, token)] != list(second.places[:2]):
        raise LeftAlone("what it weighs are no products of every expert's rows with a matrix")
    found, given = network(reader, second, second.node, ("i0", "i1"), stacked_product)
    x, order = same_node(given), second.read  # which dimensions of the second's input are experts, tokens
    if any(p.places != (*order, 2) for p in found.firsts) or second.read_last != 2:
        raise LeftAlone("the dimensions of its products are exchanged between them")
    if value_of(x).dim() != 2:
        raise LeftAlone("its first products are not of tokens (T, H)")
    return Experts(node, None, x, ids, weights, [found], [gates])


def _gates(reader: Reader, node: fx.Node, at: fx.Node) -> Weighed | None:
    """(ids, weights), where a node (T, E) has the weights of the ids, and zeros elsewhere."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or not value.is_floating_point():
        return None
    node = behind(reader.memory.current(node, at)[0], ("to", "type_as", "float", "contiguous"))
    did = operation(node)
    if did is None:
        return None
    if did.name == "scatter":
        return _scattered(reader, node)
    if did.writes:
        return None
    if did.name == "sum":
        source, dim = arguments(node, "input", "dim")
        dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
        return _spread(reader, source) if value_of(source).dim() == 3 and dim in (1, -2) else None
    product = contraction(node)
    if product is None:
        return None
    for one, other in ((0, 1), (1, 0)):
        (hot, hot_labels), (weights, labels) = product.operand(one), product.operand(other)
        if (*labels, product.out[1]) == hot_labels and labels[1:] == (product.summed,):
            ids = _one_hot(reader, reader.operand(hot, node).term)
            return None if ids is None else (ids, weights)
    return None


def _spread(reader: Reader, node: fx.Node) -> Weighed | None:
    """(ids, weights), where a node is one_hot(ids)[i0, i1, i2] * weights[i0, i1]."""
    if operation(node) != Operation("mul"):
        return None
    for hot, scale in (node.args, node.args[::-1]):
        if not isinstance(hot, fx.Node) or not isinstance(scale, fx.Node):
            continue
        ids, weights = _one_hot(reader, reader.operand(hot, node).term), first_argument(scale)
        if (
            ids is None
            or weights is None
            or name_of(scale) not in ("getitem", "unsqueeze", "view", "reshape")
        ):
            continue
        whole, seen = reader.operand(weights, node), reader.operand(scale, node)
        if len(whole.shape) == 2 and len(seen.shape) == 3 and whole.term == seen.term:
            return ids, weights
    return None


def _one_hot(reader: Reader, term: Term) -> fx.Node | None:
    """ids, where a term is one_hot(ids)[i0, i1, i2]."""
    if isinstance(term, tuple) and term[0] == "cast":
        term = term[2]
    if not isinstance(term, tuple) or term[0] != "read" or term[2:] != ("i0", "i1", "i2"):
        return None
    if AT in term[1]:
        return None
    leaf = reader.leaves[term[1]]
    return first_argument(leaf) if name_of(leaf) == "one_hot" else None


def _scattered(reader: Reader, node: fx.Node) -> Weighed | None:
    """(ids, weights) of weights that are written to zeros; ids are those of topk, and so differ."""
    base, dim, ids, weights = arguments(node, "input", "dim", "index", "src")
    if dim not in (1, -1) or not isinstance(weights, fx.Node) or not isinstance(ids, fx.Node):
        return None
    if name_of(first_argument(ids)) != "topk" or ids.args[1] != 1 or "reduce" in node.kwargs:
        return None
    if operation(node) != Operation("scatter") and reader.memory.writes[reader.memory.group[node]] != [node]:
        return None
    return (ids, weights) if number(reader.of(base).term) == 0 else None

"""A mixture of experts of a captured graph at run time, and how it takes the place of what stood there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..moe.experts import experts
from ..term import Term
from .constant import identity
from .expert import Experts, Network
from .expert_region import Region, written
from .memory import Memory
from .ops import value_of
from .product import Product
from .tensor import LeftAlone, Reader, same_size

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ExpertSite:
    """Calls `gossamer.experts` in place of a part of a graph.

    Its arguments: x, ids, weights, then the matrices of the first products, of the second, and their biases.
    Matrices are one stack, (E, out, in) after `permute(order)`, or one matrix an expert; those are put
    together, which lasts until one of them changes."""

    def __init__(self, activation: Term, halves: str | None, orders: Sequence[Sequence[int]]) -> None:
        self.term, self.halves, self.orders = activation, halves, orders
        self.kept: tuple[Any, Any] = (None, None)
        self.__name__ = "gossamer_experts"

    def __call__(self, x: Any, ids: Any, weights: Any, matrices: Any, biases: Any) -> torch.Tensor:
        given = [
            t for part in (*matrices, *biases) for t in (part if isinstance(part, (list, tuple)) else [part])
        ]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        key = None if learns else tuple((identity(t), t.data_ptr()) for t in given)
        if key is None or self.kept[0] != key or any(place is None for place, _ in key):
            self.kept = key, self.layer(matrices, biases)
        gate_up, down, *offsets = self.kept[1]
        named = dict(zip(("gate_up_bias", "down_bias"), offsets, strict=False))
        options = {"transposed": False, "interleaved": self.halves == "interleaved", **named}
        lead = x.shape[:-1]
        if len(lead) > 1:
            x, ids, weights = (t.reshape(-1, t.shape[-1]) for t in (x, ids, weights))
        out = experts(x, ids, weights, gate_up, down, activation=self, **options)
        return out if len(lead) == 1 else out.view(*lead, -1)

    def layer(self, matrices: Any, biases: Any) -> tuple[torch.Tensor, ...]:
        """(gate_up, down) and the biases, if there are any."""
        *firsts, down = (_stacked(m, order) for m, order in zip(matrices, self.orders, strict=True))
        gate_up = firsts[0] if len(firsts) == 1 else torch.cat(firsts, 1)
        if not biases:
            return gate_up, down
        *first_biases, down_bias = (_stacked(b, (0,)) for b in biases)
        return gate_up, down, torch.cat(first_biases, 1), down_bias


def _stacked(part: Any, order: Sequence[int]) -> torch.Tensor:
    if isinstance(part, torch.Tensor):
        return part.permute(*order)
    return torch.stack([tensor.permute(*order) for tensor in part])


def replace_experts(graph: fx.Graph, reader: Reader, match: Experts) -> None:
    """Put an ExpertSite in the place of experts. Raises LeftAlone, and changes nothing then."""
    made = match.prepare(graph, reader)
    try:
        _replace(graph, reader, match)
    except LeftAlone:
        for node in reversed(made):
            graph.erase_node(node)
        raise


def _replace(graph: fx.Graph, reader: Reader, match: Experts) -> None:
    _check(match, reader.memory)
    first = match.networks[0]
    products = [[*n.firsts, n.second] for n in match.networks]
    matrices: list[Any] = []
    orders: list[Sequence[int]] = []
    for column in zip(*products, strict=True):
        nodes, order = _matrices(reader, column, match.node)
        matrices.append(nodes)
        orders.append(order)
    biases = [[p.bias for p in column] for column in zip(*products, strict=True)]
    if any((b is None) != (biases[0][0] is None) for column in biases for b in column):
        raise LeftAlone("some of its products have a bias, and some have none")
    site = ExpertSite(first.activation, first.halves, orders)
    given = (match.x, match.ids, match.weights, matrices, biases if biases[0][0] is not None else [])
    region = Region(match, reader.memory)
    region.check()
    with graph.inserting_after(match.node):
        call = graph.call_function(site, given)
    call.meta = dict(match.node.meta)
    region.replace(call)


def _check(match: Experts, memory: Memory) -> None:
    """Raise LeftAlone for types that kernels do not take, for gradients that stop inside, and for inputs that
    are written to between the node that made them and the result."""
    x, ids, weights, out = map(value_of, (match.x, match.ids, match.weights, written(match.node)))
    products = [p for n in match.networks for p in (*n.firsts, n.second)]
    dtypes = {value_of(node).dtype for p in products for node in (p.node, p.matrix)}
    if dtypes != {x.dtype} or x.dtype not in FLOATS or out.dtype != x.dtype:
        raise LeftAlone("its tokens, products and matrices have different dtypes, or no floats")
    if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != x.dim():
        raise LeftAlone("its ids are no integers (T, k)")
    if weights.dim() != ids.dim() or not all(map(same_size, weights.shape, ids.shape)):
        raise LeftAlone("its weights have another shape than its ids")
    inputs = {match.x, match.ids, match.weights, *(p.matrix for p in products)}
    for node in inputs | {p.bias for p in products if p.bias is not None}:
        first, last = memory.place[node], memory.place[match.node]
        if any(first < memory.place[w] <= last for w in memory.writes[memory.group[node]]):
            raise LeftAlone(f"{node.name} is written in place before its end")
    if out.requires_grad and not all(_flows(node, match) for node in match.networks):
        raise LeftAlone("gradients stop inside it")
    if out.requires_grad and any(value_of(s).requires_grad != weights.requires_grad for s in match.scales):
        raise LeftAlone("gradients of its weights stop inside it")


def _flows(network: Network, match: Experts) -> bool:
    """Whether every step of an expert needs gradients if what it is computed from does."""
    for p in (*network.firsts, network.second):
        given = [node for node in (p.source, p.matrix, p.bias) if node is not None]
        if _learns(p.node) != any(map(_learns, given)):
            return False
    sources = [_learns(p.source) == _learns(match.x) for p in network.firsts]
    return all(sources) and _learns(network.second.source) == any(_learns(p.node) for p in network.firsts)


def _learns(node: fx.Node) -> bool:
    return value_of(node).requires_grad


def _matrices(reader: Reader, column: Sequence[Product], at: fx.Node) -> tuple[Any, Sequence[int]]:
    """(a stack of matrices, or one matrix an expert, and how their dimensions become (E, out, in))."""
    if len(column) == 1 and len(column[0].order) == 3:
        return _stack(reader, column[0], at)
    terms = [reader.operand(p.matrix, at).term for p in column]
    base = terms[0][1] if isinstance(terms[0], tuple) and len(terms[0]) == 5 else None
    for places in (("i0", "i1"), ("i1", "i0")):
        if all(t == ("readf", base, e, *places) for e, t in enumerate(terms)):
            node = reader.tensor_of(str(base))
            if value_of(node).shape[0] == len(column):
                inner = [1 + int(places[d][1]) for d in column[0].order]
                return node, (0, *inner)
    if len({p.order for p in column}) > 1:
        raise LeftAlone("its experts multiply in different ways")
    return [p.matrix for p in column], column[0].order


def _stack(reader: Reader, product: Product, at: fx.Node) -> tuple[fx.Node, Sequence[int]]:
    """A stack of matrices as it lies in memory, below transposes."""
    read = reader.operand(product.matrix, at).term
    if isinstance(read, tuple) and read[0] == "readf" and sorted(map(str, read[2:])) == ["i0", "i1", "i2"]:
        return reader.tensor_of(read[1]), [read[2:].index(f"i{d}") for d in product.order]
    return product.matrix, product.order

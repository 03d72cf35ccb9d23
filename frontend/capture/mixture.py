"""The normal form of a mixture of experts in a graph, to which all the ways to write one come down.

    out[t, h] = sum over n of [ids(t, n) == e] * [kept(t, n)] * weights(t, n) * expert_e(x[t])[h]

for every expert e. Loops over experts add up one such product an expert, whatever chooses its rows, and
tensors of all experts' results are a sum over experts too (rows.py, buffers.py, sums.py). What the products
of all experts have in common, with e in place of each one's number, says what ids and weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..term import TRUE, Term, children, rename
from .buffers import ADDS, Buffers, ChainReader
from .choices import PLACE, choice_of
from .expert import Experts, Network, name_of, network
from .generalise import EXPERT, generalised
from .ops import operation, value_of
from .product import Product, linear_product, stacked_product
from .rows import Rows
from .slots import CHOICE, Choices, Dispatched, token_names
from .sums import Summand
from .tensor import AT, LeftAlone, Reader, is_one, same_size, size_term
from .terms import kind_of, names_in, reads_in, tidy

COLUMN = "h"
SUMS = ("sum", "einsum", "matmul", "bmm", "mm")
ROUTES = ("topk", "argmax", "max", "sort", "argsort", "one_hot", "nonzero")


@dataclass(frozen=True)
class _Part:
    """One expert's share, or that of all experts of a stack. expert: its number; None for a stack.

    ids: what its number is compared to, or the place in the stack. kept, weights: factors. size: of n."""

    expert: int | None
    network: Network
    x: Term
    ids: Term
    kept: tuple[Term, ...]
    weights: tuple[Term, ...]
    scale: float
    size: int


class Mixtures:
    """Finds mixtures of experts in a graph. seen: by node that was tried, rows of experts that it sums."""

    def __init__(self, reader: Reader, graph: fx.Graph) -> None:
        self.reader, self.graph = reader, graph
        self.inner = ChainReader(graph)
        self.inner.memory = reader.memory
        self.rows = Rows(self.inner, reader, self.is_row)
        self.buffers = Buffers(self.rows)
        self.products: dict[fx.Node, bool] = {}
        self.last = 0  # where the node stands that is tried
        self.seen: dict[fx.Node, set[fx.Node]] = {}

    def candidates(self) -> Iterator[fx.Node]:
        """The nodes that may sum the rows of experts, the last first."""
        nodes = list(self.graph.nodes)
        if any(name_of(n) in ROUTES for n in nodes) and any(map(self.is_row, nodes)):
            yield from (n for n in reversed(nodes) if name_of(n) in SUMS or self._ends_chain(n))

    def chain(self, node: fx.Node) -> fx.Node:
        """The first step of the chain that a node ends; the node, where it ends none."""
        _, steps = self.buffers.steps(node, None)
        return steps[0].node if steps else node

    def _ends_chain(self, node: fx.Node) -> bool:
        name, did = name_of(node), operation(node)
        if did is None or name not in ADDS:
            return False
        if did.writes:
            group = self.reader.memory.group[node]
            return name_of(group) != "getitem" and self.reader.memory.writes[group][-1] is node
        value = value_of(node)
        return isinstance(value, torch.Tensor) and value.dim() > 1 and value.is_floating_point()

    def is_row(self, node: fx.Node) -> bool:
        """Whether a node is a product with a matrix, or one matrix an expert, that no product has made."""
        if node not in self.products:
            product = product_of(node)
            self.products[node] = product is not None and self._is_held(product.matrix)
        return self.products[node]

    def _is_held(self, node: fx.Node) -> bool:
        seen, stack = {node}, [node]
        while stack:
            node = stack.pop()
            if node.op in ("placeholder", "get_attr"):
                continue
            if len(seen) > 16 or name_of(node) in (*SUMS, "linear", "topk", "baddbmm", "addmm"):
                return False
            stack += [s for s in node.all_input_nodes if s not in seen]
            seen.update(node.all_input_nodes)
        return True

    def match(self, node: fx.Node) -> Experts | None:
        """The experts whose rows a node adds up; None where it adds up none. Raises LeftAlone."""
        did = operation(node)
        assert did is not None
        self.last = self.reader.memory.place[node]
        target: Any = node.args[0] if did.writes else node
        held = value_of(target)
        if not isinstance(held, torch.Tensor) or held.dim() < 2 or not held.is_floating_point():
            return None
        tokens = token_names(held.dim() - 1)
        places = [0 if is_one(n) else t for n, t in zip(held.shape, tokens, strict=False)]
        self.rows.sizes |= dict(zip((*tokens, COLUMN), held.shape, strict=True))
        found = self.buffers.element(node, None, [*places, COLUMN])
        if found is None:
            found = self.rows.expand(self.rows.element(node, node, [*places, COLUMN]))
        parts = [p for part in found for p in self.rows.settled(part)]
        parts = [p for p in parts if not self.rows.is_covered(p)]
        given = [self._rows_in(p) for p in parts]
        self.seen[node] = {self.inner.leaves[r[1]] for rows in given for r in rows}
        if not any(self._is_chosen(p, r) for p, rows in zip(parts, given, strict=True) for r in rows):
            self.seen[node] = set()
            return None
        if not all(given):
            raise LeftAlone("its rows are added to a tensor that is not zeros, or something else is")
        if any(len(rows) != 1 for rows in given):
            raise LeftAlone("what it adds is no product of an expert's rows and weights")
        shares = [self._part(p, rows[0], places) for p, rows in zip(parts, given, strict=True)]
        return self._mixture(node, shares, places, tokens)

    def _is_chosen(self, part: Summand, row: Any) -> bool:
        """Whether ids choose the expert whose row is read."""
        places = getattr(product_of(self.inner.leaves[row[1]]), "places", ())
        ids = row[2 + places[0]] if places else 0
        return bool(reads_in(ids)) or any(choice_of(f)[0] is not None for f in part.factors)

    def _rows_in(self, part: Summand) -> list[Any]:
        """The rows of experts among the factors of a product."""
        return [
            f
            for f in part.factors
            if isinstance(f, tuple)
            and f[0] == "readf"
            and f[-1] == COLUMN
            and f[1] in self.inner.leaves
            and AT not in f[1]
            and self.is_row(self.inner.leaves[f[1]])
        ]

    # ---- one expert ----

    def _part(self, part: Summand, row: Any, places: list[Term]) -> _Part:
        leaf = self.inner.leaves[row[1]]
        second = product_of(leaf)
        assert second is not None
        found, x = self._network(second, row, places)
        factors = [f for f in part.factors if f != row]
        expert: int | None = None
        if second.places:
            ids = row[2 + second.places[0]]
            if not isinstance(ids, (str, tuple)) or names_in(ids) & (set(part.bound) - {*_names(ids)}):
                raise LeftAlone("its sum over experts is not by token")
        else:
            numbers = [(f, *choice_of(f)) for f in factors]
            chosen = [(f, c, e) for f, c, e in numbers if c is not None and isinstance(e, int)]
            if not chosen:
                raise LeftAlone("its tokens are not those whose ids are an expert")
            condition, ids, expert = chosen[0]
            factors.remove(condition)
        if len(part.bound) > 1:
            raise LeftAlone("its choices have several indices")
        size = self.rows.sizes[part.bound[0]] if part.bound else 1
        if not isinstance(size, int):
            raise LeftAlone("the number of its choices is known at run time only")
        names = dict.fromkeys(part.bound, CHOICE)
        ids, *factors = (tidy(rename(t, names)) for t in (ids, *factors))
        if second.places and part.bound == (ids,):
            raise LeftAlone("every expert's rows are summed")
        kept = tuple(f for f in factors if kind_of(f) == "bool" and f != TRUE)
        weights = tuple(f for f in factors if kind_of(f) != "bool")
        return _Part(expert, found, x, ids, kept, weights, part.scale, size)

    def _network(self, second: Product, row: Any, places: list[Term]) -> tuple[Network, Term]:
        """(the expert that makes a row, the element of its token). Raises LeftAlone."""
        indices = list(row[2:])
        shape = value_of(second.source).shape
        if second.places and second.read_last != len(shape) - 1:
            raise LeftAlone("the dimensions of its products are exchanged between them")
        rows = tuple(0 if is_one(n) else f"i{d}" for d, n in enumerate(shape[:-1]))
        found, given = network(self.reader, second, second.node, rows, product_of)
        inner = indices[:-1]
        if second.places:
            inner = [0] * (len(shape) - 1)
            sources = second.read or second.tokens
            at = [indices[d] for d in (second.places[:-1] if second.read else second.places[1:-1])]
            for d, index in zip(sources, at, strict=True):
                inner[d] = index
        xs = [self._tokens(p, source, inner, places) for p, source in zip(found.firsts, given, strict=True)]
        if len(set(xs)) > 1:
            raise LeftAlone("its first products are of different tokens")
        return found, xs[0]

    def _tokens(self, first: Product, source: fx.Node, inner: list[Term], places: list[Term]) -> Term:
        """An element of what a first product takes, where its row is at `inner`. Raises LeftAlone."""
        shape = value_of(source).shape
        if first.places:
            if first.places[-1] != len(first.places) - 1:
                raise LeftAlone("the dimensions of its products are exchanged between them")
            at: list[Term] = [0] * len(shape)
            dims = first.places[:-1] if first.read else first.places[1:-1]
            for d, place in zip(first.read or first.tokens, dims, strict=True):
                at[d] = inner[place]
            at[first.read_last] = COLUMN
        else:
            at = [*inner, COLUMN]
        ones = [0 if is_one(n) else i for n, i in zip(shape, at, strict=True)]
        term = self.rows.element(source, first.node, ones)
        names = names_in(term) - {COLUMN}
        if not names <= {p for p in places if isinstance(p, str)} or _has_rows(term):
            raise LeftAlone("its first product is not of the tokens that its rows are added to")
        return term

    # ---- all experts ----

    def _mixture(
        self, node: fx.Node, parts: list[_Part], places: list[Term], tokens: tuple[str, ...]
    ) -> Experts:
        out = self.buffers.shape(node)
        x = self._tensor(
            _same([p.x for p in parts], "its experts take different tokens"), [*places, COLUMN], out[:-1]
        )
        if parts[0].expert is None:
            networks = [_same_network([p.network for p in parts])]
            groups = [(p, p.ids, p.kept, p.weights) for p in parts]
            count = value_of(networks[0].second.node).shape[networks[0].second.places[0]]
        else:
            networks, groups = self._by_expert(parts)
            count = len(networks)
        choices = []
        for part, ids, kept, weights in groups:
            at = tidy(("max", 0, ("min", ids, tidy(("sub", size_term(count), 1)))))
            kept, weights = (tuple(tidy(rename(f, {EXPERT: at})) for f in fs) for fs in (kept, weights))
            kept = tuple(f for f in kept if f not in (("ge", ids, 0), ("lt", ids, size_term(count))))
            self._check_terms((ids, *kept, *weights), tokens)
            choices.append(Choices(ids, None, kept, weights, part.scale, part.size))
        held = self._held(choices, places, out) if len(choices) == 1 else None
        root = node.args[0] if operation(node).writes else None  # type: ignore[union-attr]
        if root is not None:
            root = self.reader.memory.group[node]
        if held is not None:
            return Experts(node, root, x, *held, networks, [])
        return Dispatched(node, root, x, None, None, networks, [], choices, count, None, self.inner)

    def _tensor(self, term: Term, places: list[Term], lead: tuple[Any, ...]) -> fx.Node:
        """The tensor of tokens that has an element. Raises LeftAlone."""
        if isinstance(term, tuple) and term[0] == "readf" and list(term[2:]) == places:
            found = self.inner.tensor_of(term[1])
            if all(map(same_size, value_of(found).shape[:-1], lead)):
                return found
        shapes = {node: getattr(value_of(node), "shape", ()) for node in self.graph.nodes}
        nodes = [n for n, s in shapes.items() if s and self._holds(n, term, places, (*lead, s[-1]), True)]
        if not nodes:
            raise LeftAlone("its first product is not of the tokens that its rows are added to")
        return nodes[0]

    def _by_expert(self, parts: list[_Part]) -> tuple[list[Network], list[Any]]:
        """(the networks in the order of their numbers, choices that all experts have in common)."""
        by_number: dict[int, list[_Part]] = {}
        for part in parts:
            if part.expert is None:
                raise LeftAlone("some of its experts are stacked, and some are not")
            by_number.setdefault(part.expert, []).append(part)
        numbers = sorted(by_number)
        first = numbers[0]
        if len({len(ps) for ps in by_number.values()}) > 1:
            raise LeftAlone("an expert comes twice")
        if numbers != list(range(first, first + len(numbers))):
            raise LeftAlone("its experts are not numbered one after the other")
        networks = [_same_network([p.network for p in by_number[e]]) for e in numbers]
        if any((n.activation, n.halves) != (networks[0].activation, networks[0].halves) for n in networks):
            raise LeftAlone("its experts compute something different")
        groups = []
        for column in zip(*(by_number[e] for e in numbers), strict=True):
            terms = [(p.ids, ("all", *p.kept), ("all", *p.weights), p.size, p.scale) for p in column]
            if any(t[0] != terms[0][0] or t[3:] != terms[0][3:] for t in terms):
                raise LeftAlone("its experts take different ids or weights")
            pair = [generalised([(e, t[i]) for e, t in zip(numbers, terms, strict=True)]) for i in (1, 2)]
            if None in pair:
                raise LeftAlone("its experts take different ids or weights")
            ids = tidy(("sub", terms[0][0], first)) if first else terms[0][0]
            number: Term = ("add", EXPERT, first) if first else EXPERT
            kept, weights = (tuple(tidy(rename(f, {EXPERT: number})) for f in p[1:]) for p in pair)  # type: ignore[index]
            groups.append((column[0], ids, kept, weights))
        if len({(g[1], g[2]) for g in groups}) < len(groups):
            raise LeftAlone("an expert comes twice")
        return networks, groups

    def _check_terms(self, terms: Sequence[Term], tokens: tuple[str, ...]) -> None:
        for term in terms:
            names = names_in(term) - {*tokens, CHOICE}
            if any(not n.startswith("$") for n in names) or _has_rows(term):
                raise LeftAlone("its ids or weights are not those of tokens and choices")

    def _held(
        self, choices: list[Choices], places: list[Term], out: tuple[Any, ...]
    ) -> tuple[fx.Node, fx.Node] | None:
        """The tensors that hold ids and weights as they are, if there are any."""
        (one,) = choices
        if one.kept or one.scale != 1 or len(one.weights) != 1:
            return None
        place: Term = 0 if one.size == 1 else CHOICE
        found: list[fx.Node] = []
        for term in (one.ids, one.weights[0]):
            floats = kind_of(term) == "float"
            nodes = [
                n
                for n in self.graph.nodes
                if self._holds(n, term, [*places, place], (*out[:-1], one.size), floats)
            ]
            if not nodes:
                return None
            found.append(nodes[-1])
        return found[0], found[1]

    def _holds(
        self, node: fx.Node, term: Term, places: list[Term], shape: tuple[Any, ...], floats: bool
    ) -> bool:
        value = value_of(node)
        if (
            not isinstance(value, torch.Tensor)
            or value.is_floating_point() != floats
            or len(value.shape) != len(shape)
        ):
            return False
        if not all(map(same_size, value.shape, shape)) or value.dtype in (
            torch.bool,
            torch.int8,
            torch.uint8,
            torch.int16,
        ):
            return False
        did, memory = operation(node), self.reader.memory
        if memory.place.get(node, self.last) >= self.last:
            return False
        if (did is not None and did.writes and value_of(node) is None) or not memory.settled(node, node):
            return False
        try:
            return self.rows.tidied(self.inner.of(node).at(places)) == term
        except LeftAlone:
            return False


def product_of(node: fx.Node) -> Product | None:
    """A product with a matrix, or with one matrix an expert."""
    return linear_product(node) or stacked_product(node)


def _same(given: Sequence[Any], why: str) -> Any:
    if any(g != given[0] for g in given):
        raise LeftAlone(why)
    return given[0]


def _same_network(networks: Sequence[Network]) -> Network:
    """One of networks that compute the same."""
    first = networks[0]
    for other in networks[1:]:
        products = zip((*first.firsts, first.second), (*other.firsts, other.second), strict=False)
        same = len(first.firsts) == len(other.firsts) and (first.activation, first.halves) == (
            other.activation,
            other.halves,
        )
        if not same or any((a.matrix, a.bias, a.order) != (b.matrix, b.bias, b.order) for a, b in products):
            raise LeftAlone("an expert comes twice")
    return first


def _names(ids: Term) -> set[str]:
    """The indices that ids are read at."""
    return {n for r in reads_in(ids) for i in r[2:] for n in names_in(i)}


def _has_rows(term: Term) -> bool:
    if not isinstance(term, tuple):
        return False
    if term[0] == "row" or (term[0] in ("read", "readf") and term[1][0] in (PLACE, "!")):
        return True
    return any(map(_has_rows, children(term)))

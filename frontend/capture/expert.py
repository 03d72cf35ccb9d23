"""One expert of a graph: two products, with a function of the first one's elements between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..term import Term
from .ops import operation, value_of
from .product import Product
from .tensor import LeftAlone, Reader, same_size
from .terms import reads_in, replaced, tidy


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

    networks: one of every expert, or one whose products hold all experts. x: (T, H), T one dimension or
    several. ids, weights: (T, k), None until `prepare` has made them. scales: the nodes that hold weights
    where they are used."""

    node: fx.Node
    root: fx.Node | None
    x: fx.Node
    ids: Any
    weights: Any
    networks: list[Network]
    scales: list[fx.Node]

    def prepare(self, graph: fx.Graph, reader: Reader) -> list[fx.Node]:
        """Put nodes that the layer takes before it: those. Raises LeftAlone, and changes nothing then."""
        return []


def network(
    reader: Reader,
    second: Product,
    at: fx.Node,
    rows: tuple[Term, ...],
    product_of: Callable[[fx.Node], Product | None],
) -> tuple[Network, list[fx.Node]]:
    """(the expert whose second product is known, what its first products take).

    rows: the indices of a row of the second product's input, whose last index is that of the summed one.
    product_of: reads a node as a first product."""
    tensor = reader.operand(second.source, at)
    inner, place = tensor.shape[-1], f"i{len(tensor.shape) - 1}"
    firsts: dict[str, Product] = {}
    used: dict[Term, tuple[str, str]] = {}
    for read in reads_in(tensor.term):
        leaf = reader.made(read[1])
        product = product_of(leaf) if read[0] == "readf" else None
        if product is None or tuple(read[2:-1]) != rows:
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


def first_argument(node: fx.Node) -> fx.Node | None:
    """What a node is computed from first, if that is a node."""
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def behind(node: fx.Node, names: tuple[str, ...]) -> fx.Node:
    """The node of floats of which operations of these names give a node."""
    while (did := operation(node)) is not None and did.name in names and not did.writes:
        source = first_argument(node)
        if source is None or not value_of(source).is_floating_point():
            break
        node = source
    return node


def name_of(node: Any) -> str | None:
    """The name of the operation that a node does, if it does one."""
    did = operation(node) if isinstance(node, fx.Node) else None
    return None if did is None else did.name


def same_node(nodes: list[fx.Node]) -> fx.Node:
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

"""reassociate: chains of matrix products in the order that takes the fewest operations.

Before::  %k = matmul %x, %wk ; %low = matmul %e, %k          x [B, 1, S, C], wk [H, C, D], e [1, R, S]
After::   %ex = matmul %e, %x ; %low = matmul %ex, %wk        where R is far below S

A product is 2 * rows * inner * columns operations, times the extents of the batch. Orders are compared over
the whole graph: a product that several chains contain is counted, and computed, once. That is how FLuRKA's
low-rank projections of keys and values (Gupta et al., 2023) meet the projections that make keys and values.

Leaves alone: what is used by other operations or returned, and operands that are transposed. Where chains
have more orders together than MOST, each is ordered by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ..ir.errors import InputError
from ..ir.graph import Extent, Graph, Op, Value

MOST = 4096
LONGEST = 8  # factors of a chain
Tree = str | tuple["Tree", "Tree"]
Shape = tuple[Extent, ...]


@dataclass(frozen=True)
class Order:
    """One way to compute the chains of a graph. text: its products with parentheses. flops: operations."""

    text: str
    flops: int
    trees: tuple[Tree, ...]


def reassociate(graph: Graph, *, sizes: Mapping[str, int]) -> Graph:
    """The graph with its chains of products in the cheapest order, for these values of the extents' names.

    Raises InputError when an extent has no value."""
    chains = _chains(graph)
    if not chains:
        return graph
    best = min(orders(graph, sizes=sizes), key=lambda order: order.flops)
    if best.trees == tuple(_tree(graph, chain) for chain in chains):
        return graph
    return _rebuilt(graph, chains, best.trees)


def orders(graph: Graph, *, sizes: Mapping[str, int]) -> list[Order]:
    """Every order of the chains of a graph that is compared; the graph's own is the first."""
    shapes = {name: _numbers(value, sizes) for name, value in graph.values.items()}
    chains = _chains(graph)
    own = tuple(_tree(graph, chain) for chain in chains)
    ways = [list(_ways(_factors(graph, chain))) for chain in chains]
    if prod(map(len, ways)) > MOST:
        ways = [[min(way, key=lambda tree: _flops([tree], shapes))] for way in ways]
    found = [own, *(trees for trees in itertools.product(*ways) if trees != own)]
    return [Order("; ".join(map(_text, trees)), _flops(trees, shapes), trees) for trees in found]


def explain(graph: Graph, *, sizes: Mapping[str, int]) -> str:
    """The orders as text, the cheapest first.

    >>> from ..ir.graph_text import parse
    >>> graph = parse('''graph @low(%x: f32[S, C], %w: f32[C, D], %e: f32[R, S]) {
    ...   %k = matmul %x, %w : f32[S, D]
    ...   %o = matmul %e, %k : f32[R, D]
    ...   return %o
    ... }''')
    >>> print(explain(graph, sizes={"S": 8192, "C": 1024, "D": 1024, "R": 256}))
        4.832 GFLOP  (e x) w
        21.47 GFLOP  e (x w)
    """
    ranked = sorted(orders(graph, sizes=sizes), key=lambda order: order.flops)
    return "\n".join(f"{order.flops / 1e9:9.4g} GFLOP  {order.text}" for order in ranked)


# chains -------------------------------------------------------------------------------------------------


def _is_product(op: Op | None) -> bool:
    return op is not None and op.kind == "matmul" and not op.attr("transpose_b")


def _chains(graph: Graph) -> list[Op]:
    """The last products of chains. (Single products are chains too: they may be parts of others.)"""
    return [op for op in graph.ops if _is_product(op) and not _continues(graph, op)]


def _continues(graph: Graph, op: Op) -> bool:
    """Whether a product is only part of a longer one."""
    name = op.output.name
    users = graph.users(name)
    single = len(users) == 1 and _is_product(users[0]) and users[0].inputs.count(name) == 1
    return single and name not in graph.outputs and users[0].output.dtype == op.output.dtype


def _tree(graph: Graph, op: Op) -> Tree:
    left, right = (_side(graph, name) for name in op.inputs)
    return left, right


def _side(graph: Graph, name: str) -> Tree:
    made = graph.producer(name)
    if made is None or not _is_product(made) or not _continues(graph, made):
        return name
    return _tree(graph, made)


def _factors(graph: Graph, op: Op) -> tuple[str, ...]:
    found = tuple(_leaves(_tree(graph, op)))
    if len(found) > LONGEST:
        raise InputError("reassociate", f"chains of at most {LONGEST} factors", len(found))
    return found


def _leaves(tree: Tree) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    else:
        yield from _leaves(tree[0])
        yield from _leaves(tree[1])


def _ways(factors: Sequence[str]) -> Iterator[Tree]:
    """Every way to put parentheses."""
    if len(factors) == 1:
        yield factors[0]
    for at in range(1, len(factors)):
        yield from itertools.product(list(_ways(factors[:at])), list(_ways(factors[at:])))


def _text(tree: Tree) -> str:
    if isinstance(tree, str):
        return tree
    return " ".join(side if isinstance(side, str) else f"({_text(side)})" for side in tree)


# counting -----------------------------------------------------------------------------------------------


def _numbers(value: Value, sizes: Mapping[str, int]) -> tuple[int, ...]:
    missing = [n for n in value.shape if isinstance(n, str) and n not in sizes]
    if missing:
        got = ", ".join(sizes) or "nothing"
        raise InputError("reassociate.sizes", f"a value for {', '.join(missing)}", got)
    return tuple(sizes[n] if isinstance(n, str) else n for n in value.shape)


def _flops(trees: Sequence[Tree], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Operations of all products, each different one counted once."""
    known: dict[Tree, tuple[int, ...]] = {}
    total = 0

    def shape(tree: Tree) -> tuple[int, ...]:
        nonlocal total
        if isinstance(tree, str):
            return shapes[tree]
        if tree not in known:
            left, right = map(shape, tree)
            known[tree] = made = tuple(map(int, product_shape(left, right)))
            total += 2 * prod(made) * left[-1]
        return known[tree]

    for tree in trees:
        shape(tree)
    return total


def product_shape(a: Shape, b: Shape) -> Shape:
    """The shape of a product; extents of the batch are the same, or 1, or missing."""
    long, short = sorted((a[:-2], b[:-2]), key=len, reverse=True)
    short = (1,) * (len(long) - len(short)) + short
    batch = tuple(y if x == 1 else x for x, y in zip(long, short, strict=True))
    return (*batch, a[-2], b[-1])


# rewriting ----------------------------------------------------------------------------------------------


def _rebuilt(graph: Graph, chains: Sequence[Op], trees: Sequence[Tree]) -> Graph:
    """The graph with each chain computed by its tree; products of several chains come once."""
    made: dict[Tree, str] = {}
    ends = {op.output.name: tree for op, tree in zip(chains, trees, strict=True)}
    inner = {op.output.name for op in graph.ops if _is_product(op)} - set(ends)
    taken = set(graph.values)
    shapes: dict[str, Value] = dict(graph.values)
    ops: list[Op] = []

    def compute(tree: Tree, like: Op, name: str | None) -> str:
        if isinstance(tree, str):
            return tree
        if tree in made and name is None:
            return made[tree]
        left, right = (compute(side, like, None) for side in tree)
        if name is None:
            name = "_".join(_leaves(tree))
            while name in taken:
                name += "_"
        taken.add(name)
        shape = product_shape(shapes[left].shape, shapes[right].shape)
        shapes[name] = value = Value(name, like.output.dtype, shape)
        ops.append(Op("matmul", (left, right), (value,)))
        made.setdefault(tree, name)
        return name

    for op in graph.ops:
        if op.output.name in ends:
            compute(ends[op.output.name], op, op.output.name)
        elif op.output.name not in inner:
            ops.append(op)
    return Graph(graph.name, graph.inputs, tuple(ops), graph.outputs)

"""Layers of experts in a JAX program, found by what they compute: a product by experts, an activation of its
elements, and another product by experts.

    ragged   both are `jax.lax.ragged_dot` of the same groups
    slots    both are products batched by expert, of rows that a product with a dispatch matrix puts in slots
    dense    every expert on every token, and a sum over experts weighted by one_hot(ids)

What lies between the products is a term (frontend/jax/terms.py), so how the halves are cut and how the
activation is written make no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..capture.terms import linear, names_in, reads_in, replaced, tidy
from ..term import Term
from .dot import EXPERT, Dot, dot_of, plain
from .match_dense import dense_of
from .program import Program, Value
from .terms import LeftAlone, Reader


@dataclass(frozen=True)
class Network:
    """An expert's two products and what is between them.

    first, second: the products; matrices: what each has by expert, with the role of every dimension: "e",
    "in", "out". given: what the first is of, and the roles of that: "e", "in", or the label of rows in
    `second.out`. rows: those labels. halves: as ExpertsSpec has it. term: over x0 (and x1)."""

    first: Dot
    second: Dot
    matrices: tuple[tuple[Value, tuple[str, ...]], tuple[Value, tuple[str, ...]]]
    given: tuple[Value, tuple[str, ...]]
    rows: tuple[str, ...]
    halves: str | None
    term: Term


# the two products -----------------------------------------------------------------------------------


def network_of(reader: Reader, second: Dot) -> Network | None:
    """The network whose last product this is; None where no first product by experts is in front of it.

    Raises LeftAlone where there is one, and something about it that kernels do not compute."""
    for side in (0, 1) if second.groups is None else (1,):
        experts = [x for x in second.labels[side] if x[0] == "b" or x == EXPERT]
        own = [x for x in second.labels[side] if x[0] in "lr"]
        if len(second.labels[side]) == 3 and len(experts) == len(own) == len(second.summed) == 1:
            found = _before(reader, second, side, experts[0])
            if found is not None:
                return found
    return None


def _before(reader: Reader, second: Dot, side: int, expert: str) -> Network | None:
    held = second.operands[1 - side]
    try:
        term = reader.of(held).term
    except LeftAlone:
        return None
    reads = reads_in(term)
    firsts = {name: dot_of(reader.leaves[name].op) for name in {read[1] for read in reads}}
    if not firsts or any(first is None for first in firsts.values()):
        return None
    if len(firsts) > 1:
        raise LeftAlone("its gate and its up projection are two products")
    [first] = firsts.values()
    assert first is not None
    if (first.groups is None) != (second.groups is None) or first.groups is not second.groups:
        return None
    labels = second.labels[1 - side]
    role_at = {f"i{d}": (label, held.shape[d]) for d, label in enumerate(labels)}  # of its indices
    indices = {read[2:] for read in reads}
    places = [d for d in range(len(first.out)) if len({index[d] for index in indices}) > 1]
    inner_at = f"i{labels.index('x0')}"
    if not places:
        places = [d for d, index in enumerate(next(iter(indices))) if index == inner_at]
    if len(places) != 1:
        return None
    roles = _roles(first, next(iter(indices)), places[0], role_at, expert)
    return None if roles is None else _network(first, second, side, expert, roles, places[0], term, inner_at)


def _roles(
    first: Dot, index: tuple[Term, ...], place: int, role_at: dict[str, tuple[str, int]], expert: str
) -> dict[str, str] | None:
    """What each label of the first product's result is: "e", "out", or the second's label of rows.

    role_at: labels and sizes in the second, by index; it takes all of the first's rows and experts."""
    roles = {first.out[place]: "out"}
    for d, label in enumerate(first.out):
        if d != place:
            role, size = role_at.get(index[d], ("x0", 0)) if isinstance(index[d], str) else ("x0", 0)
            if role == "x0" or role in roles.values() or size != first.op.outputs[0].shape[d]:
                return None
            roles[label] = "e" if role == expert else role
    return roles


def _network(
    first: Dot,
    second: Dot,
    side: int,
    expert: str,
    roles: dict[str, str],
    place: int,
    term: Term,
    inner_at: str,
) -> Network | None:
    known = roles | {"x0": "in", EXPERT: "e"}
    column = first.out[place]
    at = next((s for s in (0, 1) if column in first.labels[s] and column[0] in "lr"), None)
    if at is None or len(first.summed) != 1:
        return None
    named = tuple(tuple(known.get(x, "") for x in own) for own in first.labels)
    if sorted(named[at]) != ["e", "in", "out"] or "" in named[1 - at]:
        return None
    of_second = {expert: "e", "x0": "in"}
    matrix = tuple(of_second.get(x, "out") for x in second.labels[side])
    columns = first.op.outputs[0].shape[place]
    inner = second.operands[side].shape[matrix.index("in")]
    halves, activation = _activation(term, place, inner_at, columns, inner)
    rows = tuple(x for x in second.labels[1 - side] if x not in (expert, "x0"))
    return Network(
        first,
        second,
        ((first.operands[at], named[at]), (second.operands[side], matrix)),
        (first.operands[1 - at], named[1 - at]),
        rows,
        halves,
        activation,
    )


def _activation(term: Term, place: int, at: str, columns: int, inner: int) -> tuple[str | None, Term]:
    """How columns hold halves, and the term over x0 and x1. Raises LeftAlone."""
    layouts = {None: ((1, 0),), "split": ((1, 0), (1, inner)), "interleaved": ((2, 0), (2, 1))}
    seen = {}
    for read in reads_in(term):
        parts = dict(linear(read[2 + place]))
        seen[read] = (parts.pop(at, 0), parts.pop(1, 0))
        if parts:
            raise LeftAlone("its activation mixes columns")
    halves = "interleaved" if any(s == 2 for s, _ in seen.values()) else None
    halves = "split" if halves is None and columns == 2 * inner else halves
    expected = layouts[halves]
    if columns != inner * len(expected) or any(p not in expected for p in seen.values()):
        raise LeftAlone("its activation reads columns that are no halves of the first product's")
    for read, part in seen.items():
        term = replaced(term, read, f"x{expected.index(part)}")
    term = tidy(term)
    if names_in(term) - {"x0", "x1"} or reads_in(term):
        raise LeftAlone("its activation depends on the expert, the token or the column")
    return halves, term


# all of a program -----------------------------------------------------------------------------------


def _is_dispatched(reader: Reader, network: Network) -> bool:
    """Whether what a network is given is a product, as that with a dispatch matrix is."""
    read = plain(reader, network.given[0])
    dot = None if read is None else dot_of(read[0].op)
    return dot is not None and dot.groups is None and len(dot.summed) == 1


def find(reader: Reader, program: Program) -> Iterator[tuple[Dot, Any]]:
    """Every product with what it ends: a Network, a Dense, "ragged_dot", or why a layer is left alone."""
    networks: dict[Value, Network] = {}
    for op in program.ops:
        dot = dot_of(op)
        if dot is None:
            continue
        try:
            network = network_of(reader, dot)
        except LeftAlone as reason:
            if dot.groups is None:
                yield dot, str(reason)
                continue
            network = None
        if network is not None:
            networks[op.outputs[0]] = network
            if dot.groups is not None or ("e" in network.given[1] and _is_dispatched(reader, network)):
                yield dot, network
        if dot.groups is not None and network is None:
            yield dot, "ragged_dot"
        for side in (0, 1) if dot.groups is None and networks else ():
            read = plain(reader, dot.operands[1 - side])
            inner = networks.get(read[0]) if read is not None else None
            if inner is not None and inner.second.groups is None and "e" not in inner.given[1]:
                try:
                    yield dot, dense_of(reader, dot, side, inner)
                except LeftAlone as reason:
                    yield dot, str(reason)

"""Sums over experts of which every one sees every token, weighted by one_hot(ids), in a JAX program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..capture.terms import replaced, tidy
from ..term import FALSE, TRUE, Term, constant, rename
from .dot import Dot, dot_of, plain
from .program import Value
from .terms import MOVES, Array, LeftAlone, Reader

if TYPE_CHECKING:
    from .match_experts import Network


@dataclass(frozen=True)
class Dense:
    """A sum over experts, weighted by one_hot(ids). sum: the product that computes it; out: the roles of its
    result. ids, weights: arrays and the roles of their dimensions: labels of rows, and "k"."""

    network: Network
    sum: Dot
    out: tuple[str, ...]
    ids: tuple[Value, tuple[str, ...]]
    weights: tuple[Value, tuple[str, ...]]


def dense_of(reader: Reader, total: Dot, side: int, network: Network) -> Dense:
    """The layer whose sum over experts this is; the network is of its other operand. Raises LeftAlone."""
    read = plain(reader, total.operands[1 - side])
    assert read is not None
    found = dict(zip(total.labels[1 - side], (network.second.out[d] for d in read[1]), strict=True))
    expert = next(x for x in network.second.out if x[0] == "b")
    role_of = {label: "e" if own == expert else own for label, own in found.items()}
    rows = set(network.rows)
    summed = [label for label, role in role_of.items() if label[0] == "x"]
    if [role_of[x] for x in summed] != ["e"] or len(total.summed) != 1:
        raise LeftAlone("its sum is not over experts alone")
    batch = {label: role for label, role in role_of.items() if label[0] == "b"}
    if set(batch.values()) != rows or any(label[0] in "lr" for label in total.labels[side]):
        raise LeftAlone("its weights are no numbers by token and expert")
    names = {f"i{d}": role_of[label] for d, label in enumerate(total.labels[side])}
    summand, choices = _summand(reader, total.operands[side], names)
    ids, weights = _chosen(reader, summand, rows | ({"k"} if choices > 1 else set()))
    sizes = dict(zip(network.second.out, network.second.op.outputs[0].shape, strict=True)) | {
        "k": choices,
        "": 1,
    }
    for value, roles in (ids, weights):
        if value.shape != tuple(sizes[role] for role in roles):
            raise LeftAlone("its ids or its weights are read in part")
    out = tuple("out" if role_of.get(x) not in rows else role_of[x] for x in total.out)
    return Dense(network, total, out, ids, weights)


def _summand(reader: Reader, value: Value, names: dict[str, str]) -> tuple[Term, int]:
    """The term over rows, "e" and "k" whose sum over k a matrix of weights is; how many k there are."""
    held = rename(_weighted(reader, value).term, names)
    leaf = reader.leaves[held[1]].op if isinstance(held, tuple) and held[0] == "readf" else None
    if leaf is None or not isinstance(held, tuple):
        return held, 1
    index = held[2:]
    if leaf.name == "reduce_sum" and len(leaf.params["axes"]) == 1:
        axis, given = int(leaf.params["axes"][0]), _weighted(reader, leaf.inputs[0])
        return tidy(given.at([*index[:axis], "k", *index[axis:]])), given.shape[axis]
    dot = dot_of(leaf)
    if dot is None or dot.groups is not None or len(dot.summed) != 1:
        return held, 1
    at = dict(zip(dot.out, index, strict=True)) | {dot.summed[0]: "k"}
    parts = (
        _weighted(reader, operand).at([at[x] for x in own])
        for operand, own in zip(dot.operands, dot.labels, strict=True)
    )
    return tidy(("mul", *parts)), dot.operands[0].shape[dot.labels[0].index(dot.summed[0])]


def _weighted(reader: Reader, value: Value) -> Array:
    """An array as factors that compare, and others, which are arrays as they are."""
    found, op = reader.of(value), value.op
    if next(_equalities(found.term), None) is None:
        return _as_it_is(reader, value)
    if op is not None and op.name == "mul":
        parts = [
            _weighted(reader, factor).at([f"i{d}" for d in range(len(value.shape))]) for factor in op.inputs
        ]
        return Array(value.shape, ("mul", *parts), found.kind)
    return found


def _as_it_is(reader: Reader, value: Value) -> Array:
    """An array as a leaf, below what only moves its elements."""
    if value.op is not None and value.op.name in MOVES:
        term = MOVES[value.op.name](_as_it_is(reader, value.op.inputs[0]), value.op)
        if term is not None:
            return Array(value.shape, tidy(term), reader.of(value).kind)
    return reader.of(value) if value.const is not None else reader.leaf(value)


def _chosen(
    reader: Reader, summand: Term, wanted: set[str]
) -> tuple[tuple[Value, tuple[str, ...]], tuple[Value, tuple[str, ...]]]:
    """ids and weights of where(e == ids, weights, 0). wanted: what both are indexed by. Raises LeftAlone."""
    for condition in _equalities(summand):
        ids = next((x for x in condition[1:] if isinstance(x, tuple)), None)
        if "e" not in condition[1:] or not _reads(ids, "read", wanted):
            continue
        weights = _without_ones(tidy(replaced(summand, condition, TRUE)))
        if _is_zero(tidy(replaced(summand, condition, FALSE))) and _reads(weights, "readf", wanted):
            return _array(reader, ids), _array(reader, weights)
    raise LeftAlone("its weights are no sum of one_hot(ids) times numbers")


def _reads(term: Term, kind: str, wanted: set[str]) -> bool:
    """Whether a term is a read of an array at these indices, each once, and at 0 in dimensions of size 1."""
    if not isinstance(term, tuple) or term[0] != kind:
        return False
    named = [index for index in term[2:] if index != 0]
    return len(named) == len(wanted) and set(named) == wanted


def _array(reader: Reader, read: Any) -> tuple[Value, tuple[str, ...]]:
    return reader.leaves[read[1]], tuple(index or "" for index in read[2:])


ZEROS, ONES = (0, constant(0.0), constant(-0.0)), (1, constant(1.0))


def _is_zero(term: Term) -> bool:
    """Whether a term is 0 for finite numbers."""
    return term in ZEROS or (isinstance(term, tuple) and term[0] == "mul" and any(map(_is_zero, term[1:])))


def _without_ones(term: Term) -> Term:
    if not isinstance(term, tuple) or term[0] != "mul":
        return term
    factors = [f for f in map(_without_ones, term[1:]) if f not in ONES]
    return factors[0] if len(factors) == 1 else ("mul", *factors) if factors else constant(1.0)


def _equalities(term: Term) -> Iterator[Any]:
    if isinstance(term, tuple) and term[0] != "f":
        if term[0] == "eq":
            yield term
        for part in term[1:]:
            yield from _equalities(part)

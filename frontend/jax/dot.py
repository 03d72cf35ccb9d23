"""Products of arrays in a JAX program, by the roles of their dimensions: batched ones, and ragged ones."""

from __future__ import annotations

from dataclasses import dataclass

from .program import Op, Value
from .terms import LeftAlone, Reader

RAGGED = ("ragged_dot_general", "ragged_dot")
EXPERT = "e"


@dataclass(frozen=True)
class Dot:
    """A product of two arrays by labels: "x0", ... are summed, "b0", ... are in both; the experts of a ragged
    one are labelled "e". groups: of a ragged one, the rows of each."""

    op: Op
    labels: tuple[tuple[str, ...], tuple[str, ...]]
    out: tuple[str, ...]
    groups: Value | None = None

    @property
    def operands(self) -> tuple[Value, Value]:
        return self.op.inputs[0], self.op.inputs[1]

    @property
    def summed(self) -> list[str]:
        return [label for label in self.labels[0] if label[0] == "x"]


def dot_of(op: Op | None) -> Dot | None:
    """The product whose result an operation gives."""
    if op is None or op.name not in (*RAGGED, "dot_general") or op.outputs[0].dtype.kind in "biuc":
        return None
    if op.name in RAGGED:
        return _ragged(op)
    contracted, batched = op.params["dimension_numbers"]
    labels: list[tuple[str, ...]] = []
    for side, letter in ((0, "l"), (1, "r")):
        given = {int(d): f"b{n}" for n, d in enumerate(batched[side])}
        given |= {int(d): f"x{n}" for n, d in enumerate(contracted[side])}
        labels.append(tuple(given.get(d, f"{letter}{d}") for d in range(len(op.inputs[side].shape))))
    free = [label for own in labels for label in own if label[0] in "lr"]
    return Dot(op, (labels[0], labels[1]), (*(f"b{n}" for n in range(len(batched[0]))), *free))


def _ragged(op: Op) -> Dot | None:
    """(m, k) by (g, k, n), or (g, n, k), and groups (g,), whose result has the dtype of both."""
    numbers = op.params.get("ragged_dot_dimension_numbers")
    if numbers is None:
        return None
    (left, right), batch = numbers.dot_dimension_numbers
    plain = tuple(left) == (1,) and tuple(right) in ((1,), (2,)) and not any(map(tuple, batch))
    plain &= tuple(numbers.lhs_ragged_dimensions) == (0,) and tuple(numbers.rhs_group_dimensions) == (0,)
    dtypes = {value.dtype for value in (*op.inputs[:2], *op.outputs)}
    if (
        not plain
        or len(dtypes) != 1
        or len(op.inputs[2].shape) != 1
        or op.params.get("group_offset") is not None
    ):
        return None
    matrix = (EXPERT, "x0", "r2") if tuple(right) == (1,) else (EXPERT, "r2", "x0")
    return Dot(op, (("l0", "x0"), matrix), ("l0", "r2"), op.inputs[2])


def plain(reader: Reader, value: Value) -> tuple[Value, tuple[int, ...]] | None:
    """The array whose dimensions a value has in another order, and which each is."""
    try:
        term = reader.of(value).term
    except LeftAlone:
        return None
    if not isinstance(term, tuple) or term[0] != "readf":
        return None
    at = {index: d for d, index in enumerate(term[2:])}
    order = [at.get(f"i{d}") for d in range(len(value.shape))]
    if len(at) != len(value.shape) or None in order:
        return None
    leaf = reader.leaves[term[1]]
    whole = tuple(d for d in order if d is not None)
    return (leaf, whole) if tuple(leaf.shape[d] for d in whole) == value.shape else None

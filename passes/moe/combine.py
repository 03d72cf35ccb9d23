"""combine: the weighted sum of each token's rows, in a fixed order and without atomics.

Before::  %o = combine %y, %place, %weights
After::   kernel @experts_combine grid(c, t) { rows of token t; products with their weights; sum }

Leaves alone: nothing; other operations are lowered elsewhere.
"""

from __future__ import annotations

import sympy

from ...ir.expr import Expr, all_of, integer, maximum, minimum, read, real
from ...ir.graph import Graph, Op
from ...ir.kernel import Axis, Compute, For, GridDim, Kernel, Let, Load, Reduce, Span, Stmt, Store, Tensor
from .spec import ExpertsSpec

ROWS = 16  # of a token, added up at once
WIDEST = 1024
ZERO = sympy.Integer(0)
T, C, R, D, U = map(integer, ("t", "c", "r", "d", "u"))


def combine_kernel(graph: Graph, op: Op, spec: ExpertsSpec) -> Kernel:
    """The kernel of one combine."""
    y, place, *rest = (graph.values[name] for name in op.inputs)
    hidden = int(y.shape[1])
    ragged, weights = len(rest) == 2, rest[-1]
    acc = spec.accumulator
    padded = not spec.is_cpu
    width = hidden if not padded else min(WIDEST, max(32, 1 << (hidden - 1).bit_length()))
    top_k = ROWS if ragged else int(place.shape[1])
    taken = min(top_k, ROWS)
    rows = Axis("r", taken, 1 << (taken - 1).bit_length() if padded else taken)
    feature = C * width + D
    inside = sympy.true if hidden % width == 0 else feature < hidden
    at = U * ROWS + R if ragged or top_k > ROWS else R
    if ragged:
        head: list[Stmt] = [Let("first", _read("starts", T)), Let("last", _read("starts", T + 1))]
        at = integer("first") + at
        known: Expr = at < integer("last")
        steps = (integer("last") - integer("first") + (ROWS - 1)) // ROWS
        entry: Expr = integer("row")
    else:
        head, known = [], sympy.true if top_k % taken == 0 else at < top_k
        steps, at = sympy.Integer(-(-top_k // ROWS)), T * top_k + at
        entry = at
    kept = all_of([known, integer("row") >= 0])
    row = maximum(integer("row"), ZERO)
    step: list[Stmt] = [
        Load("row", "i32", ("r",), "place", (at,), known, sympy.Integer(-1)),
        Load("weight", acc, ("r",), weights.name, (maximum(entry, ZERO),), kept, sympy.Float(0.0)),
        Load("Y", acc, ("r", "d"), y.name, (row, feature), all_of([kept, inside]), sympy.Float(0.0)),
        Reduce("part", acc, ("d",), "sum", real("weight") * real("Y"), ("r",)),
    ]
    total = Compute("total", acc, ("d",), real("total") + real("part"), declares=False)
    if not ragged and top_k <= ROWS:
        body: list[Stmt] = [*step]
        result = real("part")
    else:
        zero = Compute("total", acc, ("d",), sympy.Float(0.0))
        body = [zero, For("u", (Span(ZERO, steps),), (*step, total))]
        result = real("total")
    body = [*head, *body, Store(op.output.name, (T, feature), result, ("d",), inside)]
    align = 16 if padded and spec.aligned and hidden * 2 % 16 == 0 else 1
    # Where rows are given, places may be more: those of experts that choose are all pairs.
    listed = "pairs" if not ragged and graph.producer(place.name) is None else "entries"
    tensors = [
        Tensor(y.name, y.dtype, ("entries", hidden), unit=1, align=align),
        Tensor("place", place.dtype, (listed,), unit=0),
        *([Tensor("starts", rest[0].dtype, ("tokens_and_one",), unit=0)] if ragged else []),
        Tensor(weights.name, weights.dtype, (listed,), unit=0),
        Tensor(op.output.name, op.output.dtype, ("T", hidden), "out", unit=1, align=align),
    ]
    grid = [GridDim("c", sympy.Integer(-(-hidden // width))), GridDim("t", integer("T"))]
    return Kernel(
        f"experts_{op.output.name}",
        tuple(tensors),
        tuple(grid),
        (rows, Axis("d", width, width)),
        "d" if spec.is_cpu else None,
        tuple(body),
        (("stages", 2), ("warps", 4)),
        (f"tokens of {hidden} features, {'lists of rows' if ragged else f'{top_k} rows each'}",),
    )


def _read(name: str, index: Expr) -> Expr:
    """An entry of a list of rows, kept within it."""
    return minimum(maximum(read(integer(name), index), ZERO), integer("entries"))

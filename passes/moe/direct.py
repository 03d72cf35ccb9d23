"""direct: a handful of entries are not sorted; a program takes one entry, and matrices are read as
vectors are.

Before::

    %tokens, %bounds, %place = group %ids
    %h = grouped_gemm %x, %gate_up, %bounds, %tokens {gathers, halves, expr}
    %y = grouped_gemm %h, %down, %bounds
    %o = combine %y, %place, %weights

After, two kernels::

    %h = entry_gemm %x, %gate_up, %ids {halves, expr}        a row for each entry, in the order of ids
    %o = entry_combine %h, %down, %ids, %weights             all rows of a token in one program

Before::  %t = grouped_gemm %x, %a, %bounds, %tokens {expr} ; %h = grouped_gemm %x, %w, .. %t, %b {adds}
After::   %h = entry_gemm %x, %w, %ids, %a, %b {adds, low}

Every program multiplies the row by an adapter's first matrix for itself, which then comes from a cache: as
long as ranks are small, launches of their own would take longer.

Leaves alone: any other graph; one whose rows are used elsewhere or returned; adapters of ranks above
MOST_RANK.
"""

from __future__ import annotations

from ...ir.graph import Graph, Op, Value
from ...ir.ragged import storage_of

MOST_RANK = 32


def direct(graph: Graph) -> Graph:
    """The layer without sorting, where that is all there is to the graph."""
    group, *products, combine = graph.ops
    low = {op.output.name: op for op in products if any(_adds(user, op) for user in products)}
    main = [op for op in products if op.output.name not in low]
    kinds = [op.kind for op in (group, *main, combine)]
    if kinds != ["group", "grouped_gemm", "grouped_gemm", "combine"] or len(graph.outputs) != 1:
        return graph
    if any(int(op.output.shape[1]) > MOST_RANK for op in low.values()):
        return graph
    up, down = main
    if combine.inputs[1] != group.outputs[2].name or len(up.outputs) > 1:
        return graph
    ids, weights = group.inputs[0], combine.inputs[2]
    ops = (
        _of_entries(up, "entry_gemm", (ids,), up.outputs, low),
        _of_entries(down, "entry_combine", (ids, weights), combine.outputs, low),
    )
    return Graph(graph.name, graph.inputs, ops, graph.outputs)


def _adds(op: Op, low: Op) -> bool:
    """Whether an operation adds what another makes, by one more matrix."""
    return op.attr("adds") == "rows" and op.inputs[3 + bool(op.attr("gathers"))] == low.output.name


def _of_entries(
    op: Op, kind: str, routing: tuple[str, ...], outputs: tuple[Value, ...], low: dict[str, Op]
) -> Op:
    """A product by groups as one of entries."""
    plain, codes = storage_of(op)
    kept = ("halves", "expr", "transpose_b", "unit", "biased", "quantized", "adds", "chooses")
    attrs = {k: op.attr(k) for k in kept if op.attr(k) is not None}
    _, _, _, *rest = plain
    choice = [rest.pop(), rest.pop()][:1] if op.attr("chooses") else []
    bias = [rest.pop()] if op.attr("biased") else []
    added: list[str] = []
    if op.attr("adds"):
        t, b = rest[-2:]
        added, attrs["low"] = [low[t].inputs[1], b], low[t].attr("expr")
    return Op(kind, (*plain[:2], *routing, *bias, *added, *choice, *codes[1:]), outputs, tuple(attrs.items()))

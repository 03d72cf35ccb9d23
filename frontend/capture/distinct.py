"""Sums over rows that a program writes as `out[tokens] += rows`.

Where a token stands in `tokens` twice, that keeps one of its rows, and `index_add` adds both. Where no token
does, they are the same, and become `index_add`, as which loops over experts are known.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .ops import arguments, operation, value_of
from .tensor import same_size


def add_rows(graph: fx.Graph) -> None:
    """Let `out[tokens] += rows` be `out.index_add_(0, tokens, rows)`, for tokens that choose one expert."""
    for node in list(graph.nodes):
        if _name(node) != "setitem":
            continue
        out, tokens, total = node.args
        if not (_name(total) == "add" and len(total.args) == 2 and not total.kwargs):
            continue
        held, rows = total.args
        taken = _name(held) == "getitem" and tuple(held.args) == (out, tokens)
        if not (
            taken and list(held.users) == [total] and list(total.users) == [node] and _is_distinct(tokens)
        ):
            continue
        if isinstance(rows, fx.Node) and value_of(rows).dtype == value_of(out).dtype and _same(held, rows):
            with graph.inserting_before(node):
                call = graph.call_method("index_add_", (out, 0, tokens, rows))
            call.meta = {**node.meta, "example_value": value_of(out)}
            for gone in (node, total, held):
                graph.erase_node(gone)


def _is_distinct(tokens: Any) -> bool:
    """Whether tokens are the rows of `where(ids == expert)`, of ids that `topk` has found in each row."""
    if _name(tokens) != "getitem" or tokens.args[1] != 0:
        return False
    found: Any = tokens.args[0]
    alone = _name(found) == "where" and len(found.args) == 1 and not found.kwargs
    if not alone and not (_name(found) == "nonzero" and found.kwargs == {"as_tuple": True}):
        return False
    condition: Any = found.args[0]
    ids: Any
    ids, expert = condition.args if _name(condition) == "eq" and len(condition.args) == 2 else (None, None)
    if not isinstance(expert, int) or _name(ids) != "getitem" or ids.args[1] != 1 or value_of(ids).dim() != 2:
        return False
    chosen: Any = ids.args[0]
    return _name(chosen) == "topk" and arguments(chosen, "input", "k", "dim")[2] in (None, 1, -1)


def _same(held: fx.Node, rows: fx.Node) -> bool:
    shapes = value_of(held).shape, value_of(rows).shape
    return len(shapes[0]) == len(shapes[1]) == 2 and all(map(same_size, *shapes))


def _name(node: Any) -> str | None:
    did = operation(node) if isinstance(node, fx.Node) else None
    return None if did is None else did.name

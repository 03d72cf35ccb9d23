"""transpose: plans for what runs over keys: the groups of masks with queries and keys exchanged.

A kernel that gives one result a key (column sums, and gradients of keys and values) has keys for rows: its
row tiles walk over the queries that attend to them. The set of pairs is turned around, and everything
that finds loops for it stays the same:

    >>> print(exchanged_mask(Mask.parse("mask(p0) { q - k <= p0 and k <= q and q < q_len - 1 }")))
    mask(p0) { k - q <= p0 and k < kv_len - 1 and q <= k }

In a transposed group, and all that is made from it, `q` and `q_len` speak of keys, `k` and `kv_len` of
queries; `lower` exchanges the lengths back in the finished kernel.

Leaves alone: operations whose rows are queries.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.expr import Expr, integer
from ..ir.graph import Graph, Op
from ..ir.mask import Mask
from .align import align_mask
from .decompose import decompose
from .normalize import normalize_mask

TRANSPOSED = ("column_sums", "grad_columns")  # operations with a result a key
_Q, _K, _Q_LEN, _KV_LEN = map(integer, ("q", "k", "q_len", "kv_len"))
_EXCHANGE = {_Q: _K, _K: _Q, _Q_LEN: _KV_LEN, _KV_LEN: _Q_LEN}


def transpose(graph: Graph) -> Graph:
    """Every operation over keys with the groups of its transposed mask."""

    def rule(op: Op) -> Op | None:
        if op.kind not in TRANSPOSED or op.attr("mask") is None or op.attr("groups") is not None:
            return None
        mask = normalize_mask(exchanged_mask(op.attr("mask")))
        return op.with_attrs(groups=align_mask(mask, decompose(mask)))

    return graph.map_ops(rule)


def exchanged_mask(mask: Mask) -> Mask:
    """The mask with queries and keys exchanged: (k, q) attends where (q, k) did."""
    lets = tuple((name, exchanged(term)) for name, term in mask.lets)
    return replace(mask, predicate=exchanged(mask.predicate), lets=lets)


def exchanged(expr: Expr) -> Expr:
    """An expression with queries and keys, and their lengths, exchanged."""
    return expr.xreplace(_EXCHANGE)

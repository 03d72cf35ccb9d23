"""operands: where the rows of q, k, v and of everything stored per query row lie in memory.

The one place that turns (batch, head, row, key) into tensor indices. `lower` writes the softmax over
tiles and takes tensors, indices and the scalars that those need from here.
"""

from __future__ import annotations

from ..ir.expr import Expr, floordiv, integer
from ..ir.kernel import Let, Stmt, Tensor
from .scaffold import COL, ROW, B, H, Scaffold
from .spec import AttentionSpec

Index = tuple[Expr, ...]
HK = integer("hk")  # the key head that the query head reads
ROWS = ("B", "Hq", "q_len")  # extents of what is stored per query row


class Operands:
    """Tensors and indices of one attention over the tiles of a scaffold.

    inputs: the tensors q, k and v. head: statements at the head of a kernel, before any of the indices.
    row, safe_row: indices of the rows of a tile in tensors made by `per_row`; those of safe_row exist
    for every coordinate of the tile."""

    def __init__(self, spec: AttentionSpec, over: Scaffold) -> None:
        unit_q, unit_k, unit_v = (3 if u else None for u in spec.contiguous)
        self.inputs = (
            Tensor("q", spec.dtype, ("B", "Hq", "q_len", spec.qk_size), "in", unit_q),
            Tensor("k", spec.dtype, ("B", "Hk", "kv_len", spec.qk_size), "in", unit_k),
            Tensor("v", spec.dtype, ("B", "Hk", "kv_len", spec.v_size), "in", unit_v),
        )
        self.head: list[Stmt] = [Let("hk", floordiv(H, floordiv(integer("Hq"), integer("Hk"))))]
        self.row: Index = (B, H, ROW)
        self.safe_row: Index = (B, H, over.safe_row)

    def query(self, feature: Expr) -> Index:
        """Where the query of a tile's row is, for every coordinate of the tile."""
        return (*self.safe_row, feature)

    def key(self, feature: Expr) -> Index:
        """Where the key, or value, of a tile's column is."""
        return (B, HK, COL, feature)


def per_row(name: str, dtype: str, role: str, *inner: int) -> Tensor:
    """A tensor with one entry, or one row of `inner` entries, for every query row."""
    return Tensor(name, dtype, (*ROWS, *inner), role, len(ROWS) - 1 + len(inner))

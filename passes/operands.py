"""operands: where the rows of q, k, v and of everything stored per query row lie in memory.

The one place that turns (batch, head, row, key) into tensor indices. `lower` and `folds` write what happens
to tiles and take tensors, indices and the scalars that those need from here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir.expr import Expr, floordiv, integer
from ..ir.kernel import Let, Stmt, Tensor
from .scaffold import COL, ROW, B, H, Scaffold
from .spec import AttentionSpec

Index = tuple[Expr, ...]
HK = integer("hk")  # the key head that the query head reads
ROWS = ("B", "Hq", "q_len")  # extents of what is stored per query row


@dataclass(frozen=True)
class Operand:
    """A tensor of features as tiles of a kernel: names of tile and tensor, and where a row lies."""

    tile: str
    tensor: str
    at: Index


class Operands:
    """Tensors and indices of one operation over the tiles of a scaffold; rows are queries, columns keys.

    inputs: the tensors q and k, and v where it is read. rows, cols: of their tiles scores are the products.
    values: what probabilities weigh. head: statements at the head of a kernel, before any of the indices.
    row, safe_row: indices of the rows of a tile in tensors made by `per_row`; those of safe_row exist
    for every coordinate of the tile."""

    def __init__(self, spec: AttentionSpec, over: Scaffold, *, values: bool = True) -> None:
        unit_q, unit_k, unit_v = (3 if u else None for u in spec.contiguous)
        inputs = (
            Tensor("q", spec.dtype, ("B", "Hq", "q_len", spec.qk_size), "in", unit_q),
            Tensor("k", spec.dtype, ("B", "Hk", "kv_len", spec.qk_size), "in", unit_k),
            Tensor("v", spec.dtype, ("B", "Hk", "kv_len", spec.v_size), "in", unit_v),
        )
        self.inputs = inputs if values else inputs[:2]
        self.head: list[Stmt] = [Let("hk", floordiv(H, floordiv(integer("Hq"), integer("Hk"))))]
        self.row: Index = (B, H, ROW)
        self.safe_row: Index = (B, H, over.safe_row)
        self.rows = Operand("Q", "q", self.safe_row)
        self.cols = Operand("K", "k", (B, HK, COL))
        self.values = Operand("V", "v", (B, HK, COL))


class Transposed(Operands):
    """The same where rows are keys and columns queries (passes/transpose.py): q_len is the length of keys.

    column: the index of a tile's column in what is stored per query."""

    def __init__(self, spec: AttentionSpec, over: Scaffold) -> None:
        super().__init__(spec, over, values=False)
        q, k = self.inputs
        self.inputs = (
            replace(q, shape=("B", "Hq", "kv_len", spec.qk_size)),
            replace(k, shape=("B", "Hk", "q_len", spec.qk_size)),
        )
        self.rows = Operand("K", "k", (B, HK, over.safe_row))
        self.cols = Operand("Q", "q", (B, H, COL))
        self.column: Index = (B, H, COL)


def per_row(name: str, dtype: str, role: str, *inner: int) -> Tensor:
    """A tensor with one entry, or one row of `inner` entries, for every query row."""
    return Tensor(name, dtype, (*ROWS, *inner), role, len(ROWS) - 1 + len(inner))

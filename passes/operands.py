"""operands: where the rows of q, k, v and of everything stored per query row lie in memory.

The one place that turns (batch, head, row, key) into tensor indices, from what `ir.sequences` says of them.
`lower` and `folds` write what happens to tiles and take tensors, indices and the scalars that those need
from here.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ..ir.expr import Expr, floordiv, integer
from ..ir.kernel import Let, Scalar, Stmt, Tensor
from . import sequences as sq
from .scaffold import COL, HK, ROW, B, H, Scaffold
from .spec import AttentionSpec

Index = tuple[Expr, ...]
ONLY = sympy.Integer(0)  # the batch index of packed tensors


@dataclass(frozen=True)
class Operand:
    """A tensor of features as tiles of a kernel: names of tile and tensor, and where a row lies."""

    tile: str
    tensor: str
    at: Index


class Operands:
    """Tensors and indices of one operation over the tiles of a scaffold; rows are queries, columns keys.

    inputs: the tensors q and k, v where it is read, and those that say where sequences are; scalars: integers
    that do. rows, cols: of their tiles scores are the products. values: what probabilities weigh. head:
    statements at the head of a kernel, before any of the indices. row, safe_row: indices of a tile's rows in
    tensors made by `per_row`; those of safe_row exist for every coordinate of the tile."""

    def __init__(self, spec: AttentionSpec, over: Scaffold, *, values: bool = True) -> None:
        unit_q, unit_k, unit_v = (3 if u else None for u in spec.contiguous)
        self.spec, align = spec, spec.align
        where = self.sequences = spec.sequences
        self.row_extents, keys = sq.row_extents(where), sq.key_extents(where)
        v = (Tensor("v", spec.dtype, (*keys, spec.v_size), "in", unit_v, align),)
        self.inputs: tuple[Tensor, ...] = (
            Tensor("q", spec.dtype, (*self.row_extents, spec.qk_size), "in", unit_q, align),
            Tensor("k", spec.dtype, (*keys, spec.qk_size), "in", unit_k, align),
            *(v if values else ()),
            *sq.tensors(where),
        )
        self.scalars: list[Scalar] = sq.scalars(where)
        self.query_head = over.query_head
        shared = [Let("hk", floordiv(H, floordiv(integer("Hq"), integer("Hk"))))]
        self.head: list[Stmt] = [*(shared if over.heads == 1 else [])]
        self.row, self.safe_row = self._row(ROW), self._row(over.safe_row)
        self.rows = Operand("Q", "q", self.safe_row)
        key = self._key(over)
        self.cols, self.values = Operand("K", "k", key), Operand("V", "v", key)

    def per_row(self, name: str, dtype: str, role: str, *inner: int) -> Tensor:
        """A tensor with one entry, or one row of `inner` entries, for every query row."""
        shape = (*self.row_extents, *inner)
        align = self.spec.row_align(dtype, *inner) if inner else 1
        return Tensor(name, dtype, shape, role, len(shape) - 1, align)

    def _row(self, row: Expr) -> Index:
        head = self.query_head
        return (ONLY, head, sq.Q_START + row) if self.sequences.q_bounds else (B, head, row)

    def _key(self, over: Scaffold) -> Index:
        """Where the key, or value, of a tile's column is."""
        if self.sequences.block_table:
            first = over.first_key(self.sequences.page)
            statements, page, slot = sq.pages_of_tile(self.sequences, first, COL, over.valid_col)
            over.make_cols += statements
            return (page, HK, slot)
        return (ONLY, HK, sq.KV_START + COL) if self.sequences.kv_bounds else (B, HK, COL)


class Transposed(Operands):
    """The same where rows are keys and columns queries (passes/transpose.py): q_len is the length of keys.

    column: the index of a tile's column in what is stored per query; column_extents: of those tensors."""

    def __init__(self, spec: AttentionSpec, over: Scaffold, *, values: bool = False) -> None:
        unit_q, unit_k, unit_v = (3 if u else None for u in spec.contiguous)
        self.spec, align = spec, spec.align
        where = self.sequences = over.sequences
        packed = bool(where.q_bounds)
        rows = (1, "Hk", "q_total") if packed else ("B", "Hk", "q_len")
        self.row_extents: tuple[int | str, ...] = rows
        self.column_extents = (1, "Hq", "kv_total") if packed else ("B", "Hq", "kv_len")
        v = (Tensor("v", spec.dtype, (*rows, spec.v_size), "in", unit_v, align),)
        self.inputs = (
            Tensor("q", spec.dtype, (*self.column_extents, spec.qk_size), "in", unit_q, align),
            Tensor("k", spec.dtype, (*rows, spec.qk_size), "in", unit_k, align),
            *(v if values else ()),
            *sq.tensors(where),
        )
        self.scalars = sq.scalars(where)
        self.query_head = H
        shared = Let("hk", floordiv(H, floordiv(integer("Hq"), integer("Hk"))))
        self.head = [] if over.members else [shared]

        def at(row: Expr) -> Index:
            return (ONLY, HK, sq.Q_START + row) if packed else (B, HK, row)

        self.row, self.safe_row = at(ROW), at(over.safe_row)
        self.column: Index = (ONLY, H, sq.KV_START + COL) if packed else (B, H, COL)
        self.rows, self.values = Operand("K", "k", self.safe_row), Operand("V", "v", self.safe_row)
        self.cols = Operand("Q", "q", self.column)

    def per_column(self, name: str, dtype: str, *inner: int) -> Tensor:
        """A tensor with one entry, or one row of `inner` entries, for every query."""
        shape = (*self.column_extents, *inner)
        align = self.spec.row_align(dtype, *inner) if inner else 1
        return Tensor(name, dtype, shape, "in", len(shape) - 1, align)

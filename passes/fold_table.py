"""fold_table: the fold of each fused operation."""

from __future__ import annotations

from .folds import Attention, ColumnSums, Fold, RowLse, Weigh
from .gradient_captures import GradCaptures
from .gradient_columns import GradColumns
from .gradient_rows import GradDelta, GradRows, RowNorm

FOLDS: dict[str, type[Fold]] = {
    "attention": Attention,
    "row_lse": RowLse,
    "weigh": Weigh,
    "column_sums": ColumnSums,
    "row_norm": RowNorm,
    "grad_delta": GradDelta,
    "grad_rows": GradRows,
    "grad_columns": GradColumns,
    "grad_captures": GradCaptures,
}

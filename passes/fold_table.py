"""fold_table: the fold of each fused operation."""

from __future__ import annotations

from .folds import Attention, ColumnSums, Fold, RowLse, Weigh
from .gradient_folds import GradCaptures, GradColumns, GradDelta, GradRows

FOLDS: dict[str, type[Fold]] = {
    "attention": Attention,
    "row_lse": RowLse,
    "weigh": Weigh,
    "column_sums": ColumnSums,
    "grad_delta": GradDelta,
    "grad_rows": GradRows,
    "grad_columns": GradColumns,
    "grad_captures": GradCaptures,
}

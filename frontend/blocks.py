"""Which blocks of a mask hold pairs, and which hold nothing but pairs.

Block (t, u) of size (rows, cols) holds the queries rows * t ... and the keys cols * u ... of one batch
and head. Where the mask is known in closed form so are its blocks: isl projects the mask, and what it
leaves out, onto block coordinates, and only those are evaluated. Otherwise the predicate is evaluated
one row of blocks at a time. Nothing of size q_len x kv_len is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import islpy as isl
import numpy as np

from ..ir.closed import condition
from ..ir.evaluate import evaluate
from ..ir.expr import Expr, integer
from ..ir.mask import Mask
from ..ir.sets import PARAM, SET, QuotaExceeded, locked, quota

OPERATIONS = 2_000_000  # what the projection may cost in isl (about 0.1 s) before rows are evaluated instead


@dataclass(frozen=True)
class Values:
    """A mask's runtime values: its integers, its captured tensors, the lengths."""

    params: Sequence[int]
    captures: Sequence[np.ndarray]
    q_len: int
    kv_len: int

    def integers(self, mask: Mask) -> dict[str, int]:
        named = dict(zip(mask.params, self.params, strict=True))
        return named | {"q_len": self.q_len, "kv_len": self.kv_len}


def classify(
    mask: Mask, values: Values, batches: int, heads: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(some, every): whether a block holds a pair, and whether it holds all rows * cols pairs.

    Both are bool arrays [batches or 1, heads or 1, ceil(q_len / rows), ceil(kv_len / cols)]; a 1 stands
    where the mask depends on no batch, or on no head. Blocks that the lengths cut short are never full.
    """
    shape = tuple(
        n if integer(name) in mask.predicate.free_symbols else 1 for name, n in (("b", batches), ("h", heads))
    )
    shape += -(-values.q_len // size[0]), -(-values.kv_len // size[1])
    if mask.exact:
        try:
            return _in_closed_form(mask, values, shape, size)
        except QuotaExceeded:
            pass
    return _by_rows(mask, values, shape, size)


def _in_closed_form(
    mask: Mask, values: Values, shape: tuple[int, ...], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    b, h, t, u = np.ogrid[tuple(slice(n) for n in shape)]
    at = values.integers(mask) | {"b": b, "h": h, "t": t, "u": u}
    holding, lacking = (
        np.array(np.broadcast_to(evaluate(e, at), shape)) for e in _conditions(mask, values, size)
    )
    return holding, ~lacking


@locked
def _conditions(mask: Mask, values: Values, size: tuple[int, int]) -> tuple[Expr, Expr]:
    """When block (t, u) holds a pair, and when one of its pairs is missing."""
    rows, cols = size
    down, across = (-(-n // step) * step for n, step in zip((values.q_len, values.kv_len), size, strict=True))
    grid = isl.Set(f"{{ [q, k] : 0 <= q < {down} and 0 <= k < {across} }}")
    blocks = isl.Map(
        f"{{ [q, k] -> [t, u] : {rows} t <= q < {rows} t + {rows} and {cols} u <= k < {cols} u + {cols} }}"
    )
    lengths = isl.Set(f"{{ [q, k] : q < {values.q_len} and k < {values.kv_len} }}")
    with quota(OPERATIONS):
        pairs = mask.may.wrap().flatten()
        for name, value in values.integers(mask).items():
            position = pairs.find_dim_by_name(PARAM, name)
            if position >= 0:
                pairs = pairs.fix_val(PARAM, position, isl.Val(value))
        pairs = pairs.intersect(lengths).intersect(grid)
        holding, lacking = (
            condition(_named(points.apply(blocks).coalesce())) for points in (pairs, grid.subtract(pairs))
        )
        return holding, lacking


def _named(points: isl.Set) -> isl.Set:
    return points.set_dim_name(SET, 0, "t").set_dim_name(SET, 1, "u")


def _by_rows(
    mask: Mask, values: Values, shape: tuple[int, ...], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    some, every = np.zeros(shape, bool), np.zeros(shape, bool)
    (rows, cols), (batches, heads, down, across) = size, shape
    k = np.arange(values.kv_len)
    padding = (0, across * cols - values.kv_len)
    for b, h, t in np.ndindex(batches, heads, down):
        q = np.arange(t * rows, min((t + 1) * rows, values.q_len))[:, None]
        pairs = mask.evaluate(b, h, q, k, values.params, values.captures, values.q_len, values.kv_len)
        counts = np.pad(pairs.sum(0), padding).reshape(across, cols).sum(1)
        some[b, h, t], every[b, h, t] = counts > 0, counts == rows * cols
    return some, every

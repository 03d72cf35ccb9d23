"""survey: the tiles that a group would visit on a reference problem, for any tile shape, before any loop.

A schedule is chosen when only the structure of a mask is known: lengths, its integers and its captured
tensors come with each call. So its tiles are counted on a stand-in: `LENGTH` queries and keys, every
integer the same number, captured integers that split the sequence into `PARTS` parts, captured truth
values that hold for one in `PARTS`. The predicate is evaluated for a few row tiles at a few points of
every 16 x 16 cells; coarser tiles are unions of those. That takes milliseconds whatever the mask is.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import sympy

from ..ir.errors import InterpretError
from ..ir.evaluate import evaluate
from ..ir.expr import Expr, floordiv, floormod, readf, reads, sum_of, symbols, where
from ..ir.mask import Mask
from ..ir.plan import Group, Schedule
from .boxes import Boxes
from .distance import anchor
from .tile_count import Size, Tiles
from .tilesets import residue

LENGTH = 4096
PARTS = 8
CELL = 16  # rows and keys of the cells that tiles are made of
ENDS, POINTS = np.array([0, 15]), np.array([0, 5, 10, 15])  # rows and keys of a cell that are looked at
INNER = 8  # row tiles looked at beside the first and the last
GOLDEN = 0.618  # spreads them over all phases of what repeats

Cells = tuple[Any, Any, Any]  # arrays: the weight of each row tile, and [row tile, cell] touched, and full


class Survey:
    """Counts tiles of one group of a mask, with one number for all of the mask's integers."""

    def __init__(self, mask: Mask, group: Group, number: int) -> None:
        self.group, self.number = group, number
        self._predicate = _without_reads(group.predicate, mask)
        self._values: dict[str, Any] = {"q_len": LENGTH, "kv_len": LENGTH, "b": 0, "h": 0, "B": 1, "Hq": 1}
        self._values |= {s.name: number for s in symbols(self._predicate) if s.name not in self._values}
        self._seen: dict[tuple[int, bool], Cells] = {}
        self._counted: dict[tuple[Any, ...], Tiles] = {}

    @cached_property
    def anchors(self) -> tuple[Expr | None, ...]:
        """The anchor of each dimension, see `distance.anchor`; none where key tiles may come by list."""
        if not self.group.exact:
            return (None,) * len(self.group.order.dims)
        return tuple(anchor(self.group, d) for d in range(len(self.group.order.dims)))

    @cached_property
    def boxes(self) -> Boxes:
        """The dimensions of an n-d order."""
        inner = math.prod(dim.width or 1 for dim in self.group.order.dims)
        return Boxes.of(self.group, max(1, -(-LENGTH // inner)))

    def size(self, dtype: str, qk_size: int, v_size: int) -> Size:
        """The reference problem."""
        return Size(LENGTH, LENGTH, 4, 16, 16, qk_size, v_size, dtype)

    def tiles(self, schedule: Schedule, size: Size) -> Tiles:
        """The tiles of one kernel with this schedule on the reference problem."""
        key = schedule.rows, schedule.cols, schedule.anchors, size.batch * size.heads
        if key not in self._counted:
            count = self._boxes if len(self.group.order.dims) > 1 else self._line
            self._counted[key] = count(schedule, size.batch * size.heads)
        return self._counted[key]

    def _boxes(self, schedule: Schedule, heads: int) -> Tiles:
        dims = self.group.order.dims
        anchored = tuple(form is not None for form in schedule.anchors) or (False,) * len(dims)
        seen = self.boxes.visits((schedule.rows, schedule.cols), anchored)
        extents = zip(self.boxes.dims, schedule.rows, dims, strict=True)
        row_tiles = heads * math.prod(-(-int(b.extent) // t) * x.row_stride for b, t, x in extents)
        full = round(row_tiles * seen.full)
        return Tiles(row_tiles, round(row_tiles * seen.mean) - full, full, False, seen.most)

    def _line(self, schedule: Schedule, heads: int) -> Tiles:
        weights, touched, full = self._cells(schedule.rows[0], bool(schedule.anchors))
        touched, full = _merged(touched, schedule.cols[0], any), _merged(full, schedule.cols[0], all)
        visits, whole = touched.sum(axis=1), (full & touched).sum(axis=1)
        row_tiles = int(weights.sum()) * self.group.order.dims[0].row_stride * heads
        visited, full_tiles = (float(weights @ n) / weights.sum() * row_tiles for n in (visits, whole))
        return Tiles(row_tiles, round(visited - full_tiles), round(full_tiles), False, int(visits.max()))

    def _cells(self, rows: int, anchored: bool) -> Cells:
        if (rows, anchored) not in self._seen:
            self._seen[rows, anchored] = self._look(rows, anchored)
        return self._seen[rows, anchored]

    def _look(self, rows: int, anchored: bool) -> Cells:
        dim = self.group.order.dims[0]
        count = -(-LENGTH // (dim.row_stride * rows))
        at, weights = _sample(count)
        classes = self._values | {"r0": dim.row_stride // 2}
        first: Any = 0
        form = next(iter(self.anchors)) if anchored else None
        if form is not None:
            names = {str(s): self.number for s in form.free_symbols}
            first = rows * at[:, None, None] + int(evaluate(form, names))
        cells = -(-LENGTH // (dim.col_stride * CELL))
        row = (np.arange(-(-rows // CELL))[:, None] * CELL + ENDS).ravel()
        col = (np.arange(cells)[:, None] * CELL + POINTS).ravel()
        q = dim.row_stride * (rows * at[:, None, None] + row[None, :, None]) + classes["r0"]
        offset = int(evaluate(residue(self.group.order, 0), classes))
        k = dim.col_stride * (first + col[None, None, :]) + offset
        inside = (k >= 0) & (k < LENGTH)
        q = np.minimum(q, LENGTH - 1) if dim.row_stride == 1 else q
        attends = np.broadcast_to(
            self._evaluate(q, np.clip(k, 0, LENGTH - 1)) & inside, (len(at), len(row), len(col))
        )
        parts = attends.reshape(len(at), len(row), cells, len(POINTS))
        return weights, parts.any(axis=(1, 3)), parts.all(axis=(1, 3))

    def _evaluate(self, q: np.ndarray, k: np.ndarray) -> Any:
        try:
            return evaluate(self._predicate, self._values | {"q": q, "k": k})
        except InterpretError:  # a division by the number, say: count as if every pair attended
            return np.True_


def _sample(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Row tiles to look at, of so many: first, last and some between; and how many each stands for."""
    if count <= INNER + 2:
        return np.arange(count), np.ones(count)
    phase = (0.5 + np.arange(INNER) * GOLDEN) % 1
    inner = 1 + ((np.arange(INNER) + phase) * (count - 2) / INNER).astype(np.int64)
    weights = np.full(INNER, (count - 2) / INNER)
    return np.array([0, *inner, count - 1]), np.array([1, *weights, 1])


def _merged(cells: np.ndarray, cols: int, how: Any) -> np.ndarray:
    """Cells [row tile, cell] as tiles of `cols` keys: any or all of a tile's cells."""
    each = max(1, cols // CELL)
    missing = -cells.shape[1] % each
    padded = np.pad(cells, ((0, 0), (0, missing)))
    return (np.any if how is any else np.all)(padded.reshape(len(cells), -1, each), axis=2)


def _without_reads(predicate: Expr, mask: Mask) -> Expr:
    """The predicate with stand-ins for captured tensors."""
    kinds = {c.name: c.dtype for c in mask.captures}
    found = {r: _stand_in(r, kinds.get(str(r.args[0]), "i32")) for r in reads(predicate)}
    return predicate.xreplace(found) if found else predicate


def _stand_in(element: Expr, dtype: str) -> Expr:
    *outer, last = element.args[1:]
    if isinstance(element, readf):
        return sympy.Float(0)
    if dtype in ("bool", "u8"):
        if not outer:
            return sympy.Integer(1)
        return where(sympy.Eq(floormod(sum_of([3 * i for i in outer]) + last, sympy.Integer(PARTS)), 0), 1, 0)
    return floordiv(PARTS * last, sympy.Integer(LENGTH))

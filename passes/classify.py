"""classify: every tile of a (query, key) grid as empty, partial or full, by projecting integer sets.

A tile holds the pairs in range whose indices, divided by the tile's shape, agree. It is *empty* when none
of them attends, *full* when all do, else *partial*. All come from exact projections: the tiles touched by
the mask, and those touched by its complement. isl then checks that the three classes are disjoint, cover
the grid, and that full tiles hold only pairs that attend.

    >>> from ..ir.mask import Mask
    >>> found = classify(Mask.parse("mask() { k <= q }"), 1000, 1000, {}, Shape((128,), (64,)))
    >>> found.empty, found.partial, found.full
    (56, 16, 56)
    >>> print(found.touched)
    { [t0, u0] : t0 <= 7 and 0 <= u0 <= 1 + 2t0 }

Leaves alone: opaque masks. `classify` is for exact ones; `classify_points` evaluates the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import islpy as isl
import numpy as np

from ..ir.affine import PARAM, SET, condition, locked
from ..ir.errors import UnsupportedError, VerifyError
from ..ir.evaluate import evaluate
from ..ir.formats import ACSR
from ..ir.mask import Mask
from .count import Rows, count_terms
from .decompose import split
from .progression import as_set

MAX_BOX = 1 << 22  # points of a bounding box that are counted one by one


@dataclass(frozen=True)
class Shape:
    """Extents of a tile: rows and columns, one entry a dimension of the index space with these widths."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    widths: tuple[int, ...] = ()

    def counts(self, length: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """How many tiles there are in each dimension, for indices below length."""
        outer = -(-length // math.prod(self.widths))
        return tuple(-(-n // s) for n, s in zip((outer, *self.widths), sizes, strict=True))


@dataclass(frozen=True)
class Tiles:
    """The tiles of one mask at one size, counted by class.

    Of an exact mask: touched and whole are the tiles that are not empty, and those that are full, as sets
    over row tile coordinates t0, t1, ... and key tile coordinates u0, u1, ...; read and needed are sets
    over row tiles and keys: keys in the tiles that are not empty, keys that some row of the tile attends to.
    """

    shape: Shape
    empty: int
    partial: int
    full: int
    read: isl.Set | int
    needed: isl.Set | int
    touched: isl.Set | None = None
    whole: isl.Set | None = None

    @property
    def total(self) -> int:
        return self.empty + self.partial + self.full

    @cached_property
    def keys_read(self) -> int:
        """Keys in the tiles that are not empty, summed over row tiles."""
        return self.read if isinstance(self.read, int) else count_points(self.read)

    @cached_property
    def keys_needed(self) -> int:
        """Keys that some row of the row tile attends to, summed over row tiles."""
        return self.needed if isinstance(self.needed, int) else count_points(self.needed)

    @property
    def overread(self) -> float:
        """Keys read for each key needed."""
        return self.keys_read / self.keys_needed if self.keys_needed else 1.0

    @locked
    def kind(self, row: tuple[int, ...], col: tuple[int, ...]) -> str:
        """'empty', 'partial' or 'full': the class of one tile of an exact mask."""
        if self.touched is None or self.whole is None:
            raise UnsupportedError("the tiles of an opaque mask are counted, not kept: evaluate the mask")
        point = isl.Set(f"{{ [{', '.join(map(str, (*row, *col)))}] }}")
        return (
            "full" if point.is_subset(self.whole) else "partial" if point.is_subset(self.touched) else "empty"
        )


@locked
def classify(mask: Mask, q_len: int, kv_len: int, values: Mapping[str, int], shape: Shape) -> Tiles:
    """The tiles of an exact mask. values: numbers for every other symbol of its sets."""
    rank = len(shape.widths) + 1
    inside = isl.Set(f"{{ [q, k] : 0 <= q < {q_len} and 0 <= k < {kv_len} }}")
    points = fixed(as_set(mask.may), values).intersect(inside)
    tile = _tiling(shape)
    grid, touched = inside.apply(tile).coalesce(), points.apply(tile).coalesce()
    pierced = inside.subtract(points).apply(tile).coalesce()
    whole = touched.subtract(pierced).coalesce()
    _check(grid, touched, pierced, whole, whole.apply(tile.reverse()).intersect(inside).is_subset(points))
    to_rows = tile.project_out(isl.dim_type.out, rank, rank)
    row_keys = isl.Map(f"{{ [q, k] -> [{_digits('k', shape.widths)}] : {_inside('k', shape.widths)} }}")
    needed = points.apply(to_rows.flat_range_product(row_keys)).coalesce()
    in_tiles = (
        touched.apply(tile.reverse()).intersect(inside).apply(to_rows.flat_range_product(row_keys)).coalesce()
    )
    total, present, full = (count_points(s) for s in (grid, touched, whole))
    return Tiles(shape, total - present, present - full, full, in_tiles, needed, touched, whole)


def _check(grid: isl.Set, touched: isl.Set, pierced: isl.Set, whole: isl.Set, sound: bool) -> None:
    partial, empty = touched.intersect(pierced), grid.subtract(touched)
    if not (whole.is_disjoint(partial) and whole.union(partial).union(empty).is_equal(grid)):
        raise VerifyError("the classes of tiles do not partition the grid")
    if not sound:
        raise VerifyError("a tile that counts as full holds a pair that does not attend")


def fixed(points: isl.Set, values: Mapping[str, int]) -> isl.Set:
    """The set for given values of its parameters."""
    for name, value in values.items():
        at = points.find_dim_by_name(PARAM, name)
        if at >= 0:
            points = points.fix_val(PARAM, at, isl.Val(int(value))).project_out(PARAM, at, 1)
    return points.coalesce()


def _digits(index: str, widths: tuple[int, ...], letter: str = "") -> str:
    return ", ".join(f"{letter or index}{d}" for d in range(len(widths) + 1))


def _inside(index: str, widths: tuple[int, ...]) -> str:
    """That index is made of its digits."""
    linear, rules = f"{index}0", []
    for d, w in enumerate(widths, 1):
        linear = f"({w} * {linear} + {index}{d})"
        rules.append(f"0 <= {index}{d} < {w}")
    return " and ".join([f"{index} = {linear}", *rules])


def _tiling(shape: Shape) -> isl.Map:
    """The map from a pair [q, k] to its tile [t0, ..., u0, ...]."""
    parts = {}
    for index, letter, sizes in (("q", "t", shape.rows), ("k", "u", shape.cols)):
        digits = _digits(index, shape.widths)
        down = [f"{letter}{d} = floor({index}{d} / {s})" for d, s in enumerate(sizes)]
        split_up = isl.Map(f"{{ [{index}] -> [{digits}] : {_inside(index, shape.widths)} }}")
        tile = isl.Map(f"{{ [{digits}] -> [{_digits(index, shape.widths, letter)}] : {' and '.join(down)} }}")
        parts[index] = split_up.apply_range(tile)
    both = parts["q"].product(parts["k"]).flatten()
    names = [f"{x}{d}" for x in "tu" for d in range(len(shape.rows))]
    for i, name in enumerate(names):
        both = both.set_dim_name(isl.dim_type.out, i, name)
    return both


@locked
def count_points(points: isl.Set) -> int:
    """How many points a bounded set has: over its bounding box when that is small, else in closed form."""
    if points.is_empty():
        return 0
    high = [int(points.dim_max_val(i).to_python()) + 1 for i in range(points.dim(SET))]
    if math.prod(high) <= MAX_BOX:
        return _count_in_box(points, high)
    rank = len(high) // 2
    widths = tuple(max(high[d], high[rank + d]) for d in range(1, rank))
    names = [f"{x}{d}" for x in "qk" for d in range(rank)]
    rules = " and ".join(_inside(x, widths) for x in "qk")
    flat = points.apply(isl.Map(f"{{ [{', '.join(names)}] -> [q, k] : {rules} }}")).coalesce()
    terms = [piece.term() for piece in split(flat, widths)]
    closed = [t for t in terms if isinstance(t, ACSR)]
    if len(closed) < len(terms):
        raise UnsupportedError("these tiles are too many to count and too irregular for a closed form")
    inner = math.prod(widths)
    return count_terms(closed, Rows(high[0] * inner, {}), high[rank] * inner)


def _count_in_box(points: isl.Set, high: list[int]) -> int:
    names = [f"x{i}" for i in range(len(high))]
    for i, name in enumerate(names):
        points = points.set_dim_name(SET, i, name)
    axes = dict(zip(names, np.ix_(*map(np.arange, high)), strict=True))
    return int(np.broadcast_to(evaluate(condition(points), axes), high).sum())


def classify_points(
    attends: Callable[[np.ndarray, np.ndarray], np.ndarray], q_len: int, kv_len: int, shape: Shape
) -> Tiles:
    """The tiles of any mask, by evaluating it: a row tile at a time, in memory bounded by one of them.

    attends(q, k) says for broadcast arrays of indices which pairs attend.
    """
    grid_q, grid_k = shape.counts(q_len, shape.rows), shape.counts(kv_len, shape.cols)
    tile_of_row = _tile_numbers(np.arange(q_len), shape, shape.rows, grid_q)
    tile_of_key = _tile_numbers(np.arange(kv_len), shape, shape.cols, grid_k)
    columns = np.bincount(tile_of_key, minlength=math.prod(grid_k))
    present = columns > 0
    partial = full = empty = read = needed = 0
    keys = np.arange(kv_len)[None, :]
    for t in np.unique(tile_of_row):
        rows = np.flatnonzero(tile_of_row == t)
        hits = attends(rows[:, None], keys)
        sums = np.bincount(tile_of_key, weights=hits.sum(0), minlength=len(columns))[present]
        sizes = columns[present] * len(rows)
        full += int((sums == sizes).sum())
        empty += int((sums == 0).sum())
        partial += int(((sums > 0) & (sums < sizes)).sum())
        read += int(columns[present][sums > 0].sum())
        needed += int(hits.any(0).sum())
    return Tiles(shape, empty, partial, full, read, needed)


def _tile_numbers(
    index: np.ndarray, shape: Shape, sizes: tuple[int, ...], grid: tuple[int, ...]
) -> np.ndarray:
    digits: list[np.ndarray] = []
    for w in reversed(shape.widths):
        digits.insert(0, index % w)
        index = index // w
    digits.insert(0, index)
    out = np.zeros_like(index)
    for digit, size, n in zip(digits, sizes, grid, strict=True):
        out = out * n + digit // size
    return out

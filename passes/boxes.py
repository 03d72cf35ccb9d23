"""boxes: row and key tile shapes of n-d orders, and the key tiles that such shapes visit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..ir.plan import Group
from .distance import interval

TILE_COST = 24  # what starting a key tile costs, in keys
UNALIGNED = 1.1  # cost of a key tile that starts anywhere in the innermost dimension, on a GPU
RUN = 4  # the fewest keys in a row of memory that a GPU tile reads

Shape = tuple[tuple[int, ...], tuple[int, ...]]  # rows, keys


@dataclass(frozen=True)
class Along:
    """One dimension of a group: low <= k - q <= high, of an extent (inf: as long as the sequence)."""

    low: float
    high: float
    extent: float

    def keys(self, t: int, u: int, aligned: bool) -> float:
        """Key tiles of extent u that t rows visit on average, far from the ends of the sequence.

        aligned: tiles start on their own grid, so that u - 1 keys are wasted on average."""
        span = min(t + self.high - self.low, self.extent)
        return (span + u - 1) / u if aligned else math.ceil(span / u) if span < math.inf else span


@dataclass(frozen=True)
class Visits:
    """Key tiles of a row tile: on average, the full ones among them, and the most that one visits."""

    mean: float
    full: float
    most: int


@dataclass(frozen=True)
class Boxes:
    """The dimensions of a group, in rows and keys of one residue class."""

    dims: tuple[Along, ...]

    @staticmethod
    def of(group: Group, length: float = math.inf) -> Boxes:
        """length: the extent of the outermost dimension where it has none."""
        dims = group.order.dims
        widths = [length if x.width is None else x.width for x in dims]
        extents = [-(-w // x.row_stride) for w, x in zip(widths, dims, strict=True)]
        return Boxes(tuple(Along(*interval(group, d), n) for d, n in enumerate(extents)))

    def shape(self, rows: int, keys: int, *, aligned: bool) -> Shape:
        """The cheapest factorisations of `rows`, and of about `keys`, on unbounded sequences.

        aligned: see `Along.keys`."""
        rank = len(self.dims)
        key_shapes = [k for size in (keys // 2, keys, 2 * keys) for k in factorisations(size, rank)]
        shapes = itertools.product(factorisations(rows, rank), key_shapes)
        return min(shapes, key=lambda s: (self._cost(s, aligned), s))

    def _cost(self, shape: Shape, aligned: bool) -> float:
        """Keys that one row reads, and what their tiles cost to start, in keys."""
        tiles, read, waste = 1.0, 1.0, 1.0
        for t, u, dim in zip(*shape, self.dims, strict=True):
            count = dim.keys(t, u, aligned)
            tiles, read = tiles * count, read * count * u
            waste *= -(-dim.extent // t) * t / dim.extent if dim.extent < math.inf else 1
        return (read + TILE_COST * tiles) * waste / math.prod(shape[0])

    def fewest(self, rows: int, keys: int, anchors: tuple[bool, ...]) -> tuple[Shape, tuple[bool, ...]]:
        """The factorisations of rows and keys that visit the fewest key tiles, and which dimensions anchor.

        anchors: the dimensions that may; extents are finite. The innermost one does only if that saves more
        than it costs (`UNALIGNED`). Of equals, the one with the longest runs of keys in memory."""
        rank = len(self.dims)
        limits = [may * (UNALIGNED if d == rank - 1 else 1.0) for d, may in enumerate(anchors)]

        def judged(shape: Shape) -> tuple[float, int, Shape, tuple[bool, ...]]:
            sides = [_sides(dim, t, u, f) for t, u, dim, f in zip(*shape, self.dims, limits, strict=True)]
            per_row = math.prod(tiles for tiles, _ in sides)
            row_tiles = math.prod(-(-dim.extent // t) for t, dim in zip(shape[0], self.dims, strict=True))
            return per_row * row_tiles, -shape[1][-1], shape, tuple(chosen for _, chosen in sides)

        shapes = itertools.product(factorisations(rows, rank), factorisations(keys, rank))
        _, _, shape, chosen = min(judged(shape) for shape in shapes if shape[1][-1] >= RUN)
        return shape, chosen

    def visits(self, shape: Shape, anchored: tuple[bool, ...]) -> Visits:
        """What one row tile visits; extents are finite."""
        each = [visits(dim, t, u, a) for t, u, dim, a in zip(*shape, self.dims, anchored, strict=True)]
        mean, full = math.prod(v.mean for v in each), math.prod(v.full for v in each)
        return Visits(mean, full, math.prod(v.most for v in each))


def _sides(dim: Along, t: int, u: int, factor: float) -> tuple[float, bool]:
    """The cost in tiles of the better of grid and anchor along one dimension, and whether that is the anchor.

    factor: of a tile that is anchored; 0: none may."""
    grid = visits(dim, t, u, False).mean
    anchored = factor * visits(dim, t, u, True).mean if factor else grid
    return (anchored, True) if anchored < grid else (grid, False)


@lru_cache(maxsize=4096)
def visits(dim: Along, t: int, u: int, anchored: bool) -> Visits:
    """Key tiles of extent u that row tiles of extent t visit along a dimension of finite extent."""
    extent = int(dim.extent)
    counts, full = [], []
    for first in range(0, extent, t):
        start = first + int(dim.low) if anchored else 0
        low, high = max(0, first + dim.low), min(extent - 1, first + t - 1 + dim.high)
        inner_low, inner_high = max(0, first + t - 1 + dim.low), min(extent - 1, first + dim.high)
        counts.append(max(0, int((high - start) // u - (low - start) // u) + 1))
        full.append(max(0, int((inner_high + 1 - start) // u + (start - inner_low) // u)))
    return Visits(sum(counts) / len(counts), sum(full) / len(full), max(counts))


def factorisations(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Powers of two with a product, in so many parts."""
    if parts == 1:
        yield (total,)
        return
    for first in (1 << e for e in range(total.bit_length()) if total % (1 << e) == 0):
        for rest in factorisations(total // first, parts - 1):
            yield (first, *rest)

"""boxes: row and key tile shapes of n-d orders, and the key tiles that such shapes visit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..ir.plan import Group
from .distance import reach

TILE_COST = 24  # what starting a key tile costs, in keys

Shape = tuple[tuple[int, ...], tuple[int, ...]]  # rows, keys


@dataclass(frozen=True)
class Boxes:
    """The extents of a group in each dimension: max - min of k - q, and the width (inf: no bound)."""

    reach: tuple[float, ...]
    limits: tuple[float, ...]

    @staticmethod
    def of(group: Group) -> Boxes:
        dims = group.order.dims
        limits = (math.inf if x.width is None else -(-x.width // x.row_stride) for x in dims)
        return Boxes(tuple(reach(group, d) for d in range(len(dims))), tuple(limits))

    def shape(self, rows: int, keys: int, *, aligned: bool, sizes: tuple[int, ...] = ()) -> Shape:
        """The cheapest factorisations of `rows`, and of one of `sizes` (half to double of `keys`).

        aligned: key tiles start on their own grid, so that u - 1 keys a dimension are wasted on average."""
        sizes = sizes or (keys // 2, keys, 2 * keys)
        rank = len(self.limits)
        key_shapes = [k for size in sizes for k in _factorisations(size, rank)]
        shapes = itertools.product(_factorisations(rows, rank), key_shapes)
        return min(shapes, key=lambda s: (self._cost(s, aligned), s))

    def visits(self, shape: Shape, aligned: bool) -> tuple[float, float]:
        """Key tiles that one row tile visits, on average, and how many of them are full."""
        visited, full = 1.0, 1.0
        for t, u, r, limit in zip(*shape, self.reach, self.limits, strict=True):
            visited *= _along(t, u, r, limit, aligned)
            full *= limit / u if r >= limit else max(0.0, (r - t - u + 3) / u)
        return visited, min(visited, full)

    def _cost(self, shape: Shape, aligned: bool) -> float:
        """Keys that one row reads, and what their tiles cost to start, in keys."""
        tiles, read, waste = 1.0, 1.0, 1.0
        for t, u, r, limit in zip(*shape, self.reach, self.limits, strict=True):
            count = _along(t, u, r, limit, aligned)
            tiles, read = tiles * count, read * count * u
            waste *= -(-limit // t) * t / limit if limit < math.inf else 1
        return (read + TILE_COST * tiles) * waste / math.prod(shape[0])


def _along(t: int, u: int, r: float, limit: float, aligned: bool) -> float:
    """Key tiles of extent u that t rows visit along one dimension."""
    span = min(t + r, limit)
    return (span + u - 1) / u if aligned else math.ceil(span / u) if span < math.inf else span


def _factorisations(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in (1 << e for e in range(total.bit_length()) if total % (1 << e) == 0):
        for rest in _factorisations(total // first, parts - 1):
            yield (first, *rest)

"""cover: a 0/1 matrix as a union of simple shapes, each inside it.

Shapes are intervals and residue classes of rows (q), of columns (k) and of diagonals (q - k), and blocks
q // W == k // W. For each context (none, k <= q, k >= q) that holds all wanted pairs, shapes are taken
greedily by how much they add, and judged within the context only. Covers are tried with bars alone (rows,
columns, blocks), with intervals, and with residue classes too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import sympy

from ..ir.closed import size
from ..ir.expr import Expr, any_of, floordiv
from .fit import K, Matrix, Q, interval, residues, values

MAX_SHAPES, MAX_POOL = 12, 48  # shapes in a cover; shapes looked at
MAX_MODULUS, MAX_RUNS = 256, 4  # more runs of residues than this are chance
CONTEXTS = (sympy.true, K <= Q, K >= Q)
KINDS = ("bars", "intervals", "all")


@dataclass(frozen=True)
class Cover:
    """context and (one of shapes) describe the wanted pairs but for `rest`; no shape says too much."""

    context: Expr
    shapes: tuple[Expr, ...]
    rest: np.ndarray

    @property
    def predicate(self) -> Expr:
        return sympy.And(self.context, any_of(list(self.shapes)))

    @property
    def cost(self) -> tuple[int, int, int]:
        return int(self.rest.sum()), len(self.shapes), size(self.predicate)


def covers(want: Matrix) -> list[Cover]:
    """Covers from few kinds of shapes and from all, in every context that holds what is wanted."""
    wanted = want.found & want.care
    contexts = [c for c in CONTEXTS if not (wanted & ~values(c, wanted.shape)).any()]
    return [_cover(want, c, kind) for kind in KINDS for c in contexts]


def cover(want: Matrix) -> Cover:
    """The cover that leaves least, with the fewest and simplest shapes."""
    return min(covers(want), key=lambda c: c.cost)


def _cover(want: Matrix, context: Expr, kind: str) -> Cover:
    care = want.care & values(context, want.found.shape)
    weighed = sorted(_shapes(Matrix(want.found, care), kind), key=lambda s: -s[1])[:MAX_POOL]
    pool = [(s, values(s, want.found.shape) & care) for s, _ in weighed]
    rest, taken = want.found & care, []
    while rest.any() and pool and len(taken) < MAX_SHAPES:
        shape, points = max(pool, key=lambda p: int((p[1] & rest).sum()))
        if not (points & rest).any():
            break
        taken.append((shape, points))
        rest = rest & ~points
    return Cover(context, tuple(s for s, _ in _needed(taken, want.found & care & ~rest)), rest)


def _needed(taken: list[tuple[Expr, np.ndarray]], covered: np.ndarray) -> list[tuple[Expr, np.ndarray]]:
    """Shapes less those that the others make superfluous, latest first."""
    kept = list(taken)
    for item in reversed(taken):
        others = [p for s, p in kept if s is not item[0]]
        if others and (np.logical_or.reduce(others) >= covered).all():
            kept = [x for x in kept if x[0] is not item[0]]
    return kept


@dataclass(frozen=True)
class _Index:
    """What a matrix says by row, column or diagonal: number, wanted entries, and whether any is unwanted."""

    name: Expr
    numbers: np.ndarray
    wanted: np.ndarray
    broken: np.ndarray
    seen: np.ndarray


def _shapes(want: Matrix, kind: str) -> Iterator[tuple[Expr, int]]:
    """Shapes that hold no unwanted pair, the largest of each kind, with the wanted pairs that they hold."""
    bad = want.care & ~want.found
    rows, cols = np.indices(bad.shape)
    for x, index, shift in ((Q, rows, 0), (K, cols, 0), (Q - K, rows - cols, bad.shape[1] - 1)):
        if kind == "bars" and x == Q - K:
            continue
        flat = (index + shift).ravel()
        n = int(flat.max(initial=0)) + 1
        wanted, broken, seen = (
            np.bincount(flat, m.ravel(), n) for m in (want.found & want.care, bad, want.care)
        )
        along = _Index(x, np.arange(n) - shift, wanted, broken > 0, seen > 0)
        yield from _intervals(along)
        if kind == "all":
            yield from _residue_classes(along)
    width = _block(bad)
    if width > 1:
        w = sympy.Integer(width)
        blocks = sympy.Eq(floordiv(Q, w), floordiv(K, w))
        yield blocks, int((values(blocks, bad.shape) & want.found & want.care).sum())


def _runs(holds: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of every run of truth."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], holds.astype(int), [0]))))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _intervals(along: _Index) -> Iterator[tuple[Expr, int]]:
    """The longest runs of the index in which nothing is broken."""
    where = np.flatnonzero(along.seen)
    if not where.size:
        return
    first, last = int(where[0]), int(where[-1])
    for start, stop in _runs(~along.broken[first : last + 1]):
        start, stop = start + first, stop + first
        below, above = start > first, stop <= last
        if below or above:
            low, high = int(along.numbers[start]), int(along.numbers[stop - 1])
            yield interval(along.name, low, high, below, above), int(along.wanted[start:stop].sum())


def _residue_classes(along: _Index) -> Iterator[tuple[Expr, int]]:
    """Runs of residues in which nothing is broken, for moduli that no smaller one explains."""
    explained: list[tuple[int, np.ndarray]] = []
    for m in range(2, min(MAX_MODULUS, int(along.seen.sum()) // 2) + 1):
        residue = along.numbers % m
        whole = np.bincount(residue, along.broken, m) == 0
        whole &= np.bincount(residue, along.seen, m) >= 2
        for smaller, classes in explained:
            if m % smaller == 0:
                whole &= ~classes[np.arange(m) % smaller]
        runs = _runs(whole)
        if not runs or len(runs) > MAX_RUNS:
            continue
        explained.append((m, whole))
        weight = np.bincount(residue, along.wanted, m)
        for start, stop in runs:
            yield residues(along.name, m, start, stop - 1), int(weight[start:stop].sum())


def _block(bad: np.ndarray) -> int:
    """The largest W with no unwanted pair in q // W == k // W."""
    side = min(bad.shape)
    corner = bad[:side, :side]
    reach = np.flatnonzero(np.logical_or.accumulate(corner | corner.T, 1).diagonal() | corner.diagonal())
    limit = int(reach[0]) if reach.size else side - 1
    q, k = np.arange(bad.shape[0])[:, None], np.arange(bad.shape[1])[None, :]
    for width in range(limit, 1, -1):
        if not (bad & (q // width == k // width)).any():
            return width
    return 1

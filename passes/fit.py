"""fit: closed forms for rows that are one progression each, from a 0/1 matrix.

The first and last columns of the rows, and of what may not be in them, leave for each row an interval of
lower and of upper bounds. A form fits when its values lie in all of them. Forms are, in the order in which
they are tried: no bound, a constant, q + c, c - q, W * (q // W) + c, and q + c with one side or both held
by a constant.

Matrices come with a mask `care` of the same shape; entries outside it may come out either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import sympy

from ..ir.evaluate import evaluate
from ..ir.expr import Expr, all_of, floordiv, floormod, integer, maximum, minimum

Q, K = integer("q"), integer("k")
FAR = 1 << 40  # beyond every index: no bound


@dataclass(frozen=True)
class Matrix:
    """What is wanted: `found` on the entries of `care`; both bool of one shape (rows, columns)."""

    found: np.ndarray
    care: np.ndarray

    def holds(self, predicate: Expr) -> bool:
        """Whether the predicate says what is wanted, wherever it matters."""
        return bool((values(predicate, self.found.shape) == self.found)[self.care].all())


def values(predicate: Expr, shape: tuple[int, ...]) -> np.ndarray:
    """A predicate of q and k on a matrix of this shape."""
    q, k = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    return np.broadcast_to(evaluate(predicate, {"q": q, "k": k}), shape)


def fit_rows(want: Matrix) -> Expr | None:
    """A predicate whose rows are one progression each, with a common stride; None when no form fits."""
    some = np.any(want.found & want.care, axis=1)
    if not some.any():
        return sympy.false
    for rule, inside in _residues(want):
        for low in _bounds(want, inside, some, lower=True):
            for high in _bounds(want, inside, some, lower=False):
                predicate = all_of([rule, low, high])
                if want.holds(predicate):
                    return predicate
                rows = _needed_rows(want, predicate, some)
                if rows is not None and want.holds(all_of([predicate, rows])):
                    return all_of([predicate, rows])
    return None


def _residues(want: Matrix) -> Iterator[tuple[Expr, np.ndarray]]:
    """The congruence of largest modulus that all wanted entries satisfy; the trivial one if there is none."""
    rows, cols = np.nonzero(want.found & want.care)
    steps = np.diff(cols)[np.diff(rows) == 0]
    stride = int(np.gcd.reduce(steps)) if steps.size else 0
    if stride > 1:
        for form, of in ((K - Q, cols - rows), (K, cols), (K + Q, cols + rows)):
            classes = np.unique(of % stride)
            if len(classes) == 1:
                rule = sympy.Eq(floormod(form - int(classes[0]), sympy.Integer(stride)), 0)
                yield rule, values(rule, want.found.shape)
                return
    yield sympy.true, np.ones_like(want.found)


def _bounds(want: Matrix, inside: np.ndarray, some: np.ndarray, *, lower: bool) -> Iterator[Expr]:
    """Lower (or upper) bounds of k that keep wanted entries and drop others, by form."""
    wanted, columns = want.found & want.care, np.arange(want.found.shape[1])
    others = want.care & inside & ~want.found
    first, last = wanted.argmax(1), wanted.shape[1] - 1 - wanted[:, ::-1].argmax(1)
    if lower:
        barrier = np.where(others & (columns < first[:, None]), columns, -FAR).max(1)
        least, most = np.where(barrier > -FAR, barrier + 1, -FAR), first
    else:
        barrier = np.where(others & (columns > last[:, None]), columns, FAR).min(1)
        least, most = last, np.where(barrier < FAR, barrier - 1, FAR)
    q = np.flatnonzero(some)
    for form in forms(q, least[q], most[q]):
        yield sympy.true if form is None else form <= K if lower else form >= K


def forms(q: np.ndarray, least: np.ndarray, most: np.ndarray) -> Iterator[Expr | None]:
    """Functions of q with values from least to most in every row; None: no bound is needed."""
    if (least <= -FAR).all() or (most >= FAR).all():
        yield None
        return
    for base, line in ((0 * q, sympy.Integer(0)), (q, Q), (-q, -Q)):
        shift = _shift(base, least, most)
        if shift is not None:
            yield line + shift
    for width in range(2, len(q)):
        shift = _shift(width * (q // width), least, most)
        if shift is not None:
            blocks: Expr = floordiv(Q, sympy.Integer(width))
            yield width * blocks + shift
            break
    yield from _clamps(q, least, most)


def _shift(base: np.ndarray, least: np.ndarray, most: np.ndarray) -> int | None:
    """The c nearest to 0 with least <= base + c <= most."""
    low, high = int((least - base).max()), int((most - base).min())
    return min(max(0, low), high) if low <= high else None


def _clamps(q: np.ndarray, least: np.ndarray, most: np.ndarray) -> Iterator[Expr]:
    def fits(f: np.ndarray) -> bool:
        return bool(((least <= f) & (f <= most)).all())

    def number(x: int) -> sympy.Integer:
        return sympy.Integer(x)

    c, top = int((least - q).max()), int(least.max())  # the least that suffices
    if fits(np.minimum(q + c, top)):
        yield minimum(Q + c, number(top))
    c, bottom = int((most - q).min()), int(most.min())  # the most that is allowed
    if fits(np.maximum(q + c, bottom)):
        yield maximum(Q + c, number(bottom))
    held = most < top
    if held.any():
        c, bottom = int((most - q)[held].min()), int(most[held].min())
        if fits(np.minimum(np.maximum(q + c, bottom), top)):
            yield minimum(maximum(Q + c, number(bottom)), number(top))


def _needed_rows(want: Matrix, predicate: Expr, some: np.ndarray) -> Expr | None:
    """A condition on rows that drops those where the predicate says too much."""
    wrong = np.any(values(predicate, want.found.shape) & ~want.found & want.care, axis=1)
    return fit_set(some, wrong, Q)


def fit_set(must: np.ndarray, never: np.ndarray, x: Expr) -> Expr | None:
    """A condition on the index x that holds where `must` and not where `never`: an interval or residues."""
    inside, outside = np.flatnonzero(must), np.flatnonzero(never)
    if not inside.size:
        return sympy.false
    low, high = int(inside[0]), int(inside[-1])
    if not never[low : high + 1].any():
        return interval(x, low, high, bool((outside < low).any()), bool((outside > high).any()))
    for m in range(2, len(must) // 2 + 1):
        yes, no = np.unique(inside % m), np.unique(outside % m)
        if np.intersect1d(yes, no).size:
            continue
        a, b = int(yes[0]), int(yes[-1])
        if not ((no > a) & (no < b)).any():
            return residues(x, m, a, b)
    return None


def interval(x: Expr, low: int, high: int, below: bool = True, above: bool = True) -> Expr:
    """low <= x <= high, less the sides that are not needed."""
    return all_of([x >= low] * below + [x <= high] * above)


def residues(x: Expr, m: int, low: int, high: int) -> Expr:
    """low <= x % m <= high."""
    r = floormod(x, sympy.Integer(m))
    return sympy.Eq(r, low) if low == high else interval(r, low, high, low > 0, high < m - 1)

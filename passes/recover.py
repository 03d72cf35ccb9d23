"""recover: the closed form of a 0/1 matrix (SPLAT's route from data to affine-compressed rows).

    >>> q, k = np.arange(200)[:, None], np.arange(150)
    >>> mask, tables = recover((abs(q - k) <= 9) | (k < 4))
    >>> print(mask, len(tables))
    mask() { (q - k <= 9 and q - k >= -9) or k <= 3 } 0

Guaranteed: inside the matrix the mask says exactly what the matrix does; this is checked entry by entry
before the answer is given. Outside it the closed form goes on by its rule, and a table raises InputError.
Which closed form is found is a matter of search, in this order:

1. one progression a row, with a common stride and bounds of the forms of passes/fit.py;
2. a product over an index space with some width W: one form for q // W and k // W, one for q % W, k % W;
3. a union of intervals, residue classes and blocks, all within k <= q or k >= q if need be, with at most
   one part of the first two kinds beside them.

What none of them covers is stored: as progressions by row where few a row suffice, else as a table.
"""

from __future__ import annotations

import numpy as np
import sympy

from ..ir.closed import size
from ..ir.errors import InputError, VerifyError
from ..ir.expr import Expr, all_of, any_of, floordiv, floormod, integer, read
from ..ir.formats import StoredACSR
from ..ir.mask import Capture, Mask
from .cover import Cover, cover, covers
from .fit import K, Matrix, Q, fit_rows

MAX_STORED = 4  # progressions a row that are kept as such
MAX_DEPTH, MAX_TRIES = 2, 6  # products within products; widths tried for those
ALL_WIDTHS = 512  # up to this length every width is tried


def recover(array: np.ndarray) -> tuple[Mask, tuple[np.ndarray, ...]]:
    """A mask that is this matrix, and the tensors it captures (none when a closed form was found).

    array: (q_len, kv_len) of bool, or numbers that are all 0 or 1. Raises InputError on anything else.
    """
    found = _checked(array)
    predicate, rest = _fit_part(Matrix(found, np.ones_like(found)))
    stored, captures, tables = _stored(rest) if rest.any() else (sympy.false, (), ())
    mask = Mask(sympy.Or(predicate, stored) if captures else predicate, (), captures)
    q, k = np.arange(found.shape[0])[:, None], np.arange(found.shape[1])[None, :]
    if not (mask.evaluate(0, 0, q, k, (), tables, *found.shape) == found).all():
        raise VerifyError(f"the recovered mask differs from the matrix: {mask}")
    return mask, tables


def stored_rows(array: np.ndarray) -> tuple[StoredACSR, ...]:
    """The matrix as disjoint terms of stored rows: in each row the longest progression from the left."""
    rows = [_progressions(np.flatnonzero(row)) for row in _checked(array)]
    terms = []
    for i in range(max(map(len, rows), default=0)):
        here = [r[i] if i < len(r) else (0, 1, 0) for r in rows]
        terms.append(StoredACSR(*(np.array(column) for column in zip(*here, strict=True))))
    return tuple(terms)


def _checked(array: np.ndarray) -> np.ndarray:
    given = np.asarray(array)
    if given.ndim != 2:
        raise InputError("from_dense", "a matrix of shape (q_len, kv_len)", f"shape {given.shape}")
    if given.dtype == np.bool_:
        return given
    expected, fix = "a matrix of truth values, or of 0 and 1", "Compare it first, such as array > 0"
    if given.dtype.kind not in "iuf":
        raise InputError("from_dense", expected, f"dtype {given.dtype}", fix)
    wrong = given[~np.isin(given, (0, 1))]
    if wrong.size:
        raise InputError("from_dense", expected, f"{wrong[0]} among them", fix)
    return given.astype(bool)


def _fit(want: Matrix, depth: int) -> Expr | None:
    """A predicate for the whole matrix, or None."""
    predicate = fit_rows(want)
    if predicate is not None:
        return predicate
    shapes = cover(want)
    if not shapes.rest.any():
        return shapes.predicate
    return _fit_product(want, depth)


def _fit_part(want: Matrix) -> tuple[Expr, np.ndarray]:
    """A predicate that says nothing too much, and the entries it leaves."""
    whole = _fit(want, MAX_DEPTH)
    if whole is not None:
        return whole, np.zeros_like(want.found)
    found = covers(want)
    for shapes in found:
        beside = Matrix(shapes.rest, want.care & (shapes.rest | ~want.found))
        part = fit_rows(beside)
        if part is None:
            part = _fit_product(beside, 0)
        if part is not None:
            return _shortest(want, shapes, part), np.zeros_like(want.found)
    best = min(found, key=lambda c: c.cost)
    return best.predicate, best.rest


def _shortest(want: Matrix, found: Cover, part: Expr) -> Expr:
    """The cover with the part beside it, without shapes that the part makes superfluous."""
    shapes = list(found.shapes)
    for shape in found.shapes:
        fewer = [s for s in shapes if s != shape]
        if want.holds(sympy.Or(sympy.And(found.context, any_of(fewer)), part)):
            shapes = fewer
    return sympy.Or(sympy.And(found.context, any_of(shapes)), part)


def _fit_product(want: Matrix, depth: int) -> Expr | None:
    """outer(q // W, k // W) and inner(q % W, k % W), for a width W for which both have a form.

    The simplest of those with one progression a row on both sides; else the first with any form.
    """
    sides = [(w, *s) for w in _widths(want.found) if (s := _sides(want, w)) is not None]
    plain = [p for w, *s in sides if (p := _product(want, w, [fit_rows(x) for x in s])) is not None]
    if plain or not depth:
        return min(plain, key=size, default=None)
    found = (_product(want, w, [_fit(x, depth - 1) for x in s]) for w, *s in sides[:MAX_TRIES])
    return next((p for p in found if p is not None), None)


def _product(want: Matrix, width: int, sides: list[Expr | None]) -> Expr | None:
    outer, inner = sides
    if outer is None or inner is None:
        return None
    w = sympy.Integer(width)
    above = outer.xreplace({Q: floordiv(Q, w), K: floordiv(K, w)})
    found = all_of([above, inner.xreplace({Q: floormod(Q, w), K: floormod(K, w)})])
    return found if want.holds(found) else None


def _widths(found: np.ndarray) -> list[int]:
    """Widths worth trying: all, or those at which entries of the middle row repeat in a long matrix."""
    longest = max(found.shape)
    if longest <= ALL_WIDTHS:
        return list(range(2, longest))
    busiest = np.flatnonzero(found[int(found.sum(1).argmax())])
    return [int(w) for w in np.unique(busiest[:, None] - busiest[None, :64]) if 2 <= w < longest]


def _sides(want: Matrix, width: int) -> tuple[Matrix, Matrix] | None:
    """The outer and inner factors over an index space of this width; None when the matrix is no product."""
    found, care = (_unfold(x, width) for x in (want.found & want.care, want.care))
    outer, inner = np.any(found, axis=(1, 3)), np.any(found, axis=(0, 2))
    product = outer[:, None, :, None] & inner[None, :, None, :]
    if ((product != found) & care).any():
        return None
    outer_care = np.any(care & inner[None, :, None, :], axis=(1, 3))
    inner_care = np.any(care & outer[:, None, :, None], axis=(0, 2))
    return Matrix(outer, outer_care), Matrix(inner, inner_care)


def _unfold(x: np.ndarray, width: int) -> np.ndarray:
    """(rows, columns) as (q // W, q % W, k // W, k % W), padded with False."""
    rows, cols = (-(-n // width) for n in x.shape)
    out = np.zeros((rows * width, cols * width), bool)
    out[: x.shape[0], : x.shape[1]] = x
    return out.reshape(rows, width, cols, width)


def _progressions(columns: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, stride, count) of progressions that make up increasing columns, each as long as it can be."""
    out, left = [], [int(c) for c in columns]
    while left:
        if len(left) == 1:
            out.append((left[0], 1, 1))
            break
        first, stride = left[0], left[1] - left[0]
        have, n = set(left), 0
        while first + n * stride in have:
            n += 1
        taken = {first + i * stride for i in range(n)}
        out.append((first, stride, n))
        left = [c for c in left if c not in taken]
    return out


def _stored(rest: np.ndarray) -> tuple[Expr, tuple[Capture, ...], tuple[np.ndarray, ...]]:
    """(predicate, captures, tensors) of entries without a closed form."""
    terms = stored_rows(rest)
    if len(terms) > MAX_STORED:
        table = Capture("c0", "bool", 2)
        return sympy.Ne(read(table.symbol, Q, K), 0), (table,), (rest,)
    parts: list[Expr] = []
    tensors: list[np.ndarray] = []
    for i, t in enumerate(terms):
        first, stride, end = (read(integer(f"c{3 * i + j}"), Q) for j in range(3))
        parts.append(all_of([first <= K, end > K, sympy.Eq(floormod(K - first, stride), 0)]))
        tensors += [a.astype(np.int32) for a in (t.offset, t.stride, t.offset + t.stride * t.count)]
    captures = tuple(Capture(f"c{i}", "i32", 1) for i in range(len(tensors)))
    return any_of(parts), captures, tuple(tensors)

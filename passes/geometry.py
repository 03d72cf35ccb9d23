"""geometry: what a mask looks like at given lengths: its terms, how many pairs, which tiles.

    >>> from ..ir.mask import Mask
    >>> g = analyze(Mask.parse("mask(p0) { q - k <= p0 and k <= q }"), 1 << 24, 1 << 24, (127,))
    >>> g.nnz
    2147475520
    >>> print(g.explain())
    mask(p0) { k <= q and q - k <= p0 }
    q_len 16777216, kv_len 16777216, p0 = 127
    pairs 2147475520, density 7.63e-06
    term 0: acsr (stride 1, offset 0, first max(0, q - p0), count min(q, p0) + 1), rows p0 >= 0
    proven for all lengths and all p0: disjoint terms, one progression a row, union = mask

Everything is computed when asked for. For masks that isl holds exactly, no work and no memory grows with
the lengths. Opaque masks are evaluated, in chunks of bounded memory, between the columns that their affine
bound leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import sympy

from ..ir.errors import InputError
from ..ir.evaluate import evaluate
from ..ir.formats import ACSR
from ..ir.mask import Mask
from .classify import Shape, Tiles, classify, classify_points
from .count import Rows, TooIrregular, count_terms
from .decompose import Term, decompose, describe
from .delinearize import widths

CHUNK = 1 << 20  # pairs evaluated at once


class Geometry:
    """The geometry of one mask for one batch and head at given lengths. Made by `analyze`."""

    def __init__(
        self,
        mask: Mask,
        q_len: int,
        kv_len: int,
        params: Sequence[int] = (),
        captures: Sequence[np.ndarray] = (),
        b: int = 0,
        h: int = 0,
    ) -> None:
        for name, n in (("q_len", q_len), ("kv_len", kv_len)):
            if not isinstance(n, int | np.integer) or n < 0:
                raise InputError("analyze", f"{name} as an integer of at least 0", n)
        mask.check_values(params, captures)
        self.mask, self.q_len, self.kv_len = mask, int(q_len), int(kv_len)
        self.params, self.captures = tuple(map(int, params)), tuple(captures)
        self.b, self.h = int(b), int(h)

    @property
    def values(self) -> dict[str, int]:
        """Numbers for every integer that is no index."""
        own = dict(zip(self.mask.params, self.params, strict=True))
        return {"b": self.b, "h": self.h, "q_len": self.q_len, "kv_len": self.kv_len, **own}

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """Disjoint terms in closed form, for all lengths. Of an opaque mask: terms of its affine bound."""
        return decompose(self.mask)

    @cached_property
    def nnz(self) -> int:
        """How many pairs attend, exactly."""
        if self.mask.exact and all(isinstance(t, ACSR) for t in self.terms):
            try:
                return count_terms(self.terms, Rows(self.q_len, self.values), self.kv_len)  # type: ignore[arg-type]
            except TooIrregular:
                pass
        return sum(int(self.attends(q, k).sum()) for q, k in self._chunks())

    @property
    def density(self) -> float:
        """The share of pairs that attend; 0 when there are none at all."""
        pairs = self.q_len * self.kv_len
        return self.nnz / pairs if pairs else 0.0

    def attends(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Whether the pairs of broadcast index arrays attend."""
        return self.mask.evaluate(self.b, self.h, q, k, self.params, self.captures, self.q_len, self.kv_len)

    def tiles(self, rows: int | tuple[int, ...], cols: int | tuple[int, ...]) -> Tiles:
        """The tiles of a shape: rows by columns, or boxes by boxes for a mask with as many dimensions."""
        shape = self._shape(rows, cols)
        if self.mask.exact:
            return classify(self.mask, self.q_len, self.kv_len, self.values, shape)
        return classify_points(self.attends, self.q_len, self.kv_len, shape)

    def explain(
        self, rows: int | tuple[int, ...] | None = None, cols: int | tuple[int, ...] | None = None
    ) -> str:
        """The findings as text; with a tile shape, those about tiles too."""
        mask = self.mask
        given = "".join(f", {n} = {v}" for n, v in zip(mask.params, self.params, strict=True))
        lines = [mask.to_text(), f"q_len {self.q_len}, kv_len {self.kv_len}{given}"]
        lines.append(f"pairs {self.nnz}, density {self.density:.3g}")
        lines += [f"term {i}: {describe(t)}" for i, t in enumerate(self.terms)]
        scope = "for all lengths" + (f" and all {', '.join(mask.params)}" if mask.params else "")
        whole = "mask" if mask.exact else "affine bound of the mask; the rest is evaluated point by point"
        lines.append(f"proven {scope}: disjoint terms, one progression a row, union = {whole}")
        if rows is not None and cols is not None:
            lines += self._explain_tiles(self.tiles(rows, cols))
        return "\n".join(lines)

    def _explain_tiles(self, tiles: Tiles) -> list[str]:
        shape = " by ".join("x".join(map(str, s)) for s in (tiles.shape.rows, tiles.shape.cols))
        counts = f"{tiles.full} full, {tiles.partial} partial, {tiles.empty} empty"
        lines = [f"tiles {shape}: {counts}; {tiles.overread:.3g} keys read for each key needed"]
        if tiles.touched is not None:
            lines += [f"  not empty: {tiles.touched}", f"  full: {tiles.whole}"]
            lines.append(
                "proven: every tile is in exactly one class, full tiles hold no pair that does not attend"
            )
        return lines

    def _shape(self, rows: int | tuple[int, ...], cols: int | tuple[int, ...]) -> Shape:
        sides = [(s,) if isinstance(s, int) else tuple(s) for s in (rows, cols)]
        if any(s < 1 for side in sides for s in side) or len(sides[0]) != len(sides[1]):
            raise InputError("tiles", "two shapes of one rank with extents of at least 1", (rows, cols))
        if len(sides[0]) == 1:
            return Shape(*sides)
        found = widths(self.mask)
        if len(found) + 1 != len(sides[0]):
            raise InputError(
                "tiles", f"shapes of rank 1 or {len(found) + 1}, as the mask's index space has", rows
            )
        return Shape(sides[0], sides[1], found)

    def _chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row and column indices, broadcast against each other, that hold every pair that attends."""
        step = max(1, CHUNK // max(1, self.kv_len))
        for start in range(0, self.q_len, step):
            q = np.arange(start, min(self.q_len, start + step))[:, None]
            low, high = self._columns(q)
            wide = max(1, CHUNK // len(q))
            for k in range(low, high, wide):
                yield q, np.arange(k, min(high, k + wide))[None, :]

    def _columns(self, q: np.ndarray) -> tuple[int, int]:
        """The columns that the affine bound leaves for some rows."""
        low, high = self.kv_len, 0
        for t in self.terms:
            if not isinstance(t, ACSR) or t.widths:
                return 0, self.kv_len
            [line] = t.progressions
            values = {"q": q, **self.values}
            here = np.broadcast_to(evaluate(t.rows, values), q.shape)
            first = np.broadcast_to(evaluate(line.first, values), q.shape)[here]
            if not first.size:
                continue
            low = min(low, int(first.min()))
            if line.count == sympy.oo:
                high = self.kv_len
                continue
            count = np.broadcast_to(evaluate(line.count, values), q.shape)[here]
            high = max(high, int((first + line.stride * (count - 1)).max()) + 1)
        return low, min(high, self.kv_len)


def analyze(
    mask: Mask,
    q_len: int,
    kv_len: int,
    params: Sequence[int] = (),
    captures: Sequence[np.ndarray] = (),
    b: int = 0,
    h: int = 0,
) -> Geometry:
    """The geometry of a mask at given lengths; lazy, so this alone costs microseconds.

    Raises InputError when a length is no integer of at least 0, or params and captures do not fit the mask.
    """
    return Geometry(mask, q_len, kv_len, params, captures, b, h)

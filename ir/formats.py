"""Formats: how the entries of a (query, key) matrix are laid out, as a map and its inverse.

Row q of a format stores the entries s = 0 .. size(q) - 1. `index(q, s)` is the column k of entry
s; `inverse(q, k)` is the entry that stores column k, or None when the row has none. Both are exact
and bijective: inverse(q, index(q, s)) == s, and every non-zero is visited once.

Closed forms (`ACSR`) are expressions of the row q and of named integer parameters, which methods
take as keywords; stored forms (`StoredACSR`, `Blocks`) hold arrays. All are immutable, compare and
hash by content. ACSR is SPLAT's affine-compressed sparse row (Gupta et al., 2024), with the arrays
replaced by expressions and one progression a dimension of the index space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import sympy

from .errors import InputError
from .evaluate import evaluate
from .expr import Expr


@dataclass(frozen=True)
class Dense:
    """Every column of every row: entry s is column s. shape: (rows, columns)."""

    shape: tuple[int, int]

    def size(self, q: int) -> int:
        """How many entries row q stores."""
        return self.shape[1] if 0 <= q < self.shape[0] else 0

    def index(self, q: int, s: int) -> int:
        return _entry(self, q, s, self.size(q))

    def inverse(self, q: int, k: int) -> int | None:
        return k if 0 <= k < self.size(q) else None

    def columns(self, q: int) -> np.ndarray:
        """The columns of row q, in the order in which they are stored."""
        return np.arange(self.size(q))


@dataclass(frozen=True)
class Progression:
    """One dimension of a term: the coordinates first + stride * s for 0 <= s < count.

    stride: at least 1. offset: the residue class of the coordinates, 0 <= offset < stride, so
    first % stride == offset. first, count: the first coordinate and how many there are; count may be
    below 0 (none) or `INF` (unbounded to the right; callers clip to their length). All are
    expressions of q, or of q0, q1, ... when the index space has several dimensions, and of parameters.
    """

    stride: int
    offset: Expr
    first: Expr
    count: Expr

    def __post_init__(self) -> None:
        for name in ("offset", "first", "count"):
            object.__setattr__(self, name, sympy.sympify(getattr(self, name)))
        if self.stride < 1:
            raise InputError("Progression", "a stride of at least 1", self.stride)


@dataclass(frozen=True)
class ACSR:
    """One disjoint term of a mask in closed form: a box of arithmetic progressions a row.

    widths: extents of the inner dimensions of the index space, () for plain 1-d; with widths (W,)
    q = q0 * W + q1 and k = k0 * W + k1. progressions: one a dimension, outermost first; the entries
    of a row enumerate their product, innermost fastest. rows: which rows have the term (a Boolean
    expression of q). region: the exact set of the term on unbounded q, k >= 0, as isl map text
    `[params] -> { [q] -> [k] : ... }`.
    """

    widths: tuple[int, ...]
    progressions: tuple[Progression, ...]
    rows: Expr = sympy.true
    region: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", sympy.sympify(self.rows))
        if len(self.progressions) != len(self.widths) + 1:
            expected = f"{len(self.widths) + 1} progressions for widths {self.widths}"
            raise InputError("ACSR", expected, len(self.progressions))

    @property
    def params(self) -> tuple[str, ...]:
        """The names of the parameters in the closed forms, sorted."""
        own = {"q"} if not self.widths else {"q", *(f"q{d}" for d in range(len(self.progressions)))}
        forms = [self.rows, *(e for p in self.progressions for e in (p.offset, p.first, p.count))]
        return tuple(sorted({s.name for e in forms for s in e.free_symbols} - own))

    def coordinates(self, index: Any) -> tuple[Any, ...]:
        """A linear index (or an array of them) as coordinates of the index space, outermost first."""
        inner: list[Any] = []
        for width in reversed(self.widths):
            inner.append(index % width)
            index = index // width
        return (index, *reversed(inner))

    def linear(self, coordinates: tuple[Any, ...]) -> Any:
        """The inverse of `coordinates`."""
        out = coordinates[0]
        for width, c in zip(self.widths, coordinates[1:], strict=True):
            out = out * width + c
        return out

    def row(self, q: int, **params: int) -> tuple[tuple[int, int, float], ...]:
        """(first, stride, count) of row q in each dimension; count is an int, or inf when unbounded.

        A row without the term has count 0 in every dimension.
        """
        values = self._values(q, params)
        present = q >= 0 and bool(evaluate(self.rows, values))
        if not present:
            return tuple((0, p.stride, 0) for p in self.progressions)
        return tuple((int(evaluate(p.first, values)), p.stride, _count(p, values)) for p in self.progressions)

    def size(self, q: int, **params: int) -> float:
        """How many entries row q stores; inf when it is unbounded."""
        return math.prod(n for _, _, n in self.row(q, **params))

    def index(self, q: int, s: int, **params: int) -> int:
        """The column of entry s of row q. Raises InputError when the row has no such entry."""
        row = self.row(q, **params)
        _entry(self, q, s, math.prod(n for _, _, n in row))
        inner: list[int] = []
        for first, stride, n in reversed(row[1:]):
            inner.append(first + stride * (s % int(n)))
            s //= int(n)
        return int(self.linear((row[0][0] + row[0][1] * s, *reversed(inner))))

    def inverse(self, q: int, k: int, **params: int) -> int | None:
        """The entry of row q that stores column k, or None."""
        s = 0
        for (first, stride, n), c in zip(self.row(q, **params), self.coordinates(k), strict=True):
            step, remainder = divmod(c - first, stride)
            if remainder or not 0 <= step < n:
                return None
            s = s * (int(n) if n != math.inf else 0) + step
        return s

    def columns(self, q: int, kv_len: int, **params: int) -> np.ndarray:
        """The columns of row q below kv_len, in the order in which they are stored."""
        outer = -(-kv_len // math.prod(self.widths))
        axes = []
        for d, (first, stride, n) in enumerate(self.row(q, **params)):
            within = max(0, -(-(outer - first) // stride)) if d == 0 else n
            axes.append(first + stride * np.arange(int(min(n, within))))
        flat = np.asarray(self.linear(tuple(np.meshgrid(*axes, indexing="ij")))).reshape(-1)
        return flat[flat < kv_len]

    def _values(self, q: int, params: dict[str, int]) -> dict[str, int]:
        missing = set(self.params) - set(params)
        if missing:
            raise InputError(
                "ACSR", f"values for {', '.join(self.params)}", ", ".join(sorted(params)) or "none"
            )
        inner = {f"q{d}": c for d, c in enumerate(self.coordinates(q))} if self.widths else {}
        return {"q": q, **inner, **params}


class _ByContent:
    """Equality and hash of dataclasses that hold arrays."""

    def _content(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in values)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._content() == self._content()

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._content()))


@dataclass(frozen=True, eq=False)
class StoredACSR(_ByContent):
    """One term as integers by row, for what has no closed form: columns offset + stride * s.

    offset, stride, count: int64 arrays with one entry a row (given as any integers in sequence, held
    read-only). offset is the row's first column; a row without the term has count 0.
    """

    offset: np.ndarray
    stride: np.ndarray
    count: np.ndarray

    def __post_init__(self) -> None:
        _hold(self, "offset", "stride", "count")
        if not self.offset.shape == self.stride.shape == self.count.shape:
            shapes = (self.offset.size, self.stride.size, self.count.size)
            raise InputError("StoredACSR", "offset, stride and count of one length", shapes)
        _require(self, bool(np.all(self.stride >= 1)), "strides of at least 1")
        _require(self, bool(np.all(self.count >= 0)), "counts of at least 0")
        _require(self, bool(np.all(self.offset >= 0)), "offsets of at least 0")

    def size(self, q: int) -> int:
        """How many entries row q stores; rows beyond the arrays store none."""
        return int(self.count[q]) if 0 <= q < len(self.count) else 0

    def index(self, q: int, s: int) -> int:
        """The column of entry s of row q. Raises InputError when the row has no such entry."""
        _entry(self, q, s, self.size(q))
        return int(self.offset[q] + self.stride[q] * s)

    def inverse(self, q: int, k: int) -> int | None:
        """The entry of row q that stores column k, or None."""
        if self.size(q) == 0:
            return None
        step, remainder = divmod(k - int(self.offset[q]), int(self.stride[q]))
        return step if remainder == 0 and 0 <= step < self.size(q) else None

    def columns(self, q: int) -> np.ndarray:
        """The columns of row q, in the order in which they are stored."""
        return np.array([self.index(q, s) for s in range(self.size(q))], np.int64)


@dataclass(frozen=True, eq=False)
class Blocks(_ByContent):
    """Block-compressed rows (BCSR): dense blocks of the given (rows, columns) shape.

    row_offsets: int64, one entry a block row and one more; block row t stores the blocks
    row_offsets[t] .. row_offsets[t + 1] - 1. block_columns: the block column of each stored block,
    increasing within a block row. Entry s of row q lies in the row's block s // block[1].
    """

    block: tuple[int, int]
    row_offsets: np.ndarray
    block_columns: np.ndarray

    def __post_init__(self) -> None:
        _hold(self, "row_offsets", "block_columns")
        offsets, columns = self.row_offsets, self.block_columns
        _require(self, min(self.block) >= 1, "block sizes of at least 1")
        starts_and_ends = offsets.size >= 1 and offsets[0] == 0 and offsets[-1] == columns.size
        _require(
            self,
            starts_and_ends and bool(np.all(np.diff(offsets) >= 0)),
            "row_offsets rising from 0 to the number of blocks",
        )
        inside = np.ones(max(0, columns.size - 1), bool)
        inside[[o - 1 for o in offsets[1:-1].tolist() if 0 < o < columns.size]] = False
        _require(self, bool(np.all(np.diff(columns)[inside] > 0)), "columns increasing within each block row")

    def blocks(self, q: int) -> np.ndarray:
        """The block columns stored for row q."""
        t = q // self.block[0]
        if not 0 <= t < len(self.row_offsets) - 1:
            return self.block_columns[:0]
        return self.block_columns[self.row_offsets[t] : self.row_offsets[t + 1]]

    def size(self, q: int) -> int:
        """How many entries row q stores."""
        return self.blocks(q).size * self.block[1]

    def index(self, q: int, s: int) -> int:
        """The column of entry s of row q. Raises InputError when the row has no such entry."""
        _entry(self, q, s, self.size(q))
        return int(self.blocks(q)[s // self.block[1]]) * self.block[1] + s % self.block[1]

    def inverse(self, q: int, k: int) -> int | None:
        """The entry of row q that stores column k, or None."""
        stored = self.blocks(q)
        place = int(np.searchsorted(stored, k // self.block[1]))
        if place == stored.size or stored[place] != k // self.block[1]:
            return None
        return place * self.block[1] + k % self.block[1]

    def columns(self, q: int) -> np.ndarray:
        """The columns of row q, in the order in which they are stored."""
        starts = self.blocks(q)[:, None] * self.block[1]
        return (starts + np.arange(self.block[1])).reshape(-1)


@dataclass(frozen=True)
class Remainder:
    """A part of a mask that is no small union of terms: its exact region, as isl map text."""

    region: str


Format = Dense | ACSR | StoredACSR | Blocks


def _count(progression: Progression, values: dict[str, int]) -> float:
    count = evaluate(progression.count, values)
    return max(0, int(count)) if np.isfinite(count) else math.inf


def _hold(value: object, *names: str) -> None:
    """Replace sequences in fields by read-only int64 arrays of their own."""
    for name in names:
        array = np.array(getattr(value, name), dtype=np.int64).reshape(-1)
        array.flags.writeable = False
        object.__setattr__(value, name, array)


def _require(value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(type(value).__name__, expected, value)


def _entry(where: object, q: int, s: int, size: float) -> int:
    if not 0 <= s < size:
        raise InputError(type(where).__name__, f"an entry below {size} for row {q}", s)
    return s

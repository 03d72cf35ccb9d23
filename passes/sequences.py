"""sequences: the head of a kernel whose sequences differ, and the pages of a key tile.

What the rest of a kernel calls b, q_len, kv_len and q_offset are integers of one sequence; here they are
read from the tensors of `ir.sequences`, clamped to what memory holds.

Packed queries need no list of tiles. Sequence b takes the row tiles bounds[b] // T + b and following, up
to those of the next one: at least as many as it has rows for, and q_total // T + B in all. A program finds
its sequence by counting those that begin at or before it. Rows behind the last sequence are one more,
without keys.
"""

from __future__ import annotations

import sympy

from ..ir.expr import Expr, all_of, cast, floordiv, floormod, integer, maximum, minimum, read, where
from ..ir.kernel import Axis, Compute, For, GridDim, Let, Load, Reduce, Scalar, Span, Stmt, Tensor
from ..ir.sequences import Sequences

SEARCH = 128  # bounds that are compared at once
B, Q_START, KV_START = integer("b"), integer("q_start"), integer("kv_start")
BOUNDS, CHUNK, Z = integer("bounds"), integer("chunk"), integer("z")
ZERO = sympy.Integer(0)


def tensors(sequences: Sequences) -> list[Tensor]:
    """The tensors that say where sequences are, as arguments of a kernel."""
    shapes: dict[str, tuple[str, ...]] = {
        "q_bounds": ("bounds",),
        "kv_bounds": ("bounds",),
        "kv_lens": ("B",),
        "block_table": ("B", "table_width"),
    }
    found = [Tensor(name, getattr(sequences, name), shape) for name, shape in shapes.items()]
    if sequences.q_offset != "scalar":
        found.append(Tensor("q_offsets", sequences.q_offset, ("B",)))
    return [t for t in found if t.dtype]


def scalars(sequences: Sequences) -> list[Scalar]:
    """Likewise the integers."""
    return [Scalar("q_offset", "i64")] if sequences.q_offset == "scalar" else []


def row_extents(sequences: Sequences) -> tuple[int | str, ...]:
    """Extents of what is stored per query row."""
    return (1, "Hq", "q_total") if sequences.q_bounds else ("B", "Hq", "q_len")


def key_extents(sequences: Sequences) -> tuple[int | str, ...]:
    """Extents of what is stored per key."""
    if sequences.block_table:
        return ("pages", "Hk", sequences.page)
    if sequences.kv_bounds:
        return (1, "Hk", "kv_total")
    return ("B", "Hk", "kv_size" if sequences.kv_lens else "kv_len")


def longest(sequences: Sequences) -> Expr:
    """An integer of the call that the length of no sequence of keys exceeds."""
    if sequences.block_table:
        return sequences.page * integer("table_width")
    if sequences.kv_bounds:
        return integer("kv_total")
    return integer("kv_size" if sequences.kv_lens else "kv_len")


def axes(sequences: Sequences) -> list[Axis]:
    """Axes that the head needs."""
    return [Axis("z", SEARCH, SEARCH)] if sequences.q_bounds else []


def packed_tiles(rows: int) -> GridDim:
    """Row tiles of packed queries, some of them empty."""
    return GridDim("slot", floordiv(integer("q_total"), sympy.Integer(rows)) + BOUNDS)


def head(sequences: Sequences, rows: int) -> list[Stmt]:
    """Statements that make b, q_len, kv_len, q_offset and where rows start of a program's sequence.

    rows: of one row tile, all its residues and inner dimensions included."""
    out: list[Stmt] = _find(sequences, rows) if sequences.q_bounds else []
    length = _kv_len(sequences, out)
    if length is not None:
        behind = integer("sequence") >= BOUNDS - 1
        out.append(Let("kv_len", where(behind, 0, length) if sequences.q_bounds else length))
    if sequences.q_offset not in ("", "scalar"):
        out.append(Let("q_offset", maximum(_read(sequences, "q_offsets", B), ZERO)))
    return out


def _find(sequences: Sequences, rows: int) -> list[Stmt]:
    """The sequence of row tile `slot`, its rows, and which of its tiles this is (m0)."""
    at, unit = SEARCH * CHUNK + Z, sympy.Integer(rows)
    begins = floordiv(integer("bound"), unit) + at <= integer("slot")
    sequence, last = integer("sequence"), BOUNDS - 1
    begin = _read(sequences, "q_bounds", sequence)
    following = _between(
        _read(sequences, "q_bounds", minimum(sequence + 1, last)), Q_START, integer("q_total")
    )
    end = where(sequence >= last, integer("q_total"), following)
    span = Span(ZERO, floordiv(BOUNDS + SEARCH - 1, sympy.Integer(SEARCH)))
    search: tuple[Stmt, ...] = (
        Load("bound", "i32", ("z",), "q_bounds", (minimum(at, last),)),
        Reduce("more", "i32", (), "sum", where(all_of([at < BOUNDS, begins]), 1, 0), ("z",)),
        Compute("begun", "i32", (), integer("begun") + integer("more"), declares=False),
    )
    return [
        Compute("begun", "i32", (), ZERO),
        For("chunk", (span,), search),
        Let("sequence", _between(integer("begun") - 1, ZERO, last)),
        Let("b", _between(sequence, ZERO, last - 1)),
        Let("q_start", _between(begin, ZERO, integer("q_total"))),
        Let("q_len", end - Q_START),
        Let("m0", maximum(integer("slot") - sequence - floordiv(begin, unit), ZERO)),
    ]


def _kv_len(sequences: Sequences, out: list[Stmt]) -> Expr | None:
    """Keys of the sequence; None where all have kv_len. Statements that it needs are appended to `out`."""
    size: Expr = integer("kv_size")
    if sequences.block_table:
        size = sequences.page * integer("table_width")
    elif sequences.kv_bounds:
        total = integer("kv_total")
        out.append(Let("kv_start", _between(_read(sequences, "kv_bounds", B), ZERO, total)))
        size = _between(_read(sequences, "kv_bounds", B + 1), KV_START, total) - KV_START
    elif not sequences.kv_lens:
        return None
    return _between(_read(sequences, "kv_lens", B), ZERO, size) if sequences.kv_lens else size


def pages_of_tile(
    sequences: Sequences, first: Expr | None, col: Expr, valid: Expr
) -> tuple[list[Stmt], Expr, Expr]:
    """(statements, page, slot) of the keys of one tile.

    first: the first key of a tile whose keys follow each other within one page; else None, and every
    key looks up its own."""
    size, last = sympy.Integer(sequences.page), integer("pages") - 1
    page = integer("page")
    if first is not None:
        found = _between(_read(sequences, "block_table", B, floordiv(first, size)), ZERO, last)
        return (
            [Let("page", found), Let("slot0", floormod(first, size))],
            page,
            integer("slot0") + integer("j"),
        )
    place = (B, floordiv(col, size))
    statements: list[Stmt] = [
        Load("page", "i32", ("j",), "block_table", place, valid),
        Compute("page", "i32", ("j",), _between(page, ZERO, last), declares=False),
    ]
    return statements, page, floormod(col, size)


def _between(value: Expr, low: Expr, high: Expr) -> Expr:
    return minimum(maximum(value, low), high)


def _read(sequences: Sequences, name: str, *index: Expr) -> Expr:
    """An entry in 32 bits, in which kernels count."""
    found = read(integer(name), *index)
    dtype = sequences.q_offset if name == "q_offsets" else getattr(sequences, name)
    return cast(sympy.Symbol("i32"), found) if dtype == "i64" else found

"""What every kernel over a mask shares: row tiles, key tiles, loops, guards and the predicate.

A lowering takes a `Scaffold` of its group and fills in what happens to a tile. Tiles made here:
`row` [i] and `col` [j] hold linear indices; n-d orders add their coordinates row0, row1, ... and
col0, col1, ...
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import sympy
from sympy.core.relational import Relational

from ..ir.expr import (
    Expr,
    all_of,
    bitand,
    bitor,
    bitxor,
    cast,
    ceildiv,
    floordiv,
    floormod,
    integer,
    kind,
    maximum,
    minimum,
    random_bits,
    read,
    readf,
    real,
    shl,
    shr,
)
from ..ir.kernel import Compute, For, GridDim, If, Let, Span, Stmt
from ..ir.order import OrderDim
from ..ir.plan import Group, Loops, Schedule
from ..ir.sequences import PLAIN, Sequences
from . import sequences as sq
from .compare import separated
from .lists import ListTensors
from .magnitude import fits, widened
from .reads import clamp
from .tilesets import column_index, linear, row_index
from .truth import TileTruth

B, H, Q_LEN, KV_LEN = integer("b"), integer("h"), integer("q_len"), integer("kv_len")
HK = integer("hk")  # the key head that a program's query heads read
ROW, COL = integer("row"), integer("col")
_COSTLY = (floordiv, floormod, read, readf, bitand, bitor, bitxor, shl, shr)


class Scaffold:
    """The tiles and loops of one planned group.

    heads: how many query heads, those of one key head, a row tile holds of every query, side by side.
    query_head: the head of a row; a tile [i] where there are several. members: whether a program has a key
    head for its own and walks over its query heads, see `each_member`. flat: whether loops over a box of key
    tiles are one loop, as GPUs like it. lists: what its lists of key tiles are called, if any. narrow: names
    of captured tensors whose integers fit 32 bits. head: statements before all others. axes: what those
    need. mask_cols: statements over the keys of a tile that only `attends` needs."""

    def __init__(
        self,
        group: Group,
        schedule: Schedule,
        loops: Loops,
        floats: str = "f32",
        sequences: Sequences = PLAIN,
        *,
        heads: int = 1,
        flat: bool = False,
        members: bool = False,
        lists: str = "tiles",
        narrow: frozenset[str] = frozenset(),
    ) -> None:
        self.floats, self.sequences, self.heads, self.flat = floats, sequences, heads, flat
        self.members = members
        self.group, self.schedule, self.loops, self.order = group, schedule, loops, group.order
        self.boxes = len(self.order.dims) > 1
        self.rows, self.cols = heads * math.prod(schedule.rows), math.prod(schedule.cols)
        query = integer("i") if heads == 1 else floordiv(integer("i"), sympy.Integer(heads))
        made, self.row_names, inside = self._tiles("row", "i", query, row_index, schedule.rows)
        self.query_head: Expr = H
        if heads > 1:
            self.query_head = integer("head")
            of_group = floormod(integer("i"), sympy.Integer(heads))
            made.append(Compute("head", "i32", ("i",), heads * HK + of_group))
        lets = [Let(name, clamp(term, attending=True)) for name, term in group.lets]
        self.make_rows: list[Stmt] = [*lets, *made]
        self.valid_row = all_of([inside, ROW < Q_LEN])
        self.safe_row = minimum(ROW, Q_LEN - 1)
        self.make_cols, self.col_names, inside = self._tiles(
            "col", "j", integer("j"), column_index, schedule.cols
        )
        anchored = [name >= 0 for d, name in enumerate(self.col_names) if schedule.anchor(d) is not None]
        self.valid_col = all_of([inside, *anchored, COL < KV_LEN])
        self.head, self.axes = [*sq.head(sequences, self._rows_a_tile())], sq.axes(sequences)
        self.head += [self._reversal()] if loops.programs == "reversed" else []
        if loops.programs == "spread":
            self.head.insert(0, Let("b", integer("outer") * _together() + integer("inner")))
        found = loops.lists
        self.lists = None if found is None else ListTensors(found, group.order, schedule, sequences, lists)
        self.full = widened(loops.full) if self.lists is None else self.lists.full
        self._narrow, self._compared = narrow, frozenset[Expr]()
        self._hoisted: dict[tuple[Expr, str], Expr] = {}
        self.mask_cols: list[Stmt] = []
        before = len(self.make_cols)
        attends = all_of([self.bind(self._settled(group.predicate)), self.valid_col])
        self.attends = separated(attends, lambda s: s.name[:3] == "col") if flat else attends
        self.mask_cols, self.make_cols = self.make_cols[before:], self.make_cols[:before]

    def grid(self) -> tuple[GridDim, ...]:
        """The launch grid, fastest first, in the order that `programs` asks for."""
        tiles, residues = [], []
        for d, dim in enumerate(self.order.dims):
            packed = d == 0 and self.sequences.q_bounds
            tiles.append(
                sq.packed_tiles(self._rows_a_tile()) if packed else GridDim(f"m{d}", self._row_tiles(d))
            )
            if dim.row_stride > 1:
                residues.append(GridDim(f"r{d}", sympy.Integer(dim.row_stride)))
        batch = () if self.sequences.q_bounds else (GridDim("b", integer("B")),)
        if self.loops.programs == "reversed":
            tiles[0] = replace(tiles[0], name="back0")
        shared = self.members or self.heads > 1
        head = GridDim("hk", integer("Hk")) if shared else GridDim("h", integer("Hq"))
        rows = (*tiles, *residues)
        if self.loops.programs == "heads":
            return (head, *rows, *batch)
        if self.loops.programs == "spread":
            outer = GridDim("outer", floordiv(integer("B"), _together()))
            return (head, GridDim("inner", _together()), *rows, outer)
        return (*rows, head, *batch)

    def _reversal(self) -> Let:
        return Let("m0", self._row_tiles(0) - 1 - integer("back0"))

    def _row_tiles(self, d: int) -> Expr:
        """How many row tiles dimension d has."""
        dim = self.order.dims[d]
        extent: Expr = sympy.Integer(dim.width or 0)
        if dim.width is None:
            extent = ceildiv(Q_LEN, math.prod(x.width or 1 for x in self.order.dims[1:]))
        return ceildiv(extent, dim.row_stride * self.schedule.rows[d])

    def framed(self, body: list[Stmt]) -> tuple[Stmt, ...]:
        """A kernel's body behind its head; packed queries have row tiles without rows, which end there."""
        if not self.sequences.q_bounds:
            return (*self.head, *body)
        some = self._rows_a_tile() * integer("m0") < Q_LEN
        return (*self.head, If(some, tuple(body)))

    def _rows_a_tile(self) -> int:
        """Rows from one tile of the outermost dimension to the next."""
        inner = math.prod(dim.width or 1 for dim in self.order.dims[1:])
        return self.order.dims[0].row_stride * self.schedule.rows[0] * inner

    def each_member(self, body: list[Stmt]) -> tuple[list[Stmt], list[Stmt]]:
        """(statements before, the loop): body once for each query head of a program's key head.

        What is made of rows stands before the loop, unless it depends on the query head."""
        before: list[Stmt] = []
        inside: list[Stmt] = []
        late = {H}
        for s in self.make_rows:
            assert isinstance(s, (Let, Compute)), "rows are made of integers and elementwise tiles"
            moved = bool(s.expr.free_symbols & late)
            (inside if moved else before).append(s)
            if moved:
                name = s.name if isinstance(s, Let) else s.dst
                late |= {integer(name), real(name), sympy.Symbol(name)}
        count = floordiv(integer("Hq"), integer("Hk"))
        head = Let("h", HK * count + integer("member"))
        loop = For("member", (Span(sympy.Integer(0), count),), (head, *inside, *body))
        return before, [loop]

    def first_key(self, page: int) -> Expr | None:
        """The first key of a tile whose keys follow each other within one page; None when they may not."""
        follow = len(self.order.dims) == 1 and self.order.dims[0].col_stride == 1
        if not follow or self.schedule.anchor(0) is not None or page % self.cols:
            return None
        return column_index(self.order, self.schedule, [sympy.Integer(0)])[0]

    def loop(self, body: list[Stmt]) -> list[Stmt]:
        """body once for every key tile that holds a point."""
        inner: list[Stmt] = [*self.make_cols, *body]
        if self.lists is not None:
            return self.lists.loop(inner)
        if self.loops.touched != sympy.true:
            inner = [If(widened(self.loops.touched), tuple(inner))]
        if self.flat and self._rectangular():
            return self._flattened(inner)
        for d in reversed(range(len(self.loops.spans))):
            inner = [For(f"n{d}", self.loops.spans[d], tuple(inner))]
        return inner

    def _rectangular(self) -> bool:
        """Whether the key tiles are a box: one span a dimension, none depending on another dimension's n."""
        names = {integer(f"n{d}") for d in range(len(self.loops.spans))}
        bounds = [e for spans in self.loops.spans for s in spans for e in (s.lo, s.hi)]
        one = all(len(spans) == 1 for spans in self.loops.spans)
        return self.boxes and one and not any(e.free_symbols & names for e in bounds)

    def _flattened(self, body: list[Stmt]) -> list[Stmt]:
        """The nest of loops over a box of key tiles as one loop, whose loads can be pipelined throughout.

        What is pipelined runs ahead of the loop, also of an empty one: nothing divides by a count of 0."""
        out, inner, rest = [], [], integer("n")
        total: Expr = sympy.Integer(1)
        for d, (span,) in enumerate(self.loops.spans):
            out.append(Let(f"first{d}", span.lo))
            out.append(Let(f"count{d}", maximum(span.hi - integer(f"first{d}"), sympy.Integer(0))))
            total = total * integer(f"count{d}")
        for d in reversed(range(len(self.loops.spans))):
            count = maximum(integer(f"count{d}"), sympy.Integer(1))
            inner.insert(0, Let(f"n{d}", integer(f"first{d}") + (floormod(rest, count) if d else rest)))
            rest = floordiv(rest, count)
        return [*out, For("n", (Span(sympy.Integer(0), total),), (*inner, *body))]

    def _settled(self, predicate: Expr) -> Expr:
        """A predicate whose opaque parts are scalars where they are the same for every pair of a tile."""
        if self.group.exact or self.heads > 1:
            return predicate
        truth = TileTruth(self.order, self.schedule)

        def settle(part: Expr) -> Expr:
            found = truth.uniform(part) if part.has(read, readf) else None
            return part if found is None else widened(found)

        return predicate.replace(lambda e: isinstance(e, Relational), settle)

    def bind(self, expr: Expr, *, attending: bool = False, late: frozenset[Expr] = frozenset()) -> Expr:
        """An expression of q and k over the tiles that hold them; captured tensors are read in range.

        attending: only the values at pairs of the mask are used, as those of a score.
        Costly parts (reads, divisions, bit operations) of rows alone move to tiles made once a row tile,
        parts of keys alone to tiles made once a key tile, random bits of neither to scalars; nothing moves
        that depends on `late`."""
        row, col = ROW, COL
        if expr.has(read, readf):
            clamped = clamp(expr, attending=attending or self.sequences.uneven)
            row, col, expr = self.safe_row, minimum(COL, KV_LEN - 1), clamped
            if self.boxes or any(a is not None for a in self.schedule.anchors):
                col = maximum(col, sympy.Integer(0))  # the first tile may begin before key 0
        if self.boxes:
            expr = _delinearised(expr, self.order.dims, "q", self.row_names)
            expr = _delinearised(expr, self.order.dims, "k", self.col_names)
        self._compared = _only_compared(expr)
        rows = frozenset({integer("q"), *self.row_names, *([H] if self.heads > 1 else [])})
        cols = frozenset({integer("k"), *self.col_names})
        index = {integer("q"): row, integer("k"): col}
        if self.heads > 1:
            index[H] = self.query_head
        expr = self._hoist(expr, rows, cols, late, index)
        return expr.xreplace(index if fits(expr) else _wide(index))

    def _hoist(
        self,
        expr: Expr,
        rows: frozenset[Expr],
        cols: frozenset[Expr],
        late: frozenset[Expr],
        index: dict[Expr, Expr],
    ) -> Expr:
        by_row, by_col = bool(expr.free_symbols & rows), bool(expr.free_symbols & cols)
        name, axes, made = ("col", ("j",), self.make_cols) if by_col else ("row", ("i",), self.make_rows)
        if isinstance(expr, random_bits) and not (by_row and by_col):
            args = (self._hoist(a, rows, cols, late, index) for a in expr.args)
            axes = axes if by_row or by_col else ()
            return self._made(expr, expr.func(*args).xreplace(index), name, "i32", axes, made)
        if by_row != by_col and isinstance(expr, _COSTLY) and not expr.free_symbols & late:
            narrow = expr in self._compared and str(expr.args[0]) in self._narrow
            dtype = self.floats if kind(expr) != "int" else "i32" if narrow else "i64"
            return self._made(expr, expr.xreplace(_wide(index)), name, dtype, axes, made)
        if not expr.args or not (by_row or by_col):
            return expr
        return expr.func(*(self._hoist(a, rows, cols, late, index) for a in expr.args))

    def _made(
        self, key: Expr, value: Expr, stem: str, dtype: str, axes: tuple[str, ...], made: list[Stmt]
    ) -> Expr:
        """The tile that holds the value of an expression, computed by one more statement the first time."""
        known = str(self._hoisted.get((key, dtype)))
        shared = [s for s in self.mask_cols if isinstance(s, Compute) and s.dst == known]
        self.make_cols += shared
        self.mask_cols = [s for s in self.mask_cols if s not in shared]
        if (key, dtype) not in self._hoisted:
            name = f"{stem}_{len(self._hoisted)}"
            self._hoisted[key, dtype] = integer(name) if kind(key) == "int" else real(name)
            made.append(Compute(name, dtype, axes, value))
        return self._hoisted[key, dtype]

    def coordinates(self, form: Expr) -> Expr:
        """A closed form of a row (over q, or q0, q1, ...) over the tiles that hold it."""
        names = {integer(f"q{d}"): name for d, name in enumerate(self.row_names)} if self.boxes else {}
        return form.xreplace(names | {integer("q"): ROW})

    def _tiles(
        self, stem: str, axis: str, inner: Expr, index: Callable[..., list[Expr]], sizes: tuple[int, ...]
    ) -> tuple[list[Stmt], list[Expr], Expr]:
        parts = index(self.order, self.schedule, _unflatten(inner, sizes))
        if not self.boxes:
            return [Compute(stem, "i32", (axis,), parts[0])], [integer(stem)], sympy.true
        names: list[Expr] = [integer(f"{stem}{d}") for d in range(len(parts))]
        made: list[Stmt] = [Compute(f"{stem}{d}", "i32", (axis,), part) for d, part in enumerate(parts)]
        made.append(Compute(stem, "i32", (axis,), linear(self.order, names)))
        over = [d for d in range(1, len(parts)) if self._overhangs(d, sizes, stem)]
        return made, names, all_of([names[d] < self.order.dims[d].width for d in over])

    def _overhangs(self, d: int, sizes: tuple[int, ...], stem: str) -> bool:
        """Whether tiles of an inner dimension may reach beyond its width: not where they divide it."""
        dim = self.order.dims[d]
        stride = dim.row_stride if stem == "row" else dim.col_stride
        free = stem == "col" and self.schedule.anchor(d) is not None
        return free or dim.width is None or dim.width % (stride * sizes[d]) > 0


def _together() -> Expr:
    """Batches whose row tiles start side by side: 4 or 2, if that divides B and makes 64 heads at most."""
    batch, heads = integer("B"), maximum(integer("Hq"), sympy.Integer(1))

    def may(count: int) -> Expr:
        """1 if so many batches divide B and have few enough heads, else 0."""
        few = minimum(floordiv(sympy.Integer(64 // count), heads), sympy.Integer(1))
        odd: Expr = minimum(floormod(batch, sympy.Integer(count)), sympy.Integer(1))
        return few * (1 - odd)

    return 1 + may(2) + 2 * may(4)


def _only_compared(expr: Expr) -> frozenset[Expr]:
    """The reads of an expression that are sides of comparisons wherever they occur, and nothing more."""
    compared: set[Expr] = set()
    used: set[Expr] = set()

    def visit(part: Expr) -> None:
        for side in part.args:
            if isinstance(side, read):
                (compared if isinstance(part, Relational) else used).add(side)
            visit(side)

    visit(expr)
    return frozenset(compared - used)


def _wide(index: dict[Expr, Expr]) -> dict[Expr, Expr]:
    return {name: cast(sympy.Symbol("i64"), at) for name, at in index.items()}


def _unflatten(rest: Expr, sizes: tuple[int, ...]) -> list[Expr]:
    """In-tile coordinates per dimension of a flattened one, the last dimension fastest."""
    out: list[Expr] = []
    for d in reversed(range(len(sizes))):
        out.insert(0, rest if d == 0 else floormod(rest, sympy.Integer(sizes[d])))
        rest = floordiv(rest, sympy.Integer(sizes[d]))
    return out


def _delinearised(expr: Expr, dims: tuple[OrderDim, ...], index: str, names: list[Expr]) -> Expr:
    """index // W, index % W and index - W * (index // W) spelled by the coordinates that are at hand.

    Not inside reads: coordinates beyond their width are none of the index that reads are clamped to."""
    symbol = integer(index)
    known: dict[Expr, Expr] = {}
    outer: Expr = symbol  # what is left of the index above dimension d
    for d in reversed(range(1, len(dims))):
        width = sympy.Integer(dims[d].width)
        known[floormod(outer, width)] = names[d]
        outer = floordiv(outer, width)
    known[outer] = names[0]
    if len(dims) == 3:
        inner = sympy.Integer((dims[1].width or 1) * (dims[2].width or 1))
        known[floordiv(symbol, inner)] = names[0]
        known[floordiv(floormod(symbol, inner), sympy.Integer(dims[2].width))] = names[1]

    whole = names[0]
    for dim, name in zip(dims[1:], names[1:], strict=True):
        whole = whole * (dim.width or 1) + name

    def spell(part: Expr) -> Expr:
        if part in known:
            return known[part]
        if isinstance(part, (read, readf)) or not part.args:
            return part
        args = [spell(a) for a in part.args]
        made = part if tuple(args) == part.args else part.func(*args)
        if not isinstance(made, Relational) or not made.has(symbol) or kind(made.args[0]) != "int":
            return made
        left: Expr = made.args[0]
        before = sympy.expand(left - made.args[1])
        after = sympy.expand(before.xreplace({symbol: whole}))
        fewer = len(sympy.Add.make_args(after)) < len(sympy.Add.make_args(before))
        return made.func(after, 0) if fewer else made

    return spell(expr)

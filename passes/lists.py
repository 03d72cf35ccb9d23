"""lists: key tiles by list, for loops that would have to test each tile they could visit.

A mask that isl cannot hold, or whose tiles are not a few intervals, leaves a condition to test at every
key tile of its hull. A GPU cannot load ahead across such tests, and every head repeats them. Here they
move to a kernel of their own (`lower_lists`), which evaluates them for many tiles at once and writes
for each row tile

    counts[.., m0, 0]           how many full tiles it has          counts[.., m0, 1]   how many partial ones
    tiles[.., m0, 0 ..]         the numbers of its full tiles, ascending
    tiles[.., m0, .. width-1]   from the right end leftwards, the numbers of its partial tiles

with leading dimensions for batch and head only where the lists depend on them, and one for the residue
where rows run by residues. The width is the widest hull of a row tile, in tiles, so a list takes 4
bytes for each key tile that a row tile could visit: 16 MB for a batch and head of 131072 x 131072 in
tiles of 64, and less than 1 MB where a window bounds the hull.

Leaves alone: loops without a condition, boxes, anchored key tiles.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import islpy as isl
import sympy

from ..ir.affine import QuotaExceeded, quota, to_expr
from ..ir.expr import (
    Expr,
    all_of,
    ceildiv,
    fold_max,
    fold_min,
    integer,
    maximum,
    minimum,
    symbols,
    to_text,
    where,
)
from ..ir.kernel import Compute, For, Load, Span, Stmt, Tensor
from ..ir.order import Order
from ..ir.plan import Group, Lists, Loops, Schedule
from ..ir.sequences import Sequences
from . import sequences as sq
from .tilesets import SET, tile_sets
from .truth import TileTruth

MAX_OPERATIONS = 200_000  # of isl, to bound the width of the hull
POSITION, WHOLE, PART = integer("t"), integer("whole"), integer("part")


def listed(group: Group, schedule: Schedule, closed: Loops, monotone: frozenset[str]) -> Loops | None:
    """Loops over lists; None where no list is asked for, or none spares a test.

    closed: the loops that the sets give; of an opaque group, `full` says that no key is beyond kv_len."""
    if schedule.lists == "none" or len(group.order.dims) > 1 or schedule.anchor(0) is not None:
        return None
    (spans,) = closed.spans
    touched, full, open_, by_row, summaries = closed.touched, closed.full, False, False, ()
    if not group.exact:
        truth = TileTruth(group.order, schedule, monotone)
        may, must = truth.of(group.predicate)
        if not truth.open and schedule.lists == "open":
            return None
        if truth.open:
            by_row, truth = True, TileTruth(group.order, schedule, monotone, by_row=True)
            may, must = truth.of(group.predicate)
        by_row = by_row and integer("q") in symbols(may) | symbols(must)
        touched, full = all_of([touched, may]), all_of([must, closed.full])
        open_, summaries = truth.open, tuple(truth.summaries.values())
    if (touched == sympy.true and not open_) or (group.exact and schedule.lists == "open"):
        return None
    used = [touched, full, *(s.expr for s in summaries), *(e for s in spans for e in (s.lo, s.hi))]
    named = frozenset().union(*map(symbols, [*used, group.predicate] if open_ else used))
    named |= {s for name, term in group.lets if integer(name) in named for s in symbols(term)}
    lists = Lists(
        _width(group, schedule),
        summaries,
        by_row,
        open_,
        tuple(name for name in ("b", "h") if integer(name) in named),
    )
    return replace(closed, touched=touched, full=full, lists=lists)


def _width(group: Group, schedule: Schedule) -> Expr:
    """The most key tiles between the first and the last that one row tile touches."""
    tiles = ceildiv(integer("kv_len"), group.order.dims[0].col_stride * schedule.cols[0])
    hull = _reach(group, schedule)
    return maximum(tiles if hull is None else minimum(tiles, hull + 1), sympy.Integer(1))


def _reach(group: Group, schedule: Schedule) -> Expr | None:
    """How far apart the key tiles of a row tile are at most, an affine form of params; None if unbounded."""
    known_late = {integer(name) for name, _ in group.lets}
    with suppress(QuotaExceeded), quota(MAX_OPERATIONS):
        touched = tile_sets(group, schedule)[0]
        rows = isl.Map.from_range(touched).move_dims(isl.dim_type.in_, 0, SET, 0, touched.dim(SET) - 1)
        apart = rows.reverse().apply_range(rows).deltas().coalesce()
        try:
            pieces = apart.dim_max(0).get_pieces()
        except isl.Error:  # unbounded for some parameters
            return None
        for _, most in pieces:
            form = to_expr(isl.PwAff.from_aff(most))
            if form.free_symbols & known_late:
                continue
            names = ", ".join(sorted(s.name for s in form.free_symbols))
            if apart.is_subset(isl.Set(f"[{names}] -> {{ [x] : x <= {to_text(form)} }}")):
                return form
    return None


class ListTensors:
    """The tensors that hold the lists of one group, and a row tile's place in them."""

    def __init__(
        self, lists: Lists, order: Order, schedule: Schedule, sequences: Sequences, name: str
    ) -> None:
        self.lists, self.name = lists, name
        dim, packed = order.dims[0], bool(sequences.q_bounds)
        self.varies = tuple(n for n in ("b", "h") if n in lists.varies or (n == "b" and sequences.uneven))
        step = dim.row_stride * schedule.rows[0]
        rows = sq.packed_tiles(step).extent if packed else ceildiv(integer("q_len"), step)
        # (coordinate, extent in kernels, extent in terms of the call)
        places: list[tuple[str, int | str, int | str | Expr]] = []
        places += [("b", "B", "B")] if "b" in self.varies and not packed else []
        places += [("h", "Hq", "Hq")] if "h" in self.varies else []
        places += [("r0", dim.row_stride, dim.row_stride)] if dim.row_stride > 1 else []
        places.append(("slot" if packed else "m0", f"{self.name}_rows", rows))
        self.at: tuple[Expr, ...] = tuple(integer(name) for name, _, _ in places)
        self._inner = tuple(extent for _, extent, _ in places)
        self._outer = tuple(extent for _, _, extent in places)
        self.width = integer(f"{self.name}_width")
        self.most = lists.width.xreplace({integer("kv_len"): sq.longest(sequences)})

    def tensors(self, role: str) -> tuple[Tensor, Tensor]:
        """Tiles and counts as arguments of a kernel."""
        unit = len(self._inner)
        return (
            Tensor(self.name, "i32", (*self._inner, self.width.name), role, unit),
            Tensor(f"{self.name}_counts", "i32", (*self._inner, 2), role, unit),
        )

    def flags(self, role: str) -> Tensor:
        """What the points of each tile of the hull say: 0 for none, 1 for some, 2 for all."""
        shape = (*self._inner, f"{self.name}_width")
        return Tensor(f"{self.name}_flags", "u8", shape, role, len(self._inner))

    def intermediates(self) -> tuple[Tensor, ...]:
        """All of them, with extents in terms of the call."""
        made = [*self.tensors("inout"), *([self.flags("inout")] if self.lists.pairs else [])]
        last: dict[object, int | Expr] = {self.width.name: self.most, 2: 2}
        return tuple(replace(t, shape=(*self._outer, last[t.shape[-1]])) for t in made)

    @property
    def full(self) -> Expr:
        """Inside `loop`: whether the tile at hand is full."""
        return POSITION < WHOLE

    def loop(self, body: list[Stmt]) -> list[Stmt]:
        """body for every tile of the lists, the full ones first; n0 is the number of the tile."""
        tiles, counts = self.tensors("in")
        zero, count, following = sympy.Integer(0), WHOLE + PART, integer("following")

        def number(name: str, position: Expr) -> Load:
            place = where(position < WHOLE, position, position + self.width - count)
            return Load(name, "i32", (), tiles.name, (*self.at, place), count > 0, zero)

        # The next number is under way while a tile is worked on: what depends on it never waits for memory.
        step: list[Stmt] = [
            Compute("n0", "i32", (), following),
            number("ahead", minimum(POSITION + 1, count - 1)),
            Compute("following", "i32", (), integer("ahead"), declares=False),
        ]
        return [
            Load("whole", "i32", (), counts.name, (*self.at, zero)),
            Load("part", "i32", (), counts.name, (*self.at, sympy.Integer(1))),
            number("first", zero),
            Compute("following", "i32", (), integer("first")),
            For("t", (Span(zero, count),), (*step, *body)),
        ]


def hull(spans: tuple[Span, ...]) -> Span:
    """One span that covers all."""
    return Span(fold_min([s.lo for s in spans]), fold_max([s.hi for s in spans]))

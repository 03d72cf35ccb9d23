"""What the passes decide about one attention, as values that print, parse and can be edited.

A mask runs as one or more *groups*: disjoint parts of it, each with a row order of its own, merged
exactly by carrying the online softmax from one kernel to the next. `align` makes the groups,
`schedule` gives each its `Schedule`, `tile` its `Loops`.

In all expressions: m0, m1, ... are row-tile coordinates, r0, r1, ... residues, n0, n1, ... key-tile
coordinates (one a dimension of the group's order), beside b, h, q_len, kv_len and p0, p1, ...
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from .errors import ParseError
from .expr import Expr
from .kernel import Span
from .order import Order


@dataclass(frozen=True)
class Group:
    """A part of a mask: its row order, its points, and the predicate that partial tiles evaluate.

    may, must: isl text of maps [q] -> [k] bounding the part from above and below, equal when the
    part is affine. predicate: a Boolean over b, h, q, k, captures and params, exact inside `may`. lets:
    what the mask names (Mask.lets); may, must and predicate may use it."""

    order: Order
    may: str
    must: str
    predicate: Expr
    lets: tuple[tuple[str, Expr], ...] = ()

    @property
    def exact(self) -> bool:
        return self.may == self.must


@dataclass(frozen=True)
class Schedule:
    """Sizes and hints of one kernel. rows, cols: tile extents, one entry a dimension of the order.

    anchors: where key tile 0 of a row tile starts, one entry a dimension: None for the grid of key
    tiles, or the distance to the row tile's first row, in steps of the stride (an expression of
    params). A window of half-width p0 anchored at -p0 wastes no key to alignment.
    lazy_rescale: keep a stale row maximum until it lags by more than 2^8, so that accumulators are
    rescaled rarely. lists: which tests of key tiles a kernel of their own makes ahead of the loops (see
    Lists): 'none', 'all', or 'open': those that conditions on a tile leave to its rows or its points.
    meta: backend hints (see Kernel.meta). split: whether several programs share the key tiles of a row
    tile, for few rows against many keys; how many is a runtime integer. It takes lists='none'."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    anchors: tuple[Expr | None, ...] = ()
    lazy_rescale: bool = True
    lists: str = "all"
    meta: tuple[tuple[str, int], ...] = ()
    split: bool = False

    def anchor(self, d: int) -> Expr | None:
        """The anchor of dimension d."""
        return self.anchors[d] if self.anchors else None

    def __str__(self) -> str:
        """The text that `parse` reads back.

        >>> str(Schedule((64,), (32,), meta=(("warps", 4),)))
        "Schedule(rows=(64,), cols=(32,), meta=(('warps', 4),))"
        """
        from .attributes import dump

        return dump(self)

    @staticmethod
    def parse(text: str) -> Schedule:
        """The schedule of a text. Raises ParseError.

        >>> Schedule.parse("Schedule(rows=(64,), cols=(32,), anchors=(expr('-p0'),))").anchors
        (-p0,)
        """
        from .attributes import load

        found = load(text)
        if not isinstance(found, Schedule):
            raise ParseError(f"expected Schedule(rows=(...), cols=(...), ...); got {text.strip()[:80]!r}")
        return found


# "rows": the row tiles of one head in order, head after head, so that neighbours share keys in the cache;
# "reversed": from the last row tile to the first, for masks whose later rows see more keys; "heads": one row
# tile of every head of a batch, then the next; "spread": likewise, with up to
# 64 heads of several batches, for windows, whose keys stay cached as long as they are needed, and for masks
# with a few heavy row tiles.
PROGRAMS = ("rows", "reversed", "heads", "spread")


@dataclass(frozen=True)
class Summary:
    """What the keys of a tile have in common, as one value that conditions may name.

    op over the keys of the tile that lie below kv_len: 'min' or 'max' of an integer, 'any' or 'all' of a
    condition. expr is over k, b, h, captures and params."""

    name: str
    op: str
    expr: Expr


@dataclass(frozen=True)
class Lists:
    """Key tiles by list: for each row tile the numbers of its full tiles, and of its partial ones.

    A kernel of its own evaluates touched and full for the tiles of the spans, many at once, and writes
    the numbers of full tiles from the left of a row of `width` entries and those of partial ones from
    its right. by_row: the conditions are about one row, q; touched has to hold for any row of the tile
    and full for all. pairs: tiles that are touched and not full are decided by evaluating their points.
    summaries: the values that the conditions name. varies: which of 'b' and 'h' the lists depend on."""

    width: Expr
    summaries: tuple[Summary, ...] = ()
    by_row: bool = False
    pairs: bool = False
    varies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loops:
    """The closed-form loops over the key tiles of one row tile.

    spans: for each dimension, outermost first, the disjoint spans of its n; together they cover
    every tile that holds a point. touched: a condition that skips tiles of the spans without points
    (true when there are none). full: implies that every pair of the tile with key below kv_len attends.
    programs: the order in which row tiles start, see `PROGRAMS`. lists: how the conditions are evaluated
    ahead of the loop, which then runs over lists; None: in it."""

    spans: tuple[tuple[Span, ...], ...]
    touched: Expr = sympy.true
    full: Expr = sympy.false
    programs: str = "rows"
    lists: Lists | None = None

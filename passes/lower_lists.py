"""lower_lists: the kernels that write the lists of key tiles of one group (see `lists`).

Before::  Loops(spans, touched, full, lists) of a group
After::   kernel @..._tiles(..) grid(m0, ..) { conditions of T key tiles at once, prefix sums, stores }

Where only the points of a tile can decide, a kernel before it evaluates them, a few tiles a grid cell,
and leaves one flag a tile.

Leaves alone: groups without lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import sympy

from ..ir.expr import (
    Expr,
    all_of,
    any_of,
    cast,
    ceildiv,
    integer,
    maximum,
    minimum,
    read,
    readf,
    symbols,
    where,
)
from ..ir.kernel import (
    Axis,
    Compute,
    For,
    GridDim,
    If,
    Kernel,
    Let,
    Load,
    Reduce,
    Scalar,
    Scan,
    Span,
    Stmt,
    Store,
    Tensor,
)
from ..ir.plan import Group, Loops, Schedule, Summary
from ..ir.sequences import Sequences
from .lists import ListTensors, hull
from .magnitude import fits, widened
from .reads import clamp
from .scaffold import KV_LEN, Scaffold
from .tilesets import column_index, linear

POINTS = 2048  # of a block of tiles: key tiles at once times rows or keys of one
CHUNK = 4  # key tiles whose points one grid cell evaluates
N0, FIRST, LAST, TILE_AXIS = integer("n0"), integer("first"), integer("last"), integer("t")


def list_kernels(
    plan: tuple[Group, Schedule, Loops], sequences: Sequences, user: Kernel, places: ListTensors
) -> tuple[Kernel, ...]:
    """The kernels that write the lists of a group, in launch order.

    user: the kernel that loops over the lists, of whose arguments these take what they use."""
    return _Builder(plan, sequences, user, places).kernels()


class _Builder:
    def __init__(
        self, plan: tuple[Group, Schedule, Loops], sequences: Sequences, user: Kernel, places: ListTensors
    ) -> None:
        group, schedule, loops = plan
        self.loops, self.lists, self.user, self.places = loops, places.lists, user, places
        self.order, self.schedule = group.order, schedule
        self.over = Scaffold(group, schedule, replace(loops, programs="rows"), sequences=sequences)
        (self.spans,) = loops.spans
        late = frozenset({N0, *map(_symbol, self.lists.summaries)})
        self.touched, self.full = (
            widened(self.over.bind(e, late=late)) if self.lists.by_row else self._bound(e)
            for e in (loops.touched, loops.full)
        )
        whole = hull(self.spans)
        lets = [s for s in self.over.make_rows if isinstance(s, Let)]
        self.bounds: list[Stmt] = [*lets, Let("first", whole.lo), Let("last", whole.hi)]

    def kernels(self) -> tuple[Kernel, ...]:
        return (
            (self._judge(), self._compact(flagged=True))
            if self.lists.pairs
            else (self._compact(flagged=False),)
        )

    # kernels ----------------------------------------------------------------------------------------

    def _compact(self, *, flagged: bool) -> Kernel:
        """Judges T key tiles at once, by the conditions or by flags, and appends what is left."""
        extent = min(128, max(16, POINTS // max(self.over.rows, self.over.cols)))
        tiles, counts = self.places.tensors("out")
        t, at, n = ("t",), integer("at"), integer("n0")
        inside = all_of([at < LAST, *([] if len(self.spans) == 1 else [self._member(n)])])
        if flagged:
            flags = self.places.flags("in")
            load = Load("F", "i32", t, flags.name, (*self.places.at, at - FIRST), inside, sympy.Integer(0))
            judged: list[Stmt] = [load]
            some, full = integer("F") > 0, sympy.Eq(integer("F"), 2)
        else:
            judged = self._conditions(t)
            some, full = all_of([sympy.Symbol("some"), inside]), sympy.Symbol("whole_tile")
        place = self.places.at
        fulls, parts = integer("fulls"), integer("parts")
        last_place = self.places.width - 1
        step: list[Stmt] = [
            Compute("at", "i32", t, FIRST + extent * integer("u") + TILE_AXIS),
            Compute("n0", "i32", t, minimum(at, LAST - 1)),
            *judged,
            Compute("is_full", "bool", t, all_of([some, full])),
            Compute("is_part", "bool", t, all_of([some, sympy.Not(full)])),
            Scan("full_rank", "i32", t, where(sympy.Symbol("is_full"), 1, 0), "t"),
            Scan("part_rank", "i32", t, where(sympy.Symbol("is_part"), 1, 0), "t"),
            Store(tiles.name, (*place, fulls + integer("full_rank") - 1), at, t, sympy.Symbol("is_full")),
            Store(
                tiles.name,
                (*place, last_place + 1 - parts - integer("part_rank")),
                at,
                t,
                sympy.Symbol("is_part"),
            ),
            Reduce("more_full", "i32", (), "max", integer("full_rank"), t),
            Reduce("more_part", "i32", (), "max", integer("part_rank"), t),
            Compute("fulls", "i32", (), fulls + integer("more_full"), declares=False),
            Compute("parts", "i32", (), parts + integer("more_part"), declares=False),
        ]
        body: list[Stmt] = [
            *self.bounds,
            *(self._rows() if not flagged and self.lists.by_row else []),
            Compute("fulls", "i32", (), sympy.Integer(0)),
            Compute("parts", "i32", (), sympy.Integer(0)),
            For("u", (Span(sympy.Integer(0), ceildiv(LAST - FIRST, extent)),), tuple(step)),
            Store(counts.name, (*place, sympy.Integer(0)), fulls, ()),
            Store(counts.name, (*place, sympy.Integer(1)), parts, ()),
        ]
        return self._kernel("tiles", body, [Axis("t", extent, extent)], (), [tiles, counts])

    def _judge(self) -> Kernel:
        """Evaluates the points of tiles that the conditions leave open; one flag a tile."""
        flags = self.places.flags("out")
        start = FIRST + CHUNK * integer("u0")
        spans = tuple(Span(maximum(s.lo, start), minimum(s.hi, start + CHUNK)) for s in self.spans)
        row, attends, ij = self.over.valid_row, self.over.attends, ("i", "j")
        some, full, flag = sympy.Symbol("some"), sympy.Symbol("whole_tile"), integer("flag")
        looked_at: tuple[Stmt, ...] = (
            *self.over.mask_cols,
            Compute("ok", "bool", ij, attends),
            Reduce("hit", "bool", (), "any", all_of([row, sympy.Symbol("ok")]), ij),
            Reduce("hole", "bool", (), "any", all_of([row, sympy.Not(sympy.Symbol("ok"))]), ij),
            Compute(
                "flag",
                "i32",
                (),
                where(sympy.Symbol("hit"), where(sympy.Symbol("hole"), 1, 2), 0),
                declares=False,
            ),
        )
        tile: list[Stmt] = [
            *self.over.make_cols,
            *self._conditions(()),
            Compute("flag", "i32", (), where(some, where(full, 2, 1), 0)),
            If(sympy.Eq(flag, 1), looked_at),
            Store(flags.name, (*self.places.at, N0 - FIRST), flag, ()),
        ]
        body = [*self.bounds, *self._rows(), For("n0", spans, tuple(tile))]
        grid = (GridDim("u0", ceildiv(self.places.most, sympy.Integer(CHUNK))),)
        return self._kernel("flags", body, [], grid, [flags])

    def _kernel(
        self, what: str, body: list[Stmt], axes: list[Axis], grid: tuple[GridDim, ...], written: list[Tensor]
    ) -> Kernel:
        kept = {name: name in self.places.varies for name in ("b", "h")}
        body = list(self.over.framed(body))
        grid = (*grid, *(g for g in self.over.grid() if kept.get(g.name, True)))
        sizes = {"i": self.over.rows, "j": self.over.cols}
        axes = [*axes, *self.over.axes, *(Axis(name, size, size) for name, size in sizes.items())]
        flags = [self.places.flags("in")] if self.lists.pairs and what == "tiles" else []
        return Kernel(
            name=f"{self.user.name}_{what}",
            args=_used(self.user.args, [*flags, *written], body, grid),
            grid=grid,
            axes=tuple(a for a in axes if _mentions(body, a.name)),
            lanes=None,
            body=tuple(body),
            meta=(("stages", 1), ("warps", 8)),
            comment=(
                f"{what} of row tiles of {self.schedule.rows[0]}, key tiles of {self.schedule.cols[0]}",
            ),
        )

    # conditions -------------------------------------------------------------------------------------

    def _rows(self) -> list[Stmt]:
        """The rows of the tile, and what the conditions want of each alone."""
        return [s for s in self.over.make_rows if not isinstance(s, Let)]

    def _conditions(self, axes: tuple[str, ...]) -> list[Stmt]:
        """`some` and `whole_tile` over these axes (of key tiles): what the conditions say of n0."""
        key = linear(self.order, column_index(self.order, self.schedule, [integer("j")]))
        key = minimum(key, KV_LEN - 1)
        made: list[Stmt] = []
        for s in self.lists.summaries:
            expr = self._bound(s.expr, key)
            op, dtype = ("any", "bool") if s.op in ("any", "all") else (s.op, "i64")
            name = f"{s.name}_not" if s.op == "all" else s.name
            made.append(Reduce(name, dtype, axes, op, sympy.Not(expr) if s.op == "all" else expr, ("j",)))
            if s.op == "all":
                made.append(Compute(s.name, "bool", axes, sympy.Not(sympy.Symbol(name))))
        touched, full, row = self.touched, self.full, self.over.valid_row
        if not self.lists.by_row:
            return [*made, Compute("some", "bool", axes, touched), Compute("whole_tile", "bool", axes, full)]
        return [
            *made,
            Reduce("some", "bool", axes, "any", all_of([row, touched]), ("i",)),
            Reduce("hole_in_row", "bool", axes, "any", all_of([row, sympy.Not(full)]), ("i",)),
            Compute("whole_tile", "bool", axes, sympy.Not(sympy.Symbol("hole_in_row"))),
        ]

    def _bound(self, expr: Expr, key: Expr | None = None) -> Expr:
        """An expression over key tiles, or over their keys; captured tensors are read in range."""
        expr = clamp(expr, attending=self.over.sequences.uneven)
        if key is None:
            return widened(expr)
        return expr.xreplace({integer("k"): key if fits(expr) else cast(sympy.Symbol("i64"), key)})

    def _member(self, n: Expr) -> Expr:
        return any_of([all_of([s.lo <= n, n < s.hi]) for s in self.spans])


def _symbol(summary: Summary) -> Expr:
    return sympy.Symbol(summary.name) if summary.op in ("any", "all") else integer(summary.name)


def _walk(body: Iterable[Stmt]) -> Iterator[Stmt]:
    for s in body:
        yield s
        if isinstance(s, (If, For)):
            yield from _walk(s.body)


def _expressions(s: Stmt) -> Iterable[Expr]:
    match s:
        case Let() | Compute() | Reduce() | Scan():
            return (s.expr,)
        case Load():
            return (*s.index, s.guard, s.other)
        case Store():
            return (*s.index, s.value, s.guard)
        case If():
            return (s.cond,)
        case For():
            return tuple(e for span in s.spans for e in (span.lo, span.hi))
    return ()


def _mentions(body: Iterable[Stmt], axis: str) -> bool:
    """Whether a statement runs over an axis."""
    over = [(*getattr(s, "axes", ()), *(s.over if isinstance(s, Reduce) else ())) for s in _walk(body)]
    return any(axis in axes for axes in over)


def _used(
    arguments: tuple[Tensor | Scalar, ...], own: list[Tensor], body: list[Stmt], grid: tuple[GridDim, ...]
) -> tuple[Tensor | Scalar, ...]:
    """What a body uses of some arguments: scalars, tensors it reads, and tensors that name an extent."""
    found = [*(e for s in _walk(body) for e in _expressions(s)), *(g.extent for g in grid)]
    names = {s.name for e in found for s in symbols(e)}
    names |= {str(r.args[0]) for e in found for r in e.atoms(read, readf)}
    names |= {s.tensor for s in _walk(body) if isinstance(s, Load)}
    taken = [a for a in arguments if a.name in names]
    known = {n for t in (*taken, *own) if isinstance(t, Tensor) for n in t.shape}
    for argument in arguments:
        more = isinstance(argument, Tensor) and argument.role == "in" and set(argument.shape) - known
        if more and names & more and argument.name not in {t.name for t in own}:
            taken.append(argument)
            known |= more
    return (*(a for a in arguments if a in taken), *own)

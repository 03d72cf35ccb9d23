"""split: several programs share the key tiles of one row tile, and a last kernel merges what they found.

A program takes an even share of the tiles that the loops of its row tile visit, counted through all spans
in order, so that the work is even whatever the mask and the length. It leaves the state of its online
softmax (maximum m, sum l, weighted values O) in a slot of its own; `merge` combines the slots of a row
exactly and ends as the operation's fold does. Programs without tiles leave an empty state.

How many programs share a row tile is a runtime integer, `splits`.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from ..ir.expr import INF, Expr, all_of, ceildiv, exp2, integer, maximum, minimum, real, where
from ..ir.kernel import (
    Axis,
    Compute,
    For,
    GridDim,
    If,
    Kernel,
    Load,
    Reduce,
    Span,
    Stmt,
    Store,
    Tensor,
)
from ..ir.plan import Loops, Schedule
from .fold_table import FOLDS
from .folds import LOWEST, Fold, Part
from .operands import Index, Operands
from .scaffold import B, H
from .spec import AttentionSpec

CHUNK = 16  # slots that are merged at once
SPLITS, SPLIT, SLOTS = integer("splits"), integer("split"), integer("slots")
ZERO = sympy.Integer(0)


def share(loops: Loops) -> tuple[list[Stmt], Loops]:
    """(statements, loops): the loops over this program's share of the outermost key tiles.

    The numbers are tiles without axes, not lets: they build on each other, and TVM would write each out
    in the next."""
    made: list[Stmt] = []

    def number(name: str, expr: Expr) -> Expr:
        made.append(Compute(name, "i32", (), expr))
        return integer(name)

    before: list[Expr] = [ZERO]
    starts = []
    for n, span in enumerate(loops.spans[0]):
        starts.append(number(f"start{n}", span.lo))
        before.append(before[-1] + number(f"tiles{n}", maximum(span.hi - starts[-1], ZERO)))
    total = number("visited", before[-1])
    each = number("each", ceildiv(total, SPLITS))
    first = number("first", minimum(SPLIT * each, total))
    last = number("last", minimum(first + each, total))

    def within(at: Expr, n: int) -> Expr:
        """How many of the tiles of span n come before a tile of all of them."""
        rest = at - before[n]
        return rest if len(starts) == 1 else minimum(maximum(rest, ZERO), integer(f"tiles{n}"))

    spans = tuple(Span(at + within(first, n), at + within(last, n)) for n, at in enumerate(starts))
    return made, replace(loops, spans=(spans, *loops.spans[1:]))


def partials(fold: Fold, role: str) -> list[Tensor]:
    """The tensors that hold the states of a fold: a slot for every split of every group of the mask."""
    found = []
    for c in fold.state():
        inner = [fold.spec.v_size for _ in c.axes[1:]]
        plain = fold.at.per_row(f"part_{c.tile}", fold.acc, role, *inner)
        found.append(replace(plain, shape=("slots", *plain.shape), unit=len(plain.shape)))
    return found


def leave(fold: Fold, index: int) -> list[Stmt]:
    """Statements that store the state of part `index` of an operation; values only where there are any."""
    slot, valid = index * SPLITS + SPLIT, fold.over.valid_row
    out: list[Stmt] = []
    for c in fold.state():
        inner = [integer(axis) for axis in c.axes[1:]]
        store = Store(f"part_{c.tile}", (slot, *fold.at.row, *inner), real(c.tile), c.axes, valid)
        out.append(If(integer("last") > integer("first"), (store,)) if inner else store)
    return out


class _Row:
    """One query row in place of a tile of them, as far as folds ask a scaffold and operands."""

    valid_row = sympy.true
    query_head = H

    def __init__(self, at: Operands) -> None:
        row = integer("row") + integer("i")
        self.per_row, self.row_extents = at.per_row, at.row_extents
        self.row: Index = (B, H, row)


def merge(kind: str, spec: AttentionSpec, schedule: Schedule, at: Operands) -> Kernel:
    """The kernel that combines the states of a row and ends the operation."""
    wide, row, plain = spec.target_kind != "cpu", _Row(at), replace(spec, prob_map=None)
    part = Part(plain, schedule, row, row, spec.accumulator, sympy.S.One, first=True, last=True)  # type: ignore[arg-type]
    fold = FOLDS[kind](part)
    extent = max(16, 1 << (spec.v_size - 1).bit_length()) if wide else spec.v_size
    batch, heads, rows = (integer(n) if isinstance(n, str) else sympy.Integer(n) for n in at.row_extents)
    return Kernel(
        name=f"{kind}_merge",
        args=(*partials(fold, "in"), *fold.reads(), *fold.results()),
        grid=(GridDim("row", rows), GridDim("h", heads), GridDim("b", batch)),
        axes=(Axis("z", CHUNK, CHUNK), Axis("i", 1, 1), Axis("e", spec.v_size, extent)),
        lanes=None if wide else "e",
        body=(*fold.prepare(), *fold.begin(), _combine(fold), *fold.end()),
        meta=(("stages", 1), ("warps", 4)) if wide else (),
        comment=(f"the splits of {kind}, merged",),
    )


def _combine(fold: Fold) -> For:
    """The states of all slots added to the one at hand, `CHUNK` at a time."""
    slot, acc = CHUNK * integer("c") + integer("z"), fold.acc
    there = slot < SLOTS
    m, peak, alpha, weight = real("m"), real("peak"), real("alpha"), real("weight")

    def set_(name: str, axes: tuple[str, ...], expr: Expr) -> Compute:
        return Compute(name, acc, axes, expr, declares=False)

    def load(tile: str, inner: list[Expr], guard: Expr, other: Expr) -> Load:
        axes = ("z", "i", *(str(x) for x in inner))
        return Load(f"{tile}z", acc, axes, f"part_{tile}", (slot, *fold.at.row, *inner), guard, other)

    body: list[Stmt] = [
        load("m", [], there, -INF),
        Reduce("peak", acc, ("i",), "max", real("mz"), ("z",)),
        set_("peak", ("i",), maximum(m, peak)),
        Compute("safe", acc, ("i",), where(peak < LOWEST[acc], 0, peak)),
        Compute("alpha", acc, ("i",), exp2(m - real("safe"))),
        set_("m", ("i",), peak),
        Compute("weight", acc, ("z", "i"), exp2(real("mz") - real("safe"))),
    ]
    for c in fold.state():
        inner = [integer(axis) for axis in c.axes[1:]]
        tile, part, found = real(c.tile), real(f"{c.tile}z"), f"{c.tile}_all"
        if c.tile == "largest":
            body += [
                load(c.tile, inner, there, -INF),
                Reduce(found, acc, c.axes, "max", part, ("z",)),
                set_(c.tile, c.axes, maximum(tile, real(found))),
            ]
        elif c.tile != "m":
            some = all_of([there, real("lz") > 0]) if inner else there
            body += [
                load(c.tile, inner, some, ZERO),
                Reduce(found, acc, c.axes, "sum", part * weight, ("z",)),
                set_(c.tile, c.axes, tile * alpha + real(found)),
            ]
    return For("c", (Span(ZERO, ceildiv(SLOTS, CHUNK)),), tuple(body))

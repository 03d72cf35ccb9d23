"""truth: what a whole tile knows of an opaque predicate, by three-valued evaluation.

isl answers exactly for affine predicates. Where captured tensors or bit tricks are involved, the
predicate is evaluated over a tile atom by atom: an affine part gives the conditions isl finds for it,
an atom that reads captured tensors at indices constant over the tile is its own answer, an equality of
sorted ids compares the tile's ends, and anything else may be true and may be false. And, or and not
combine both sides. The results are scalar conditions on tile coordinates: `may` false skips the tile,
`must` true runs it without a mask.

Leaves alone: affine predicates (their sets are already exact).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import sympy

from ..ir.affine import QuotaExceeded, condition, quota, to_sets
from ..ir.expr import Expr, all_of, any_of, floordiv, integer, minimum, read, readf
from ..ir.order import Order
from ..ir.plan import Group, Schedule
from .progression import as_map
from .tilesets import column_index, linear, row_index, simplify_tiles, tile_sets

Truth = tuple[Expr, Expr]  # (may, must)
MAX_OPERATIONS = 200_000  # of isl, for one affine part


class TileTruth:
    """Three-valued truth of predicates over the tiles of one order and schedule.

    monotone: names of captured tensors whose values never decrease, checked at each call."""

    def __init__(self, order: Order, schedule: Schedule, monotone: frozenset[str] = frozenset()) -> None:
        self.order, self.schedule, self.monotone = order, schedule, monotone
        self.free = any(schedule.anchor(d) is not None for d in range(len(order.dims)))
        self.first, self.last = self._corner(0), self._corner(-1)

    def of(self, predicate: Expr) -> Truth:
        """(may, must) of a predicate over every valid pair of a tile."""
        if predicate in (sympy.true, sympy.false):
            return predicate, predicate
        closed = None if predicate.has(read, readf) else self._affine(predicate)
        if closed is not None:
            return closed
        match predicate:
            case sympy.And():
                return self._join(all_of, predicate.args)
            case sympy.Or():
                return self._join(any_of, predicate.args)
            case sympy.Not():
                may, must = self.of(predicate.args[0])
                return sympy.Not(must), sympy.Not(may)
        uniform = self.uniform(predicate)
        if uniform is not None:
            return uniform, uniform
        return self._sorted(predicate) or (sympy.true, sympy.false)

    def uniform(self, expr: Expr) -> Expr | None:
        """expr in tile coordinates when it is constant over every tile, else None."""
        if self.free or len(self.order.dims) > 1:
            return None
        inner = {name: sympy.Symbol(f"{name}_", integer=True) for name in ("i", "j")}
        q = linear(self.order, row_index(self.order, self.schedule, [inner["i"]]))
        k = linear(self.order, column_index(self.order, self.schedule, [inner["j"]]))
        spread = {inner["i"]: self.schedule.rows[0], inner["j"]: self.schedule.cols[0]}
        found = expr.xreplace({integer("q"): q, integer("k"): k}).replace(
            lambda e: isinstance(e, floordiv) and e.args[1].is_Integer, _without_inner(spread)
        )
        return None if found.free_symbols & set(spread) else found

    def _join(self, connect: Callable[[list[Expr]], Expr], parts: tuple[Expr, ...]) -> Truth:
        truths = [self.of(p) for p in parts]
        return connect([t[0] for t in truths]), connect([t[1] for t in truths])

    def _affine(self, predicate: Expr) -> Truth | None:
        """The closed forms of an affine predicate; None where isl finds none, or not in good time."""
        with suppress(QuotaExceeded), quota(MAX_OPERATIONS):
            region, must = to_sets(predicate)
            if not region.is_equal(must):
                return None
            text = str(as_map(region))
            touched, full = tile_sets(Group(self.order, text, text, sympy.true), self.schedule)
            return tuple(condition(simplify_tiles(s, self.order, self.schedule)) for s in (touched, full))  # type: ignore[return-value]
        return None

    def _sorted(self, predicate: Expr) -> Truth | None:
        """c[q] == c[k] with sorted c: the id ranges of rows and keys overlap, or all four ends agree."""
        if not isinstance(predicate, sympy.Eq) or self.free or self.first is None or self.last is None:
            return None
        sides: dict[Expr, Expr] = {r.args[1:]: r.args[0] for r in predicate.args if isinstance(r, read)}
        tensors = set(sides.values())
        if set(sides) != {(integer("q"),), (integer("k"),)} or len(tensors) != 1:
            return None
        tensor = tensors.pop()
        if tensor.name not in self.monotone:
            return None
        ends: list[Expr] = [read(tensor, at) for at in (*self.first, *self.last)]
        q0, k0, q1, k1 = ends
        return sympy.And(q0 <= k1, k0 <= q1), sympy.And(sympy.Eq(q0, q1), sympy.Eq(k0, k1), sympy.Eq(q0, k0))

    def _corner(self, which: int) -> tuple[Expr, Expr] | None:
        """The least (0) or greatest (-1) row and key of a tile, clipped to the lengths."""
        if len(self.order.dims) > 1:
            return None
        rows, cols = self.schedule.rows[0], self.schedule.cols[0]
        i, j = (
            (sympy.Integer(0), sympy.Integer(0))
            if which == 0
            else (sympy.Integer(rows - 1), sympy.Integer(cols - 1))
        )
        q = linear(self.order, row_index(self.order, self.schedule, [i]))
        k = linear(self.order, column_index(self.order, self.schedule, [j]))
        return minimum(q, integer("q_len") - 1), minimum(k, integer("kv_len") - 1)


def _without_inner(spread: dict[sympy.Symbol, int]) -> Callable[[Expr], Expr]:
    """(T * x + i) // n with 0 <= i < T, T a divisor of n and of everything else: i does not matter."""

    def rewrite(division: Expr) -> Expr:
        value, n = division.args
        for symbol, extent in spread.items():
            value = sympy.expand(value)
            step = value.coeff(symbol)
            rest = value - step * symbol
            if not step.is_Integer or step <= 0:
                continue
            reach = int(step) * extent
            constant, terms = rest.as_coeff_add()
            aligned = int(n) % reach == 0 and all(t.as_coeff_Mul()[0] % reach == 0 for t in terms)
            if aligned and 0 <= int(constant) % reach <= reach - int(step) * (extent - 1) - 1:
                return floordiv(rest, n)
        return division

    return rewrite

"""truth: what a whole tile knows of an opaque predicate, by three-valued evaluation.

isl answers exactly for affine predicates. Where captured tensors or bit tricks are involved, the
predicate is evaluated over a tile atom by atom:

- an affine part gives the conditions isl finds for it;
- what is constant over every tile is its own answer;
- a comparison of integers compares ranges: the ends of the tile, sorted ids at these ends, least and
  greatest values over the keys of the tile (a `Summary`), and interval arithmetic on those;
- what depends on keys alone holds for any or for all of them (a `Summary` too);
- anything else may be true and may be false: the tile's points have to decide.

And, or and not combine both sides. The results are conditions on tile coordinates: `may` false skips
the tile, `must` true runs it without a mask.

Leaves alone: affine predicates (their sets are already exact).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import sympy
from sympy.core.relational import Relational

from ..ir.affine import QuotaExceeded, condition, quota, to_sets
from ..ir.expr import (
    Expr,
    all_of,
    any_of,
    boolean,
    floordiv,
    integer,
    kind,
    maximum,
    minimum,
    read,
    readf,
    symbols,
    where,
)
from ..ir.order import Order
from ..ir.plan import Group, Schedule, Summary
from .progression import as_map
from .tilesets import column_index, linear, row_index, simplify_tiles, tile_sets

Truth = tuple[Expr, Expr]  # (may, must)
Range = tuple[Expr, Expr]  # (least, greatest)
MAX_OPERATIONS = 200_000  # of isl, for one affine part
UNKNOWN: Truth = (sympy.true, sympy.false)
Q, K = integer("q"), integer("k")


class TileTruth:
    """Three-valued truth of predicates over the tiles of one order and schedule.

    monotone: names of captured tensors whose values never decrease, checked at each call. by_row: the
    answers are about one row, q, and the keys of a tile, of whose values `summaries` then holds what
    the answers name; for an order of one dimension, without anchors. Afterwards `open` says whether
    some part had no answer."""

    def __init__(
        self,
        order: Order,
        schedule: Schedule,
        monotone: frozenset[str] = frozenset(),
        *,
        by_row: bool = False,
    ) -> None:
        self.order, self.monotone, self.by_row = order, monotone, by_row
        self.schedule = replace(schedule, rows=(1,)) if by_row else schedule
        self.plain = len(order.dims) == 1 and schedule.anchor(0) is None
        self.varying = frozenset({K}) if by_row else frozenset({Q, K})
        self.ends = _ends(order, schedule)
        self.summaries: dict[tuple[str, Expr], Summary] = {}
        self.open = False

    def of(self, predicate: Expr) -> Truth:
        """(may, must) of a predicate over every valid pair of a tile."""
        if predicate in (sympy.true, sympy.false):
            return predicate, predicate
        closed = None if predicate.has(read, readf) else self._affine(predicate)
        if closed is not None:
            return closed
        same = self.uniform(predicate)
        if same is not None:
            return same, same
        if self.by_row and self._side(predicate) == {K} and Q not in symbols(predicate):
            return self._summary("any", predicate), self._summary("all", predicate)
        match predicate:
            case sympy.And():
                return self._join(all_of, predicate.args)
            case sympy.Or():
                return self._join(any_of, predicate.args)
            case sympy.Not():
                may, must = self.of(predicate.args[0])
                return sympy.Not(must), sympy.Not(may)
        found = self._compared(predicate) if isinstance(predicate, Relational) else None
        self.open = self.open or found is None
        return found or UNKNOWN

    def uniform(self, expr: Expr) -> Expr | None:
        """expr in tile coordinates (by row: and q) when it is constant over every tile, else None."""
        if not self.plain:
            return None
        inner = {name: sympy.Symbol(f"{name}_", integer=True) for name in ("i", "j")}
        q = linear(self.order, row_index(self.order, self.schedule, [inner["i"]]))
        k = linear(self.order, column_index(self.order, self.schedule, [inner["j"]]))
        spread = {inner["i"]: self.schedule.rows[0], inner["j"]: self.schedule.cols[0]}
        at = {K: k} if self.by_row else {Q: q, K: k}
        found = expr.xreplace(at).replace(
            lambda e: isinstance(e, floordiv) and e.args[1].is_Integer, _without_inner(spread)
        )
        return None if found.free_symbols & set(spread) else found

    # conditions -------------------------------------------------------------------------------------

    def _join(self, connect: Callable[[list[Expr]], Expr], parts: tuple[Expr, ...]) -> Truth:
        """The affine parts together, and those of keys alone, which is sharper than one by one."""
        kinds: dict[object, list[Expr]] = {}
        for part in parts:
            of_keys = self.by_row and symbols(part) & {Q, K} == {K}
            own = "affine" if not part.has(read, readf) else "keys" if of_keys else part
            kinds.setdefault(own, []).append(part)
        joined = [connect(group) for group in kinds.values()] if len(kinds) > 1 else list(parts)
        truths = [self.of(p) for p in joined]
        return connect([t[0] for t in truths]), connect([t[1] for t in truths])

    def _affine(self, predicate: Expr) -> Truth | None:
        """The closed forms of an affine predicate; None where isl finds none, or not in good time."""
        with suppress(QuotaExceeded), quota(MAX_OPERATIONS):
            region, must = to_sets(predicate)
            if not region.is_equal(must):
                return None
            text = str(as_map(region))
            found = tile_sets(Group(self.order, text, text, sympy.true), self.schedule)
            touched, full = (condition(simplify_tiles(s, self.order, self.schedule)) for s in found)
            stride = self.order.dims[0].row_stride
            row = {integer("m0"): floordiv(Q - integer("r0"), stride) if stride > 1 else Q}
            return (touched.xreplace(row), full.xreplace(row)) if self.by_row else (touched, full)
        return None

    def _compared(self, relation: Expr) -> Truth | None:
        """A comparison of integers, by their ranges over the tile."""
        left, right = relation.args
        if kind(left) != "int" or kind(right) != "int":  # NaN compares as nothing else does
            return None
        if self._side(left) & self._side(right):
            left, right = _apart(left - right)
        a, b = self._range(left), self._range(right)
        if a is None or b is None:
            return None
        match relation:
            case sympy.StrictLessThan():
                return sympy.Lt(a[0], b[1]), sympy.Lt(a[1], b[0])
            case sympy.LessThan():
                return sympy.Le(a[0], b[1]), sympy.Le(a[1], b[0])
            case sympy.StrictGreaterThan():
                return sympy.Gt(a[1], b[0]), sympy.Gt(a[0], b[1])
            case sympy.GreaterThan():
                return sympy.Ge(a[1], b[0]), sympy.Ge(a[0], b[1])
        meet = all_of([sympy.Le(a[0], b[1]), sympy.Le(b[0], a[1])])
        agree = all_of([sympy.Eq(a[0], a[1]), sympy.Eq(b[0], b[1]), sympy.Eq(a[0], b[0])])
        return (meet, agree) if isinstance(relation, sympy.Eq) else (sympy.Not(agree), sympy.Not(meet))

    # ranges -----------------------------------------------------------------------------------------

    def _range(self, expr: Expr) -> Range | None:
        """Bounds of an integer over a tile, sharp where it depends on one index; None when unknown."""
        if not self._side(expr):
            return expr, expr
        same = self.uniform(expr)
        if same is not None:
            return same, same
        rising = self._rising(expr)
        if rising is not None:
            return rising
        if self.by_row and Q not in symbols(expr):
            return self._summary("min", expr), self._summary("max", expr)
        parts = [self._range(a) for a in expr.args if kind(a) != "bool"]
        if not parts or any(p is None for p in parts):
            return None
        low, high = zip(*(p for p in parts if p is not None), strict=True)
        match expr:
            case sympy.Add() | minimum() | maximum():
                return expr.func(*low), expr.func(*high)
            case sympy.Mul() if len(parts) == 2 and expr.args[0].is_Integer:
                ends = (expr.args[0] * low[1], expr.args[0] * high[1])
                return ends if _positive(expr.args[0]) else ends[::-1]
            case floordiv() if _positive(expr.args[1]):
                return floordiv(low[0], expr.args[1]), floordiv(high[0], expr.args[1])
            case where():
                return minimum(*low), maximum(*high)
            case sympy.Abs():
                return maximum(maximum(low[0], -high[0]), sympy.Integer(0)), maximum(-low[0], high[0])
        return None

    def _rising(self, expr: Expr) -> Range | None:
        """The range of a function of one index that rises or falls with it, from the ends of the tile."""
        if expr in self.ends and expr in self.varying:
            return self.ends[expr]
        varying = [a for a in expr.args if self._side(a)]
        inner = self._rising(varying[0]) if len(varying) == 1 else None
        if inner is None:
            return None
        falls = False
        match expr:
            case sympy.Add() | minimum() | maximum():
                pass
            case sympy.Mul() if (expr / varying[0]).is_Integer:
                falls = bool(expr / varying[0] < 0)
            case floordiv() if _positive(expr.args[1]):
                pass
            case read() if len(expr.args) == 2 and str(expr.args[0]) in self.monotone:
                pass
            case _:
                return None
        low, high = (expr.xreplace({varying[0]: end}) for end in inner)
        return (high, low) if falls else (low, high)

    def _side(self, expr: Expr) -> frozenset[Expr]:
        """Which of the indices that vary within a tile an expression depends on."""
        return symbols(expr) & self.varying

    def _summary(self, op: str, expr: Expr) -> Expr:
        """The name of a summary of the keys."""
        name = f"key_{op}_{len(self.summaries)}"
        found = self.summaries.setdefault((op, expr), Summary(name, op, expr))
        return boolean(found.name) if op in ("any", "all") else integer(found.name)


def _positive(expr: Expr) -> bool:
    return bool(expr.is_Integer and int(expr) > 0)


def _apart(difference: Expr) -> tuple[Expr, Expr]:
    """left - right = difference, with the terms of keys alone on the right."""
    terms = sympy.Add.make_args(sympy.expand(difference))
    keys = [t for t in terms if symbols(t) & {Q, K} == {K}]
    return sympy.Add(*(t for t in terms if t not in keys)), -sympy.Add(*keys)


def _ends(order: Order, schedule: Schedule) -> dict[Expr, Range]:
    """The least and greatest row and key of a tile, within the lengths; of one dimension only."""
    if len(order.dims) > 1:
        return {}
    found = {}
    for symbol, index, extents in ((Q, row_index, schedule.rows), (K, column_index, schedule.cols)):
        last = integer("q_len" if symbol == Q else "kv_len") - 1
        ends = [linear(order, index(order, schedule, [sympy.Integer(at)])) for at in (0, extents[0] - 1)]
        if symbol == K and schedule.anchor(0) is not None:
            ends = [maximum(end, sympy.Integer(0)) for end in ends]
        found[symbol] = (minimum(ends[0], last), minimum(ends[1], last))
    return found


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

"""count: how many pairs closed-form terms hold, without walking rows.

Closed forms of terms are built from + - * // % min max where and comparisons of the row q. With numbers
for everything else they are *piecewise quasi-linear*: between a few breakpoints, f(x + L) - f(x) depends
on x mod L only, for some period L. `Steps` holds such a function exactly, a few small arrays whatever
the length is, and sums it and products of it in closed form.

    >>> q = Steps.identity(10**9)
    >>> (q // 3).minimum(Steps.constant(5, 10**9)).total()
    4999999955

Work and memory grow with the periods and the number of breakpoints, not with the length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import sympy

from ..ir import expr as E
from ..ir.formats import ACSR

MAX_RUNS, MAX_PERIOD = 4096, 1 << 14


class TooIrregular(Exception):
    """A function has too many breakpoints, or too long a period, to be summed in closed form."""


@dataclass(frozen=True)
class Run:
    """f(start + r + L * t) = base[r] + slope[r] * t on start <= x < stop, with 0 <= r < L = len(base)."""

    start: int
    stop: int
    base: np.ndarray
    slope: np.ndarray

    def within(self, start: int, stop: int, period: int) -> Run:
        """The same function on a part of the run, with a multiple of its period."""
        at = np.arange(period) + (start - self.start)
        own = len(self.base)
        residue = at % own
        base = self.base[residue] + self.slope[residue] * (at // own)
        return Run(start, stop, base, self.slope[residue] * (period // own))

    def lengths(self) -> np.ndarray:
        """How many t each residue has."""
        period = len(self.base)
        return np.maximum(0, (self.stop - self.start - np.arange(period) + period - 1) // period)


@dataclass(frozen=True)
class Steps:
    """A piecewise quasi-linear function from 0 <= x < length to the integers; truth values are 0 and 1."""

    runs: tuple[Run, ...]

    @staticmethod
    def identity(length: int) -> Steps:
        return Steps((Run(0, length, np.zeros(1, np.int64), np.ones(1, np.int64)),))

    @staticmethod
    def constant(value: int, length: int) -> Steps:
        return Steps((Run(0, length, np.full(1, value, np.int64), np.zeros(1, np.int64)),))

    def __add__(self, other: Steps) -> Steps:
        return Steps(
            tuple(Run(a.start, a.stop, a.base + b.base, a.slope + b.slope) for a, b in aligned(self, other))
        )

    def __mul__(self, c: int) -> Steps:
        return Steps(tuple(Run(a.start, a.stop, a.base * c, a.slope * c) for a in self.runs))

    def __floordiv__(self, c: int) -> Steps:
        out = []
        for a in self.runs:
            period = len(a.base) * (abs(c) // math.gcd(c, *map(int, a.slope)))
            if period > MAX_PERIOD // 4 and len(a.base) == 1:
                out += _plateaus(a, c)
                continue
            a = a.within(a.start, a.stop, _period(period))
            out.append(Run(a.start, a.stop, a.base // c, a.slope // c))
        return Steps(tuple(out))

    def __mod__(self, c: int) -> Steps:
        return self + (self // c) * -c

    def not_positive(self) -> Steps:
        """1 where the function is 0 or less, else 0: each residue changes sign once."""
        out = []
        for a in self.runs:
            up, down = a.slope > 0, a.slope < 0
            # first t of the other sign; numpy floors, so that -(-x // s) is the ceiling of x / s
            flip = np.zeros_like(a.base)
            flip[up] = -a.base[up] // a.slope[up] + 1
            flip[down] = -(-a.base[down] // -a.slope[down])
            last = -(-(a.stop - a.start) // len(a.base))
            cuts = np.unique(flip[(up | down) & (flip > 0) & (flip < last)])
            if len(cuts) + len(out) > MAX_RUNS:
                raise TooIrregular
            edges = [0, *map(int, cuts), last]
            for t, end in itertools.pairwise(edges):
                start, stop = a.start + t * len(a.base), min(a.stop, a.start + end * len(a.base))
                holds = a.base + a.slope * t <= 0
                out.append(Run(start, stop, holds.astype(np.int64), np.zeros_like(a.base)))
        return Steps(tuple(out))

    def choose(self, yes: Steps, no: Steps) -> Steps:
        """yes where this is 1, no where it is 0."""
        out = []
        for c, a, b in aligned(self, yes, no):
            base, slope = (np.where(c.base, x, y) for x, y in ((a.base, b.base), (a.slope, b.slope)))
            out.append(Run(c.start, c.stop, base, slope))
        return Steps(tuple(out))

    def at_most(self, other: Steps) -> Steps:
        return (self + other * -1).not_positive()

    def minimum(self, other: Steps) -> Steps:
        return self.at_most(other).choose(self, other)

    def maximum(self, other: Steps) -> Steps:
        return self.at_most(other).choose(other, self)

    def negated(self) -> Steps:
        """1 - x, for truth values."""
        return Steps(tuple(Run(a.start, a.stop, 1 - a.base, a.slope) for a in self.runs))

    def total(self, *factors: Steps) -> int:
        """The sum over all x of this function times the factors."""
        total = 0
        for runs in aligned(self, *factors):
            lengths = runs[0].lengths().astype(object)
            polynomial: list[np.ndarray] = [
                np.ones(len(lengths), object)
            ]  # coefficients in t, one array a power
            for run in runs:
                base = [c * run.base.astype(object) for c in polynomial]
                if not run.slope.any():
                    polynomial = base
                    continue
                slope = [c * run.slope.astype(object) for c in polynomial]
                polynomial = [a + b for a, b in zip([*base, 0 * base[0]], [0 * base[0], *slope], strict=True)]
            sums = _power_sums(lengths, len(polynomial))
            total += sum(int(np.dot(c, s)) for c, s in zip(polynomial, sums, strict=True))
        return total


def aligned(*functions: Steps) -> Iterator[tuple[Run, ...]]:
    """The runs of several functions on one domain, cut to common intervals and periods."""
    if all(len(f.runs) == 1 and len(f.runs[0].base) == 1 for f in functions):
        yield tuple(f.runs[0] for f in functions)
        return
    edges = sorted({e for f in functions for r in f.runs for e in (r.start, r.stop)})
    if len(edges) > MAX_RUNS:
        raise TooIrregular
    at = [0] * len(functions)
    for start, stop in itertools.pairwise(edges):
        for i, f in enumerate(functions):
            while f.runs[at[i]].stop <= start:
                at[i] += 1
        here = [f.runs[i] for f, i in zip(functions, at, strict=True)]
        period = _period(math.lcm(*(len(r.base) for r in here)))
        yield tuple(r.within(start, stop, period) for r in here)


def _plateaus(line: Run, c: int) -> list[Run]:
    """line // c as its constant pieces: fewer than the residues of a large c."""
    base, slope = int(line.base[0]), int(line.slope[0])
    if c < 0:
        base, slope, c = -base, -slope, -c
    out, x = [], line.start
    while x < line.stop:
        value = (base + slope * (x - line.start)) // c
        end = line.stop
        if slope > 0:  # up to the first t with base + slope * t >= (value + 1) * c
            end = min(end, line.start - (base - (value + 1) * c) // slope)
        elif slope < 0:  # up to the first t with base + slope * t < value * c
            end = min(end, line.start + (base - value * c) // -slope + 1)
        out.append(Run(x, end, np.array([value]), np.zeros(1, np.int64)))
        x = end
        if len(out) > MAX_RUNS:
            raise TooIrregular
    return out


def _period(length: int) -> int:
    if length > MAX_PERIOD:
        raise TooIrregular
    return length


def _power_sums(n: np.ndarray, powers: int) -> list[np.ndarray]:
    """The sums of t ** p over 0 <= t < n for p < powers, by telescoping (t + 1) ** (p + 1) - t ** (p + 1)."""
    sums: list[np.ndarray] = []
    for p in range(powers):
        lower = sum((math.comb(p + 1, j) * s for j, s in enumerate(sums)), 0 * n)
        sums.append((n ** (p + 1) - lower) // (p + 1))
    return sums


class Rows:
    """Evaluates expressions of the row q to Steps. values: numbers for every other symbol."""

    def __init__(self, length: int, values: Mapping[str, int]) -> None:
        self.length = length
        q = Steps.identity(length)
        self.known: dict[E.Expr, Steps] = {E.integer("q"): q}
        self.known |= {E.integer(n): Steps.constant(int(v), length) for n, v in values.items()}

    def with_widths(self, widths: Sequence[int]) -> Rows:
        """The same, where q0, q1, ... are known too."""
        out = Rows(self.length, {})
        out.known |= {s: f for s, f in self.known.items() if isinstance(s, sympy.Symbol)}
        outer = out.known[E.integer("q")]
        for d in range(len(widths), 0, -1):
            out.known[E.integer(f"q{d}")] = outer % widths[d - 1]
            outer = outer // widths[d - 1]
        out.known[E.integer("q0")] = outer
        return out

    def steps(self, expr: E.Expr) -> Steps:
        if expr not in self.known:
            self.known[expr] = self._steps(expr)
        return self.known[expr]

    def _steps(self, expr: E.Expr) -> Steps:
        if expr.is_Integer or expr in (sympy.true, sympy.false):
            return Steps.constant(int(bool(expr)) if not expr.is_Integer else int(expr), self.length)
        args = [self.steps(a) for a in expr.args]
        match expr:
            case sympy.Add():
                return reduce(Steps.__add__, args)
            case sympy.Mul() if len(args) == 2 and expr.args[0].is_Integer:
                return args[1] * int(expr.args[0])
            case sympy.Mul():
                c, rest = expr.as_coeff_Mul()
                constants = [a for a in rest.args if self._number(a) is not None]
                if c.is_Integer and len(constants) == len(rest.args):
                    return Steps.constant(
                        int(c) * math.prod(self._number(a) or 0 for a in constants), self.length
                    )
            case E.floordiv() | E.floormod():
                divisor = self._number(expr.args[1])
                if divisor:
                    return args[0] // divisor if isinstance(expr, E.floordiv) else args[0] % divisor
            case E.minimum() | sympy.And():
                return reduce(Steps.minimum, args)
            case E.maximum() | sympy.Or():
                return reduce(Steps.maximum, args)
            case sympy.Abs():
                return args[0].maximum(args[0] * -1)
            case E.where():
                return args[0].choose(args[1], args[2])
            case sympy.Not():
                return args[0].negated()
            case sympy.Le():
                return args[0].at_most(args[1])
            case sympy.Ge():
                return args[1].at_most(args[0])
            case sympy.Lt():
                return args[1].at_most(args[0]).negated()
            case sympy.Gt():
                return args[0].at_most(args[1]).negated()
            case sympy.Eq():
                return args[0].at_most(args[1]).minimum(args[1].at_most(args[0]))
            case sympy.Ne():
                return args[0].at_most(args[1]).minimum(args[1].at_most(args[0])).negated()
        raise TooIrregular

    def _number(self, expr: E.Expr) -> int | None:
        """The value of an expression that does not depend on the row."""
        runs = self.steps(expr).runs
        constant = len(runs) == 1 and len(runs[0].base) == 1 and runs[0].slope[0] == 0
        return int(runs[0].base[0]) if constant else None


def count_terms(terms: Sequence[ACSR], rows: Rows, kv_len: int) -> int:
    """How many pairs with k < kv_len the terms hold in all rows. Raises TooIrregular."""
    return sum(_count_term(t, rows, kv_len) for t in terms)


def _count_term(term: ACSR, rows: Rows, kv_len: int) -> int:
    if rows.length == 0 or kv_len == 0:
        return 0
    present = rows.steps(term.rows)
    rows = rows.with_widths(term.widths) if term.widths else rows
    # Keys below kv_len, digit by digit: those that agree with it in d dimensions and are less in the next.
    digits = _digits(kv_len, term.widths)
    total, agree = 0, present
    rank = len(term.progressions)
    for d in range(rank):
        less = _below(term, d, rows, digits[d])
        free = [_below(term, e, rows, None) for e in range(d + 1, rank)]
        total += agree.total(less, *free)
        if d + 1 < rank:
            equal = _below(term, d, rows, digits[d] + 1) + less * -1
            agree = agree.minimum(equal)
    return total


def _digits(index: int, widths: Sequence[int]) -> list[int]:
    out: list[int] = []
    for w in reversed(widths):
        index, digit = divmod(index, w)
        out.append(digit)
    return [index, *reversed(out)]


def _below(term: ACSR, dim: int, rows: Rows, limit: int | None) -> Steps:
    """How many coordinates of one dimension are below the limit (all of them: None), row by row."""
    p = term.progressions[dim]
    bounded = p.count != sympy.oo
    counts = [rows.steps(p.count)] if bounded else []
    if limit is not None:
        room = Steps.constant(limit - 1, rows.length) + rows.steps(p.first) * -1
        counts.append(room // p.stride + Steps.constant(1, rows.length))
    return reduce(Steps.minimum, counts).maximum(Steps.constant(0, rows.length))

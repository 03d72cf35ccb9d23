"""Elements of a program as products of a few tensors, summed over indices: the ways to take them apart.

Which of a program's products are parts of a larger one, and which make one of its tensors, a program does not
say: `Splitter.parts` gives every way. What its operations are, a subclass knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..term import Term
from .terms import names_in, number, reads_in, tidy

MOST = 200  # pieces that one node is looked at in


@dataclass(frozen=True)
class Factor:
    """An element that is multiplied. held: a tensor whose element it is, and at which indices, last, if any
    is."""

    term: Term
    held: Any = None

    @property
    def names(self) -> set[str]:
        return names_in(self.term)


@dataclass(frozen=True)
class Part:
    """scale times factors, where conditions hold, over denominators; summed over indices of sizes.

    inside: the operations that were taken apart."""

    factors: tuple[Factor, ...] = ()
    kept: tuple[Term, ...] = ()
    over: tuple[Term, ...] = ()
    bound: tuple[tuple[str, Any], ...] = ()
    inside: tuple[Any, ...] = ()
    scale: float = 1.0

    def times(self, other: Part) -> Part:
        joined = (a + b for a, b in zip(self._parts, other._parts, strict=True))
        return Part(*joined, scale=self.scale * other.scale)

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.factors, self.kept, self.over, self.bound, self.inside


class Splitter:
    """Takes elements apart."""

    def __init__(self) -> None:
        self.count = itertools.count()
        self.looked = 0

    def is_sum(self, name: str) -> bool:
        """Whether a tensor, by the name in reads, is a sum or a product that `leaf` takes apart."""
        raise NotImplementedError

    def leaf(self, name: str, indices: Sequence[Term]) -> Iterator[Part]:
        """The ways to take an element of a sum or a product apart."""
        raise NotImplementedError

    def fresh(self) -> str:
        """The name of another index that is summed."""
        return f"j{next(self.count)}"

    def parts(self, term: Term, held: Any = None) -> Iterator[Part]:
        """The ways to take a term apart."""
        self.looked += 1
        if self.looked > MOST:
            return
        value = number(term)
        if value is not None:
            yield Part(scale=float(value))
            return
        split = list(self.split(term)) if isinstance(term, tuple) else []
        yield from split
        if not split or term[0] in ("read", "readf", "mul", "where"):
            yield Part((Factor(term, held),))

    def split(self, term: Any) -> Iterator[Part]:
        op, *parts = term
        if op == "cast":
            yield from self.split(parts[1]) if isinstance(parts[1], tuple) else ()
        elif op == "mul":
            yield from self.products([(p, None) for p in parts])
        elif op == "div" and (self._goes_on(parts[0]) or self._has_sum(parts[1])):
            value = number(parts[1])
            over = Part(over=(parts[1],)) if value is None else Part(scale=1 / value)
            yield from (part.times(over) for part in self.parts(parts[0]))
        elif op == "where" and not reads_in(parts[0]):
            kept = [(c, side) for c, side, other in _sides(*parts) if number(other) == 0]
            yield from (p.times(Part(kept=(c,))) for c, side in kept for p in self.parts(side))
        elif op == "readf":
            yield from self.leaf(parts[0], parts[1:])

    def products(self, operands: Sequence[tuple[Term, Any]]) -> Iterator[Part]:
        """The ways to take a product of up to four tensors apart."""
        if not operands:
            yield Part()
            return
        (term, held), *rest = operands
        for first in self.parts(term, held):
            for other in self.products(rest):
                whole = first.times(other)
                if len(whole.factors) <= 3:
                    yield whole

    def _goes_on(self, term: Term) -> bool:
        """Whether products, sums or denominators stand among what a term multiplies."""
        if not isinstance(term, tuple):
            return False
        if term[0] == "readf":
            return self.is_sum(term[1])
        if term[0] == "div" and self._has_sum(term[2]):
            return True
        parts = {"mul": term[1:], "div": term[1:2], "where": term[2:], "cast": term[2:]}.get(term[0], ())
        return any(map(self._goes_on, parts))

    def _has_sum(self, term: Term) -> bool:
        return any(self.is_sum(read[1]) for read in reads_in(term))


def _sides(c: Term, a: Term, b: Term) -> list[tuple[Term, Term, Term]]:
    return [(c, a, b), (tidy(("not", c)), b, a)]

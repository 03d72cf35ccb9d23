"""Elements of a graph as products of a few tensors, summed over indices: the ways to take them apart.

Which of a graph's products are parts of a larger one, and which make one of its tensors, a graph does not
say: `Splitter.parts` gives every way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..term import Term
from .ops import arguments, operation, value_of
from .sums import general_product
from .tensor import AT, Reader, is_one
from .terms import names_in, number, reads_in, tidy

MOST = 200  # pieces that one node is looked at in


@dataclass(frozen=True)
class Factor:
    """An element that is multiplied. held: a tensor whose element it is, and at which indices, if any is."""

    term: Term
    held: tuple[fx.Node, fx.Node, tuple[Term, ...]] | None = None

    @property
    def names(self) -> set[str]:
        return names_in(self.term)


@dataclass(frozen=True)
class Part:
    """scale times factors, where conditions hold, over denominators; summed over indices of sizes."""

    factors: tuple[Factor, ...] = ()
    kept: tuple[Term, ...] = ()
    over: tuple[Term, ...] = ()
    bound: tuple[tuple[str, Any], ...] = ()
    inside: tuple[fx.Node, ...] = ()
    scale: float = 1.0

    def times(self, other: Part) -> Part:
        joined = (a + b for a, b in zip(self._parts, other._parts, strict=True))
        return Part(*joined, scale=self.scale * other.scale)

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.factors, self.kept, self.over, self.bound, self.inside


class Splitter:
    """Takes nodes apart."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.count = itertools.count()
        self.looked = 0

    def element(self, node: fx.Node, at: fx.Node, indices: Sequence[Term]) -> tuple[Term, Any]:
        tensor = self.reader.operand(node, at)
        places = tuple(0 if is_one(n) else index for n, index in zip(tensor.shape, indices, strict=True))
        return tidy(tensor.at(list(places))), (node, at, places)

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
        elif op == "readf" and AT not in parts[0]:
            yield from self.leaf(self.reader.leaves[parts[0]], parts[1:])

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
            return AT not in term[1] and is_sum(self.reader.leaves[term[1]])
        if term[0] == "div" and self._has_sum(term[2]):
            return True
        parts = {"mul": term[1:], "div": term[1:2], "where": term[2:], "cast": term[2:]}.get(term[0], ())
        return any(map(self._goes_on, parts))

    def _has_sum(self, term: Term) -> bool:
        return any(AT not in read[1] and is_sum(self.reader.leaves[read[1]]) for read in reads_in(term))

    def leaf(self, leaf: fx.Node, indices: Sequence[Term]) -> Iterator[Part]:
        did = operation(leaf)
        if did is None or did.writes:
            return
        source, dim, keeps = arguments(leaf, "input", "dim", "keepdim")
        if did.name in ("sum", "cumsum"):
            dims = dim if isinstance(dim, (list, tuple)) else [dim]
            if len(dims) != 1 or not isinstance(dims[0], int):
                return
            shape = tuple(value_of(source).shape)
            d = dims[0] % len(shape)
            name, size = f"j{next(self.count)}", shape[d]
            same_rank = did.name == "cumsum" or keeps
            places = [*indices[:d], name, *indices[d + 1 if same_rank else d :]]
            kept = (("le", name, indices[d]),) if did.name == "cumsum" else ()
            whole = Part(kept=kept, bound=((name, size),), inside=(leaf,))
            yield from (part.times(whole) for part in self.products([self.element(source, leaf, places)]))
            return
        product = general_product(leaf)
        if product is None:
            return
        operands, out, summed = product
        of: dict[str | None, Term] = dict(zip(out, indices, strict=True)) | {None: 0}
        of |= {label: f"j{next(self.count)}" for label in summed}
        whole = Part(bound=tuple((of[label], n) for label, n in summed.items()), inside=(leaf,))
        given = [self.element(node, leaf, [of[x] for x in labels]) for node, labels in operands]
        yield from (part.times(whole) for part in self.products(given))


def is_sum(node: fx.Node) -> bool:
    did = operation(node)
    return did is not None and (did.name in ("sum", "cumsum") or general_product(node) is not None)


def _sides(c: Term, a: Term, b: Term) -> list[tuple[Term, Term, Term]]:
    return [(c, a, b), (tidy(("not", c)), b, a)]

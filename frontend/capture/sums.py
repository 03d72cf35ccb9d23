"""Tensors of a graph as sums of products: what `one_hot`, `einsum` and sums make of numbers and conditions.

`Sums.expand(term)` gives an element as products of factors, each over indices that are summed. Conditions
count as 1 and 0. A sum over an index that a condition sets equal to something is what it is there:

    sum over e of loc[t, e] * one_hot(ids)[t, e]   is   loc[t, ids[t]]
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..term import FALSE, TRUE, Term, children, rename
from .contract import Labels, contraction
from .match import simplified
from .ops import Operation, arguments, operation, value_of
from .tensor import AT, LeftAlone, Reader, is_one, same_size, size_term
from .terms import combined, from_linear, kind_of, linear, names_in, number, tidy

RESHAPES = ("view", "reshape", "flatten", "unflatten")
MOST = 64  # products of a sum that is still worth carrying on


@dataclass(frozen=True)
class Summand:
    """scale times the product of factors, summed over the indices in `bound`."""

    factors: tuple[Term, ...] = ()
    bound: tuple[str, ...] = ()
    scale: float = 1

    def times(self, other: Summand) -> Summand:
        return Summand(self.factors + other.factors, self.bound + other.bound, self.scale * other.scale)

    @property
    def counts(self) -> bool:
        """Whether it is a condition: 1 or 0 at every index."""
        return self.scale == 1 and all(kind_of(f) == "bool" for f in self.factors)


class Sums:
    """Elements of a reader's tensors as sums of products.

    wide: names of indices; tensors that are indexed by none of them are read as they are. None: every tensor
    is taken apart as far as its operations go. exact: sums of 16 bits, which round counts, are read as they
    are. sizes: of summed indices, by name."""

    def __init__(self, reader: Reader, wide: Collection[str] | None = None, *, exact: bool = False) -> None:
        self.reader, self.wide, self.exact = reader, wide, exact
        self.sizes: dict[str, Any] = {}
        self.ranges: dict[Term, Any] = {}  # what is known to be below a number, and at least 0
        self._fresh = itertools.count()

    def element(self, node: fx.Node, at: fx.Node, indices: Sequence[Term]) -> Term:
        """The element of what a tensor holds when the node `at` reads it."""
        if self._is_narrow(indices) and value_of(node).is_floating_point():
            holder, whole = self.reader.memory.current(node, at)
            tensor = self.reader.leaf(holder) if whole else self.reader.leaf(node, at)
        else:
            tensor = self.reader.operand(node, at)
        ones = (0 if is_one(n) else index for n, index in zip(tensor.shape, indices, strict=True))
        return self.tidied(tensor.at(list(ones)))

    def _is_narrow(self, indices: Iterable[Term]) -> bool:
        return self.wide is not None and not set().union(*map(names_in, indices)) & set(self.wide)

    def expand(self, term: Term) -> list[Summand]:
        """A term as a sum. Raises LeftAlone for one of too many products."""
        value = number(term)
        if value is not None:
            return [Summand(scale=value)] if value else []
        if not isinstance(term, tuple):
            return [Summand((term,))]
        found = self._expand(term)
        if len(found) > MOST:
            raise LeftAlone("it is a sum of too many products")
        return found

    def _expand(self, term: Any) -> list[Summand]:
        op, *parts = term
        if op == "add":
            return self.expand(parts[0]) + self.expand(parts[1])
        if op == "sub":
            return self.expand(parts[0]) + _negative(self.expand(parts[1]))
        if op == "neg":
            return _negative(self.expand(parts[0]))
        if op in ("mul", "and"):
            left, right = map(self.expand, parts)
            return [a.times(b) for a in left for b in right]
        if op == "where":
            yes, no = self.expand(parts[0]), [Summand((tidy(("not", parts[0])),))]
            return [a.times(b) for a in yes for b in self.expand(parts[1])] + [
                a.times(b) for a in no for b in self.expand(parts[2])
            ]
        if op == "cast":
            inner = self.expand(parts[1])
            whole = parts[0][0] != "f" and parts[0] != "bf16"
            return inner if not whole or all(map(self._is_whole, inner)) else [Summand((term,))]
        if op == "ne" and parts[1] in (0, ("f", "0x0.0p+0")):
            inner = self.expand(parts[0])
            return inner if len(inner) == 1 and inner[0].counts and not inner[0].bound else [Summand((term,))]
        if op in ("read", "readf"):
            return self._read(term)
        return [Summand((term,))]

    def _is_whole(self, part: Summand) -> bool:
        """Whether a product is an integer: one of conditions, integers and counts of conditions."""

        def whole(factor: Term) -> bool:
            if not isinstance(factor, tuple) or factor[0] != "readf":
                return kind_of(factor) != "float"
            leaf = self.reader.leaves[factor[1]]
            if operation(leaf) != Operation("cumsum"):
                return False
            source = arguments(leaf, "input")[0]
            names = [f"i{d}" for d in range(value_of(source).dim())]
            inner = Sums(self.reader, exact=True).expand(self.reader.operand(source, leaf).at(list(names)))
            return all(p.counts for p in inner)

        return part.scale == int(part.scale) and all(map(whole, part.factors))

    def _read(self, read: Any) -> list[Summand]:
        name, indices = read[1], read[2:]
        leaf = self.reader.leaves[name]
        did = operation(leaf)
        whole = [Summand((read,))]
        if self._is_narrow(indices) or AT in name or did is None or did.writes:
            return whole
        if did.name == "one_hot":
            ids, size = arguments(leaf, "input", "num_classes")
            chosen = self.element(ids, leaf, indices[:-1])
            if isinstance(size, int) and size > 0:
                self.ranges[chosen] = size
            return self.expand(tidy(("eq", chosen, indices[-1])))
        if did.name == "sum":
            return self._sum(leaf, indices) or whole
        if did.name in RESHAPES:
            return self._reshape(leaf, indices) or whole
        product = general_product(leaf)
        if product is None:
            return whole
        operands, out, summed = product
        of: dict[str | None, Term] = dict(zip(out, indices, strict=True)) | {None: 0}
        found = [Summand()]
        for label, size in summed.items():
            of[label] = self.fresh(size)
        found = [Summand(bound=tuple(of[label] for label in summed))]
        for node, labels in operands:
            factor = self.expand(self.element(node, leaf, [of[label] for label in labels]))
            found = [a.times(b) for a in found for b in factor]
        return found

    def _sum(self, leaf: fx.Node, indices: Sequence[Term]) -> list[Summand] | None:
        source, dim, keeps = arguments(leaf, "input", "dim", "keepdim")
        shape = tuple(value_of(source).shape)
        dims = dim if isinstance(dim, (list, tuple)) else [dim]
        rounds = value_of(leaf).dtype in (torch.float16, torch.bfloat16)
        if len(dims) != 1 or not isinstance(dims[0], int) or (self.exact and rounds):
            return None
        d = dims[0] % len(shape)
        name = self.fresh(shape[d])
        rest = list(indices[:d]) + list(indices[d + 1 if keeps else d :])
        inner = self.expand(self.element(source, leaf, [*rest[:d], name, *rest[d:]]))
        return [Summand(p.factors, (name, *p.bound), p.scale) for p in inner]

    def _reshape(self, leaf: fx.Node, indices: Sequence[Term]) -> list[Summand] | None:
        """A reshape of one dimension to several, or back, some of whose sizes are known at run time only."""
        source: Any = leaf.args[0]
        old, new, first = tuple(value_of(source).shape), tuple(value_of(leaf).shape), 0
        while min(len(old), len(new)) > first and same_size(old[first], new[first]):
            first += 1
        last = 0
        while min(len(old), len(new)) - first > last and same_size(old[-1 - last], new[-1 - last]):
            last += 1
        before, behind = indices[:first], indices[len(indices) - last :]
        given = indices[first : len(indices) - last]
        left, right = old[first : len(old) - last], new[first : len(new) - last]
        if 1 not in (len(left), len(right)) or not left or not right:
            return None
        inner = [size_term(n) for n in (right if len(left) == 1 else left)[1:]]
        if len(left) == 1:
            places = [given[0]]
            for n, index in zip(inner, given[1:], strict=True):
                places = [("add", ("mul", n, places[0]), index)]
        else:
            places, rest = [], given[0]
            for n in reversed(inner):
                places.insert(0, ("mod", rest, n))
                rest = ("floordiv", rest, n)
            places.insert(0, rest)
        at = [self.tidied(place) for place in (*before, *places, *behind)]
        return self.expand(self.element(source, leaf, at))

    def fresh(self, size: Any) -> str:
        name = f"s{next(self._fresh)}"
        self.sizes[name] = size
        return name

    def simplified(self, part: Summand, facts: Collection[Term] = ()) -> Summand | None:
        """A product without indices that a condition fixes, and without what is known to hold; None for 0."""
        factors, bound = list(part.factors), list(part.bound)
        for name in list(bound):
            fixed = fixed_by(factors, name, bound)
            if fixed is not None:  # else the sum stays
                if not self._in_range(fixed, self.sizes[name]):
                    factors += [("ge", fixed, 0), ("lt", fixed, size_term(self.sizes[name]))]
                factors = [rename(f, {name: fixed}) for f in factors]
                bound.remove(name)
        factors = [self.tidied(f) for f in factors]
        if FALSE in factors:
            return None
        conditions = dict.fromkeys(f for f in factors if kind_of(f) == "bool" and f != TRUE)
        kept = tuple(f for f in conditions if f not in facts)
        return Summand((*kept, *(f for f in factors if kind_of(f) != "bool")), tuple(bound), part.scale)

    def tidied(self, term: Term) -> Term:
        """A term in normal form, its quotients and remainders worked out."""
        return tidy(self._divided(tidy(simplified(term, self.sizes))))

    def _divided(self, term: Term) -> Term:
        """A term whose quotients and remainders by sizes that are known at run time only are worked out."""
        if not isinstance(term, tuple) or term[0] == "f":
            return term
        kept = len(term) - len(children(term))
        op, *parts = found = (*term[:kept], *map(self._divided, term[kept:]))
        if op not in ("floordiv", "mod") or isinstance(parts[1], int):
            return found
        whole, rest = {}, {}
        for part, count in linear(parts[0]).items():
            if isinstance(part, tuple) and part[0] == "mul" and parts[1] in part[1:]:
                whole[part[1] if part[2] == parts[1] else part[2]] = count
            else:
                rest[part] = count
        (name, count), *others = rest.items() or [(0, 1)]
        below = name == 0 or (name in self.sizes and size_term(self.sizes[name]) == parts[1])
        if others or count != 1 or not below:
            return found
        return from_linear(whole) if op == "floordiv" else name

    def _in_range(self, term: Term, size: Any) -> bool:
        """Whether a term is known to be from 0 to a size, exclusive."""
        known = self.ranges.get(term)
        return isinstance(known, int) and isinstance(size, int) and known <= size


def fixed_by(factors: Iterable[Term], name: str, bound: Collection[str] = ()) -> Term | None:
    """What a condition among factors says that an index is, best in terms of none that is summed."""
    found: list[Term] = []
    for factor in factors:
        if not isinstance(factor, tuple) or factor[0] != "eq":
            continue
        left, right = map(as_integer, factor[1:])
        if name in (left, right):
            other = right if left == name else left
            found += [] if name in names_in(other) else [other]
        elif kind_of(left) == kind_of(right) == "int":
            parts = linear(("sub", left, right))
            sign = parts.pop(name, 0)
            other = from_linear(combined({}, parts, -sign))
            found += [other] if abs(sign) == 1 and name not in names_in(other) else []
    return min(found, key=lambda term: len(names_in(term) & set(bound)), default=None)


def as_integer(term: Term) -> Term:
    """An integer, where a term is that integer as a float."""
    return term[2] if isinstance(term, tuple) and term[0] == "cast" and kind_of(term) == "float" else term


def general_product(
    node: fx.Node,
) -> tuple[list[tuple[fx.Node, Labels]], tuple[str, ...], dict[str, Any]] | None:
    """(operands with a label for every dimension, the result's labels, the sizes of those that are summed) of
    a product of any number of tensors; None for what is none."""
    did = operation(node)
    if did is None or did.writes:
        return None
    if did.name != "einsum":
        product = contraction(node)
        if product is None:
            return None
        sides = [product.operand(0), product.operand(1)]
        size = value_of(product.left).shape[product.left_labels.index(product.summed)]
        return sides, product.out, {product.summed: size}
    given: tuple[Any, ...] = node.args
    equation, *operands = given
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "." in equation or not all(isinstance(x, fx.Node) for x in operands):
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    labels = [tuple(part) for part in inputs.split(",")]
    if not arrow or len(labels) != len(operands):
        return None
    if any(len(set(part)) < len(part) for part in (*labels, tuple(out))):
        return None
    sizes: dict[str, Any] = {}
    for part, x in zip(labels, operands, strict=True):
        for label, n in zip(part, value_of(x).shape, strict=True):
            if is_one(sizes.setdefault(label, n)) != is_one(n):
                return None  # one of them is broadcast
    summed = {label: n for label, n in sizes.items() if label not in out}
    return list(zip(operands, labels, strict=True)), tuple(out), summed  # type: ignore[return-value]


def _negative(parts: list[Summand]) -> list[Summand]:
    return [Summand(p.factors, p.bound, -p.scale) for p in parts]

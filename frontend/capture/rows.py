"""Elements of tensors whose rows a condition has chosen, as sums over what the condition is about.

Programs choose tokens in many ways: `x[mask]`, `torch.where(mask)`, columns of `mask.nonzero()`. All of these
give the places where a condition holds, in their order, so that row r of what is chosen has *places*

    ("read", "?c.d", r)      dimension d of the r-th place where condition c holds

and, the other way round, ("row", c, i, j) is the row of place (i, j). What is added to rows of a tensor is
summed over r, which is a sum over all places, of the condition times the rest:

    sum over r of f(?c.0[r], ?c.1[r])   is   sum over i, j of c[i, j] * f(i, j)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..term import FALSE, Term, children, rename
from .choices import PLACE, choice_of, count_of, is_choice
from .expert import first_argument, name_of
from .ops import arguments, value_of
from .row_rules import RULES
from .sums import Summand, Sums
from .tensor import AT, Reader, axis, is_one, same_size, size_term
from .terms import kind_of, linear, names_in, number, reads_in, replaced, tidy


class Rows(Sums):
    """Elements as sums of products, rows that conditions choose among them.

    plain: a reader of whole terms. is_row: whether a node gives rows of experts, which are factors of their
    own. chain: gives the element of a tensor that a chain of nodes has added up; see buffers.py."""

    def __init__(self, reader: Reader, plain: Reader, is_row: Callable[[fx.Node], bool]) -> None:
        super().__init__(reader)
        self.plain, self.is_row = plain, is_row
        self.conditions: list[tuple[Term, tuple[Any, ...]]] = []  # a term over i0, i1, ..., and their sizes
        self.chain: Callable[[fx.Node, fx.Node | None, Sequence[Term]], list[Summand] | None] | None = None

    # ---- places ----

    def condition(self, node: fx.Node, at: fx.Node) -> int:
        """The number of a condition, the same for all nodes that compute the same."""
        tensor = self.reader.operand(node, at)
        term = tensor.term if tensor.kind == "bool" else tidy(("ne", tensor.term, 0))
        for index, (known, shape) in enumerate(self.conditions):
            if known == term and len(shape) == len(tensor.shape) and all(map(same_size, shape, tensor.shape)):
                return index
        self.conditions.append((term, tensor.shape))
        return len(self.conditions) - 1

    def place(self, condition: int, d: int, row: Term) -> Term:
        """Dimension d of the place of a row."""
        if isinstance(row, tuple) and row[:2] == ("row", condition):
            return row[2 + d]
        return ("read", f"{PLACE}{condition}.{d}", row)

    def holds(self, condition: int, places: Sequence[Term]) -> list[Summand]:
        """The condition at places, as a sum."""
        term, _ = self.conditions[condition]
        return self.expand(self.tidied(rename(term, {axis(d): p for d, p in enumerate(places)})))

    # ---- reading ----

    def resolved(self, term: Term) -> Term:
        """A term with what its tensors choose rows of in their place, where that takes no sum."""
        if not isinstance(term, tuple) or term[0] == "f":
            return term
        kept = len(term) - len(children(term))
        term = (*term[:kept], *map(self.resolved, term[kept:]))
        if term[0] in ("read", "readf") and term[1][0] != PLACE:
            found = self._chosen(term)
            if found is not None:
                return self.resolved(found)
        return term

    def element(self, node: fx.Node, at: fx.Node, indices: Sequence[Term]) -> Term:
        return self.tidied(self.resolved(super().element(node, at, indices)))

    def _expand(self, term: Any) -> list[Summand]:
        op, *parts = term
        if op == "ne" and number(parts[1]) == 0:
            inner = self.expand(parts[0])
            if len(inner) == 1 and self.is_exclusive(inner[0]):
                return inner
        if op == "div" and kind_of(term) == "float":
            above = self.expand(parts[0])
            if above != [Summand((parts[0],))]:
                below = ("div", ("f", (1.0).hex()), parts[1])
                return [p.times(Summand((below,))) for p in above]
        if op == "where":
            at = _added_to(parts[1], parts[2])
            if at is not None:
                return self.expand(parts[2]) + self.expand(("where", parts[0], at, ("f", (0.0).hex())))
            sides = zip((parts[0], tidy(("not", parts[0]))), parts[1:], strict=True)
            return [
                a.times(b) for c, x in sides if (held := self.expand(x)) for a in self.expand(c) for b in held
            ]
        return super()._expand(term)

    def _read(self, read: Any) -> list[Summand]:
        whole = [Summand((read,))]
        if read[1][0] in (PLACE, "!"):
            return whole
        leaf, indices = self.reader.leaves[read[1]], read[2:]
        if AT not in read[1] and self.is_row(leaf):
            return whole
        found = self._known(read, leaf, indices)
        if found is None and AT not in read[1]:
            found = super()._read(read)
        return whole if found is None or self._cuts(leaf, found) else found

    def _known(self, read: Any, leaf: fx.Node, indices: Sequence[Term]) -> list[Summand] | None:
        chosen = self._chosen(read)
        if chosen is not None:
            return self.expand(self.tidied(self.resolved(chosen)))
        if self.chain is not None:
            at = self.reader.read_at(read[1]) if AT in read[1] else None
            found = self.chain(leaf, at, indices)
            if found is not None:
                return found
        rule = RULES.get(name_of(leaf) or "")
        return None if rule is None or AT in read[1] else rule(self, leaf, list(indices))

    def _cuts(self, leaf: fx.Node, found: list[Summand]) -> bool:
        """Whether gradients stop at a node that what it is computed from would have."""
        if value_of(leaf).requires_grad:
            return False
        reads = [r for part in found for f in part.factors if kind_of(f) == "float" for r in reads_in(f)]
        return any(
            value_of(self.reader.leaves[r[1]]).requires_grad for r in reads if r[1] in self.reader.leaves
        )

    def _chosen(self, read: Any) -> Term | None:
        """The element that a read of chosen rows, or of places, is; None for any other."""
        leaf, indices = self.reader.leaves.get(read[1]), read[2:]
        if leaf is None or AT in read[1]:
            return None
        name, source = name_of(leaf), first_argument(leaf)
        if source is None:
            return None
        if name in ("nonzero", "argwhere") and isinstance(indices[-1], int) and len(indices) == 2:
            if leaf.kwargs.get("as_tuple"):
                return None
            return self.place(self.condition(source, leaf), indices[1], indices[0])
        if name in ("gather", "take_along_dim"):
            return self._gathered(leaf, indices)
        if name != "getitem":
            return None
        if not isinstance(value_of(source), torch.Tensor):
            given: Any = first_argument(source)
            alone = len(source.args) == 1 and not (set(source.kwargs) - {"as_tuple"})
            is_where = name_of(source) == "where" and alone and not source.kwargs
            if given is None or not (is_where or (name_of(source) == "nonzero" and alone)):
                return None
            return self.place(self.condition(given, source), int(leaf.args[1]), indices[0])  # type: ignore[arg-type]
        return self._picked(leaf, source, indices)

    def _gathered(self, leaf: fx.Node, indices: Sequence[Term]) -> Term | None:
        source, dim, index = arguments(leaf, "input", "dim", "index")
        if not isinstance(dim, int) or not isinstance(index, fx.Node):
            return None
        places = list(indices)
        places[dim % len(places)] = self.element(index, leaf, indices)
        return self.reader.operand(source, leaf).at(places)

    def _picked(self, leaf: fx.Node, source: fx.Node, indices: Sequence[Term]) -> Term | None:
        """An element of `source[items]`, where tensors among the items choose rows."""
        given: Any = leaf.args[1]
        found = self.picks(source, given, leaf, lambda n: indices[n], len(indices))
        if found is None:
            return None
        places, _ = found
        shape = value_of(source).shape
        ones = [0 if is_one(n) else p for n, p in zip(shape, places, strict=True)]
        return self.reader.operand(source, leaf).at(ones)

    def picks(
        self, source: fx.Node, items: Any, at: fx.Node, out: Callable[[int], Term], rank: int
    ) -> tuple[list[Term], list[Term]] | None:
        """(where `source[items]` reads its element [out(0), out(1), ...], those of its indices that tensors
        give); None where items are others than conditions, places, slices and numbers."""
        items, shape = list(items) if isinstance(items, tuple) else [items], value_of(source).shape
        widths, dots = [_width(i) for i in items], [n for n, i in enumerate(items) if i is Ellipsis]
        if len(dots) > 1 or None in widths:
            return None
        rest = [slice(None)] * (len(shape) - sum(n for n in widths if n is not None))
        items = [*items[: dots[0]], *rest, *items[dots[0] + 1 :]] if dots else [*items, *rest]
        tensors = [n for n, i in enumerate(items) if isinstance(i, fx.Node) and _is_tensor(i)]
        if not tensors or any(not _is_between(i) for i in items[tensors[0] : tensors[-1] + 1]):
            return None
        nodes = [items[n] for n in tensors]
        flags = [value_of(i).dtype == torch.bool for i in nodes]
        if (any(flags) and len(nodes) > 1) or any(
            value_of(i).dim() != 1 for i, f in zip(nodes, flags, strict=True) if not f
        ):
            return None
        places: list[Term] = []
        given: list[Term] = []
        count, row = 0, None
        for item in items:
            if item is None:
                count += 1
            elif isinstance(item, slice):
                if item.start is not None and not (isinstance(item.start, int) and item.start >= 0):
                    return None
                if item.step not in (None, 1):
                    return None
                places.append(tidy(("add", item.start or 0, out(count))))
                count += 1
            elif isinstance(item, fx.Node) and _is_tensor(item):
                if row is None:
                    row, count = out(count), count + 1
                if flags[0]:
                    condition = self.condition(item, at)
                    found = [self.place(condition, d, row) for d in range(value_of(item).dim())]
                else:
                    found = [self.element(item, at, [row])]
                if not all(map(self.is_place, found)):
                    return None
                given += found
                places += found
            else:
                index = self.reader.integer(item)
                size = shape[len(places)]
                if isinstance(index, int) and index < 0:
                    index = tidy(("add", size_term(size), index))
                places.append(index)
        return (places, given) if count == rank and len(places) == len(shape) else None

    def is_place(self, index: Term) -> bool:
        """Whether an index is known to be no number below 0, which would count from the end."""
        if isinstance(index, int):
            return index >= 0
        if isinstance(index, str):
            return True
        if index[0] in ("floordiv", "mod") and isinstance(index[2], int) and index[2] > 0:
            return self.is_place(index[1])
        if index[0] == "read":
            return index[1][0] == PLACE or is_choice(self.reader, index[1]) is not None
        parts = linear(index)
        if parts == {index: 1}:
            return False
        return all(c > 0 and (t == 1 or self.is_place(t)) for t, c in parts.items())

    # ---- sums over rows ----

    def settled(self, part: Summand) -> list[Summand]:
        """A product with sums over rows as sums over places, and without indices that conditions fix."""
        for row in part.bound:
            condition = _condition_of(part.factors, row)
            if condition is None:
                continue
            names = [self.fresh(n) for n in self.conditions[condition][1]]
            factors = [self._placed(f, row, condition, names) for f in part.factors]
            bound = (*(b for b in part.bound if b != row), *names)
            rest = Summand(tuple(factors), bound, part.scale)
            return [p for c in self.holds(condition, names) for p in self.settled(c.times(rest))]
        found = self.simplified(part)
        if found is None:
            return []
        found = self._merged(found)
        return [] if found is None else [found]

    def _placed(self, term: Term, row: str, condition: int, names: list[str]) -> Term:
        here = ("row", condition, *names)
        for d, name in enumerate(names):
            term = replaced(term, ("read", f"{PLACE}{condition}.{d}", row), name)
        return rename(term, {row: here})

    def _merged(self, part: Summand) -> Summand | None:
        """A product of conditions on the same choices as one: no token chooses an expert twice."""
        while True:
            equal = [f for f in part.factors if isinstance(f, tuple) and f[0] == "eq"]
            pair: tuple[str, Term] | None = next(
                (p for i, a in enumerate(equal) for b in equal[:i] if (p := self._same_choice(a, b, part))),
                None,
            )
            if pair is None:
                return part
            old, new = pair
            factors = dict.fromkeys(self.tidied(rename(f, {old: new})) for f in part.factors)
            bools = [f for f in factors if kind_of(f) == "bool"]
            floats = [self.tidied(rename(f, {old: new})) for f in part.factors if kind_of(f) != "bool"]
            if FALSE in bools:
                return None
            bound = tuple(b for b in part.bound if b != old)
            part = Summand((*(f for f in bools if f != "true"), *floats), bound, part.scale)

    def _same_choice(self, a: Any, b: Any, part: Summand) -> tuple[str, Term] | None:
        """(an index, what it is), where two conditions say that choices of a token are the same expert."""
        (left, x), (right, y) = choice_of(a), choice_of(b)
        if left is None or right is None or left[1] != right[1] or x != y:
            return None
        d = is_choice(self.reader, left[1])
        if d is None or any(
            m != n for i, (m, n) in enumerate(zip(left[2:], right[2:], strict=True)) if i != d
        ):
            return None
        m, n = left[2 + d], right[2 + d]
        if m in part.bound and m not in names_in(n):
            return m, n
        return (n, m) if n in part.bound and n not in names_in(m) else None

    def _in_range(self, term: Term, size: Any) -> bool:
        named = isinstance(term, str) and term in self.sizes
        return (named and same_size(self.sizes[term], size)) or super()._in_range(term, size)

    def is_covered(self, part: Summand) -> bool:
        """Whether a product is 0: its conditions exclude all numbers that ids may be."""
        excluded: dict[Term, set[int]] = {}
        for factor in part.factors:
            if isinstance(factor, tuple) and factor[0] == "ne" and isinstance(factor[2], int):
                excluded.setdefault(factor[1], set()).add(factor[2])
        counts = {ids: count_of(self.reader, ids) for ids in excluded}
        return any(counts[ids] > 0 and es >= set(range(counts[ids])) for ids, es in excluded.items())

    def is_exclusive(self, part: Summand) -> bool:
        """Whether a sum of conditions is 0 or 1, as at most one of them holds."""
        if not part.counts or len(part.bound) > 1:
            return False
        return not part.bound or any(self.excludes(f, part.bound[0]) for f in part.factors)

    def excludes(self, factor: Term, name: str) -> bool:
        """Whether a condition holds for one value of an index at most: a token's choices differ."""
        choice, value = choice_of(factor)
        if choice is None or name in names_in(value):
            return False
        d = is_choice(self.reader, choice[1])
        return (
            d is not None
            and [i for i, x in enumerate(choice[2:]) if name in names_in(x)] == [d]
            and (choice[2 + d] == name)
        )


def _added_to(term: Term, base: Term) -> Term | None:
    """What a sum adds to one of its sides."""
    if isinstance(term, tuple) and term[0] == "add" and base in term[1:] and number(base) is None:
        return term[2] if term[1] == base else term[1]
    return None


def _condition_of(factors: Sequence[Term], row: str) -> int | None:
    """The condition whose places are read at an index, if those of one condition only are."""
    names = {r[1].partition(".")[0] for f in factors for r in reads_in(f) if r[1][0] == PLACE and r[2] == row}
    return int(names.pop()[1:]) if len(names) == 1 else None


def _is_tensor(item: fx.Node) -> bool:
    value = value_of(item)
    return isinstance(value, torch.Tensor) and (value.dim() > 0 or value.dtype == torch.bool)


def _is_between(item: Any) -> bool:
    return isinstance(item, (int, fx.Node))


def _width(item: Any) -> int | None:
    """How many dimensions an item of an index takes; None for what is not known."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, fx.Node) and isinstance(value_of(item), torch.Tensor):
        value = value_of(item)
        return value.dim() if value.dtype == torch.bool else 1
    return 1 if isinstance(item, (int, slice, fx.Node)) and not isinstance(item, bool) else None

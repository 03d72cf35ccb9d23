"""Experts in a graph that take tokens from slots: GShard's dispatch and combine tensors of capacities.

    out[t] = sum over e, c of combine[t, e, c] * expert_e(sum over t' of dispatch[t', e, c] x[t'])

Both tensors are sums of products of conditions (`sums.py`): for each choice of a token one that
says which expert it is, one that says which of the expert's slots it takes, others that say whether it gets
one, and in `combine` a weight. Where no two choices take the same slot, the experts are those of a layer
whose ids are those of the choices, and nobody's where a choice gets no slot. Slots are proven to differ where
they are running counts: `cumsum` of conditions that hold for the choice itself, behind all earlier choices'.

Tokens may have a dimension of groups before their own, g in "gsec,gsm->egcm", each with slots of its own.
Tokens are then named t0 and t1, and counts are those of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..term import Term, rename
from .contract import Labels
from .expert import behind, name_of, network, same_node
from .ops import arguments, operation, value_of
from .product import stacked_product
from .slots import CHOICE, Choices, Dispatched, token_names
from .sums import Summand, Sums, fixed_by, general_product
from .tensor import AT, LeftAlone, Opaque, Reader, is_one, same_size, size_term
from .terms import kind_of, linear, names_in, number, replaced

EXPERT, SLOT = "e", "c"
Indexed = tuple[fx.Node, fx.Node, list[Term]]  # a tensor, the node that reads it, at which indices


def combines(reader: Reader, node: fx.Node) -> bool:
    """Whether a node sums experts' rows over experts and their slots."""
    return value_of(node) is not None and _sides(reader, node) is not None


@dataclass(frozen=True)
class _Sides:
    """combine: a tensor at (t, e, c). second: the product that makes the experts' rows. slot: which of the
    dimensions behind that of experts is that of slots. tokens: the names of their indices."""

    combine: Indexed
    second: fx.Node
    slot: int
    tokens: tuple[str, ...]


def _sides(reader: Reader, node: fx.Node) -> _Sides | None:
    product = general_product(node)
    if (
        product is None
        or len(product[0]) != 2
        or len(product[1]) not in (2, 3)
        or len(product[2]) not in (1, 2)
    ):
        return None
    operands, (*tokens, column), summed = product
    names, groups = token_names(len(tokens)), tokens[:-1]
    for one in (0, 1):
        (combine, its), (rows, labels) = operands[one], operands[1 - one]
        if not isinstance(rows, fx.Node) or set(its) != {*tokens, *summed}:
            continue
        if set(labels) != {column, *summed, *groups}:
            continue
        found = _rows(reader, rows, labels, (*groups, column), node)
        if found is not None:
            second, at, slot = found
            of: dict[Any, Any] = dict(zip(tokens, names, strict=True)) | at
            return _Sides((combine, node, [of[x] for x in its]), second, slot, names)
    return None


def _rows(
    reader: Reader, node: fx.Node, labels: Labels, outer: tuple[str, ...], at: fx.Node
) -> tuple[fx.Node, dict[Any, Term], int] | None:
    """(the stacked product whose rows a tensor holds, the summed labels as terms of e and c, which of its
    dimensions of rows is that of slots). outer: the labels of groups, and that of columns."""
    try:
        read = reader.operand(node, at).at([f"l{x}" for x in labels])
    except (LeftAlone, Opaque):
        return None
    if not isinstance(read, tuple) or read[0] != "readf" or AT in read[1]:
        return None
    leaf = reader.leaves[read[1]]
    second = stacked_product(leaf)
    if second is None:
        return None
    expert, *rows, out = (read[2 + d] for d in second.places)
    own = [f"l{x}" for x in outer[:-1]]
    slots = [n for n, row in enumerate(rows) if row not in own]
    if out != f"l{outer[-1]}" or len(slots) != 1 or [row for row in rows if row in own] != own:
        return None
    which, slot = slots[0], rows[slots[0]]
    capacity = value_of(leaf).shape[second.places[1 + which]]
    inner = [x for x in labels if x not in outer]
    if len(inner) == 2:
        of = {f"l{x}": x for x in inner}
        found = {of.get(expert): EXPERT, of.get(slot): SLOT}
        return (leaf, found, which) if set(found) == set(inner) else None
    flat = f"l{inner[0]}"
    size = size_term(capacity)
    if expert == ("floordiv", flat, size) and slot == ("mod", flat, size):
        return leaf, {inner[0]: ("add", ("mul", size, EXPERT), SLOT)}, which
    return None


def dispatched(reader: Reader, node: fx.Node) -> Dispatched:
    """The experts whose slots a node combines. Raises LeftAlone."""
    sides = _sides(reader, node)
    assert sides is not None
    second = stacked_product(sides.second)
    assert second is not None
    order, last = second.read, len(second.places) - 1
    found, given = network(reader, second, second.node, tuple(f"i{d}" for d in range(last)), stacked_product)
    whole = len(order) == last and second.read_last == last
    if not whole or any(p.places != (*order, last) or len(p.read) != last for p in found.firsts):
        raise LeftAlone("its first products are not of every expert's slots")
    sources = [_source(reader, p, rows, sides) for p, rows in zip(found.firsts, given, strict=True)]
    x = same_node([source[0] for source in sources])
    lead = value_of(x).shape[:-1]
    if len(lead) != len(sides.tokens) or not all(map(same_size, lead, value_of(node).shape[:-1])):
        raise LeftAlone("its result has other rows than its tokens")
    experts, capacity = (value_of(second.node).shape[second.places[d]] for d in (0, 1 + sides.slot))
    reading = _Reading(reader, experts, capacity, dict(zip(sides.tokens, lead, strict=True)))
    choices = reading.choices(reading.element(sides.combine))
    for _, dispatch in sources:
        reading.check(choices, reading.element(dispatch), reading.element(sides.combine))
    return Dispatched(node, None, x, None, None, [found], [], choices, experts, capacity)


def _source(reader: Reader, product: Any, rows: fx.Node, sides: _Sides) -> tuple[fx.Node, Indexed]:
    """(x, the dispatch tensor at (t, e, c)) of what a first product takes: (.., e, .., c, .., in)."""
    places = list(sides.tokens[:-1])
    places.insert(sides.slot, SLOT)
    names = dict(zip(product.read, (EXPERT, *places), strict=True)) | {product.read_last: "h"}
    rows = behind(rows, ("to", "contiguous", "type_as"))
    read = reader.operand(rows, product.node).at([names[d] for d in range(len(names))])
    leaf = reader.made(read[1]) if isinstance(read, tuple) and read[0] == "readf" else None
    found = None if leaf is None else general_product(leaf)
    if leaf is None or found is None or len(found[0]) != 2 or len(found[2]) != 1:
        raise LeftAlone("its slots are not filled by a product of tokens and a dispatch tensor")
    operands, out, summed = found
    of: dict[Any, Term] = (
        dict(zip(out, read[2:], strict=True)) | dict.fromkeys(summed, sides.tokens[-1]) | {None: 0}
    )
    for one in (0, 1):
        (x, labels), (dispatch, its) = operands[one], operands[1 - one]
        if [of[label] for label in labels] == [*sides.tokens, "h"] and "h" not in [
            of[label] for label in its
        ]:
            wide = value_of(dispatch).shape
            if not any(is_one(n) for n in wide) or len(wide) == 2 + len(sides.tokens):
                return x, (dispatch, leaf, [of[label] for label in its])
    raise LeftAlone("its slots are not filled by a product of tokens (T, H) and a dispatch tensor")


class _Reading:
    """The choices that dispatch and combine tensors are made of."""

    def __init__(self, reader: Reader, experts: Any, capacity: Any, tokens: dict[str, Any]) -> None:
        self.reader, self.experts, self.capacity = reader, experts, capacity
        *self.groups, self.token = tokens
        self.sums, self.deep = Sums(reader, (EXPERT, SLOT)), Sums(reader, exact=True)
        for sums in (self.sums, self.deep):
            sums.sizes |= {EXPERT: experts, SLOT: capacity, **tokens}

    def element(self, tensor: Indexed) -> Term:
        node, at, indices = tensor
        return self.sums.element(node, at, indices)

    def choices(self, term: Term) -> list[Choices]:
        """Raises LeftAlone for what is no sum of choices of slots."""
        found = [self._choice(part) for part in self.sums.expand(term)]
        choices = [one for one in found if one is not None]
        if not choices:
            raise LeftAlone("nothing is combined")
        return choices

    def _choice(self, part: Summand) -> Choices | None:
        first = self.sums.simplified(part)
        if first is None:
            return None
        factors = list(first.factors)
        held: dict[str, Term] = {}
        for name, what in ((EXPERT, "an expert"), (SLOT, "a slot")):
            fixed = fixed_by(factors, name)
            if fixed is None or {EXPERT, SLOT} & names_in(fixed):
                raise LeftAlone(f"its tensors do not say which is {what} of a choice")
            held[name] = fixed
            factors = [self.sums.tidied(rename(f, {name: fixed})) for f in factors]
        if len(first.bound) > 1:
            raise LeftAlone("its choices have several indices")
        size = 1
        for name in first.bound:
            size = self.sums.sizes[name]
            if not isinstance(size, int):
                raise LeftAlone("the number of its choices is known at run time only")
        names, self.sums.sizes[CHOICE] = dict.fromkeys(first.bound, CHOICE), size
        ids, slot, *factors = (rename(f, names) for f in (held[EXPERT], held[SLOT], *factors))
        last = self.sums.simplified(Summand(tuple(factors)), self._inside(ids))
        if last is None:
            return None
        kept = tuple(f for f in last.factors if kind_of(f) == "bool" and not self._exists(slot, f))
        weights = tuple(f for f in last.factors if kind_of(f) != "bool")
        return Choices(ids, slot, kept, weights, first.scale, size)

    def _inside(self, ids: Term) -> tuple[Term, ...]:
        """What holds of an expert whose slot exists."""
        return ("ge", ids, 0), ("lt", ids, size_term(self.experts))

    def _exists(self, slot: Term, condition: Term) -> bool:
        """Whether a condition says no more than that a slot is below some number of slots."""
        if not isinstance(condition, tuple) or condition[0] not in ("lt", "le"):
            return False
        above = linear(("sub", condition[1], condition[2]))
        for term, count in linear(("sub", slot, size_term(self.capacity))).items():
            above[term] = above.get(term, 0) - count
        rest = {term: count for term, count in above.items() if count}
        return rest.keys() <= {1} and rest.get(1, 0) <= 0

    # ---- proofs ----

    def check(self, choices: list[Choices], dispatch: Term, combine: Term) -> None:
        """Raise LeftAlone unless every slot that choices take holds their token and no other."""
        takers = choices
        if not _is_nonzero(dispatch, combine):
            takers = self.choices(dispatch)
            if any(one.weights or one.scale != 1 for one in takers):
                raise LeftAlone("its dispatch tensor is not made of conditions")
            if len(takers) != len(choices):
                raise LeftAlone("it dispatches other choices than it combines")
            for one in choices:
                if not any(t.taken == one.taken and set(t.kept) <= set(one.kept) for t in takers):
                    raise LeftAlone("it combines slots that may hold another token")
        places = [self._place(one) for one in takers]
        for i, later in enumerate(places):
            for earlier in places[:i]:
                if not (later.follows(earlier) or earlier.follows(later)):
                    raise LeftAlone("two choices may take the same slot")

    def _place(self, one: Choices) -> _Place:
        """The slot of a choice as a running count. Raises LeftAlone."""
        facts = {*one.kept, *self._inside(one.ids)}
        self.deep.sizes[CHOICE] = one.size
        parts = [self.deep.simplified(p, facts) for p in self.deep.expand(one.slot)]
        offset, counts, totals = 0, [], []
        for part in parts:
            if part is None:
                continue
            if not part.factors and not part.bound:
                offset += part.scale
            elif part.scale == 1 and not part.bound and len(part.factors) == 1:
                counts.append(part.factors[0])
            elif part.counts and len(part.bound) == 1:
                totals.append(part)
            else:
                raise LeftAlone("its slots are no running counts")
        if len(counts) != 1 or offset != int(offset):
            raise LeftAlone("its slots are no running counts")
        counted = self._counted(counts[0], one, facts)
        return _Place(one, offset, counted, [self._total(t, one) for t in totals])

    def _counted(self, read: Any, one: Choices, facts: set[Term]) -> frozenset[Term]:
        """The conditions whose running count a read is: of token s, where the expert is e.

        Proves that choices with the same expert read different counts."""
        is_read = isinstance(read, tuple) and read[0] in ("read", "readf")
        leaf = self.reader.made(read[1]) if is_read else None
        if leaf is None or name_of(leaf) != "cumsum":
            raise LeftAlone("its slots are no running counts")
        _check_exact(leaf)
        did = operation(leaf)
        source, dim = arguments(leaf, "input", "dim")
        if did is None or did.writes or not isinstance(dim, int):
            raise LeftAlone("its slots are no running counts")
        indices = list(read[2:])
        dim %= len(indices)
        others = [index for d, index in enumerate(indices) if d != dim and index != 0]
        if [i for i in others if i not in self.groups] != [one.ids] or len(others) != 1 + len(self.groups):
            raise LeftAlone("its slots are not counted by expert")
        held_at = {one.ids: EXPERT} | {group: group for group in self.groups}
        names = ["s" if d == dim else held_at.get(index, 0) for d, index in enumerate(indices)]
        parts = self.deep.expand(self.deep.element(source, leaf, names))
        held = [p for p in map(self.deep.simplified, parts) if p is not None]
        if len(held) != 1 or not held[0].counts or held[0].bound:
            raise LeftAlone("its slots do not count conditions")
        own = {"s": indices[dim], EXPERT: one.ids}
        for factor in held[0].factors:
            holds = self.deep.tidied(rename(factor, own))
            if holds != "true" and holds not in facts:
                raise LeftAlone("a slot's count may leave out the choice that takes it")
        if not _differ(
            indices[dim], one.size, value_of(source).shape[dim], self.token, self.deep.sizes[self.token]
        ):
            raise LeftAlone("different tokens may have the same count")
        return frozenset(held[0].factors)

    def _total(self, total: Summand, one: Choices) -> frozenset[Term]:
        (name,) = total.bound
        return frozenset(replaced(rename(f, {name: "s"}), one.ids, EXPERT) for f in total.factors)


@dataclass(frozen=True)
class _Place:
    """A slot: offset plus a running count of conditions plus totals of others."""

    choice: Choices
    offset: float
    counted: frozenset[Term]
    totals: list[frozenset[Term]]

    def follows(self, other: _Place) -> bool:
        """Whether every slot of this choice lies behind all of the other's, for the same expert."""
        rest = list(self.totals)
        for total in other.totals:
            if total not in rest:
                return False
            rest.remove(total)
        return other.counted in rest and self.offset >= other.offset


def _check_exact(count: fx.Node) -> None:
    """Raise LeftAlone where a count passes through floats of 16 bits, which round it."""
    stack, seen = [count], {count}
    while stack:
        node = stack.pop()
        dtype = getattr(value_of(node), "dtype", torch.bool)
        if dtype in (torch.float16, torch.bfloat16):
            raise LeftAlone("its slots are counted in 16 bits")
        if dtype != torch.bool and name_of(node) != "one_hot":
            stack += [user for user in node.users if user not in seen]
            seen.update(node.users)


def _is_nonzero(term: Term, combine: Term) -> bool:
    """Whether a term says where another is not 0."""
    if isinstance(term, tuple) and term[0] in ("cast", "where"):
        given = term[2:] if term[0] == "cast" else (term[1], *map(number, term[2:]))
        return given[1:] in ((), (1, 0)) and _is_nonzero(given[0], combine)
    return isinstance(term, tuple) and term[:2] == ("ne", combine) and number(term[2]) == 0


def _differ(index: Term, size: int, length: Any, token: str, tokens: Any) -> bool:
    """Whether tokens t and choices n give different indices."""
    parts = linear(index)
    if size == 1:
        return parts == {token: 1}
    if parts == {token: size, CHOICE: 1}:
        return True
    if isinstance(length, int):
        return length % size == 0 and parts == {token: 1, CHOICE: length // size}
    return parts == {token: 1, ("mul", size_term(tokens), CHOICE): 1}

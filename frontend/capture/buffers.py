"""Tensors that a chain of nodes adds up, or fills row by row, as sums of products.

A chain begins with zeros, or memory that holds nothing yet. Each step adds rows (`index_add`, `scatter_add`,
`index_put` and `out[rows] += ...`), adds whole tensors, or sets rows that no step before has set:

    state[b, h]  becomes  state[b, h] + sum over r of (tokens[r] == b) * rows[r, h]
    state[b, h]  becomes  state[b, h] + mask[b] * rows[row of b, h],  where state is 0 if mask holds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..term import Term, rename
from .choices import PLACE, choice_of, is_choice
from .expert import name_of
from .memory import Memory
from .ops import arguments, operation, value_of
from .rows import Rows
from .sums import RESHAPES, Summand
from .tensor import LeftAlone, Opaque, Reader, Tensor, is_one, same_size
from .terms import names_in, number, reads_in, tidy
from .views import reshaped

STATE = "!"  # how a tensor is read that a step of a chain changes
ADDS = ("index_add", "scatter_add", "index_put", "add", "where", "setitem")
EMPTY = ("empty", "empty_like", "new_empty")

Key = tuple[fx.Node, int]  # what a group of tensors holds after so many writes


class ChainReader(Reader):
    """Reads the nodes of chains as they are, so that a term holds one step of a chain only."""

    def _read(self, node: fx.Node) -> Tensor:
        value = value_of(node)
        floats = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
        added = name_of(node) in ("add", "where") or self.memory.writes.get(node)
        return self.leaf(node) if floats and added else super()._read(node)


@dataclass(frozen=True)
class _Step:
    """One node of a chain. target: what it changes. before: what that holds when it runs."""

    node: fx.Node
    target: fx.Node
    before: Key


class Buffers:
    """The chains of a graph. rows: reads what the steps add."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.reader = rows, rows.reader
        self.memory: Memory = rows.reader.memory
        self.open: dict[Key, tuple[Any, ...]] = {}  # what is being worked out, with its shape
        rows.chain = self.element

    def element(self, leaf: fx.Node, at: fx.Node | None, indices: Sequence[Term]) -> list[Summand] | None:
        """The element of what a chain has given when the node `at` reads it; None for what is no chain."""
        if name_of(leaf) in EMPTY and not self._writes(leaf, at):
            return []
        key = self._key(leaf, at)
        if key in self.open:
            return [Summand((("readf", STATE, *self._mapped(self.open[key], leaf, indices)),))]
        base, steps = self.steps(leaf, at)
        if not steps or (len(steps) == 1 and name_of(leaf) == "where"):
            return (
                self._pointwise(leaf, indices) if name_of(leaf) in ("add", "where") and at is None else None
            )
        shape = self.shape(steps[0].target)
        own: list[Term] = [0 if is_one(n) else self.rows.fresh(n) for n in shape]
        try:
            parts = self._base(base, steps[0], own)
            for step in steps:
                parts = self._after(step, parts, own, shape)
            places = self._mapped(shape, leaf, indices)
        except Opaque:
            return None
        return [self._at(part, dict(zip(own, places, strict=True))) for part in parts]

    def steps(self, leaf: fx.Node, at: fx.Node | None) -> tuple[Any, list[_Step]]:
        """(what a chain begins with, its steps)."""
        found: list[_Step] = []
        cur: Any = leaf
        while True:
            writes = self._writes(cur, at)
            if writes:
                group = self.memory.group[cur]
                if any(name_of(w) not in ADDS for w in writes) or name_of(group) == "getitem":
                    return cur, []
                found = [_Step(w, w.args[0], (group, n)) for n, w in enumerate(writes)] + found  # type: ignore[arg-type]
                cur, at = group, None
                continue
            before = self._before(cur)
            if before is None:
                return cur, found
            found.insert(
                0, _Step(cur, cur, self._key(before, cur) if isinstance(before, fx.Node) else (cur, -1))
            )
            cur, at = before, cur
            if not isinstance(cur, fx.Node):
                return cur, found

    def _before(self, node: fx.Node) -> Any:
        """What a step of a chain that writes to nothing adds to; None for what is no step."""
        name, did = name_of(node), operation(node)
        if did is None or did.writes or name not in ADDS or not isinstance(value_of(node), torch.Tensor):
            return None
        if name == "where":
            _, value, other = arguments(node, "condition", "input", "other")
            given = [other] if isinstance(value, fx.Node) and isinstance(other, fx.Node) else []
        elif name == "add":
            if node.kwargs or len(node.args) != 2:
                return None
            given = list(node.args)
            given.sort(key=lambda x: not isinstance(x, fx.Node) or name_of(x) not in ADDS)
            if not any(isinstance(x, (int, float)) or name_of(x) in ADDS for x in given):
                return None
            if isinstance(given[1], (int, float)):
                given.reverse()
        else:
            given = [arguments(node, "input")[0]]
        if not given or (not isinstance(given[0], fx.Node) and given[0] != 0):
            return None
        shape = value_of(node).shape
        if isinstance(given[0], fx.Node):
            held = value_of(given[0])
            whole = isinstance(held, torch.Tensor) and len(held.shape) == len(shape)
            if not whole or not all(map(same_size, held.shape, shape)):
                return None
        return given[0]

    def _writes(self, node: fx.Node, at: fx.Node | None) -> list[fx.Node]:
        place = self.memory.place
        limit = place[node] + 1 if at is None else place[at]
        return [w for w in self.memory.writes[self.memory.group[node]] if place[w] < limit]

    def _key(self, node: fx.Node, at: fx.Node | None) -> Key:
        return self.memory.group[node], len(self._writes(node, at))

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        while name_of(node) == "setitem":
            node = node.args[0]  # type: ignore[assignment]
        return tuple(value_of(node).shape)

    def _mapped(self, shape: tuple[Any, ...], leaf: fx.Node, indices: Sequence[Term]) -> list[Term]:
        """Where an element of a view lies in the tensor of a shape that steps change. Raises Opaque."""
        own = self.shape(leaf)
        if len(own) == len(shape) and all(map(same_size, own, shape)):
            return list(indices)
        base = leaf
        while base is not self.memory.group[leaf]:
            if name_of(base) not in RESHAPES:
                raise Opaque("another view than a reshape")
            base = base.args[0]  # type: ignore[assignment]
        names = {f"i{d}": index for d, index in enumerate(indices)}
        return [self.rows.tidied(rename(i, names)) for i in reshaped(shape, own)]

    def _at(self, part: Summand, places: dict[Any, Term]) -> Summand:
        names = {b: self.rows.fresh(self.rows.sizes[b]) for b in part.bound}
        names |= {n: p for n, p in places.items() if isinstance(n, str)}
        factors = tuple(self.rows.tidied(rename(f, names)) for f in part.factors)
        return Summand(factors, tuple(names[b] for b in part.bound), part.scale)

    def _pointwise(self, leaf: fx.Node, indices: Sequence[Term]) -> list[Summand] | None:
        """A sum of two tensors, or a choice between two."""
        given = [self._operand(x, leaf, indices) for x in leaf.args]
        if leaf.kwargs or any(g is None for g in given):
            return None
        if name_of(leaf) == "add" and len(given) == 2:
            return self.rows.expand(given[0]) + self.rows.expand(given[1])
        return self.rows.expand(tidy(("where", *given))) if len(given) == 3 else None

    def _operand(self, x: Any, at: fx.Node, indices: Sequence[Term]) -> Term | None:
        if isinstance(x, (int, float)):
            return ("f", float(x).hex())
        if not isinstance(x, fx.Node) or not isinstance(value_of(x), torch.Tensor):
            return None
        shape = value_of(x).shape
        first = len(indices) - len(shape)
        own = [0 if is_one(n) else indices[first + d] for d, n in enumerate(shape)]
        return self.rows.element(x, at, own)

    def _base(self, base: Any, first: _Step, own: list[Term]) -> list[Summand]:
        if not isinstance(base, fx.Node) or name_of(base) in EMPTY:
            return []
        if number(self.rows.plain.of(base).term) in (0, False):
            return []
        return self.rows.expand(
            self.rows.element(base, first.node, self._mapped(self.shape(first.target), base, own))
        )

    # ---- steps ----

    def _after(
        self, step: _Step, parts: list[Summand], own: list[Term], shape: tuple[Any, ...]
    ) -> list[Summand]:
        target = self.shape(step.target)
        if len(target) != len(shape) or not all(map(same_size, target, shape)):
            raise LeftAlone("its rows are added to a tensor of changing shapes")
        self.open[step.before] = shape
        try:
            name = name_of(step.node)
            if name in ("setitem", "index_put"):
                return self._put(step, parts, own)
            if name in ("add", "where"):
                return parts + self._whole(step, own)
            return parts + self._added(step, own)
        finally:
            del self.open[step.before]

    def _whole(self, step: _Step, own: list[Term]) -> list[Summand]:
        """`state + y`, or `where(condition, state + y, state)`: y."""
        node = step.node
        if name_of(node) == "where":
            condition, value, _ = arguments(node, "condition", "input", "other")
            kept = self._operand(condition, node, own)
            found = self._operand(value, node, own)
            if kept is None or found is None:
                raise Opaque("a choice between numbers")
            changed = self._less_state(self.rows.expand(found), own)
            if changed is None:
                raise LeftAlone("rows of its result are replaced, which may have been there before")
            return [c.times(p) for c in self.rows.expand(kept) for p in changed]
        if node.kwargs or len(node.args) != 2:
            raise LeftAlone("its rows are scaled where they are added")
        terms = [self._operand(x, node, own) for x in node.args]
        sides = [self.rows.expand(t) for t in terms if t is not None]
        changed = self._less_state([p for side in sides for p in side], own)
        if changed is None or len(sides) < 2:
            if not isinstance(node.args[0], fx.Node) or not isinstance(node.args[1], fx.Node):
                return [p for side in sides for p in side]  # 0 + y
            raise LeftAlone("its result is scaled between its experts")
        return changed

    def _less_state(self, parts: list[Summand], own: list[Term]) -> list[Summand] | None:
        """A sum without the state that is in it once; None where it is not, or at other places."""
        here = Summand((("readf", STATE, *own),))
        rest = [p for p in parts if p != here]
        read = any(r[1] == STATE for p in rest for f in p.factors for r in reads_in(f))
        return None if len(rest) != len(parts) - 1 or read else rest

    def _added(self, step: _Step, own: list[Term]) -> list[Summand]:
        node, name = step.node, name_of(step.node)
        source = "source" if name == "index_add" else "src"
        _, dim, index, rows, alpha = arguments(node, "input", "dim", "index", source, "alpha")
        shape = self.shape(step.target)
        if dim not in (0, -len(shape)) or alpha not in (None, 1) or not isinstance(rows, fx.Node):
            raise LeftAlone("rows are added along another dimension, or scaled")
        r = self.rows.fresh(value_of(rows).shape[0])
        given = [r, *own[1:]]
        if name == "index_add":
            token = self.rows.element(index, node, [r])
        else:
            token = self.rows.element(index, node, given)
            if any(n in names_in(token) for n in own[1:]) or not all(
                same_size(value_of(t).shape[d], shape[d]) for t in (index, rows) for d in range(1, len(shape))
            ):
                raise LeftAlone("its rows are scattered over columns")
        value = self.rows.expand(self.rows.element(rows, node, given))
        return self._settled([Summand((("eq", token, own[0]),), (r,)).times(v) for v in value])

    def _put(self, step: _Step, parts: list[Summand], own: list[Term]) -> list[Summand]:
        """Rows that are set, or added to what they were."""
        node, rows = step.node, self.rows
        adds = False
        if name_of(node) == "setitem":
            target, items, value = node.args
        else:
            target, items, value, adds = arguments(node, "input", "indices", "values", "accumulate")
            items = tuple(items)
        if not isinstance(value, fx.Node) or not isinstance(target, fx.Node):
            raise Opaque("numbers that are set")
        r = rows.fresh(None)
        rank = value_of(value).dim()
        columns = own[len(own) - rank + 1 :] if rank else []
        found = rows.picks(target, items, node, lambda n: (r, *columns)[n], rank)
        if found is None or found[0][len(found[1]) :] != columns:
            raise Opaque("an index that is no place")
        tokens = found[1]
        mine = own[: len(tokens)]
        condition = self._whole_condition(tokens, r)
        if condition is not None and not adds:
            order = [
                next(i for i, t in enumerate(tokens) if t[1].endswith(f".{d}")) for d in range(len(tokens))
            ]
            r_here: Term = ("row", condition, *(mine[i] for i in order))
            kept = rows.holds(condition, r_here[2:])
            held = rows.expand(rows.element(value, node, self._rows_of(value, r_here, columns)))
            held = [p for one in held for p in rows.settled(one)]
            changed = self._less_state(held, own)
            if changed is not None:
                return parts + self._settled([c.times(p) for c in kept for p in changed])
            if any(r[1] == STATE for p in held for f in p.factors for r in reads_in(f)):
                raise LeftAlone("its result is changed between its experts")
            left = [self._outside(part, kept) for part in parts]
            return left + self._settled([c.times(p) for c in kept for p in held])
        held = rows.expand(rows.element(value, node, self._rows_of(value, r, columns)))
        if not adds:
            there = Summand((("readf", STATE, *tokens, *columns),))
            rest = [p for p in held if p != there]
            if len(rest) != len(held) - 1 or not self._differ(tokens, r):
                raise LeftAlone("rows of its result are replaced, which may have been there before")
            held = rest
        if any(r[1] == STATE for p in held for f in p.factors for r in reads_in(f)):
            raise LeftAlone("its result is changed between its experts")
        equal = tuple(("eq", token, b) for token, b in zip(tokens, mine, strict=True))
        return parts + self._settled([Summand(equal, (r,)).times(p) for p in held])

    def _outside(self, part: Summand, kept: list[Summand]) -> Summand:
        """A part where none of some conditions holds. Raises LeftAlone."""
        if all(_apart(c, part) for c in kept):
            return part
        (condition, *others) = kept
        if others or condition.bound or len(condition.factors) != 1 or condition.scale != 1:
            raise LeftAlone("rows of its result are replaced, which may have been there before")
        choice, value = choice_of(condition.factors[0])
        if choice is None:
            raise LeftAlone("rows of its result are replaced, which may have been there before")
        return Summand((("ne", choice, value), *part.factors), part.bound, part.scale)

    def _rows_of(self, value: fx.Node, row: Term, columns: Sequence[Term]) -> list[Term]:
        return [0 if is_one(n) else i for n, i in zip(value_of(value).shape, (row, *columns), strict=True)]

    def _settled(self, parts: list[Summand]) -> list[Summand]:
        return [p for part in parts for p in self.rows.settled(part)]

    def _whole_condition(self, tokens: list[Term], row: str) -> int | None:
        """The condition all of whose dimensions rows are written by: each place is written once."""
        names = [t[1] for t in tokens if isinstance(t, tuple) and t[0] == "read" and t[2] == row]
        conditions = {n[1:].partition(".")[0] for n in names if n[0] == PLACE}
        if len(names) != len(tokens) or len(conditions) != 1 or len(set(names)) != len(names):
            return None
        condition = int(conditions.pop())
        return condition if len(self.rows.conditions[condition][1]) == len(tokens) else None

    def _differ(self, tokens: list[Term], row: str) -> bool:
        """Whether rows are written to different places: the dimensions left out are of a token's choices."""
        names = [t[1] for t in tokens if isinstance(t, tuple) and t[0] == "read" and t[2] == row]
        conditions = {n[1:].partition(".")[0] for n in names if n[0] == PLACE}
        if len(names) != len(tokens) or len(conditions) != 1:
            return False
        number = int(conditions.pop())
        term, shape = self.rows.conditions[number]
        choice, _ = choice_of(term)
        d = None if choice is None else is_choice(self.reader, choice[1])
        if choice is None or d is None or any(isinstance(i, tuple) for i in choice[2:]):
            return False
        left = {f"i{n}" for n in range(len(shape))} - {f"i{n.partition('.')[2]}" for n in names}
        return left <= {choice[2 + d]}


def _apart(condition: Summand, part: Summand) -> bool:
    """Whether a condition holds nowhere where a part is not 0: both say which expert a choice is."""
    for factor in condition.factors:
        choice, value = choice_of(factor)
        for other in part.factors:
            same, its = choice_of(other)
            alike = choice is not None and choice == same and not set(condition.bound) & names_in(choice)
            if alike and isinstance(value, int) and isinstance(its, int) and value != its:
                return True
    return False

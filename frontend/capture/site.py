"""One attention of a captured graph at run time: from the graph's tensors to a kernel and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..attention import attention
from ..score import ProbMod
from ..term import Term, rename, rewrite
from .constant import identity, with_closed_forms
from .empty_rows import nearest, with_empty_rows, with_sums
from .operand import Axes, Operand, back, is_grouped, is_plain
from .score import SHIFT, Bound, bind, signature, to_mask, to_score
from .terms import linear, names_in, reads_in

PER_CALL: Any = object()
MAX_BOUND = 256  # calls with different sizes or constants that are remembered


class Sizes(dict[str, int]):
    """The values of sizes, worked out as they are asked for."""

    def __init__(self, terms: Mapping[str, Term], numbers: dict[str, int]) -> None:
        self.terms, self.numbers = terms, numbers

    def __missing__(self, name: str) -> int:
        value = self[name] = evaluate(self.terms[name], self.numbers)
        return value


class _Ready(NamedTuple):
    """What a call needs: its parts, with the mask and the map made where they hold no tensors of the call.

    mask, score: PER_CALL where they do."""

    bound: Bound
    mask: Any
    score: Any


class Site:
    """Calls `gossamer.attention` in place of a part of a graph.

    Its arguments: query, key and value, a number for each of `numbers` (the $ names), then the tensors of
    `tensors` (the % names). constants: those of the tensors that a model holds."""

    def __init__(
        self,
        operands: tuple[Operand, Operand, Operand],
        axes: Axes,
        out: tuple[Term, ...],
        order: Sequence[int],
        sizes: dict[str, Term],
        score: Term,
        prob: Term,
        low: float,
        empty: str,
        numbers: tuple[str, ...],
        tensors: tuple[str, ...],
        constants: frozenset[str],
        sinks: str | None = None,
        least: float = -math.inf,
    ) -> None:
        self.operands, self.axes, self.out, self.order, self.sizes = operands, axes, out, order, sizes
        self.score, self.prob, self.low, self.least, self.empty = score, prob, low, least, empty
        self.numbers, self.tensors, self.constants, self.sinks = numbers, tensors, constants, sinks
        self._bound: dict[Any, _Ready] = {}
        shares = [o.sharing(axes) for o in operands[1:]]
        self._full = shares[0] != shares[1] or not is_grouped(shares[0], axes)
        rows = ("q", "k", "k")
        fulls = (True, self._full, self._full)
        self._arrange = tuple(
            (o, row, full and set(o.sharing(axes)) - {1}, o.is_arranged(axes, row))
            for o, row, full in zip(operands, rows, fulls, strict=True)
        )
        self._as_it_is = is_plain(out, axes, "q") and list(order) == [0, 1, 2, 3]
        self.__name__ = "gossamer_attention"

    def __call__(self, query: Any, key: Any, value: Any, *others: Any) -> torch.Tensor:
        count = len(self.numbers)
        numbers = dict(zip(self.numbers, map(int, others[:count]), strict=True))
        tensors = dict(zip(self.tensors, others[count:], strict=True))
        sizes = Sizes(self.sizes, numbers)
        q, k, v = (
            x if plain and not full else o.arranged(x, self.axes, row, sizes, bool(full))
            for (o, row, full, plain), x in zip(self._arrange, (query, key, value), strict=True)
        )
        slopes = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, *tensors.values()))
        ready = self.ready(numbers, tensors, (q.shape[2], k.shape[2]), slopes)
        empty, scale = ready.bound.empty, ready.bound.scale
        if ready.bound.levels:
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            tensors[SHIFT[1]] = torch.zeros(q.shape[:3], dtype=wide, device=q.device)
        lse = empty in ("nan", "mean", "sum")
        maps: dict[str, Any] = {
            "mask": to_mask(ready.bound, tensors) if ready.mask is PER_CALL else ready.mask,
            "score_mod": to_score(ready.bound, tensors) if ready.score is PER_CALL else ready.score,
            "prob_mod": self._prob_mod(numbers, tensors),
            "sinks": None if self.sinks is None else tensors[self.sinks],
        }
        if ready.bound.levels:
            with torch.no_grad():
                rows: Any = attention(q, k, v, **maps, scale=scale, enable_gqa=True, return_lse=True)[1]
            tensors[SHIFT[1]] = nearest(rows, ready.bound.levels)
            maps["score_mod"] = to_score(ready.bound, tensors)
        found: Any = attention(q, k, v, **maps, scale=scale, enable_gqa=True, return_lse=lse)
        if empty == "sum":
            out = with_sums(found[0], found[1], q, k, v, scale)
        elif lse:
            out = with_empty_rows(found[0], found[1], v, empty)
        else:
            out = found
        return out if self._as_it_is else back(out, self.axes, self.out, sizes, self.order)

    def ready(
        self,
        numbers: dict[str, int],
        tensors: dict[str, torch.Tensor],
        lengths: tuple[int, int],
        slopes: bool,
    ) -> _Ready:
        """The mask and maps of a call, worked out once for the same sizes and constants."""
        held = [tensors[name] for name in self.constants]
        key = (tuple(numbers.values()), lengths, slopes, tuple(map(identity, held)))
        known = self._bound.get(key)
        if known is None:
            bound = self.bound(numbers, dict(zip(self.constants, held, strict=True)), lengths, slopes)
            mask = PER_CALL if bound.captures else to_mask(bound, {})
            score = PER_CALL if bound.score_captures else to_score(bound, {})
            if len(self._bound) >= MAX_BOUND:
                self._bound.clear()
            self._bound[key] = known = _Ready(bound, mask, score)
        return known

    def bound(
        self,
        numbers: dict[str, int],
        constants: dict[str, torch.Tensor],
        lengths: tuple[int, int],
        slopes: bool,
    ) -> Bound:
        """The mask and maps at these sizes, and for these tensors of the model."""
        term = with_closed_forms(self.score, constants)
        plain = self.prob == "prob" and self.sinks is None
        return bind(term, numbers, lengths, (self.low, self.least), self.empty, plain, slopes)

    def _prob_mod(self, numbers: dict[str, int], tensors: dict[str, torch.Tensor]) -> ProbMod | None:
        if self.prob == "prob":
            return None
        names: list[str] = []

        def leaf(name: str) -> str:
            if not name.startswith("%"):
                return name
            if name not in names:
                names.append(name)
            return f"w{names.index(name)}"

        term = rewrite(rename(self.prob, numbers), leaf)
        held = tuple(tensors[name] for name in names)
        return ProbMod(term, (), held, tuple(map(signature, held)))


def evaluate(term: Term, numbers: dict[str, int]) -> int:
    """The value of a size."""
    if isinstance(term, int):
        return term
    if isinstance(term, str):
        return numbers[term]
    if term[0] in ("floordiv", "mod"):
        a, b = (evaluate(t, numbers) for t in term[1:])
        return a // b if term[0] == "floordiv" else a % b
    if term[0] == "mul":
        return evaluate(term[1], numbers) * evaluate(term[2], numbers)
    return sum(c * (1 if t == 1 else evaluate(t, numbers)) for t, c in linear(term).items())


def tensors_in(*terms: Term) -> tuple[str, ...]:
    """The graph's tensors that terms read."""
    return tuple(dict.fromkeys(r[1] for t in terms for r in reads_in(t) if r[1].startswith("%")))


def numbers_in(*terms: Term) -> tuple[str, ...]:
    """The sizes, known at run time, that terms depend on."""
    return tuple(sorted({name for term in terms for name in names_in(term) if name.startswith("$")}))

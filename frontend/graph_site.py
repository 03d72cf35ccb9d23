"""One attention of a captured graph at run time: from the graph's tensors to a kernel and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .attention import attention
from .graph_constant import identity, with_closed_forms
from .graph_operand import Axes, Operand, back, is_grouped
from .graph_score import Bound, bind, signature, to_mask, to_score
from .graph_terms import linear, names_in, reads_in
from .score import ProbMod
from .term import Term, rename, rewrite

MAX_BOUND = 256  # calls with different sizes or constants that are remembered


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
        self._bound: dict[Any, Bound] = {}
        shares = [o.sharing(axes) for o in operands[1:]]
        self._full = shares[0] != shares[1] or not is_grouped(shares[0], axes)
        self.__name__ = "gossamer_attention"

    def __call__(self, query: Any, key: Any, value: Any, *others: Any) -> torch.Tensor:
        count = len(self.numbers)
        numbers = dict(zip(self.numbers, map(int, others[:count]), strict=True))
        tensors = dict(zip(self.tensors, others[count:], strict=True))
        sizes = {name: evaluate(term, numbers) for name, term in self.sizes.items()}
        rows = ("q", "k", "k")
        given = zip(self.operands, (query, key, value), rows, (True, self._full, self._full), strict=True)
        q, k, v = (o.arranged(x, self.axes, row, sizes, full) for o, x, row, full in given)
        bound = self.bound(numbers, tensors, (q.shape[2], k.shape[2]))
        lse = bound.empty in ("nan", "mean")
        maps: dict[str, Any] = {
            "score_mod": to_score(bound, tensors),
            "prob_mod": self._prob_mod(numbers, tensors),
        }
        found: Any = attention(
            q,
            k,
            v,
            mask=to_mask(bound, tensors),
            **maps,
            scale=bound.scale,
            sinks=None if self.sinks is None else tensors[self.sinks],
            enable_gqa=True,
            return_lse=lse,
        )
        out = _with_empty_rows(found[0], found[1], v, bound.empty) if lse else found
        return back(out, self.axes, self.out, sizes, self.order)

    def bound(
        self, numbers: dict[str, int], tensors: dict[str, torch.Tensor], lengths: tuple[int, int]
    ) -> Bound:
        """The mask and maps of a call, worked out once for the same sizes and constants."""
        held = {name: tensors[name] for name in self.constants}
        key = (tuple(numbers.values()), lengths, tuple(map(identity, held.values())))
        known = self._bound.get(key)
        if known is None:
            term = with_closed_forms(self.score, held)
            plain = self.prob == "prob" and self.sinks is None
            known = bind(term, numbers, lengths, (self.low, self.least), self.empty, plain)
            if len(self._bound) >= MAX_BOUND:
                self._bound.clear()
            self._bound[key] = known
        return known

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


def _with_empty_rows(out: torch.Tensor, lse: torch.Tensor, value: torch.Tensor, empty: str) -> torch.Tensor:
    """The output in which rows without pairs give what the original program gives them."""
    rows = torch.isneginf(lse)[..., None]
    if empty == "nan":
        return out.masked_fill(rows, float("nan"))
    mean = value.mean(-2, keepdim=True, dtype=lse.dtype).to(out.dtype)
    shared = out.shape[1] // mean.shape[1]
    return torch.where(rows, mean.repeat_interleave(shared, 1), out)


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

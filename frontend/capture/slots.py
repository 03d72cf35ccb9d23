"""Choices of experts that a graph spells by terms: how ids and weights follow from them at run time."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..term import FALSE, TRUE, Term
from .expert import Experts
from .memory import Memory
from .ops import value_of
from .site import numbers_in, tensors_in
from .tensor import LeftAlone, Reader, size_term
from .terms import number

TOKEN, CHOICE = "t", "n"


def token_names(count: int) -> tuple[str, ...]:
    """The indices of tokens of so many dimensions."""
    return (TOKEN,) if count == 1 else tuple(f"{TOKEN}{d}" for d in range(count))


@dataclass(frozen=True)
class Choices:
    """One choice of every token t, or several, counted by n. size: how many.

    ids: the expert. slot: which of its slots, None without slots. kept: conditions. weights: factors."""

    ids: Term
    slot: Term
    kept: tuple[Term, ...]
    weights: tuple[Term, ...]
    scale: float
    size: int

    @property
    def taken(self) -> tuple[Any, ...]:
        return self.ids, self.slot, self.size

    @property
    def terms(self) -> tuple[Term, ...]:
        slot = () if self.slot is None else (self.slot,)
        return (self.ids, *slot, *self.kept, *self.weights)


@dataclass
class Dispatched(Experts):
    """Experts whose ids and weights are worked out from choices. count: experts; capacity: slots of each.

    names: the reader that knows the tensors of the choices' terms; None for that of the graph."""

    choices: list[Choices] = field(default_factory=list)
    count: Any = 0
    capacity: Any = None
    names: Reader | None = None

    def prepare(self, graph: fx.Graph, reader: Reader) -> list[fx.Node]:
        reader = self.names or reader
        terms = tuple(t for one in self.choices for t in one.terms)
        bounds = size_term(self.count), size_term(0 if self.capacity is None else self.capacity)
        names, numbers = tensors_in(*terms), numbers_in(*terms, *bounds)
        held = [reader.tensor_of(name) for name in names]
        sizes = symbols(graph)
        missing = [name for name in numbers if name not in sizes]
        if missing:
            raise LeftAlone(f"a size ({missing[0]}) that is no input of the graph")
        x = value_of(self.x)
        factors = [value_of(reader.leaves[name]) for one in self.choices for name in tensors_in(*one.weights)]
        floats = [value for value in factors if value.is_floating_point()]
        dtype = floats[0].dtype if floats else x.dtype
        site = Slots(self.choices, bounds, dtype, numbers, names)
        with graph.inserting_before(self.node):
            given = (self.x, *(sizes[name] for name in numbers), *held)
            both = graph.call_function(site, given)
            made = [both, *(graph.call_function(operator.getitem, (both, i)) for i in (0, 1))]
        shape = (*x.shape[:-1], sum(one.size for one in self.choices))
        with x.fake_mode:
            fakes = x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=dtype)
        fakes[1].requires_grad_(torch.is_grad_enabled() and any(v.requires_grad for v in floats))
        for node, value in zip(made, (fakes, *fakes), strict=True):
            node.meta = dict(self.node.meta) | {"example_value": value}
            note(reader.memory, node, self.node)
        self.ids, self.weights = made[1:]
        return made


def symbols(graph: fx.Graph) -> dict[str, fx.Node]:
    """The nodes of a graph that are sizes, by name."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            try:
                term = size_term(value)
            except ValueError:
                continue
            if isinstance(term, str):
                found.setdefault(term, node)
    return found


def note(memory: Memory, node: fx.Node, at: fx.Node) -> None:
    """Take up a node that runs where another one stands."""
    memory.place[node], memory.group[node] = memory.place[at] - 1, node


class Slots:
    """Gives (ids, weights), (T, choices) each, of choices that have got a slot; ids of others are `count`.

    Its arguments: x, a number for each of `numbers` (the $ names), then the tensors of `tensors`."""

    def __init__(
        self,
        choices: Sequence[Choices],
        bounds: tuple[Term, Term],
        dtype: torch.dtype,
        numbers: tuple[str, ...],
        tensors: tuple[str, ...],
    ) -> None:
        self.choices, self.bounds, self.dtype = choices, bounds, dtype
        self.numbers, self.tensors = numbers, tensors
        self.__name__ = "gossamer_slots"

    def __call__(self, x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(self.numbers)
        names: dict[str, Any] = dict(zip(self.numbers, map(int, others[:count]), strict=True))
        names |= dict(zip(self.tensors, others[count:], strict=True))
        experts, capacity = (evaluate(bound, names) for bound in self.bounds)
        ids, weights = [], []
        lead = x.shape[:-1]
        for d, (name, size) in enumerate(zip(token_names(len(lead)), lead, strict=True)):
            names[name] = torch.arange(size, device=x.device).view(-1, *[1] * (len(lead) - d))
        for one in self.choices:
            names[CHOICE] = torch.arange(one.size, device=x.device)
            shape = (*lead, one.size)
            kept = torch.ones((), dtype=torch.bool, device=x.device)
            if one.slot is not None:
                slot = evaluate(one.slot, names)
                kept = (slot >= 0) & (slot < capacity)
            for condition in one.kept:
                kept = kept & evaluate(condition, names)
            ids.append(torch.where(kept, evaluate(one.ids, names), experts).expand(shape))
            weight: Any = torch.full((1,) * len(shape), one.scale, dtype=self.dtype, device=x.device)
            for factor in one.weights:
                weight = weight * evaluate(factor, names)
            weights.append(weight.to(self.dtype).expand(shape))
        return torch.cat(ids, -1), torch.cat(weights, -1)


_CALLS: dict[str, Any] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "neg", "mod", "floordiv", "pow")},
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "abs")},
    "div": operator.truediv,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "min": torch.minimum,
    "max": torch.maximum,
}


def evaluate(term: Term, names: Mapping[str, Any]) -> Any:
    """A term on tensors that broadcast: torch's result, or a number. Differentiable.

    Raises KeyError for an operation without a form in torch."""
    value = number(term)
    if value is not None and term not in (TRUE, FALSE):
        return value
    if not isinstance(term, tuple):
        return names[term] if term in names else torch.tensor(term == TRUE)
    op, *parts = term
    if op in ("read", "readf"):
        tensor = names[parts[0]]
        return tensor[tuple(evaluate(i, names) for i in parts[1:])] if tensor.dim() else tensor
    if op == "cast":
        inner, whole = evaluate(parts[1], names), parts[0][0] not in "fb"
        return inner.to(torch.int64) if whole and isinstance(inner, torch.Tensor) else inner
    given = [evaluate(part, names) for part in parts]
    if op == "where":
        return torch.where(*given)
    if op in ("min", "max") and not all(isinstance(g, torch.Tensor) for g in given):
        tensor, bound = given if isinstance(given[0], torch.Tensor) else given[::-1]
        return tensor.clamp(**{"max" if op == "min" else "min": bound})
    found = _CALLS.get(op)
    return found(*given) if found is not None else getattr(torch, op)(*given)

"""What one attention of a JAX program is, arrays aside: a value, and text that XLA carries to the kernel.

The text holds everything that a kernel is found by, so that a compiled XLA program finds it again in any
process. Structures and integers are in it; arrays are operands, by the names of `Call.operands`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from ..mask import Mask
from ..score import ProbMod, ScoreMod
from ..term import Term, children

Face = TypeVar("Face", Mask, ScoreMod, ProbMod)


@dataclass(frozen=True)
class Source:
    """A mask or a map without its arrays: its term, its numbers, dtype and rank of each captured array."""

    term: Term
    values: tuple[int | float, ...]
    signature: tuple[tuple[str, int], ...]

    def bound(self, face: type[Face], tensors: tuple[Any, ...]) -> Face:
        """It, with arrays."""
        return face(self.term, self.values, tensors, self.signature)  # type: ignore[arg-type]

    def folded(self, batch: int, arrays: dict[str, bool]) -> Source:
        """The same for sequences of several such calls, numbered one call after the other.

        batch: of each call. arrays: the captured arrays that every call has its own of, by name: whether
        they lie along the sequences (else a first dimension counts calls)."""
        number, inner = ("b", 0) if batch == 1 else (("floordiv", "b", batch), ("mod", "b", batch))

        def visit(term: Term) -> Term:
            if term == "b":
                return inner
            if not isinstance(term, tuple) or term[0] == "f":
                return term
            below = children(term)
            head = term[: len(term) - len(below)]
            indices = tuple(map(visit, below))
            if term[0] in ("read", "readf") and term[1] in arrays:
                indices = ("b", *indices[1:]) if arrays[term[1]] else (number, *indices)
            return (*head, *indices)

        names = {name: int(name[1:]) for name, along in arrays.items() if not along}
        signature = tuple(
            (dtype, rank + (i in names.values())) for i, (dtype, rank) in enumerate(self.signature)
        )
        return Source(visit(self.term), self.values, signature)

    def along(self, name: str) -> bool:
        """Whether every read of a captured array has b as its first index."""

        def visit(term: Term) -> bool:
            if isinstance(term, tuple) and term[0] in ("read", "readf") and term[1] == name:
                return term[2] == "b" and all(map(visit, term[3:]))
            return all(map(visit, children(term)))

        return visit(self.term)


@dataclass(frozen=True)
class Call:
    """One attention, arrays aside.

    layout: of query, key and value: "BTNH" or "BNTH". q_offset: of all queries, where `offsets` is False.
    sinks, offsets, lens, paged (a table of pages): whether those are operands. packed: whose bounds are:
    those of queries ("q"), of keys too ("qk"), or nobody's. lse: whether it is a result."""

    mask: Source
    score: Source | None = None
    prob: Source | None = None
    scale: float | None = None
    layout: str = "BTNH"
    q_offset: int = 0
    sinks: bool = False
    offsets: bool = False
    lens: bool = False
    lse: bool = False
    packed: str = ""
    paged: bool = False

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands, in order; captured arrays are c0, ..., t0, ..., w0, ..."""
        asked = (
            ("sinks", self.sinks),
            ("q_offsets", self.offsets),
            ("kv_lens", self.lens),
            ("q_bounds", "q" in self.packed),
            ("kv_bounds", "k" in self.packed),
            ("block_table", self.paged),
        )
        captured = [f"{letter}{i}" for letter, source in self.sources for i in range(len(source.signature))]
        return ("q", "k", "v", *(name for name, there in asked if there), *captured)

    @property
    def sources(self) -> tuple[tuple[str, Source], ...]:
        """The mask and the maps that there are, by the letter of their captured arrays."""
        found = (("c", self.mask), ("t", self.score), ("w", self.prob))
        return tuple((letter, source) for letter, source in found if source is not None)

    def folded(self, batch: int, arrays: dict[str, bool]) -> Call:
        """The call of several such calls; see `Source.folded`."""
        sources = {
            letter: source.folded(batch, {n: along for n, along in arrays.items() if n[0] == letter})
            for letter, source in self.sources
        }
        return replace(self, mask=sources["c"], score=sources.get("t"), prob=sources.get("w"))

    @property
    def text(self) -> str:
        """JSON; the same for the same call."""
        return json.dumps(self, default=_fields, sort_keys=True)

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Call:
        """The call of a text."""
        fields = json.loads(text)
        for name in ("mask", "score", "prob"):
            if (found := fields[name]) is not None:
                fields[name] = Source(**{key: _tuples(value) for key, value in found.items()})
        return Call(**fields)


@dataclass(frozen=True)
class GradientCall:
    """The gradients of one attention, arrays aside.

    wanted: operands of the call, by name. lse: whether the LSE has a gradient too."""

    call: Call
    wanted: tuple[str, ...]
    lse: bool

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Those of the call, then its results and their gradients."""
        return (*self.call.operands, "o", "lse", "do", *(("dlse",) if self.lse else ()))

    @property
    def text(self) -> str:
        """JSON; the same for the same call."""
        return json.dumps({"call": self.call.text, "wanted": self.wanted, "lse": self.lse})

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> GradientCall:
        """The gradients of a text."""
        fields = json.loads(text)
        return GradientCall(Call.parse(fields["call"]), tuple(fields["wanted"]), fields["lse"])


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

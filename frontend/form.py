"""The form of a call: everything of an attention that is neither a tensor nor a number.

An operator of torch takes tensors, numbers and text. `take_apart` splits a captured call into these, `Form`
is its text, and `Form.join` makes the same call of them again, in any process:

    call  ->  form, tensors, integers, floats  ->  call
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ..ir.errors import InputError
from . import masks as masks  # registers how its tensors are derived
from .captured import Constant, Derived, as_tensor
from .mask import Mask, Signature
from .score import ProbMod, ScoreMod
from .softmax import Softmax
from .term import Term
from .trace.value import plain_number

VERSION = 1  # of the text of forms, which exported programs hold


class Options(NamedTuple):
    """Keywords of a call that are no tensors. extra: the results beside the output, in this order: "lse",
    "max" (beside "lse" only), "column_sums"."""

    enable_gqa: bool = False
    extra: tuple[str, ...] = ()
    backend: str = "auto"
    schedule: Any = None
    validate: bool = False
    deterministic: bool | None = None


class Call(NamedTuple):
    """A captured call: objects of the frontend, and no functions.

    held: sinks and the tensors that say where sequences are, by the kernels' names. offset: q_offset, where
    it is a number."""

    mask: Mask
    score: ScoreMod | None
    prob: ProbMod | None
    scale: Any
    held: dict[str, Any]
    offset: Any
    options: Options

    @property
    def tensors(self) -> list[Any]:
        """Every tensor beside query, key and value."""
        found = list(self.held.values())
        for source in (self.mask, self.score, self.prob):
            if source is not None and source.sources:
                found += [t.source if isinstance(t, Derived) else t for t in source.sources]
        return found

    @property
    def softmax(self) -> Softmax:
        """As `prepare` takes it; sinks are taken to be checked."""
        return Softmax.joined(self.held.get("sinks"), self.prob)

    @property
    def where(self) -> tuple[Any, ...]:
        """q_offset, cu_seqlens_q, cu_seqlens_kv, block_table and kv_lens."""
        names = ("q_bounds", "kv_bounds", "block_table", "kv_lens")
        return self.held.get("q_offsets", self.offset), *map(self.held.get, names)


class Part(NamedTuple):
    """The form of a mask or a map: its term, what its numbers and its tensors are, and how those are derived.

    kinds: "int" or "float" of each number. recipes: None for a tensor that is read as it is."""

    term: Term
    kinds: tuple[str, ...] = ()
    signature: Signature = ()
    recipes: tuple[tuple[Any, ...] | None, ...] = ()


class Form(NamedTuple):
    """What `take_apart` leaves beside tensors and numbers.

    held: the names of further tensors, after those that mask, score and prob captured. scaled: whether a
    scale comes first among the floats. offset: whether an offset comes last among the integers."""

    mask: Part
    score: Part | None = None
    prob: Part | None = None
    held: tuple[str, ...] = ()
    scaled: bool = False
    offset: bool = False
    options: Options = Options()

    @property
    def text(self) -> str:
        """The form as JSON, which `Form.parse` reads back."""
        return json.dumps((VERSION, *self), separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Form:
        """The form of its text. Raises InputError for text that is none, or of another version."""
        try:
            version, *fields = _tuples(json.loads(text))
        except (ValueError, TypeError):
            version, fields = None, []
        if version != VERSION or len(fields) != len(Form._fields):
            fix = "Export the program again with this version of gossamer"
            raise InputError("gossamer::attention.form", f"a form of version {VERSION}", repr(text[:60]), fix)
        mask, score, prob, held, scaled, offset, options = fields
        maps = [None if part is None else Part(*part) for part in (score, prob)]
        return Form(Part(*mask), maps[0], maps[1], held, scaled, offset, Options(*options))

    @property
    def parts(self) -> tuple[tuple[str, Part], ...]:
        """Mask and maps by the letters of the tensors that they capture."""
        found = (("c", self.mask), ("t", self.score), ("w", self.prob))
        return tuple((letter, part) for letter, part in found if part is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """What kernels call the tensors beside q, k and v."""
        captured = (f"{letter}{i}" for letter, part in self.parts for i in range(len(part.signature)))
        return (*captured, *self.held)

    def join(self, tensors: Sequence[Any], integers: Sequence[int], floats: Sequence[float]) -> Call:
        """The call with these tensors and numbers."""
        left: dict[str, list[Any]] = {"int": list(integers), "float": list(floats)}
        scale = left["float"].pop(0) if self.scaled else None
        waiting = list(tensors)
        made: list[Any] = []
        for kind, part in ((Mask, self.mask), (ScoreMod, self.score), (ProbMod, self.prob)):
            if part is None:
                made.append(None)
                continue
            values = tuple(left[k].pop(0) for k in part.kinds)
            own = tuple(_derived(waiting.pop(0), recipe) for recipe in part.recipes)
            made.append(kind(part.term, values, own, part.signature))
        held = dict(zip(self.held, waiting, strict=True))
        offset = left["int"][0] if self.offset else None
        return Call(made[0], made[1], made[2], scale, held, offset, self.options)


class Parts(NamedTuple):
    """A call taken apart, query, key and value aside."""

    form: Form
    tensors: list[Any]
    integers: list[Any]
    floats: list[Any]


def take_apart(call: Call, device: Any) -> Parts:
    """The form of a call, its tensors on a device, its numbers."""
    tensors: list[Any] = []
    numbers: dict[str, list[Any]] = {"int": [], "float": []}
    if call.scale is not None:
        numbers["float"].append(call.scale)
    parts: list[Any] = []
    for source in (call.mask, call.score, call.prob):
        if source is None:
            parts.append(None)
            continue
        kinds, captured = source.kinds, source.sources
        for kind, value in zip(kinds, source.values, strict=True):
            numbers[kind].append(value)
        tensors += [_source(tensor, device) for tensor in captured]
        recipes = tuple(t.recipe if isinstance(t, Derived) else None for t in captured)
        parts.append(Part(source.term, kinds, source.signature, recipes))
    tensors += call.held.values()
    if call.offset is not None:
        numbers["int"].append(plain_number(call.offset))
    options = call.options._replace(schedule=_spelled(call.options.schedule))
    mask, score, prob = parts
    form = Form(mask, score, prob, tuple(call.held), call.scale is not None, call.offset is not None, options)
    return Parts(form, tensors, *numbers.values())


def _source(tensor: Any, device: Any) -> Any:
    if isinstance(tensor, Derived):
        return as_tensor(tensor.source)
    return tensor.on(device) if isinstance(tensor, Constant) else as_tensor(tensor)


def _derived(tensor: Any, recipe: tuple[Any, ...] | None) -> Any:
    return tensor if recipe is None else Derived(tensor, recipe)


def _spelled(schedule: Any) -> str | None:
    """A schedule as text, which every process reads back."""
    if schedule is None or isinstance(schedule, str):
        return schedule
    from ..ir.attributes import dump
    from .schedules import given

    return dump(given(schedule, few=True))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

"""Capture of mask_mod, score_mod and prob_mod: the function runs once, on stand-ins for its indices.

`trace_mask`, `trace_score` and `trace_prob` give a `Traced`: the term of what the function computes, and
what it captured. Nothing of it is cached by the function's name or code: the term itself is the key. A
memo in the process skips the run when everything that an earlier run looked at is unchanged (see
captures.py); numbers and tensors are always read anew.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...ir.errors import GossamerError
from ..term import Term, constant
from .captures import Trace, code_of, lift_root, settle
from .error import at_definition, wrapped
from .gradient import recording
from .guard import Guard, Path, holds, resolve
from .operate import value_of
from .tensor import Captured, dtype_name
from .torch_functions import maximum, minimum, where
from .value import Value, is_number, plain_number, run_recipe

__all__ = [
    "Traced",
    "dtype_name",
    "kv_length",
    "maximum",
    "minimum",
    "trace_activation",
    "trace_mask",
    "trace_prob",
    "trace_score",
    "where",
]


@dataclass(frozen=True)
class Traced:
    """What a function computes and captured.

    term: over b h q k (and score, prob), params p0.. (s0.., x0..) and captures c0.. (t0.., w0..), by first
    appearance. values: of the params, ints (but for a mask_mod also floats). tensors: the captured ones.
    signature: (dtype, rank) of each tensor; one without dimensions is read as if it had one, of size 1.
    """

    term: Term
    values: tuple[int | float, ...]
    tensors: tuple[Any, ...]
    signature: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Recorded:
    """An earlier run: valid for a function in which its guards hold."""

    term: Term
    recipes: tuple[Any, ...]
    slots: tuple[Path, ...]
    captures: tuple[Path, ...]
    signature: tuple[tuple[str, int], ...]
    guards: tuple[Guard, ...]
    expected: tuple[tuple[Any, Any], ...]

    def replay(self, function: Any) -> Traced | None:
        try:
            if not all(holds(guard, function) for guard in self.guards):
                return None
            slots = [resolve(function, path) for path in self.slots]
            if any(run_recipe(recipe, slots) != outcome for recipe, outcome in self.expected):
                return None
            tensors = tuple(resolve(function, path) for path in self.captures)
        except (LookupError, AttributeError, ValueError, TypeError, ArithmeticError):
            return None  # what stood there is gone: run the function
        values = tuple(plain_number(run_recipe(recipe, slots)) for recipe in self.recipes)
        return Traced(self.term, values, tensors, self.signature)


_MEMO: OrderedDict[Any, tuple[_Recorded, ...]] = OrderedDict()
_FUNCTIONS, _VARIANTS = 512, 8
ARGUMENTS = {
    "mask_mod": ("b", "h", "q", "k"),
    "score_mod": ("score", "b", "h", "q", "k"),
    "prob_mod": ("prob", "b", "h", "q", "k"),
    "activation": ("x0", "x1"),
    "plain activation": ("x0",),
}
FLOATS = frozenset(("score", "prob", "x0", "x1"))
GIVEN = {"activation": "gate, up", "plain activation": "x"}  # what else has b, h, q_idx, kv_idx
LETTERS = {
    "mask_mod": ("p", "c"),
    "score_mod": ("s", "t"),
    "prob_mod": ("x", "w"),
    "activation": ("a", "t"),
    "plain activation": ("a", "t"),
}
"""What the numbers and the tensors that each kind of function captures are called."""


def trace_mask(function: Callable[..., Any]) -> Traced:
    """The predicate of `mask_mod(b, h, q_idx, kv_idx) -> bool`. Raises TraceError."""
    return _trace(function, "mask_mod")


def trace_score(function: Callable[..., Any]) -> Traced:
    """The score map of `score_mod(score, b, h, q_idx, kv_idx) -> float`. Raises TraceError."""
    return _trace(function, "score_mod")


def trace_prob(function: Callable[..., Any]) -> Traced:
    """The probability map of `prob_mod(prob, b, h, q_idx, kv_idx) -> float`. Raises TraceError."""
    return _trace(function, "prob_mod")


def trace_activation(function: Callable[..., Any], *, gated: bool) -> Traced:
    """What `activation(gate, up) -> float` makes of x0 and x1, or `activation(x)` of x0.

    Raises TraceError."""
    return _trace(function, "activation" if gated else "plain activation")


def kv_length(index: Value) -> Value:
    """The number of keys, kv_len, as an expression beside an index of the same trace."""
    return Value(index.trace, "kv_len", "int")


def _trace(function: Callable[..., Any], role: str) -> Traced:
    code = code_of(function)
    key = (role, type(function), code)
    for recorded in _MEMO.get(key, ()):
        replayed = recorded.replay(function)
        if replayed is not None:
            return replayed
    trace, recorded, traced = _traced(
        role, code, lambda trace, *indices: _call(trace, function, code, list(indices))
    )
    if trace.memo and code is not None:
        kept = (recorded, *_MEMO.pop(key, ()))[:_VARIANTS]
        _MEMO[key] = kept
        while len(_MEMO) > _FUNCTIONS:
            _MEMO.popitem(last=False)
    return traced


def run_traced(run: Callable[..., Any], role: str) -> Traced:
    """What `run(trace, *indices)` computes on stand-ins, which it is given. Raises TraceError."""
    return _traced(role, None, run)[2]


def _traced(role: str, code: Any, run: Callable[..., Any]) -> tuple[Trace, _Recorded, Traced]:
    is_map = role != "mask_mod"
    trace = Trace(role, float_params=is_map, learns=is_map)
    with recording():
        trace.recording = is_map
        indices = [Value(trace, name, "float" if name in FLOATS else "int") for name in ARGUMENTS[role]]
        result = _result(trace, run(trace, *indices), code)
    _check_size(trace, result.term, code)
    recorded, tensors = _finish(trace, result)
    values = tuple(plain_number(run_recipe(r, trace.values)) for r in recorded.recipes)
    return trace, recorded, Traced(recorded.term, values, tensors, recorded.signature)


def _call(trace: Trace, function: Callable[..., Any], code: Any, indices: list[Value]) -> Any:
    first = f"{indices[0].term}, " if len(indices) == 5 else ""
    given = GIVEN.get(trace.role, f"{first}b, h, q_idx, kv_idx")
    positional = _positional(function)
    if positional is not None and not positional[0] <= len(indices) <= positional[1]:
        raise at_definition(
            code, f"{trace.role} expects {len(indices)} arguments ({given}); it takes {_range(positional)}"
        )
    try:
        return lift_root(trace, function)(*indices)
    except GossamerError:
        raise
    except RecursionError:
        raise at_definition(code, f"{trace.role} recurses without end while it is captured") from None
    except Exception as error:
        raise wrapped(error, trace.role, code) from error


def _positional(function: Any) -> tuple[int, float] | None:
    """The fewest and most positional arguments that a function takes; None when that cannot be told."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = [p.kind for p in parameters if p.default is p.empty]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        return None
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    most = (
        float("inf")
        if inspect.Parameter.VAR_POSITIONAL in kinds
        else sum(p.kind in by_position for p in parameters)
    )
    return sum(k in by_position for k in kinds), most


def _range(counts: tuple[int, float]) -> str:
    fewest, most = counts
    if most == float("inf"):
        return f"{fewest} or more"
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


_KINDS = {"int": "an integer", "float": "a float", "bool": "a truth value", "NoneType": "None"}


def _result(trace: Trace, result: Any, code: Any) -> Value:
    """The function's result as an expression of the kind that its role asks for."""
    like = f"{GIVEN.get(trace.role, trace.role).split(', ')[-1].removesuffix('_mod')} * 2"
    wanted, like = ("bool", "q_idx >= kv_idx") if trace.role == "mask_mod" else ("float", like)
    known = type(result) in (Value, Captured) or is_number(result) or getattr(result, "shape", None) == ()
    value = value_of(trace, result) if known else None
    if wanted == "float" and value is not None and value.kind == "int":
        return value_of(trace, 1.0) * value
    if value is None or value.kind != wanted:
        got = type(result).__name__ if value is None else value.kind
        fix = "Compare it, such as != 0" if wanted == "bool" and value is not None else ""
        said = f"{trace.role} returns {_KINDS.get(got, got)}; expected {_KINDS[wanted]}, such as {like}"
        raise at_definition(code, said, fix)
    return value


_FOLDED = frozenset(("add", "sub", "mul", "neg"))
MAX_SIZE = 20_000


def _check_size(trace: Trace, term: Term, code: Any) -> None:
    """Refuse what would take forever to write out. (Terms share their parts, expressions do not.)"""
    sizes: dict[int, int] = {}

    def size(t: Term) -> int:
        if not isinstance(t, tuple):
            return 1
        if id(t) not in sizes:
            sizes[id(t)] = 1 + sum(map(size, t[1:]))
        return sizes[id(t)]

    if (n := size(term)) > MAX_SIZE:
        raise at_definition(
            code,
            f"{trace.role} computes an expression of {n} operations, expected at most {MAX_SIZE}",
            "A value that is used several times is written out each time: use intermediate values once, or "
            "precompute them in a captured tensor",
        )


def _finish(trace: Trace, result: Value) -> tuple[_Recorded, tuple[Any, ...]]:
    """Number params and captures by first appearance; put baked numbers in their places."""
    number, tensor = LETTERS[trace.role]
    recipes: list[Any] = []
    captures: list[int] = []

    def numbered(items: list[Any], item: Any, prefix: str) -> str:
        if item not in items:
            items.append(item)
        return f"{prefix}{items.index(item)}"

    def place(term: Term) -> Term:
        if not isinstance(term, tuple) or term[0] == "f":
            return term
        if term[0] == "num":
            known = settle(trace, term[1])
            return numbered(recipes, term[1], number) if known is None else constant(known)
        if term[0] in ("read", "readf"):
            name = numbered(captures, term[1], tensor)
            return (term[0], name, *map(place, term[2:]))
        parts = tuple(map(place, term[1:]))
        if term[0] in _FOLDED and all(isinstance(p, int) for p in parts):
            return run_recipe((term[0], *parts), ())
        return (term[0], *parts)

    term = place(result.term)
    tensors = tuple(trace.captures[i][0] for i in captures)
    recorded = _Recorded(
        term,
        tuple(recipes),
        tuple(trace.slots),
        tuple(trace.captures[i][1] for i in captures),
        tuple((dtype_name(t.dtype) or "", max(1, len(t.shape))) for t in tensors),
        tuple(trace.guards),
        tuple(trace.expected.items()),
    )
    return recorded, tensors

"""From the term of a score to what a kernel takes: a mask, a scale, a score map, and what empty rows give.

Scores of -inf, or so low that their weight is 0 beside any other, are the mask's; all else is the score
map's. Where a row has no pair that attends, programs differ: softmax of -inf gives NaN, of equal large
negative numbers the mean of all values. isl proves that there is no such row, or the result says what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..mask import Mask
from ..score import ScoreMod
from ..term import COMPARISONS, FALSE, TRUE, Term, both, children, constant, rename, rewrite
from .terms import from_linear, kind_of, linear, names_in, number, reads_in, replaced, tidy

LOW = -1e9  # a fill from here down counts as -inf beside scores of pairs that attend
ABSORBING = -1e30  # a fill from here down swallows the score that it is added to, in float64 too
SHIFT: Term = ("readf", "%shift", "b", "h", "q")  # what is taken off each score of a row: its level
MAX_LIFTED = 2  # constants of a mask that become runtime values; with more, they are numbers of the kernel
_FLIPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}


@dataclass(frozen=True)
class Fill:
    """A score given to pairs that do not attend. added: whether their own score is added to it."""

    value: float
    added: bool


@dataclass(frozen=True)
class Split:
    """mask: which pairs attend. score: of those. fills: what the others are given."""

    mask: Term
    score: Term
    fills: tuple[Fill, ...] = ()


def split(term: Term, low: float) -> Split:
    """A score as a mask and the score of its pairs; fills are constants of at most `low`."""
    if not isinstance(term, tuple):
        return Split(TRUE, term)
    op, *parts = term
    if op == "where" and "score" not in names_in(parts[0]):
        condition, yes, no = parts
        for wanted, kept, fill in ((condition, yes, no), (tidy(("not", condition)), no, yes)):
            value = number(fill)
            if isinstance(value, float) and value <= low:
                inner = split(kept, low)
                here = Fill(value, added="score" not in names_in(kept))
                return Split(both(wanted, inner.mask), inner.score, (here, *inner.fills))
    if op == "sub" and kind_of(term) == "float":
        return split(("add", parts[0], tidy(("neg", parts[1]))), low)
    if op == "add" and kind_of(term) == "float":
        left, right = (split(p, low) for p in parts)
        score = tidy(("add", left.score, right.score))
        return Split(both(left.mask, right.mask), score, left.fills + right.fills)
    if op in ("mul", "div"):
        factor, inner = _positive_factor(op, *parts)
        if factor is not None:
            found = split(inner, low)
            fills = tuple(Fill(f.value * factor, f.added) for f in found.fills)
            if all(f.value <= low for f in fills):
                score = tidy(
                    (op, found.score, parts[1]) if inner is parts[0] else (op, parts[0], found.score)
                )
                return Split(found.mask, score, fills)
    if op == "max":
        least = next((n for p in parts if (n := number(p)) is not None and n <= low), None)
        found = split(parts[0] if number(parts[1]) is not None else parts[1], low)
        if least is not None and found.fills:
            return Split(found.mask, found.score, tuple(Fill(float(least), False) for _ in found.fills))
    return Split(TRUE, term)


def _positive_factor(op: str, a: Term, b: Term) -> tuple[float | None, Term]:
    x, y = number(a), number(b)
    if y is not None and y > 0:
        return (float(y) if op == "mul" else 1 / float(y)), a
    if op == "mul" and x is not None and x > 0:
        return float(x), b
    return None, a


@dataclass(frozen=True)
class Bound:
    """What a kernel is called with at some sizes: a mask and maps, less the tensors of the call.

    mask, score: terms with p0.. and s0.. for their values, and names of tensors for c0.. and t0...
    empty: "none" (no row is empty), "zero", "nan" or "mean"; "sum" is the mean with gradients of the scores,
    to which the fill is added. levels: those that SHIFT is one of, where scores are shifted."""

    mask: Term
    values: tuple[int, ...]
    captures: tuple[str, ...]
    score: Term | None
    score_captures: tuple[str, ...]
    scale: float
    empty: str
    levels: tuple[float, ...] = ()


def bind(
    term: Term,
    sizes: Mapping[str, int],
    lengths: tuple[int, int],
    limits: tuple[float, float],
    empty: str,
    plain: bool,
    slopes: bool = False,
) -> Bound:
    """The parts of a score at given sizes.

    sizes: the values of $ names. lengths: (q_len, kv_len). limits: what `split` takes for low, and the lowest
    number that the original's softmax tells from -inf. empty: what rows of nothing but -inf give in the
    original. plain: whether probabilities are weighed as they come, and share with no sink. slopes: whether
    scores have gradients; beside a log-sum-exp as low as a fill probabilities would be lost, so that such
    rows are shifted."""
    low, least = limits
    found = split(term, low)
    mask, values, captures = _as_mask(found.mask, sizes)
    score, scale = _scaled(rename(found.score, sizes))
    levels: tuple[float, ...] = ()
    if found.mask == TRUE or never_empty(mask, values, captures, *lengths):
        empty = "none"
    elif any(f.value >= least for f in found.fills) and (plain or empty != "zero"):
        added = any(f.added for f in found.fills)
        if plain and _is_even(found.fills, least) and not (slopes and added and score != "score"):
            empty = "sum" if added and slopes else "mean"
        else:  # every pair takes part, with its low score
            empty = empty if any(f.value < least for f in found.fills) else "none"
            mask, values, captures = TRUE, (), ()
            score, scale = _scaled(rename(_bounded(term, least), sizes))
            if slopes:
                score = ("sub", ("max", score, constant(len(found.fills) * 2 * ABSORBING)), SHIFT)
                levels = _levels(found.fills, least)
    mapped, score_captures = (None, ()) if score == "score" else _captured(score, "t")
    return Bound(mask, values, captures, mapped, score_captures, scale, empty, levels)


def _levels(fills: Sequence[Fill], least: float) -> tuple[float, ...]:
    """Where the scores of a row may lie: at 0, and by its fills below."""
    levels = {0.0}
    for fill in fills:
        value = max(fill.value, ABSORBING) if fill.value >= least else -math.inf
        levels |= {value + level for level in levels}
    return tuple(sorted(level for level in levels if math.isfinite(level)))


def _is_even(fills: Sequence[Fill], least: float) -> bool:
    """Whether all pairs of a row without any that attends have one and the same finite score."""
    if len({f.value for f in fills}) > 1 or fills[0].value < least:
        return False
    if len(fills) > 1:  # one in the place of another is the same; one added to another is not
        return not any(f.added for f in fills)
    return not fills[0].added or fills[0].value <= ABSORBING


def _bounded(term: Term, least: float) -> Term:
    """The term with its finite fills no lower than kernels tell from -inf."""
    if not isinstance(term, tuple):
        return term
    value = number(term)
    if value is not None:
        return constant(ABSORBING) if least <= value < ABSORBING else term
    kept = len(term) - len(children(term))
    return (*term[:kept], *(_bounded(t, least) for t in term[kept:]))


def _scaled(score: Term) -> tuple[Term, float]:
    """The score map, and the factor that it applies to the product of query and key first."""
    scale = 1.0
    while True:
        found = _innermost(score)
        if found is None:
            return score, scale
        around, factor = found
        if not math.isfinite(scale * factor) or scale * factor < 2.0**-64:
            return score, scale
        score, scale = replaced(score, around, "score"), scale * factor


def _innermost(term: Term) -> tuple[Term, float] | None:
    """The only use of the score in a term, if it is a product with a number above 0."""
    uses = _uses(term)
    if len(uses) != 1 or not isinstance(uses[0], tuple) or uses[0][0] not in ("mul", "div"):
        return None
    op, a, b = uses[0]
    factor, inner = _positive_factor(op, a, b)
    return (uses[0], factor) if factor is not None and inner == "score" else None


def _uses(term: Term) -> list[Term]:
    """The operations that take the score itself, once for every time they do."""
    found = [term for t in children(term) if t == "score" and isinstance(t, str)]
    return found + [use for t in children(term) for use in _uses(t)]


# ---- masks -----------------------------------------------------------------------------------------


def _as_mask(term: Term, sizes: Mapping[str, int]) -> tuple[Term, tuple[int, ...], tuple[str, ...]]:
    numbers = {n for n in map(abs, _constants(term)) if n > 1}
    lift = len(numbers) <= MAX_LIFTED
    values: list[int] = []

    def param(value: int, literal: bool) -> Term:
        if literal and (not lift or abs(value) < 2):
            return value
        if value not in values:
            values.append(value)
        return f"p{values.index(value)}"

    lifted = tidy(_lifted(term, sizes, param))
    named, captures = _captured(lifted, "c")
    return named, tuple(values), captures


Param = Callable[[int, bool], Term]


def _apart(term: Term, sizes: Mapping[str, int]) -> tuple[dict[Term, int], int, bool]:
    """The part of an integer that depends on indices, the rest's value, whether the rest is a literal."""
    parts = linear(term)
    rest = {t: c for t, c in parts.items() if t == 1 or (isinstance(t, str) and t in sizes)}
    value = sum(c * (1 if t == 1 else sizes[str(t)]) for t, c in rest.items())
    return {t: c for t, c in parts.items() if t not in rest}, value, rest.keys() <= {1}


def _lifted(term: Term, sizes: Mapping[str, int], param: Param) -> Term:
    """The term with what indices are compared to, and moved by, as runtime integers."""
    if not isinstance(term, tuple) or term[0] == "f":
        return sizes.get(term, term) if isinstance(term, str) else term
    op = term[0]
    if op in COMPARISONS and kind_of(term[1]) == kind_of(term[2]) == "int":
        around, value, literal = _apart(("sub", term[1], term[2]), sizes)
        if around:
            leading = next((around[n] for n in ("q", "k", "b", "h") if n in around), 1)
            if leading < 0:
                op, around, value = _FLIPPED[op], {t: -c for t, c in around.items()}, -value
            inner = {_atom(t, sizes, param): c for t, c in around.items()}
            if (
                op in ("ge", "lt")
                and value >= 0
                and all(isinstance(t, str) and c > 0 for t, c in inner.items())
            ):
                return TRUE if op == "ge" else FALSE  # indices are 0 or more
            if value == 0 and literal and sorted(inner.values()) == [-1, 1]:
                return (op, *sorted(inner, key=lambda t: -inner[t]))
            return tidy((op, from_linear(inner), param(-value, literal)))
    if kind_of(term) == "int" and op in ("add", "sub", "neg"):
        return _index(term, sizes, param)
    return _atom(term, sizes, param)


def _index(term: Term, sizes: Mapping[str, int], param: Param) -> Term:
    around, value, literal = _apart(term, sizes)
    inner = from_linear({_atom(t, sizes, param): c for t, c in around.items()})
    if value < 0:
        return tidy(("sub", inner, param(-value, literal)))
    return tidy(("add", inner, param(value, literal)))


def _atom(term: Term, sizes: Mapping[str, int], param: Param) -> Term:
    if not isinstance(term, tuple) or term[0] == "f":
        return sizes.get(term, term) if isinstance(term, str) else term
    kept = len(term) - len(children(term))
    if term[0] in ("floordiv", "mod"):
        return (term[0], _lifted(term[1], sizes, param), rename(term[2], sizes))
    if term[0] in ("mul", "shl", "shr", "bitand", "bitor", "bitxor"):
        return rename(term, sizes)
    return (*term[:kept], *(_lifted(t, sizes, param) for t in term[kept:]))


def _constants(term: Term) -> set[int]:
    """The integers that indices are compared to or moved by."""
    found: set[int] = set()

    def note(value: int, literal: bool) -> Term:
        if literal:
            found.add(value)
        return value

    sizes = {name: 0 for name in names_in(term) if name.startswith("$")}
    _lifted(term, sizes, note)
    return found


def _captured(term: Term, letter: str) -> tuple[Term, tuple[str, ...]]:
    """The term with its tensors numbered, and their names."""
    names: list[str] = []

    def leaf(name: str) -> str:
        if not name.startswith("%"):
            return name
        if name not in names:
            names.append(name)
        return f"{letter}{names.index(name)}"

    return rewrite(term, leaf), tuple(names)


@lru_cache(maxsize=4096)
def never_empty(
    mask: Term, values: tuple[int, ...], captures: tuple[str, ...], q_len: int, kv_len: int
) -> bool:
    """Whether isl proves that every query of every batch and head has a key, whatever tensors hold."""
    import islpy as isl

    from ...ir.mask import Capture
    from ...ir.mask import Mask as IRMask
    from ...ir.sets import QuotaExceeded, locked, quota
    from ..term_expr import to_expr

    if mask == TRUE:
        return kv_len > 0
    if mask == FALSE:
        return False
    reads = {r[1]: ("f32" if r[0] == "readf" else "i32", len(r) - 2) for r in reads_in(mask)}
    tensors = tuple(Capture(f"c{i}", *reads.get(f"c{i}", ("i32", 1))) for i in range(len(captures)))
    bound = IRMask(to_expr(rename(mask, {f"p{i}": v for i, v in enumerate(values)})), (), tensors)

    @locked
    def prove() -> bool:
        with quota(1_000_000):
            keys = isl.Set(f"{{ [k] : 0 <= k < {kv_len} }}")
            rows = isl.Set(f"{{ [q] : 0 <= q < {q_len} }}")
            some = bound.must.intersect_range(keys).domain()
            return rows.is_subset(some)

    try:
        return bool(prove())
    except (QuotaExceeded, isl.Error):
        return False


def to_mask(bound: Bound, tensors: Mapping[str, Any]) -> Mask | None:
    """The Mask of a call; None for every pair."""
    if bound.mask == TRUE:
        return None
    held = tuple(tensors[name] for name in bound.captures)
    return Mask(bound.mask, bound.values, held, tuple(map(signature, held)))


def to_score(bound: Bound, tensors: Mapping[str, Any]) -> ScoreMod | None:
    """The ScoreMod of a call."""
    if bound.score is None:
        return None
    held = tuple(tensors[name] for name in bound.score_captures)
    return ScoreMod(bound.score, (), held, tuple(map(signature, held)))


def signature(tensor: Any) -> tuple[str, int]:
    from ..trace.tensor import dtype_name

    return dtype_name(tensor.dtype) or "", max(1, tensor.dim())

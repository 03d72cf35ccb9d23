"""Captured tensors read at indices that no closed form bounds: checked exactly before a kernel runs.

`passes/reads.py` gives affine indices a condition that costs microseconds a call. An index that depends on
values (`ids[pages[q]]`) or on products has none: it is evaluated here, over the indices it depends on,
whenever something is captured that way. The kernel keeps such reads inside their tensor, so that
without this check a wrong index would be a silent wrong result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import InputError
from .captured import as_numpy
from .term import children

if TYPE_CHECKING:
    from .mask import Mask
    from .placement import Placement
    from .problem import Problem
    from .score import ScoreMod

CHUNK = 1 << 22  # pairs evaluated at once
_PLAIN = ("add", "sub", "neg", "abs", "min", "max", "where")  # keep an affine index affine


def check_reads(problem: Problem, placed: Placement, mask: Mask, *maps: ScoreMod | None) -> None:
    """Raise InputError when an index without a closed-form check leaves its tensor.

    None has one where sequences differ in lengths or positions: all are then checked for each sequence."""
    sources: list[tuple[Any, Mask | None]] = [(mask, None), *((mapped, mask) for mapped in maps)]
    for source, attending in sources:
        if source is None or not source.captures or not (placed.uneven or _suspicious(source.key[1])):
            continue
        from ..passes.reads import every_index, unchecked

        expr = source.ir.predicate if source is mask else source.ir.expr
        if not placed.uneven:
            lengths = (problem.q_len, problem.kv_len)
            points = Points(range(problem.batch), problem.heads, *lengths, placed.values.get("q_offset", 0))
            _check(points, source, attending, unchecked(expr))
            continue
        for piece in placed.pieces(problem):
            points = Points(range(piece.b, piece.b + 1), problem.heads, *piece.lengths, piece.offset)
            _check(points, source, attending, every_index(expr))


@dataclass(frozen=True)
class Points:
    """The pairs of one sequence, or of several alike: their numbers, heads, lengths and first position."""

    b: range
    heads: int
    q_len: int
    kv_len: int
    offset: int


def _suspicious(term: Any) -> bool:
    """Whether some index may be beyond isl: a cheap test that errs on the side of True."""
    if not isinstance(term, tuple):
        return False
    if term[0] in ("read", "readf") and not all(map(_plain, term[2:])):
        return True
    return any(map(_suspicious, children(term)))


def _plain(index: Any) -> bool:
    if not isinstance(index, tuple):
        return True
    operation, *parts = index
    if operation in ("floordiv", "mod", "mul"):
        return sum(not isinstance(p, int) for p in parts) <= 1 and all(map(_plain, parts))
    return operation in _PLAIN and all(map(_plain, parts))


def _check(points: Points, source: Any, attending: Mask | None, indices: list[Any]) -> None:
    from ..ir.expr import symbols, to_text

    values: dict[str, Any] = {"q_len": points.q_len, "kv_len": points.kv_len}
    stem, tensor = ("p", "c") if attending is None else source.letters
    values |= {f"{stem}{i}": v for i, v in enumerate(source.values)}
    values |= {f"{tensor}{i}": as_numpy(t) for i, t in enumerate(source.tensors)}
    for read, index, dimension in indices:
        used = {"b", "h", "q", "k"}
        if attending is None:
            used &= {s.name for s in symbols(index)}
        size = values[str(read.args[0])].shape[dimension]
        for grid in _grids(points, used):
            _check_grid(to_text(read), index, size, values | grid, attending)


def _grids(points: Points, used: set[str]) -> Any:
    """Broadcastable arrays of the used indices (the first of others), so many points at a time."""
    lengths = {"b": len(points.b), "h": points.heads, "q": points.q_len, "k": points.kv_len}
    extents = {name: n if name in used else 1 for name, n in lengths.items()}
    others = extents["b"] * extents["h"] * extents["k"]
    step = max(1, CHUNK // max(1, others))
    for first in range(0, extents["q"], step):
        rows = np.arange(first, min(first + step, extents["q"]))
        b, h, k = (np.arange(extents[name]) for name in ("b", "h", "k"))
        yield {
            "b": points.b.start + b[:, None, None, None],
            "h": h[:, None, None],
            "q": points.offset + rows[:, None],
            "k": k,
        }


def _check_grid(text: str, index: Any, size: int, values: dict[str, Any], attending: Mask | None) -> None:
    from ..ir.errors import InterpretError
    from ..ir.evaluate import evaluate

    try:
        found = np.asarray(evaluate(index, values))
    except InterpretError as error:
        expected = "captured tensors that cover every index read from them"
        raise InputError("attention", expected, error) from None
    bad = (found < 0) | (found >= size)
    if bad.any() and attending is not None:
        tensors = [as_numpy(t) for t in attending.tensors]
        b, h, q, k, *lengths = (values[name] for name in ("b", "h", "q", "k", "q_len", "kv_len"))
        bad = bad & attending.ir.evaluate(b, h, q, k, attending.values, tensors, *lengths)
    if bad.any():
        worst = int(np.broadcast_to(found, bad.shape)[bad].flat[0])
        expected = f"an index from 0 to {size - 1}"
        raise InputError(f"attention: {text}", expected, worst, "Make the tensor longer")

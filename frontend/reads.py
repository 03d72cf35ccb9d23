"""Captured tensors read at indices that no closed form bounds: checked exactly before a kernel runs.

`passes/reads.py` gives affine indices a condition that costs microseconds a call. An index that depends on
values (`ids[pages[q]]`) or on products has none: it is evaluated here, over the indices it depends on,
whenever something is captured that way. The kernel keeps such reads inside their tensor, so that
without this check a wrong index would be a silent wrong result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import InputError
from .captured import as_numpy
from .term import children

if TYPE_CHECKING:
    from .mask import Mask
    from .problem import Problem
    from .score import ScoreMod

CHUNK = 1 << 22  # pairs evaluated at once
_PLAIN = ("add", "sub", "neg", "abs", "min", "max", "where")  # keep an affine index affine


def check_reads(problem: Problem, mask: Mask, *maps: ScoreMod | None) -> None:
    """Raise InputError when an index without a closed-form check leaves its tensor."""
    if mask.tensors and _suspicious(mask.key[1]):
        _check(problem, mask, None, mask.ir.predicate, mask)
    for mapped in maps:
        if mapped is not None and mapped.tensors and _suspicious(mapped.key[1]):
            _check(problem, mapped, mask, mapped.ir.expr, mask)


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


def _check(problem: Problem, source: Any, attending: Mask | None, expr: Any, mask: Mask) -> None:
    from ..ir.expr import symbols, to_text
    from ..passes.reads import unchecked

    lengths = {"b": problem.batch, "h": problem.heads, "q": problem.q_len, "k": problem.kv_len}
    values: dict[str, Any] = {"q_len": problem.q_len, "kv_len": problem.kv_len}
    stem, tensor = ("p", "c") if source is mask else source.letters
    values |= {f"{stem}{i}": v for i, v in enumerate(source.values)}
    values |= {f"{tensor}{i}": as_numpy(t) for i, t in enumerate(source.tensors)}
    for read, index, dimension in unchecked(expr):
        used = {s.name for s in symbols(index)} & set(lengths)
        if attending is not None:
            used = set(lengths)
        size = values[str(read.args[0])].shape[dimension]
        for grid in _grids(lengths, used):
            _check_grid(to_text(read), index, size, values | grid, attending, problem)


def _grids(lengths: dict[str, int], used: set[str]) -> Any:
    """Broadcastable arrays of the used indices (zero elsewhere), a bounded number of points at a time."""
    extents = {name: n if name in used else 1 for name, n in lengths.items()}
    others = extents["b"] * extents["h"] * extents["k"]
    step = max(1, CHUNK // max(1, others))
    for first in range(0, extents["q"], step):
        rows = np.arange(first, min(first + step, extents["q"]))
        b, h, k = (np.arange(extents[name]) for name in ("b", "h", "k"))
        yield {
            "b": b[:, None, None, None],
            "h": h[:, None, None],
            "q": rows[:, None],
            "k": k,
        }


def _check_grid(
    text: str, index: Any, size: int, values: dict[str, Any], attending: Mask | None, problem: Problem
) -> None:
    from ..ir.errors import InterpretError
    from ..ir.evaluate import evaluate

    try:
        found = np.asarray(evaluate(index, values))
    except InterpretError as error:
        expected = "captured tensors that cover every index read from them"
        raise InputError("attention", expected, error) from None
    bad = (found < 0) | (found >= size)
    if bad.any() and attending is not None:
        tensors, lengths = [as_numpy(t) for t in attending.tensors], (problem.q_len, problem.kv_len)
        b, h, q, k = (values[name] for name in ("b", "h", "q", "k"))
        bad = bad & attending.ir.evaluate(b, h, q, k, attending.values, tensors, *lengths)
    if bad.any():
        worst = int(np.broadcast_to(found, bad.shape)[bad].flat[0])
        expected = f"an index from 0 to {size - 1}"
        raise InputError(f"attention: {text}", expected, worst, "Make the tensor longer")

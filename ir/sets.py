"""Integer sets: the lock around isl, and the few operations on sets that every pass needs.

isl contexts are not thread-safe. `ISL_LOCK` is the one lock around them: public functions of gossamer
that reach isl take it (`locked`), and it is re-entrant. Code that calls islpy on its own must hold it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import islpy as isl

ISL_LOCK = threading.RLock()
PARAM, SET, DIV = isl.dim_type.param, isl.dim_type.set, isl.dim_type.div
IN, OUT = isl.dim_type.in_, isl.dim_type.out
F = TypeVar("F", bound=Callable)


def locked(function: F) -> F:
    """Run a function under ISL_LOCK."""

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        with ISL_LOCK:
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


class QuotaExceeded(Exception):
    """isl was stopped because the answer took more operations than it is worth."""


@contextmanager
def quota(operations: int) -> Iterator[None]:
    """Stop isl with QuotaExceeded after so many operations (a million take about 0.6 s). Not nested."""
    context = isl.DEFAULT_CONTEXT
    context.reset_operations()
    context.set_max_operations(operations)
    try:
        yield
    except (isl.Error, TypeError):  # islpy's conversions of what a stopped isl answers fail with TypeError
        if not _spent():
            raise
        raise QuotaExceeded from None
    finally:
        context.set_max_operations(0)
        context.reset_operations()


def _spent() -> bool:
    """Whether isl refuses to work on; what it was at when it stopped may have failed with any message."""
    try:
        isl.Set("{ [x] : x > 0 }").intersect(isl.Set("{ [x] : x < 9 }")).is_empty()
    except isl.Error:
        return True
    return False


def flatten(points: isl.Set, keep: str = "") -> isl.Set:
    """The same set with every dimension but `keep` turned into a parameter of its name."""
    for i in reversed(range(points.dim(SET))):
        name = str(points.get_dim_name(SET, i))
        if name != keep:
            end = points.dim(PARAM)
            points = points.move_dims(PARAM, end, SET, i, 1).set_dim_name(PARAM, end, name)
    return points


@locked
def project(points: isl.Set, *names: str) -> isl.Set:
    """The set without the dimensions `names`: points for which some value of them is in the set."""
    for name in names:
        points = points.project_out(SET, points.find_dim_by_name(SET, name), 1)
    return points.coalesce()


@locked
def convex(points: isl.Set, dim: str) -> bool:
    """Whether the values of one dimension are an interval (no holes) for all values of everything else."""
    flat = flatten(points, dim)
    up = isl.Map("{ [x] -> [y] : y >= x }")
    return flat.apply(up).intersect(flat.apply(up.reverse())).is_equal(flat)

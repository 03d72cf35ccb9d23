"""What a program differentiates while it is traced, replaced before JAX differentiates it.

`jax.grad` leaves no mark in a jaxpr: what it is of and its gradient come out as one list of operations,
in which probabilities are used twice, or saved by one loop for another. So a function is changed where JAX
begins with it: in `linearize` of jax.interpreters.ad, which `grad`, `vjp`, `jacrev` and their like all call.
Within a function that is differentiated, in either mode, nothing more is replaced: kernels have first
derivatives.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any

import jax
from jax.interpreters import ad

Function = Callable[..., Any]
Change = Callable[[Function], Function]

_change: ContextVar[Change | None] = ContextVar("gossamer_jax_change", default=None)
_changes = jax.make_user_context(None)  # whether there is one: JAX's caches of traces look at it
_watching = threading.Lock()
_WATCHED = "gossamer_change"


@contextlib.contextmanager
def changing(change: Change | None) -> Iterator[None]:
    """Within it, a function whose gradient is taken in reverse mode is changed first."""
    _watch()
    token = _change.set(change)
    try:
        with _changes(None if change is None else True):
            yield
    finally:
        _change.reset(token)


def _watch() -> None:
    """Put our functions in front of those that JAX differentiates by, once."""
    module = sys.modules[ad.linearize.__module__]
    with _watching:
        for name in ("linearize", "jvp"):
            if not hasattr(getattr(module, name), _WATCHED):
                setattr(module, name, _watched(getattr(module, name)))


def _watched(differentiate: Function) -> Function:
    @wraps(differentiate)
    def run(function: Function, *args: Any, **options: Any) -> Any:
        change = _change.get()
        if change is None:
            return differentiate(function, *args, **options)
        # JAX 0.10.0 passes transformations that are no functions yet: they stay as they are.
        reverse = options.get("is_vjp") and not hasattr(function, "call_wrapped")
        with changing(None):
            return differentiate(change(function) if reverse else function, *args, **options)

    setattr(run, _WATCHED, True)
    return run

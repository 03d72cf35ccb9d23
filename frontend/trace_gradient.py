"""Which values of a traced function gradients hold fixed: those of `detach()` and of `torch.no_grad()`."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

from .term import Term, children, is_constant

_FLOATS = frozenset(("score", "prob", "x0", "x1"))


def grad_enabled() -> bool:
    """Whether torch records operations for gradients now."""
    torch = sys.modules.get("torch")
    return torch is None or torch.is_grad_enabled()


def recording() -> AbstractContextManager[object]:
    """Gradients on, whatever the caller of a traced function set: what is seen off is off in the function."""
    torch = sys.modules.get("torch")
    return nullcontext() if torch is None else torch.enable_grad()


def stopped(term: Term) -> Term:
    """The float term, constant to gradients.

    >>> stopped(("readf", 0, "k")), stopped(("cast", "f32", "q"))
    (('stop_gradient', ('readf', 0, 'k')), ('cast', 'f32', 'q'))
    """
    fixed = is_constant(term) or (isinstance(term, tuple) and term[0] == "stop_gradient")
    return term if fixed or not _varies(term) else ("stop_gradient", term)


@lru_cache(maxsize=1024)
def _varies(term: Term) -> bool:
    """Whether a term has something in it that gradients are taken by."""
    if not isinstance(term, tuple):
        return term in _FLOATS
    return term[0] == "readf" or (term[0] != "num" and any(map(_varies, children(term))))

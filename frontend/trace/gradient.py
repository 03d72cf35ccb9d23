"""Which values of a traced function gradients hold fixed: those of `detach()` and of `torch.no_grad()`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache

from ..term import Term, children, is_constant

_FLOATS = frozenset(("score", "prob", "x0", "x1"))


def grad_enabled() -> bool:
    """Whether torch records operations for gradients now."""
    torch = sys.modules.get("torch")
    return torch is None or torch.is_grad_enabled()


@contextmanager
def recording() -> Iterator[None]:
    """Gradients on, whatever the caller of a traced function set: what is seen off is off in the function.

    Modes that watch functions of torch are set aside: torch.export would record these switches."""
    torch = sys.modules.get("torch")
    with ExitStack() as stack:
        if torch is not None:
            for _ in range(torch._C._len_torch_function_stack()):
                stack.enter_context(torch.overrides._pop_mode_temporarily())
            stack.enter_context(torch.enable_grad())
        yield


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

"""What torch.compile traces, and what it runs itself: said without loading torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def pure(function: Function) -> Function:
    """Mark a function whose result depends on its arguments alone.

    Dynamo runs it with the constants that it knows, as torch.compiler.assume_constant_result says."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def uncompiled(function: Function) -> Function:
    """Mark a function that launches kernels by itself: graphs of torch.compile end before it."""
    import torch

    return torch.compiler.disable(function)  # type: ignore[return-value]


def is_compiled() -> bool:
    """Whether torch.compile traces the caller."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_dynamo_compiling()

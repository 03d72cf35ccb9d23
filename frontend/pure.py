"""Functions of constants, which torch.compile runs itself instead of tracing how they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def pure(function: Function) -> Function:
    """Mark a function whose result depends on its arguments alone.

    It says what torch.compiler.assume_constant_result says, without loading torch."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function

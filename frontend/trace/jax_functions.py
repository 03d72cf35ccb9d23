"""JAX's functions on the stand-ins of tracing: `jax.numpy`, `jax.nn` and `jax.lax.stop_gradient`.

JAX looks for an array in every argument, so a stand-in cannot answer for it as it does for torch and NumPy. A
traced function that captures one of JAX's modules finds these in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .error import trace_error
from .kinks import detach
from .tensor import Captured
from .torch_functions import FUNCTIONS, call, maximum, minimum
from .value import Number, Value


def adapted(value: Any) -> Any:
    """A module or a function of JAX, which takes stand-ins too; anything else as it is."""
    if isinstance(value, ModuleType):
        return _Module(value)
    if callable(value) and not isinstance(value, type) and hasattr(value, "__name__"):
        return functools.partial(_call, value)
    return value


class _Module:
    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return adapted(getattr(self._module, name))


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    stand_in = next((a for a in (*args, *kwargs.values()) if isinstance(a, (Value, Number, Captured))), None)
    if stand_in is None:
        return function(*args, **kwargs)
    module, name = function.__module__, function.__name__
    if name in _OWN:
        return _OWN[name](*args, **kwargs)
    if module.startswith(("jax.lax", "jax._src.lax")) or (name in _REDUCTIONS and name in FUNCTIONS):
        fix = "Use operators and the functions of jax.numpy that work on one element"
        raise trace_error(f"{stand_in.trace.role} calls {module}.{name}(), which cannot be captured", fix)
    return call(function, args, kwargs)


def _clip(x: Any, min: Any = None, max: Any = None) -> Any:
    x = x if min is None else maximum(x, min)
    return x if max is None else minimum(x, max)


def _gelu(x: Any, approximate: bool = True) -> Any:
    return FUNCTIONS["gelu"](x, approximate="tanh" if approximate else "none")


_OWN: dict[str, Callable[..., Any]] = {"stop_gradient": detach, "clip": _clip, "gelu": _gelu}
"""Functions that mean something else than torch's of that name, in their result or in their slope."""
_REDUCTIONS = ("min", "max")

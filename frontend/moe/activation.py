"""What happens between the two products of an expert: a name, or a function that is traced.

    swiglu    silu(gate) * up                     the default of gated experts
    geglu     gelu(gate) * up;  geglu_tanh: with the tanh form
    reglu     relu(gate) * up
    silu, gelu, gelu_tanh, relu, relu2            of one argument; gated experts multiply by up
    a function of (gate, up), or of one argument, by whose result of the gate gated experts multiply up

`clamped_swiglu(alpha, limit)` is what gpt-oss uses.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

from ...ir.errors import InputError, UnsupportedError
from ..term import Term, constant, rename
from ..trace.function import Traced, trace_activation

X, GATE, UP = "x0", "x0", "x1"


def _one(x: float) -> Term:
    return constant(float(x))


def _gelu(x: Term) -> Term:
    return ("mul", ("mul", _one(0.5), x), ("add", _one(1), ("erf", ("mul", x, _one(0.5**0.5)))))


def _gelu_tanh(x: Term) -> Term:
    cube = ("mul", _one(0.044715), ("mul", x, ("mul", x, x)))
    inner = ("mul", _one((2 / 3.141592653589793) ** 0.5), ("add", x, cube))
    return ("mul", ("mul", _one(0.5), x), ("add", _one(1), ("tanh", inner)))


def _relu(x: Term) -> Term:
    return ("where", ("le", x, _one(0)), _one(0), x)  # slope 0 at 0


ONE_ARGUMENT: dict[str, Term] = {
    "silu": ("mul", X, ("sigmoid", X)),
    "gelu": _gelu(X),
    "gelu_tanh": _gelu_tanh(X),
    "relu": _relu(X),
    "relu2": ("mul", _relu(X), _relu(X)),
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def clamped_swiglu(alpha: float = 1.702, limit: float = 7.0) -> Callable[[Any, Any], Any]:
    """gpt-oss's gate: both halves clamped, then (up + 1) * gate * sigmoid(alpha * gate)."""

    def activation(gate: Any, up: Any) -> Any:
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
        return (up + 1) * (gate * (gate * alpha).sigmoid())

    return activation


def activation_term(activation: Any, *, gated: bool) -> Term:
    """The term over x0 (and x1) of what `experts` was given.

    Raises InputError for an unknown name, TraceError for a function that cannot be captured."""
    if isinstance(activation, str):
        return _named(activation, gated)
    known = getattr(activation, "term", None)  # captured already
    if known is not None:
        return known
    if not callable(activation):
        raise InputError("experts.activation", f"a function, or one of {_names()}", repr(activation))
    if gated and _wanted(activation) == 1:
        return ("mul", baked(trace_activation(activation, gated=False)), UP)
    return baked(trace_activation(activation, gated=gated))


def _wanted(function: Any) -> int | None:
    """How many arguments a function or a module wants, `silu(input, inplace=False)` one; None where nothing
    says. What torch wrote in C++ has no signature of its own, but torch keeps one for who overrides it."""
    function = getattr(function, "forward", function)
    if type(function) is FunctionType and not hasattr(function, "__wrapped__"):  # at each call: be quick
        code = function.__code__
        many = code.co_flags & inspect.CO_VARARGS
        return None if many else code.co_argcount - len(function.__defaults__ or ())
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        overrides = sys.modules.get("torch.overrides")
        known = overrides and overrides.get_testing_overrides().get(function)
        if known is None:
            return None
        signature = inspect.signature(known)
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in by_position and p.default is p.empty for p in parameters)


def baked(traced: Traced) -> Term:
    """The term of a traced activation, with its numbers. Raises UnsupportedError if it reads tensors."""
    if traced.tensors:
        raise UnsupportedError(
            "experts.activation: a function that reads tensors is not built yet; capture numbers"
        )
    return rename(traced.term, {f"a{i}": constant(v) for i, v in enumerate(traced.values)})


@lru_cache(maxsize=64)
def _named(name: str, gated: bool) -> Term:
    if gated and GATED.get(name, name) in ONE_ARGUMENT:
        return ("mul", ONE_ARGUMENT[GATED.get(name, name)], UP)
    if not gated and name in ONE_ARGUMENT:
        return ONE_ARGUMENT[name]
    fix = "These matrices have no gate: gate_up_proj has as many columns as down_proj has inputs"
    raise InputError("experts.activation", f"one of {_names()}", repr(name), fix if name in GATED else "")


def _names() -> str:
    return ", ".join((*GATED, *ONE_ARGUMENT))

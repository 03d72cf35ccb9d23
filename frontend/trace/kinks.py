"""Functions of torch whose slopes at single points are a convention, as choices that have these slopes.

    relu(x)         where(x <= 0, 0, x)                    slope 0 at 0
    clamp(x, a, b)  where(x < a, a, where(x > b, b, x))    slope 1 at a and b

NaN stays NaN. Maxima and minima share the slope of equal arguments, and are functions of expressions.
"""

from __future__ import annotations

from typing import Any

from .gradient import stopped
from .operate import operate, select, value_of
from .tensor import Captured
from .value import Number, Value


def relu(x: Any) -> Any:
    """0 up to 0."""
    return _bounded("max", "le", x, 0)


def at_least(x: Any, low: Any) -> Any:
    """clamp(x, min=low)."""
    return _bounded("max", "lt", x, low)


def at_most(x: Any, high: Any) -> Any:
    """clamp(x, max=high)."""
    return _bounded("min", "gt", x, high)


def clamp(x: Any, low: Any = None, high: Any = None) -> Any:
    """x between two bounds, of which the upper one wins over a lower one above it."""
    if high is None:
        return x if low is None else at_least(x, low)
    if low is None:
        return at_most(x, high)
    x = x.element() if type(x) is Captured else x
    if not _has_slope(x):
        return at_most(at_least(x, low), high)
    least = min(low, high) if _are_plain(low, high) else operate("min", low, high)
    return select(operate("lt", x, low), value_of(x.trace, least), at_most(x, high))


def _bounded(extreme: str, beyond: str, x: Any, bound: Any) -> Any:
    """x, or the bound where x is beyond it."""
    if _are_plain(x, bound):
        return min(x, bound) if extreme == "min" else max(x, bound)
    x = x.element() if type(x) is Captured else x
    if not _has_slope(x):
        return operate(extreme, x, bound)
    return select(operate(beyond, x, bound), value_of(x.trace, bound), x)


def _has_slope(x: Any) -> bool:
    return type(x) is Value and x.kind == "float" and x.trace.learns


def _are_plain(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) and type(v) is not Number for v in values)


def detach(x: Any) -> Any:
    """x, constant to gradients."""
    if type(x) is Captured:
        return x.detach()
    return Value(x.trace, stopped(x.term), "float") if _has_slope(x) else x

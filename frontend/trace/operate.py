"""Operations on stand-ins: the kinds they take and give, and where captured numbers bake.

Kinds follow torch: `&` and `|` on truth values are logical, a truth value among numbers is 0 or 1,
`/` gives a float, `//` and `%` round down.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..term import FALSE, TRUE, Term, both, constant, either, negate
from .error import trace_error
from .tensor import Captured
from .value import COMPARISONS, Number, Value, is_number, numbers

if TYPE_CHECKING:
    from .captures import Trace

_BAKES_RIGHT = frozenset(("floordiv", "mod", "shl", "shr", "pow"))
_BAKES = frozenset(("mul", "div", "bitand"))


def operate(op: str, *args: Any) -> Any:
    """One operation on stand-ins and numbers, by its name in terms (bitand serves `&` on truth values)."""
    if all(map(is_number, args)):
        return numbers(op, *args)
    if op in ("eq", "ne") and any(a is None or isinstance(a, str) for a in args):
        return NotImplemented
    trace = next(a.trace for a in args if type(a) in (Value, Number, Captured))
    if op in _BAKES_RIGHT or (op in _BAKES and not trace.float_params):
        bakes_left = op in _BAKES
        args = tuple(a.bake() if type(a) is Number and (i or bakes_left) else a for i, a in enumerate(args))
    if op in _ROUNDS:
        args = _rounded(op, *args)
    values = [value_of(trace, a) for a in args]
    return _OPERATE[op](op, *values)


# An integer is at most 2.5 exactly when it is at most 2: how a float on the (left, right) is rounded.
_ROUNDS = {"lt": ("floor", "ceil"), "le": ("ceil", "floor"), "gt": ("ceil", "floor"), "ge": ("floor", "ceil")}


def _rounded(op: str, a: Any, b: Any) -> tuple[Any, Any]:
    """An order between an integer and a float number, as one between integers."""
    if type(a) is Value and a.kind == "int" and _is_finite_float(b):
        return a, _round(_ROUNDS[op][1], b)
    if type(b) is Value and b.kind == "int" and _is_finite_float(a):
        return _round(_ROUNDS[op][0], a), b
    return a, b


def _is_finite_float(x: Any) -> bool:
    return is_number(x) and isinstance(x, float) and math.isfinite(x.value if type(x) is Number else x)


def _round(way: str, x: Any) -> Any:
    return numbers(way, x) if type(x) is Number else getattr(math, way)(x)


def value_of(trace: Trace, x: Any) -> Value:
    """x as an expression."""
    if type(x) is Value:
        return x
    if type(x) is Number:
        return trace.number(x)
    if isinstance(x, (bool, int, float)):
        kind = "bool" if isinstance(x, bool) else "int" if isinstance(x, int) else "float"
        return Value(trace, constant(x), kind)
    if type(x) is Captured:
        return x.element()
    if getattr(x, "shape", None) == () and hasattr(x, "item"):
        trace.memo = False  # made inside the function: what it holds was read just now
        return value_of(trace, x.item())
    shape = f" of shape {tuple(x.shape)}" if hasattr(x, "shape") else ""
    raise trace_error(
        f"{trace.role}: expected an index, a number or an element of a captured tensor; "
        f"got {type(x).__name__}{shape}"
    )


def as_int(x: Value) -> Value:
    """A truth value as 0 or 1; anything else as it is."""
    return x if x.kind != "bool" else Value(x.trace, ("where", x.term, 1, 0), "int")


def as_float(x: Value) -> Value:
    """An integer as torch's default float, float32; a float as it is."""
    return x if x.kind == "float" else Value(x.trace, ("cast", "f32", as_int(x).term), "float")


def as_bool(x: Value) -> Value:
    """x != 0."""
    return x if x.kind == "bool" else Value(x.trace, ("ne", x.term, 0), "bool")


def _make(op: str, *args: Value) -> Value:
    kind = "float" if any(a.kind == "float" for a in args) else "int"
    return Value(args[0].trace, (op, *(as_int(a).term for a in args)), kind)


def _arithmetic(op: str, a: Value, b: Value) -> Value:
    if a.kind == b.kind == "bool":
        if op == "sub":
            raise trace_error(f"{a.trace.role} subtracts truth values", "Use a ^ b, or a & ~b")
        return Value(a.trace, (both if op == "mul" else either)(a.term, b.term), "bool")
    return _make(op, a, b)


def _divide(op: str, a: Value, b: Value) -> Value:
    return _make("div", as_float(a), as_float(b))


def _whole(op: str, a: Value, b: Value) -> Value:
    if b.term in (0, FALSE):
        raise trace_error(f"{a.trace.role} divides by zero")
    if "float" not in (a.kind, b.kind):
        return _make(op, a, b) if b.term != 1 else a if op == "floordiv" else a.trace.constant(0)
    quotient = _make("floor", _make("div", as_float(a), as_float(b)))
    return quotient if op == "floordiv" else a - quotient * b


def _power(op: str, a: Value, b: Value) -> Value:
    exponent = b.term if isinstance(b.term, int) else None
    if isinstance(b.term, tuple) and b.term[0] == "f":
        exponent = float.fromhex(b.term[1])
        if exponent == 0.5 or exponent == -0.5:
            root = _make("sqrt", as_float(a))
            return root if exponent > 0 else 1.0 / root
        a = as_float(a)
    if exponent is not None and exponent in (1, 2, 3, 4):
        out = a
        for _ in range(int(exponent) - 1):
            out = _make("mul", out, a)
        return out
    if a.term == 2 and b.kind == "int":
        return _make("shl", a.trace.constant(1), b)
    if a.kind == "int" and b.kind == "int":
        raise trace_error(
            f"{a.trace.role} raises an integer to an integer power; expected a constant power of 1 to 4, "
            "or 2 as the base",
            "Use .float() for a power of floats",
        )
    if exponent == -1:
        return 1.0 / a
    if a.term == 2 or a.term == constant(2.0):
        return _make("exp2", as_float(b))
    return _make("pow", as_float(a), as_float(b))


def _bits(op: str, a: Value, b: Value) -> Value:
    if "float" in (a.kind, b.kind):
        raise trace_error(f"{a.trace.role}: bit operations expect truth values or integers; got a float")
    if not a.kind == b.kind == "bool":
        return _make(op, a, b)
    if op == "bitxor":
        return Value(a.trace, _differ(a.term, b.term), "bool")
    return Value(a.trace, (both if op == "bitand" else either)(a.term, b.term), "bool")


def _differ(a: Term, b: Term) -> Term:
    return either(both(a, negate(b)), both(negate(a), b))


def _shift(op: str, a: Value, b: Value) -> Value:
    if "float" in (a.kind, b.kind):
        raise trace_error(f"{a.trace.role}: a shift expects integers; got a float")
    return _make(op, a, b)


def _compare(op: str, a: Value, b: Value) -> Value:
    if a.kind == b.kind == "bool" and op in ("eq", "ne"):
        differ = _differ(a.term, b.term)
        return Value(a.trace, differ if op == "ne" else negate(differ), "bool")
    return Value(a.trace, (op, as_int(a).term, as_int(b).term), "bool")


def _extreme(op: str, a: Value, b: Value) -> Value:
    if a.kind == b.kind == "bool":
        return Value(a.trace, (both if op == "min" else either)(a.term, b.term), "bool")
    return _make(op, a, b)


def _unary(op: str, a: Value) -> Value:
    if a.kind == "bool":
        raise trace_error(f"{a.trace.role}: {op} expects a number; got a truth value", "Use ~ to negate it")
    return _make(op, a)


def _invert(op: str, a: Value) -> Value:
    if a.kind == "float":
        raise trace_error(f"{a.trace.role}: ~ expects a truth value or an integer; got a float")
    return Value(a.trace, negate(a.term), "bool") if a.kind == "bool" else -a - 1


def select(c: Value, a: Value, b: Value) -> Value:
    """`a` where the condition holds, else `b`."""
    if c.kind != "bool":
        raise trace_error(f"{c.trace.role}: where expects a truth value as its condition; got {c.kind}")
    if c.term in (TRUE, FALSE):
        return a if c.term == TRUE else b
    if a.kind == b.kind == "bool":
        return Value(c.trace, either(both(c.term, a.term), both(negate(c.term), b.term)), "bool")
    kind = "float" if "float" in (a.kind, b.kind) else "int"
    return Value(c.trace, ("where", c.term, as_int(a).term, as_int(b).term), kind)


_OPERATE = {
    **dict.fromkeys(("add", "sub", "mul"), _arithmetic),
    **dict.fromkeys(("floordiv", "mod"), _whole),
    **dict.fromkeys(("bitand", "bitor", "bitxor"), _bits),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(COMPARISONS, _compare),
    **dict.fromkeys(("min", "max"), _extreme),
    **dict.fromkeys(("neg", "abs"), _unary),
    "div": _divide,
    "pow": _power,
    "invert": _invert,
}

"""torch's and NumPy's functions and tensor methods, on the stand-ins of tracing.

One table serves `torch.where(...)`, `numpy.where(...)` and `x.where(...)`: it is keyed by the name
alone, for all three agree on what a name means.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from ..term import negate
from .error import trace_error
from .kinks import at_least, at_most, clamp, detach, relu
from .operate import as_bool, as_float, as_int, operate, select, value_of
from .tensor import Captured, dtype_name
from .value import Number, Value, numbers

Function = Callable[..., Any]


def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a torch or NumPy function gives on stand-ins."""
    name = getattr(function, "__name__", str(function))
    is_method = type(function).__name__ == "method_descriptor"
    found = (METHODS.get(name) if is_method else None) or FUNCTIONS.get(_plain(name))
    if found is None:
        trace = _trace_of(args, kwargs)
        raise trace_error(f"{trace.role} calls {name}(), which cannot be captured", _supported())
    return _run(found, name, args, kwargs)


def method(x: Value | Captured, name: str) -> Any:
    """The method or attribute `name` of a stand-in."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name in _READS:
        raise trace_error(
            f"{x.trace.role} calls .{name}(); expected operators only, for {_what(x)} has no value while "
            "tracing",
            "Compute with it directly: torch.where, &, | and captured tensors indexed by it",
        )
    if isinstance(x, Captured):
        if name == "to":
            return functools.partial(_move, x)
        raise trace_error(
            f"{x.trace.role} uses .{name} of a whole captured tensor of shape {tuple(x.tensor.shape)}",
            "Index it by b, h, q, kv or expressions of them first, or do this before capturing it",
        )
    if name in _ATTRIBUTES:
        return _ATTRIBUTES[name](x)
    found = METHODS.get(name) or FUNCTIONS.get(_plain(name))
    if found is None:
        raise trace_error(f"{x.trace.role} uses .{name}, which cannot be captured", _supported())
    return lambda *args, **kwargs: _run(found, f".{name}", (x, *args), kwargs)


def _run(function: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kwargs = {_KEYWORDS.get(k, k): v for k, v in kwargs.items() if k not in _PLACEMENT}
    first = [kwargs.pop(k) for k in ("condition", "input", "self") if k in kwargs]
    last = [kwargs.pop(k) for k in ("other", "exponent", "value", "fill_value") if k in kwargs]
    args = (*first, *args, *last)
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        trace = _trace_of(args, kwargs)
        raise trace_error(f"{trace.role} calls {name}() in a way that cannot be captured: {error}") from None


def _trace_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next(a.trace for a in (*args, *kwargs.values()) if type(a) in (Value, Number, Captured))


def _plain(name: str) -> str:
    """__iadd__ and add_ are add; special_expit is expit."""
    bare = name.removeprefix("special_").strip("_")
    if name.startswith("__") and bare not in FUNCTIONS and bare[0] in "ir":
        return bare[1:] if bare[1:] in FUNCTIONS else bare
    return bare


def _what(x: Value | Captured) -> str:
    return "an index" if isinstance(x, Value) else "a captured tensor, read at each call,"


def _supported() -> str:
    return "What can: " + ", ".join(n for n in sorted(FUNCTIONS) if n not in _OPERATOR_NAMES)


def _move(x: Captured, *args: Any, **kwargs: Any) -> Captured:
    """`captured.to(device)`: where a tensor lives is checked when the kernel is called."""
    for dtype in (*args, *kwargs.values()):
        if dtype_name(dtype) is not None and dtype != x.tensor.dtype:
            raise trace_error(
                f"{x.trace.role} converts a whole captured tensor to {dtype}",
                "Convert the element read from it",
            )
    return x


# ---- the table ----


def _of(op: str) -> Function:
    def apply(*args: Any) -> Any:
        return operate(op, *args)

    return apply


def _reversed(op: str) -> Function:
    return lambda a, b: operate(op, b, a)


def _floating(op: str) -> Function:
    def apply(x: Any) -> Value:
        value = as_float(_value(x))
        return Value(value.trace, (op, value.term), "float")

    return apply


def _logic(op: str) -> Function:
    def apply(*args: Any) -> Any:
        trace = _trace_of(args, {})
        return operate(op, *(as_bool(value_of(trace, a)) for a in args))

    return apply


def _value(x: Any) -> Value:
    return value_of(x.trace, x)


def where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, bool):
        return a if condition else b
    trace = _trace_of((condition, a, b), {})
    c, x, y = (value_of(trace, v) for v in (condition, a, b))
    return select(c, x, y)


def _extreme(op: str) -> Function:
    def apply(a: Any, b: Any) -> Any:
        only_numbers = all(type(x) in (Number, int, float) for x in (a, b))
        return numbers(op, a, b) if only_numbers else operate(op, a, b)

    return apply


minimum, maximum = _extreme("min"), _extreme("max")


def _elu(x: Any, alpha: Any = 1.0, inplace: bool = False) -> Any:
    return where(x > 0, x, alpha * (_floating("exp")(at_most(x, 0)) - 1.0))


def _softplus(x: Any, beta: Any = 1.0, threshold: Any = 20.0) -> Any:
    """torch's softplus, linear beyond the threshold."""
    scaled = x * beta
    soft = _floating("log")(1.0 + _floating("exp")(at_most(scaled, threshold))) / beta
    return where(scaled > threshold, x, soft)


def _gelu(x: Any, approximate: str = "none") -> Any:
    """torch's gelu: by the error function, or by tanh."""
    if approximate == "tanh":
        return 0.5 * x * (1.0 + _floating("tanh")(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1.0 + _floating("erf")(x * math.sqrt(0.5)))


def _scaled(op: str) -> Function:
    def apply(a: Any, b: Any, alpha: Any = 1) -> Any:
        return operate(op, a, b if type(alpha) is int and alpha == 1 else alpha * b)

    return apply


def _trunc_divide(a: Any, b: Any) -> Any:
    trace = _trace_of((a, b), {})
    x, y = value_of(trace, a), value_of(trace, b.bake() if type(b) is Number else b)
    if "float" in (x.kind, y.kind):
        return _floating("trunc")(x / y)
    return select(value_of(trace, (x < 0) ^ (y < 0)), -(abs(x) // abs(y)), abs(x) // abs(y))


def divide(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return operate("div", a, b)
    return operate("floordiv", a, b) if rounding_mode == "floor" else _trunc_divide(a, b)


def _sign(x: Any) -> Any:
    x = _value(x)
    return where(x > 0, 1, where(x < 0, -1, 0)) * (1.0 if x.kind == "float" else 1)


def _round_down(op: str) -> Function:
    def apply(x: Any) -> Value:
        x = _value(x)
        return x if x.kind == "int" else _floating(op)(x)

    return apply


def to(x: Any, *args: Any, **kwargs: Any) -> Value:
    """`x.to(dtype)`; devices and the like change nothing."""
    names = [dtype_name(a) for a in (*args, *kwargs.values())]
    dtype = next((n for n in names if n is not None), None)
    if dtype is None and not kwargs:
        like = [a for a in args if isinstance(a, Value)]
        return {"bool": as_bool, "int": as_int, "float": as_float}[like[0].kind](x) if like else x
    return _cast(_value(x), dtype or "f32") if dtype else x


def _cast(x: Value, dtype: str) -> Value:
    if dtype == "bool":
        return as_bool(x)
    kind = "float" if dtype[0] == "f" or dtype == "bf16" else "int"
    if kind == "int" and x.kind != "float" and dtype in ("i32", "i64"):
        return as_int(x)  # indices are wide integers already
    return Value(x.trace, ("cast", dtype, as_int(x).term), kind)


def _casting(dtype: str) -> Function:
    return lambda x: _cast(_value(x), dtype)


def _filled(fixed: float | None) -> Function:
    """`torch.ones_like(x)`, `x.new_zeros(())`, `torch.full_like(x, v)`: a constant."""

    def apply(x: Any, *args: Any, dtype: Any = None, size: Any = None) -> Value:
        value = args[-1] if fixed is None else fixed
        result = value_of(x.trace, value)
        kind = {"bool": "bool", "int": "i64", "float": "f32"}[x.kind]
        return _constant_of(result, dtype_name(dtype) or kind)

    return apply


def _constant_of(x: Value, dtype: str) -> Value:
    if isinstance(x.term, int) and dtype == "bool":
        return x.trace.constant(bool(x.term))
    if isinstance(x.term, int) and (dtype[0] == "f" or dtype == "bf16"):
        return x.trace.constant(float(x.term))
    return _cast(x, dtype) if x.kind != "float" or dtype[0] != "f" else x


_OPERATOR_NAMES = {
    "and": "bitand",
    "or": "bitor",
    "xor": "bitxor",
    "invert": "invert",
    "lshift": "shl",
    "rshift": "shr",
    "truediv": "div",
    "mod": "mod",
    "floordiv": "floordiv",
    "pos": "pos",
}
FUNCTIONS: dict[str, Function] = {
    **{name: _of(op) for name, op in _OPERATOR_NAMES.items() if op != "pos"},
    **{name: _floating(name) for name in ("exp", "exp2", "log", "log2", "sqrt", "tanh", "sin", "cos", "tan")},
    **{name: _floating(name) for name in ("sigmoid", "erf")},
    **{name: _of(name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "mul", "pow")},
    "pos": lambda x: x,
    "positive": lambda x: x,
    "expit": _floating("sigmoid"),
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "rsub": lambda a, b, alpha=1: operate("sub", b, alpha * a),
    "rtruediv": _reversed("div"),
    "rdiv": _reversed("div"),
    "rpow": _reversed("pow"),
    "rfloordiv": _reversed("floordiv"),
    "rmod": _reversed("mod"),
    "rlshift": _reversed("shl"),
    "rrshift": _reversed("shr"),
    "subtract": _scaled("sub"),
    "multiply": _of("mul"),
    "negative": _of("neg"),
    "absolute": _of("abs"),
    "square": lambda x: x * x,
    "reciprocal": lambda x: operate("div", 1, x),
    "rsqrt": lambda x: 1.0 / _floating("sqrt")(x),
    "power": _of("pow"),
    "float_power": lambda a, b: operate("pow", as_float(_value(a)), b),
    "log10": lambda x: _floating("log")(x) / math.log(10.0),
    "relu": relu,
    "elu": _elu,
    "softplus": _softplus,
    "silu": lambda x: x * _floating("sigmoid")(x),
    "gelu": _gelu,
    "sign": _sign,
    "floor": _round_down("floor"),
    "trunc": _round_down("trunc"),
    "fix": _round_down("trunc"),
    "ceil": lambda x: -_round_down("floor")(-_value(x)),
    "div": divide,
    "divide": divide,
    "true_divide": _of("div"),
    "floor_divide": _of("floordiv"),
    "remainder": _of("mod"),
    "fmod": lambda a, b: a - _trunc_divide(a, b) * b,
    "where": where,
    "minimum": minimum,
    "maximum": maximum,
    "fmin": minimum,
    "fmax": maximum,
    "min": minimum,
    "max": maximum,
    "clamp": clamp,
    "clip": clamp,
    "clamp_min": at_least,
    "clamp_max": at_most,
    "less": _of("lt"),
    "less_equal": _of("le"),
    "greater": _of("gt"),
    "greater_equal": _of("ge"),
    "equal": _of("eq"),
    "not_equal": _of("ne"),
    "logical_and": _logic("bitand"),
    "logical_or": _logic("bitor"),
    "logical_xor": _logic("bitxor"),
    "logical_not": lambda x: Value(x.trace, negate(as_bool(_value(x)).term), "bool"),
    "bitwise_and": _of("bitand"),
    "bitwise_or": _of("bitor"),
    "bitwise_xor": _of("bitxor"),
    "bitwise_not": _of("invert"),
    "bitwise_left_shift": _of("shl"),
    "bitwise_right_shift": _of("shr"),
    "left_shift": _of("shl"),
    "right_shift": _of("shr"),
    "ones_like": _filled(1),
    "zeros_like": _filled(0),
    "full_like": _filled(None),
    "new_ones": _filled(1),
    "new_zeros": _filled(0),
    "new_full": _filled(None),
    "masked_fill": lambda x, condition, value: where(condition, value, x),
    "clone": lambda x: x,
    "detach": detach,
}
METHODS: dict[str, Function] = {
    "to": to,
    "type": to,
    "astype": to,
    "where": lambda x, condition, other: where(condition, x, other),
    "bool": as_bool,
    "float": _casting("f32"),
    "double": _casting("f64"),
    "half": _casting("f16"),
    "bfloat16": _casting("bf16"),
    "long": _casting("i64"),
    "int": _casting("i32"),
    "short": _casting("i16"),
    "char": _casting("i8"),
    "byte": _casting("u8"),
    **dict.fromkeys(("contiguous", "cpu", "cuda", "squeeze"), lambda x, *_: x),
    "dim": lambda _: 0,
    "numel": lambda _: 1,
}
_READS = frozenset(("item", "tolist", "numpy", "any", "all", "nonzero", "is_nonzero"))
_KEYWORDS = {"min": "low", "max": "high", "a_min": "low", "a_max": "high"}
_PLACEMENT = frozenset(
    ("device", "out", "layout", "memory_format", "non_blocking", "copy", "requires_grad", "inplace")
)


def _torch_dtype(x: Value) -> Any:
    import torch

    return {"bool": torch.bool, "int": torch.int32, "float": torch.float32}[x.kind]


def _torch_device(_: Value) -> Any:
    import torch

    return torch.device("cpu")


_ATTRIBUTES: dict[str, Callable[[Value], Any]] = {
    "dtype": _torch_dtype,
    "device": _torch_device,
    "shape": lambda _: (),
    "ndim": lambda _: 0,
    "is_cuda": lambda _: False,
    "requires_grad": lambda _: False,
    "data": detach,
}

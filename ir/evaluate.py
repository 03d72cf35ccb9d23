"""Expressions on NumPy values: the one evaluator under every interpreter.

Integers are int64 and wrap; floats are `floats` (float64 unless told, float32 in most kernels);
truth values are bool. Where an integer meets a float it is converted first. Values broadcast as
NumPy arrays do, so callers shape them. Division by zero of integers and reads outside a tensor
raise `InterpretError`: real code would trap or corrupt memory there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import sympy

from . import expr as E
from .errors import InterpretError
from .philox import random_bits

Values = Mapping[str, Any]
Compiled = Callable[[Values], Any]
_ERF = np.vectorize(math.erf, otypes=[np.float64])

_UNARY: dict[type, Callable[[Any], Any]] = {
    E.exp2: np.exp2,
    E.log2: np.log2,
    E.sigmoid: lambda x: 1 / (1 + np.exp(-x)),
    E.erf: lambda x: _ERF(x).astype(x.dtype),
    E.trunc: np.trunc,
    E.stop_gradient: lambda x: x,
    sympy.exp: np.exp,
    sympy.log: np.log,
    sympy.tanh: np.tanh,
    sympy.sin: np.sin,
    sympy.cos: np.cos,
    sympy.tan: np.tan,
}
_BITS: dict[type, Callable[[Any, Any], Any]] = {
    E.bitand: np.bitwise_and,
    E.bitor: np.bitwise_or,
    E.bitxor: np.bitwise_xor,
    E.shl: np.left_shift,
    E.shr: np.right_shift,
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    sympy.StrictLessThan: np.less,
    sympy.LessThan: np.less_equal,
    sympy.StrictGreaterThan: np.greater,
    sympy.GreaterThan: np.greater_equal,
    sympy.Equality: np.equal,
    sympy.Unequality: np.not_equal,
}
_LOGIC: dict[type, Callable[[Any, Any], Any]] = {
    sympy.And: np.logical_and,
    sympy.Or: np.logical_or,
    sympy.Xor: np.logical_xor,
}


def evaluate(expr: E.Expr, values: Values, *, floats: type = np.float64) -> Any:
    """The value of an expression; `values` gives a number or an array for every name in it.

    >>> q, k = np.arange(4)[:, None], np.arange(4)
    >>> evaluate(E.integer("q") >= E.integer("k"), {"q": q, "k": k}).sum()
    np.int64(10)
    """
    with np.errstate(all="ignore"):
        return compiled(sympy.sympify(expr), floats)(values)


@lru_cache(maxsize=4096)
def compiled(expr: E.Expr, floats: type = np.float64) -> Compiled:
    """A function from values to the value of expr: for loops, where walking the tree costs too much."""
    if isinstance(expr, sympy.Symbol):
        return _symbol(expr.name, floats)
    if expr in (sympy.true, sympy.false):
        return _constant(np.bool_(bool(expr)))
    if expr.is_Integer:
        return _constant(np.int64(int(expr)))
    if expr.is_number and not expr.has(sympy.Function):
        return _constant(floats(float(expr)))
    if isinstance(expr, (E.read, E.readf)):
        return _read(expr, floats)
    if isinstance(expr, E.cast):
        return _cast(str(expr.args[0]), compiled(expr.args[1], floats))
    if isinstance(expr, sympy.Mul):
        return _product(expr, floats)
    if isinstance(expr, sympy.Pow):
        return _power(expr, floats)
    parts = [compiled(a, floats) for a in expr.args]
    return _function(expr, parts, floats)


def _function(expr: E.Expr, parts: list[Compiled], floats: type) -> Compiled:
    kind = type(expr)
    if kind in _UNARY:
        function, part = _UNARY[kind], _floating(parts[0], floats)
        return lambda v: function(part(v))
    if kind in _BITS:
        function, (a, b) = _BITS[kind], parts
        return lambda v: function(_int(a(v)), _int(b(v)))
    if kind in _COMPARE:
        function, (a, b) = _COMPARE[kind], parts
        return lambda v: function(*_join((a(v), b(v)), floats))
    if kind in _LOGIC:
        function = _LOGIC[kind]
        return lambda v: reduce(function, [_truth(p(v)) for p in parts])
    match expr:
        case sympy.Not():
            return lambda v: np.logical_not(_truth(parts[0](v)))
        case sympy.Add():
            return lambda v: reduce(np.add, _join([p(v) for p in parts], floats))
        case E.minimum() | sympy.Min():
            return lambda v: reduce(np.minimum, _join([p(v) for p in parts], floats))
        case E.maximum() | sympy.Max():
            return lambda v: reduce(np.maximum, _join([p(v) for p in parts], floats))
        case E.where():
            c, a, b = parts
            return lambda v: np.where(_truth(c(v)), *_join((a(v), b(v)), floats))
        case E.floordiv() | E.floormod():
            a, b = parts
            divide = np.floor_divide if isinstance(expr, E.floordiv) else np.remainder
            text = E.to_text(expr)
            return lambda v: divide(_int(a(v)), _divisor(b(v), text))
        case E.float_of_bits():
            return lambda v: _int(parts[0](v)).astype(np.uint32).view(np.float32).astype(floats)
        case E.random_bits():
            return lambda v: random_bits(*(_int(p(v)) for p in parts))
        case E.bits_of_float():
            return lambda v: np.asarray(parts[0](v), np.float32).view(np.int32).astype(np.int64)
        case sympy.Abs():
            return lambda v: np.abs(_number(parts[0](v)))
        case sympy.floor():
            return lambda v: np.floor(_number(parts[0](v))).astype(np.int64)
    raise InterpretError(
        f"no NumPy meaning for {kind.__name__} in {expr}; ir/expr.py lists what expressions hold"
    )


def _constant(value: Any) -> Compiled:
    return lambda _: value


def _symbol(name: str, floats: type) -> Compiled:
    def get(values: Values) -> Any:
        if name not in values:
            raise InterpretError(f"no value for {name!r}; given: {', '.join(sorted(values))}")
        return _typed(values[name], floats)

    return get


def _typed(value: Any, floats: type) -> Any:
    array = value if isinstance(value, (np.ndarray, np.generic)) else np.asarray(value)[()]
    if array.dtype == np.bool_:
        return array
    return array.astype(floats if array.dtype.kind == "f" else np.int64, copy=False)


def _number(value: Any) -> Any:
    return value.astype(np.int64) if value.dtype == np.bool_ else value


def _int(value: Any) -> Any:
    if value.dtype.kind == "f":
        raise InterpretError(f"expected integers; got {value.dtype}")
    return _number(value)


def _truth(value: Any) -> Any:
    return value if value.dtype == np.bool_ else value != 0


def _join(values: Any, floats: type) -> list[Any]:
    """All values as floats if one is, else all as integers."""
    if any(v.dtype.kind == "f" for v in values):
        return [v.astype(floats, copy=False) for v in values]
    return [_number(v) for v in values]


def _floating(part: Compiled, floats: type) -> Compiled:
    return lambda v: part(v).astype(floats, copy=False)


def _divisor(value: Any, text: str) -> Any:
    if np.any(value == 0):
        raise InterpretError(f"integer division by zero in {text}")
    return _int(value)


def _product(expr: E.Expr, floats: type) -> Compiled:
    """Products; a factor 1/x is a division, not a product with a rounded reciprocal."""
    coefficient, rest = expr.as_coeff_mul()
    tops = [compiled(f, floats) for f in rest if not _is_inverse(f)]
    bottoms = [compiled(f.args[0], floats) for f in rest if _is_inverse(f)]
    if coefficient.is_Rational:
        tops += [_constant(np.int64(int(coefficient.p)))] if coefficient.p != 1 or not tops else []
        bottoms += [_constant(np.int64(int(coefficient.q)))] if coefficient.q != 1 else []
    else:
        tops.append(compiled(coefficient, floats))

    def product(values: Values) -> Any:
        out = reduce(np.multiply, _join([t(values) for t in tops], floats))
        for bottom in bottoms:
            out = np.divide(out.astype(floats, copy=False), bottom(values).astype(floats, copy=False))
        return out

    return product


def _is_inverse(factor: E.Expr) -> bool:
    return isinstance(factor, sympy.Pow) and factor.args[1] == -1


def _power(expr: sympy.Pow, floats: type) -> Compiled:
    base, exponent = (compiled(a, floats) for a in expr.args)
    if expr.args[1] == sympy.Rational(1, 2):
        return lambda v: np.sqrt(base(v).astype(floats, copy=False))
    if expr.args[1] == -1:
        return lambda v: np.divide(floats(1), base(v).astype(floats, copy=False))
    if expr.args[1].is_Integer and expr.args[1] > 0:
        return lambda v: np.power(_number(base(v)), exponent(v).astype(_number(base(v)).dtype))
    return lambda v: np.power(base(v).astype(floats, copy=False), exponent(v).astype(floats, copy=False))


def _read(expr: E.Expr, floats: type) -> Compiled:
    name = str(expr.args[0])
    parts = [compiled(a, floats) for a in expr.args[1:]]
    text = E.to_text(expr)

    def get(values: Values) -> Any:
        if name not in values:
            raise InterpretError(
                f"no value for tensor {name!r} in {text}; given: {', '.join(sorted(values))}"
            )
        tensor = np.asarray(values[name])
        if tensor.ndim != len(parts):
            raise InterpretError(f"{text}: expected {len(parts)} dimensions; got shape {tensor.shape}")
        index = tuple(_int(p(values)) for p in parts)
        for d, (i, n) in enumerate(zip(index, tensor.shape, strict=True)):
            if np.size(i) and (np.min(i) < 0 or np.max(i) >= n):
                raise InterpretError(
                    f"{text}: dimension {d} is read at {np.min(i)} .. {np.max(i)}; it has {n} entries"
                )
        return _typed(tensor[index], floats)

    return get


def _cast(dtype: str, part: Compiled) -> Compiled:
    return lambda v: round_to(part(v), dtype)


NUMPY = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.float32,
    "f8e4m3": np.float32,
    "i64": np.int64,
    "i32": np.int32,
    "i16": np.int16,
    "i8": np.int8,
    "u8": np.uint8,
    "bool": np.bool_,
}


def round_to(value: Any, dtype: str) -> Any:
    """value in a gossamer dtype; bf16 and f8e4m3 are held as float32, rounded to nearest even."""
    with np.errstate(all="ignore"):
        array = np.asarray(value)
        if dtype == "f8e4m3":
            return _e4m3_rounded(array.astype(np.float32))[()]
        if dtype != "bf16":
            return array.astype(NUMPY[dtype])[()]
        bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(
            0xFFFF0000
        )
        out = np.where(np.isnan(array), np.float32(np.nan), rounded.view(np.float32))
        return out.reshape(array.shape)[()]


def _e4m3_rounded(array: np.ndarray) -> np.ndarray:
    """float32 rounded to e4m3fn; what is beyond 448 after rounding becomes NaN."""
    step = np.exp2(np.maximum(np.frexp(array)[1] - 1, -6) - 3).astype(np.float32)
    out = (np.rint(array / step) * step).astype(np.float32)
    return np.where(np.abs(out) <= 448, out, np.float32(np.nan))

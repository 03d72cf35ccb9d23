"""Pointwise operations of a graph, on the terms of their operands: the rules that masks are traced by."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..term import Term, children
from ..trace.operate import as_bool, as_int
from ..trace.torch_functions import FUNCTIONS, METHODS
from ..trace.value import Value
from .ops import arguments, value_of
from .tensor import Opaque, Reader, Tensor, broadcast, fitting, kind_of_dtype
from .terms import kind_of, number, tidy

# A table of operations on indices, which a graph's tensors share but for these: reductions, or no operations.
_OTHERS = frozenset(("dim", "numel", "squeeze", "astype", "cpu", "cuda", "equal"))
LARGE = 1e4  # a factor whose products with the parts of a sum may lose what the sum has
_FILLS = frozenset(("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"))
_CASTS = frozenset(
    ("to", "type", "float", "double", "half", "bfloat16", "long", "int", "short", "char", "byte", "bool")
)
_DECIDING = frozenset(
    ("floor", "ceil", "round", "trunc", "fix", "sign", "isclose", "mod", "fmod", "remainder")
)
_DECIDING |= {
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "less",
    "less_equal",
    "greater",
    "greater_equal",
    "not_equal",
}
_DECIDING |= {"floordiv", "floor_divide"}
_IGNORED = frozenset(
    ("device", "out", "layout", "memory_format", "non_blocking", "copy", "inplace", "pin_memory")
)


def pointwise(reader: Reader, node: fx.Node, name: str) -> Tensor | None:
    """The result of a pointwise operation; None where there is no rule for it."""
    if name in _CASTS:
        return _cast(reader, node)
    if name == "baddbmm":
        return _baddbmm(reader, node)
    found = METHODS.get(name) if node.op == "call_method" else None
    found = found or FUNCTIONS.get(name)
    if found is None or name in _OTHERS or name in _FILLS:
        return None
    if name in _DECIDING and any(_is_rounded(reader, a, node) for a in node.all_input_nodes):
        return None
    if name in ("max", "min") and not _two_tensors(node):
        return None
    shape = tuple(value_of(node).shape)
    args = [_argument(reader, a, node, shape) for a in node.args]
    kwargs = {k: _argument(reader, a, node, shape) for k, a in node.kwargs.items() if k not in _IGNORED}
    first = [kwargs.pop(k) for k in ("condition", "input", "self") if k in kwargs]
    last = [kwargs.pop(k) for k in ("mask", "other", "exponent", "value") if k in kwargs]
    renamed = {{"min": "low", "max": "high"}.get(k, k): v for k, v in kwargs.items() if v is not None}
    result = found(*first, *args, *last, **renamed)
    if not isinstance(result, Value):
        return None
    term = tidy(result.term)
    if _cancels(term):
        raise Opaque("a sum times a large number")
    return fitting(Tensor(shape, term, result.kind), value_of(node).dtype)


def _is_rounded(reader: Reader, operand: fx.Node, node: fx.Node) -> bool:
    """Whether an operand holds indices in 16 bits of floating point: what is decided by them is decided by
    their roundings."""
    value = value_of(operand)
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float16, torch.bfloat16):
        return False
    return _has_indices(reader.operand(operand, node).term)


def _has_indices(term: Term) -> bool:
    """Whether a number that is no choice is computed from indices, beside what tensors are read at."""
    if isinstance(term, str):
        return kind_of(term) == "int"
    if not isinstance(term, tuple) or term[0] in ("read", "readf"):
        return False
    return any(map(_has_indices, term[2:] if term[0] == "where" else children(term)))


def _cancels(term: Term) -> bool:
    """Whether a term multiplies a sum by a large number, which expressions would distribute: parts cancel."""
    if not isinstance(term, tuple) or term[0] != "mul" or kind_of(term) != "float":
        return False
    factors = [number(part) for part in term[1:]]
    sums = [isinstance(part, tuple) and part[0] in ("add", "sub") for part in term[1:]]
    return any(f is not None and abs(f) >= LARGE for f in factors) and any(sums)


def _two_tensors(node: fx.Node) -> bool:
    given = (*node.args, *(node.kwargs[k] for k in ("other",) if k in node.kwargs))
    return len(given) == 2 and all(
        isinstance(a, fx.Node) and isinstance(value_of(a), torch.Tensor) for a in given
    )


def _argument(reader: Reader, value: Any, node: fx.Node, shape: tuple[Any, ...]) -> Any:
    """An operand's element under the result's indices; numbers and None as they are."""
    if isinstance(value, fx.Node):
        if isinstance(value_of(value), torch.Tensor):
            operand = reader.operand(value, node)
            return Value(reader.trace, broadcast(operand, shape), operand.kind)
        return reader.scalar(value, node)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise Opaque(f"an argument {value!r}")


def _cast(reader: Reader, node: fx.Node) -> Tensor:
    """A conversion to another dtype, device or layout. Roundings of floats are left out: kernels compute in
    float32 or wider and round at the end."""
    source: Any = node.args[0]
    operand = reader.operand(source, node)
    dtype = value_of(node).dtype
    if not dtype.is_floating_point and _is_rounded(reader, source, node):
        raise Opaque("indices rounded to 16 bits")
    kind, value = kind_of_dtype(dtype), Value(reader.trace, operand.term, operand.kind)
    if kind == operand.kind:
        term = operand.term
    elif kind == "bool":
        term = as_bool(value).term
    elif kind == "int" and operand.kind == "bool":
        term = as_int(value).term
    elif kind == "int":
        term = ("cast", "i32", operand.term)
    else:
        term = ("cast", "f32", as_int(value).term)
    return fitting(Tensor(operand.shape, tidy(term), kind), dtype)


def _baddbmm(reader: Reader, node: fx.Node) -> Tensor:
    """beta * input + alpha * a batch of products, which is a leaf of its own."""
    added, _, _ = arguments(node, "input", "batch1", "batch2")
    beta, alpha = (reader.scalar(node.kwargs.get(name, 1), node) for name in ("beta", "alpha"))
    shape, trace = tuple(value_of(node).shape), reader.trace
    given = reader.operand(added, node)
    product = Value(trace, reader.product(node).term, "float")
    result = beta * Value(trace, broadcast(given, shape), given.kind) + alpha * product
    return Tensor(shape, tidy(result.term), "float")

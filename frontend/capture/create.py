"""Operations of a graph that make tensors out of numbers and indices: rules on indices.

Both sides of a choice are evaluated, so rules that read elsewhere on one side take no tensors of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..term import FALSE, Term, rename
from ..trace.operate import select
from ..trace.value import Value
from .ops import arguments, value_of
from .tensor import (
    Opaque,
    Reader,
    Tensor,
    axis,
    broadcast,
    filled,
    fitting,
    is_one,
    kind_of_dtype,
    size_term,
)
from .terms import number, reads_in, tidy
from .views import Rule

Found = tuple[tuple[Any, ...], Term, str]


def _made(node: fx.Node) -> tuple[tuple[Any, ...], str]:
    value = value_of(node)
    return tuple(value.shape), kind_of_dtype(value.dtype)


def _reads(*tensors: Tensor) -> bool:
    return any(reads_in(t.term) for t in tensors)


def _filled(number: float) -> Rule:
    def rule(reader: Reader, node: fx.Node) -> Found:
        shape, kind = _made(node)
        return shape, filled(number, kind), kind

    return rule


def _full(reader: Reader, node: fx.Node) -> Found:
    shape, kind = _made(node)
    value = node.kwargs.get("fill_value", node.args[-1] if node.args else None)
    value = value_of(value) if isinstance(value, fx.Node) else value
    if not isinstance(value, (bool, int, float)):
        raise Opaque("a fill that is no number")
    return shape, filled(value, kind), kind


def _tensor(reader: Reader, node: fx.Node) -> Found:
    """`torch.tensor(number)`."""
    shape, kind = _made(node)
    value = node.args[0]
    if shape or not isinstance(value, (bool, int, float)):
        raise Opaque("a tensor of several numbers")
    return shape, filled(value, kind), kind


def _arange(reader: Reader, node: fx.Node) -> Found:
    shape, kind = _made(node)
    bounds = [a for a in node.args if a is not None] + [node.kwargs[k] for k in ("end",) if k in node.kwargs]
    start = node.kwargs.get("start", bounds[0] if len(bounds) > 1 else 0)
    step = node.kwargs.get("step", bounds[2] if len(bounds) > 2 else 1)
    place = 0 if is_one(shape[0]) else axis(0)
    term = tidy(("add", reader.integer(start), ("mul", reader.integer(step), place)))
    if kind == "float":
        return shape, ("cast", "f32", term), kind
    return shape, fitting(Tensor(shape, term, kind), value_of(node).dtype).term, kind


def _triangle(lower: bool) -> Rule:
    def rule(reader: Reader, node: fx.Node) -> Found:
        source, diagonal = arguments(node, "input", "diagonal")
        tensor = reader.operand(source, node)
        row, col = (0 if is_one(n) else axis(d) for d, n in list(enumerate(tensor.shape))[-2:])
        edge = ("add", row, reader.integer(diagonal or 0))
        kept = ("le" if lower else "ge", col, edge)
        trace = reader.trace
        zero = Value(trace, filled(0, tensor.kind), tensor.kind)
        return (
            tensor.shape,
            select(Value(trace, tidy(kept), "bool"), Value(trace, tensor.term, tensor.kind), zero).term,
            tensor.kind,
        )

    return rule


def _eye(reader: Reader, node: fx.Node) -> Found:
    shape, kind = _made(node)
    same = ("eq", *(0 if is_one(n) else axis(d) for d, n in enumerate(shape)))
    return shape, same if kind == "bool" else ("where", same, filled(1, kind), filled(0, kind)), kind


def _cumsum(reader: Reader, node: fx.Node) -> Found:
    """The running sum of a constant."""
    source, dim = arguments(node, "input", "dim")
    tensor = reader.operand(source, node)
    value = 0 if tensor.term == FALSE else 1 if tensor.term == "true" else number(tensor.term)
    if value is None or value_of(node).dtype.is_floating_point:
        raise Opaque("a running sum")
    dim %= len(tensor.shape)
    place = 0 if is_one(tensor.shape[dim]) else axis(dim)
    return tensor.shape, tidy(("mul", int(value), ("add", place, 1))), "int"


def _diff(reader: Reader, node: fx.Node) -> Found:
    """The differences along a dimension, behind one element put before them."""
    source, n, dim, prepend, append = arguments(node, "input", "n", "dim", "prepend", "append")
    tensor, shape = reader.operand(source, node), tuple(value_of(node).shape)
    if n not in (None, 1) or append is not None or prepend is None:
        raise Opaque("differences")
    dim = (-1 if dim is None else dim) % len(shape)
    before = reader.operand(prepend, node)
    if not is_one(before.shape[dim]) or tensor.kind != "int" or _reads(tensor, before):
        raise Opaque("differences")
    here = axis(dim)
    earlier = rename(tensor.term, {here: ("sub", here, 1)})
    first = tidy(("sub", rename(tensor.term, {here: 0}), broadcast(before, shape)))
    later = tidy(("sub", tensor.term, earlier))
    return shape, ("where", ("eq", here, 0), first, later), "int"


def _cat(reader: Reader, node: fx.Node) -> Found:
    parts, dim = arguments(node, "tensors", "dim")
    tensors = [reader.operand(p, node) for p in parts]
    shape, kind = _made(node)
    dim = (dim or 0) % len(shape)
    if len(tensors) != 2 or any(t.kind != kind for t in tensors) or _reads(*tensors):
        raise Opaque("tensors one after the other")
    first, second = tensors
    size, here = size_term(first.shape[dim]), axis(dim)
    indices = [0 if is_one(n) else axis(d) for d, n in enumerate(shape)]
    left, right = list(indices), list(indices)
    left[dim] = 0 if is_one(first.shape[dim]) else here
    right[dim] = 0 if is_one(second.shape[dim]) else tidy(("sub", here, size))
    sides = (Value(reader.trace, t.at(i), kind) for t, i in ((first, left), (second, right)))
    return shape, select(Value(reader.trace, ("lt", here, size), "bool"), *sides).term, kind


def _flip(reader: Reader, node: fx.Node) -> Found:
    given: tuple[Any, ...] = node.args
    tensor, named = reader.operand(given[0], node), node.kwargs.get("dims", given[1:])
    dims: list[Any] = []
    for one in named if isinstance(named, (tuple, list)) else (named,):
        dims += one if isinstance(one, (tuple, list)) else [one]
    turned = {d % len(tensor.shape) for d in dims}
    indices: list[Term] = []
    for d, n in enumerate(tensor.shape):
        place = 0 if is_one(n) else axis(d)
        indices.append(tidy(("sub", ("sub", size_term(n), 1), place)) if d in turned else place)
    return tensor.shape, tensor.at(indices), tensor.kind


def _pad(reader: Reader, node: fx.Node) -> Found:
    """Padding with a constant."""
    source, pad, mode, value = arguments(node, "input", "pad", "mode", "value")
    tensor, (shape, kind) = reader.operand(source, node), _made(node)
    if mode not in (None, "constant") or _reads(tensor):
        raise Opaque(f"padding by {mode}")
    inside: Term = "true"
    indices: list[Term] = [0 if is_one(n) else axis(d) for d, n in enumerate(shape)]
    for n in range(len(pad) // 2):
        d = len(shape) - 1 - n
        before, size = reader.integer(pad[2 * n]), size_term(tensor.shape[d])
        place = tidy(("sub", axis(d), before))
        inside = ("and", inside, ("and", ("ge", place, 0), ("lt", place, size)))
        indices[d] = 0 if is_one(tensor.shape[d]) else place
    sides = (Value(reader.trace, t, kind) for t in (tensor.at(indices), filled(value or 0, kind)))
    return shape, select(Value(reader.trace, tidy(inside), "bool"), *sides).term, kind


def meshgrid(reader: Reader, source: fx.Node, node: fx.Node, index: int) -> Found:
    """One of the results of `torch.meshgrid`. Raises Opaque for another operation's."""
    from .ops import operation

    did = operation(source)
    if did is None or did.name != "meshgrid":
        raise Opaque("one of several results")
    given: tuple[Any, ...] = source.args
    parts = given[0] if isinstance(given[0], (tuple, list)) else given
    tensor = reader.operand(parts[index], source)
    place = 1 - index if source.kwargs.get("indexing") == "xy" and index < 2 else index
    shape = tuple(value_of(node).shape)
    return shape, tensor.at([0 if is_one(shape[place]) else axis(place)]), tensor.kind


CREATIONS: dict[str, Callable[[Reader, fx.Node], Found]] = {
    **{name: _filled(0) for name in ("zeros", "zeros_like", "new_zeros")},
    **{name: _filled(1) for name in ("ones", "ones_like", "new_ones")},
    **{name: _full for name in ("full", "full_like", "new_full", "fill")},
    **{name: _tensor for name in ("tensor", "scalar_tensor", "as_tensor")},
    "arange": _arange,
    "tril": _triangle(lower=True),
    "triu": _triangle(lower=False),
    "eye": _eye,
    "cumsum": _cumsum,
    "diff": _diff,
    "cat": _cat,
    "flip": _flip,
    "pad": _pad,
}

"""Operations of a graph that rearrange a tensor: rules on indices.

A rule gives (shape, term, kind) of a node; `broadcast`, `permuted` and `reshaped` carry all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..term import Term, rename
from .ops import Operation, arguments, operation, value_of
from .tensor import Opaque, Reader, Tensor, axis, broadcast, is_one, same_size, size_term
from .terms import combined, divided, from_linear, linear, tidy

Rule = Callable[[Reader, fx.Node], tuple[tuple[Any, ...], Term, str]]


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(value_of(node).shape)


def _first(reader: Reader, node: fx.Node) -> Tensor:
    source = arguments(node, "input")[0] if node.args or "input" in node.kwargs else node.kwargs["self"]
    if not isinstance(source, fx.Node) or not isinstance(value_of(source), torch.Tensor):
        raise Opaque("no tensor")
    return reader.operand(source, node)


def _same(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
    tensor = _first(reader, node)
    return tensor.shape, tensor.term, tensor.kind


def _reshape(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
    tensor, shape = _first(reader, node), _shape(node)
    if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        raise Opaque("the bits of a tensor as another dtype")
    return shape, tensor.at(reshaped(tensor.shape, shape)), tensor.kind


def reshaped(old: tuple[Any, ...], new: tuple[Any, ...]) -> list[Term]:
    """The indices into a shape that elements [i0, i1, ...] of a reshaped tensor come from. Raises Opaque.

    >>> reshaped((2, 8, 5), (16, 5))
    [('floordiv', 'i0', 8), ('mod', 'i0', 8), 'i1']
    >>> reshaped((16, 5), (2, 8, 5))
    [('add', ('mul', 8, 'i0'), 'i1'), 'i2']
    """
    indices: list[Term] = [0] * len(old)
    from_, to = ([d for d, n in enumerate(shape) if not is_one(n)] for shape in (old, new))
    sizes = {axis(d): n for d, n in enumerate(new)}
    while from_ and to:
        if same_size(old[from_[0]], new[to[0]]):
            indices[from_.pop(0)] = axis(to.pop(0))
            continue
        if same_size(old[from_[-1]], new[to[-1]]):
            indices[from_.pop()] = axis(to.pop())
            continue
        left, right = _group(old, new, from_, to)
        flat: dict[Term, int] = {}
        for d, stride in zip(right, _strides([new[d] for d in right]), strict=True):
            flat = combined(flat, {axis(d): stride})
        rest = from_linear(flat)
        for d, stride in zip(left, _strides([old[d] for d in left]), strict=True):
            indices[d], rest = divided(rest, stride, sizes)
        del from_[: len(left)], to[: len(right)]
    return indices


def _group(
    old: tuple[Any, ...], new: tuple[Any, ...], from_: list[int], to: list[int]
) -> tuple[list[int], list[int]]:
    """The fewest leading dimensions of both sides that hold equally many elements."""
    i = j = 1
    while i <= len(from_) and j <= len(to):
        a, b = (_product([shape[d] for d in dims]) for shape, dims in ((old, from_[:i]), (new, to[:j])))
        if a == b:
            return from_[:i], to[:j]
        if not (isinstance(a, int) and isinstance(b, int)):
            if i == len(from_) and j == len(to):
                return from_, to
            i, j = (i + 1, j) if i <= j and i < len(from_) else (i, j + 1)
            continue
        i, j = (i + 1, j) if a < b else (i, j + 1)
    raise Opaque("a reshape of sizes that are known at run time only")


def _product(sizes: list[Any]) -> Term:
    out: Term = 1
    for size in sizes:
        out = tidy(("mul", out, size_term(size)))
    return out


def _strides(sizes: list[Any]) -> list[int]:
    """Of a contiguous tensor; every size but the first is a number."""
    strides = [1]
    for size in reversed(sizes[1:]):
        if not isinstance(size, int):
            raise Opaque("a reshape of sizes that are known at run time only")
        strides.insert(0, strides[0] * size)
    return strides


def permuted(node: fx.Node, name: str, rank: int) -> list[int]:
    """Where each dimension of a permuted tensor comes from."""
    order = list(range(rank))
    if name in ("t", "T", "mT", "adjoint"):
        a, b = rank - 2, rank - 1
        return order[::-1] if name == "T" or rank < 2 else [*order[:a], b, a]
    if name == "transpose":
        _, a, b = arguments(node, "input", "dim0", "dim1")
        order[a], order[b] = order[b], order[a]
        return order
    if name == "permute":
        dims: Any = node.kwargs.get("dims", node.args[1:])
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        return [d % rank for d in dims]
    _, source, destination = arguments(node, "input", "source", "destination")
    moved = [[x] if isinstance(x, int) else list(x) for x in (source, destination)]
    ends = {d % rank: s % rank for s, d in zip(*moved, strict=True)}
    others = iter([d for d in order if d not in ends.values()])
    return [ends[d] if d in ends else next(others) for d in order]


def _permute(name: str) -> Rule:
    def rule(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
        tensor = _first(reader, node)
        order = permuted(node, name, len(tensor.shape))
        indices: list[Term] = [0] * len(order)
        for d, source in enumerate(order):
            indices[source] = axis(d)
        return tuple(tensor.shape[d] for d in order), tensor.at(indices), tensor.kind

    return rule


def _expand(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
    tensor, shape = _first(reader, node), _shape(node)
    return shape, broadcast(tensor, shape), tensor.kind


def _repeat(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
    tensor, shape = _first(reader, node), _shape(node)
    first = len(shape) - len(tensor.shape)
    indices: list[Term] = []
    for d, n in enumerate(tensor.shape):
        if is_one(n):
            indices.append(0)
        elif same_size(n, shape[first + d]):
            indices.append(axis(first + d))
        elif isinstance(n, int):
            indices.append(("mod", axis(first + d), n))
        else:
            raise Opaque("a repeat of a size that is known at run time only")
    return shape, tensor.at(indices), tensor.kind


def _repeat_interleave(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
    tensor, shape = _first(reader, node), _shape(node)
    _, repeats, dim = arguments(node, "input", "repeats", "dim")
    if not isinstance(repeats, int) or dim is None:
        raise Opaque("repeats that are no number")
    indices = [0 if is_one(n) else axis(d) for d, n in enumerate(tensor.shape)]
    dim %= len(shape)
    if not is_one(tensor.shape[dim]):
        indices[dim] = divided(axis(dim), repeats, {axis(dim): shape[dim]})[0]
    return shape, tensor.at(indices), tensor.kind


def _getitem(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
    given: tuple[Any, ...] = node.args
    source, items = given
    if not isinstance(value_of(source), torch.Tensor):
        return _member(reader, node)
    tensor, shape = _first(reader, node), _shape(node)
    items = list(items) if isinstance(items, tuple) else [items]
    used = sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis in [i for i in items if i is Ellipsis]:
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(tensor.shape) - used)
    items += [slice(None)] * (len(tensor.shape) - sum(i is not None for i in items))
    gathers = [i for i in items if isinstance(i, fx.Node) and isinstance(value_of(i), torch.Tensor)]
    if gathers:
        return shape, *_gathered(reader, node, tensor, items, shape)
    indices, d, out = [], 0, 0
    for item in items:
        if item is None:
            out += 1
            continue
        size = tensor.shape[d]
        if isinstance(item, slice):
            indices.append(_sliced(reader, item, size, shape[out], out))
            out += 1
        else:
            indices.append(_from_start(reader.integer(item), size))
        d += 1
    return shape, tensor.at(indices), tensor.kind


def _member(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
    """One of the parts that a tensor is cut into, or one of the results of meshgrid."""
    from .create import meshgrid

    given: tuple[Any, ...] = node.args
    source, index = given
    did = operation(source)
    if did is None or did.name not in ("chunk", "split", "tensor_split", "unbind"):
        return meshgrid(reader, source, node, index)
    whole, _, dim = arguments(source, "input", "sections", "dim")
    tensor, parts = reader.operand(whole, source), value_of(source)
    if did.name == "unbind":
        dim = (arguments(source, "input", "dim")[1] or 0) % len(tensor.shape)
        kept = [0 if is_one(n) else axis(d) for d, n in enumerate(parts[index].shape)]
        at = 0 if is_one(tensor.shape[dim]) else _from_start(reader.integer(index), len(parts))
        return tuple(parts[index].shape), tensor.at([*kept[:dim], at, *kept[dim:]]), tensor.kind
    dim = (dim or 0) % len(tensor.shape)
    sizes = [part.shape[dim] for part in parts]
    if not all(isinstance(n, int) for n in sizes):
        raise Opaque("parts of sizes that are known at run time only")
    indices: list[Term] = [0 if is_one(n) else axis(d) for d, n in enumerate(tensor.shape)]
    place = 0 if is_one(sizes[index]) else axis(dim)
    indices[dim] = tidy(("add", sum(sizes[:index]), place))
    return tuple(parts[index].shape), tensor.at(indices), tensor.kind


def _from_start(index: Term, size: Any) -> Term:
    return tidy(("add", size_term(size), index)) if isinstance(index, int) and index < 0 else index


def _sliced(reader: Reader, item: slice, size: Any, length: Any, out: int) -> Term:
    start = 0 if item.start is None else _from_start(reader.integer(item.start), size)
    step = 1 if item.step is None else reader.integer(item.step)
    if is_one(size):
        return 0
    if isinstance(start, int) and isinstance(size, int):
        start = min(max(start, 0), size)
    place = 0 if is_one(length) else axis(out)
    return tidy(("add", start, ("mul", step, place)))


def _gathered(
    reader: Reader, node: fx.Node, tensor: Tensor, items: list[Any], shape: tuple[Any, ...]
) -> tuple[Term, str]:
    """An element read by integer tensors, which broadcast and take the place of the first of them."""
    at = [n for n, i in enumerate(items) if isinstance(i, fx.Node)]
    adjacent = at == list(range(at[0], at[-1] + 1))
    if any(i is None for i in items) or not adjacent:
        raise Opaque("an index of tensors apart from each other")
    readers = [reader.operand(items[n], node) for n in at]
    if any(r.kind != "int" for r in readers):
        raise Opaque("an index by truth values")
    rank = max(len(r.shape) for r in readers)
    first = at[0]
    block = shape[first : first + rank]
    indices: list[Term] = []
    out = 0
    for d, item in enumerate(items):
        if d in at:
            inner = broadcast(readers[at.index(d)], block)
            shifted = {axis(n): axis(n + first) for n in range(rank)}
            indices.append(0 if is_one(tensor.shape[d]) else rename(inner, shifted))
            out = first + rank
        else:
            indices.append(_sliced(reader, item, tensor.shape[d], shape[out], out))
            out += 1
    if not reader.inner and not all(_counts_up(reader, i) for i in indices):
        raise Opaque("an index that may count from the end")
    return tensor.at(indices), tensor.kind


def _counts_up(reader: Reader, index: Term) -> bool:
    """Whether an index is known to be 0 or more."""
    if isinstance(index, tuple) and index[0] in ("floordiv", "mod") and isinstance(index[2], int):
        return index[2] > 0 and _counts_up(reader, index[1])
    if isinstance(index, tuple) and index[0] == "read":
        leaf = reader.leaves[index[1]]
        return (operation(leaf) or Operation("")).name == "argsort" or _is_order(leaf)
    parts = linear(index)
    if parts == {index: 1}:
        return isinstance(index, str)
    return all(c > 0 and (t == 1 or _counts_up(reader, t)) for t, c in parts.items())


def _is_order(node: fx.Node) -> bool:
    """Whether a node is the second result of a sort."""
    given: Any = (*node.args, None, None)
    source = operation(given[0]) if isinstance(given[0], fx.Node) else None
    return source == Operation("sort") and given[1] == 1 and operation(node) == Operation("getitem")


def _index_select(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
    tensor, shape = _first(reader, node), _shape(node)
    _, dim, index = arguments(node, "input", "dim", "index")
    dim %= len(shape)
    places: list[Term] = [0 if is_one(n) else axis(d) for d, n in enumerate(tensor.shape)]
    if not is_one(tensor.shape[dim]):
        places[dim] = rename(broadcast(reader.operand(index, node), (shape[dim],)), {axis(0): axis(dim)})
    return shape, tensor.at(places), tensor.kind


def _select(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
    tensor, shape = _first(reader, node), _shape(node)
    _, dim, index = arguments(node, "input", "dim", "index")
    dim %= len(tensor.shape)
    places = [axis(d) for d in range(len(shape))]
    at = _from_start(reader.integer(index), tensor.shape[dim])
    indices = [
        0 if is_one(n) else i for n, i in zip(tensor.shape, [*places[:dim], at, *places[dim:]], strict=True)
    ]
    return shape, tensor.at(indices), tensor.kind


def _narrow(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
    tensor, shape = _first(reader, node), _shape(node)
    _, dim, start, _ = arguments(node, "input", "dim", "start", "length")
    indices = [0 if is_one(n) else axis(d) for d, n in enumerate(tensor.shape)]
    dim %= len(shape)
    indices[dim] = _sliced(reader, slice(start, None), tensor.shape[dim], shape[dim], dim)
    return shape, tensor.at(indices), tensor.kind


def _dropout(reader: Reader, node: fx.Node) -> tuple[tuple[Any, ...], Term, str]:
    _, p, training = arguments(node, "input", "p", "training")
    if not (training is False or p == 0 or (training is None and node.op == "call_method")):
        raise Opaque("dropout in training")
    return _same(reader, node)


VIEWS: dict[str, Rule] = {
    **{
        name: _reshape
        for name in ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "ravel")
    },
    **{name: _reshape for name in ("view_as", "reshape_as")},
    **{name: _permute(name) for name in ("permute", "transpose", "t", "T", "mT", "movedim")},
    **{
        name: _same
        for name in ("contiguous", "clone", "detach", "alias", "lift_fresh", "requires_grad_", "cpu")
    },
    "expand": _expand,
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    "getitem": _getitem,
    "index_select": _index_select,
    "select": _select,
    "narrow": _narrow,
    "dropout": _dropout,
}

"""NumPy semantics of the operations over ragged groups (see ir/ragged.py); `graph_interpret` calls them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from . import expr as E
from .derivative import derivative
from .evaluate import evaluate
from .graph import Op
from .quantized import dequantize

Array = np.ndarray
Operands = list[Any]


def _group(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    experts, top_k = op.attr("experts"), x[0].shape[1]
    ids = x[0].reshape(-1)
    kept = np.flatnonzero((ids >= 0) & (ids < experts))
    order = kept[np.argsort(ids[kept], kind="stable")]
    tokens, place = np.zeros(ids.size, np.int32), np.full(ids.size, -1, np.int32)
    tokens[: order.size] = order // max(top_k, 1)
    place[order] = np.arange(order.size)
    bounds = np.zeros(experts + 1, np.int32)
    bounds[1:] = np.cumsum(np.bincount(ids[kept], minlength=experts))
    return tokens, bounds, place.reshape(x[0].shape)


def _dequantize(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    if not op.attr("used"):
        return (dequantize(op.attr("format"), x).astype(floats),)
    *operands, bounds = x
    found, used = dequantize(op.attr("format"), operands).astype(floats), np.diff(bounds) > 0
    return (np.where(used[:, None, None], found, floats(np.nan)),)


def _dense(op: Op, x: Operands, floats: type) -> Operands:
    """The operands with matrices in the place of their codes."""
    q = op.attr("quantized")
    if q is None:
        return x
    end = len(x) - q.operands + 1
    return [x[0], dequantize(q, [x[1], *x[end:]]).astype(floats), *x[2:end]]


def _gather(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    rows, tokens = x
    return (rows[tokens] if len(rows) else np.zeros((len(tokens), rows.shape[1]), rows.dtype),)


def _grouped_matmul(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    chooses, adds = op.attr("chooses"), op.attr("adds")
    choice = x[-1][x[-2]] if chooses else None
    a, w, bounds, *bias = x[:-2] if chooses else x
    added, bias = (bias[:2], bias[2:]) if adds else ([], bias)
    w = w.swapaxes(-1, -2) if op.attr("transpose_b") else w
    out = np.zeros((len(a), w.shape[-1]), floats)
    _add_products(out, a, w, bounds, choice if chooses == "w" else None)
    if added:
        b = added[1].swapaxes(-1, -2) if adds == "rows" else added[1]
        _add_products(out, added[0], b, bounds, choice if chooses == "b" else None)
    for e, (start, end) in enumerate(pairwise(bounds)) if bias else ():
        out[start:end] += bias[0][e].astype(floats)
    return (out,)


def _add_products(out: Array, a: Array, w: Array, bounds: Array, choice: Array | None) -> None:
    """Each group's rows by its matrix; by that of a row's choice, where there is one: w is [A, E, K, N]."""
    stacks = [w] if choice is None else w
    for number, stack in enumerate(stacks):
        for e, (start, end) in enumerate(pairwise(bounds)):
            mine = slice(start, end)
            if choice is not None:
                mine = start + np.flatnonzero(choice[start:end] == number)
            out[mine] += a[mine].astype(out.dtype) @ stack[e].astype(out.dtype)


def _split(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    one, other = _halves(x[0], "interleaved" if op.attr("interleaved") else "split")
    return one, other


def _combine(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    y, place, *rest = x
    if len(rest) == 1:
        taken = np.where(place[..., None] >= 0, y[np.maximum(place, 0)].astype(floats), floats(0))
        return ((np.where(place >= 0, rest[0], 0).astype(floats)[..., None] * taken).sum(1),)
    starts, weights = rest
    out = np.zeros((len(starts) - 1, y.shape[1]), floats)
    for t, (start, end) in enumerate(pairwise(starts)):
        rows = place[start:end]
        out[t] = (weights[rows].astype(floats)[:, None] * y[rows].astype(floats)).sum(0)
    return (out,)


def _grouped_gemm(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    a, w, bounds, *rest = _dense(op, x, floats)
    if op.attr("gathers"):
        (a,) = _gather(op, [a, rest[0]], floats)
        rest = rest[1:]
    (found,) = _grouped_matmul(op, [a, w, bounds, *rest], floats)
    halves, expr = op.attr("halves"), op.attr("expr")
    parts = _halves(found, halves)
    if expr is None:
        return parts[0], found
    mapped = evaluate(expr, {f"x{i}": part for i, part in enumerate(parts)}, floats=floats)
    return _kept(np.broadcast_to(mapped, parts[0].shape), bounds), found


def _halves(value: Array, halves: str | None) -> tuple[Array, ...]:
    """A value, or its two halves."""
    if halves is None:
        return (value,)
    if halves == "interleaved":
        return value[..., 0::2], value[..., 1::2]
    half = value.shape[-1] // 2
    return value[..., :half], value[..., half:]


def _grouped_outer(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    choice = x[-1][x[-2]] if op.attr("chooses") else None
    a, b, bounds, *tokens = x[:-2] if op.attr("chooses") else x
    trains = tokens.pop() if op.attr("masked") else np.ones(len(bounds) - 1, np.int32)
    if op.attr("gathers") == "a":
        (a,) = _gather(op, [a, *tokens], floats)
    if op.attr("gathers") == "b":
        (b,) = _gather(op, [b, *tokens], floats)
    a, b = a.astype(floats), b.astype(floats)

    def sums(mine: Array) -> Array:
        spans = [start + np.flatnonzero(mine[start:end]) for start, end in pairwise(bounds)]
        return np.stack([a[rows].T @ b[rows] * bool(on) for rows, on in zip(spans, trains, strict=True)])

    if choice is None:
        return (sums(np.ones(len(a), bool)),)
    many: Any = op.output.shape[0]
    return (np.stack([sums(choice == number) for number in range(many)]),)


def _map_grad_rows(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    g, dh, weights, bounds = x
    g, dh, weights = (v.astype(floats) for v in (g, dh, weights))
    parts = _halves(g, op.attr("halves"))
    values = {f"x{i}": part for i, part in enumerate(parts)}
    h = np.broadcast_to(evaluate(op.attr("expr"), values, floats=floats), dh.shape)
    out = np.zeros_like(g)
    for i, part in enumerate(_halves(out, op.attr("halves"))):
        slope = evaluate(derivative(op.attr("expr"), E.real(f"x{i}")), values, floats=floats)
        part[...] = slope * dh * weights[:, None]
    inside = np.arange(len(g)) < bounds[-1]
    dw = np.where(inside, (h * dh).sum(1), floats(0))
    return _kept(out, bounds), _kept(h * weights[:, None], bounds), dw


def _entry_gemm(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    a, w, ids, *more = _dense(op, x, floats)
    out = _entries(op, np.repeat(a, ids.size // max(len(a), 1), 0), w, ids, more, floats)
    parts = _halves(out, op.attr("halves"))
    if op.attr("expr") is None:
        return (parts[0],)
    values = {f"x{i}": part for i, part in enumerate(parts)}
    return (np.broadcast_to(evaluate(op.attr("expr"), values, floats=floats), parts[0].shape),)


def _entry_combine(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    h, w, ids, weights, *more = _dense(op, x, floats)
    y = _entries(op, h, w, ids, more, floats) * weights.reshape(-1, 1).astype(floats)
    inside = ((ids >= 0) & (ids < len(w)))[..., None]
    return (np.where(inside, y.reshape(*ids.shape, -1), 0).sum(1),)


def _entries(op: Op, a: Array, w: Array, ids: Array, more: Operands, floats: type) -> Array:
    """Each row by the matrix of its expert, what an adapter adds, and its bias."""
    w = w.swapaxes(1, 2) if op.attr("transpose_b") else w
    choice = np.repeat(more[-1], ids.shape[1]) if op.attr("chooses") else np.zeros(ids.size, np.int64)
    bias = more.pop(0) if op.attr("biased") else None
    added: Operands = (
        [m if op.attr("chooses") else m[None] for m in more[:2]] if op.attr("adds") else [[], []]
    )
    low, b = added
    ids = ids.reshape(-1)
    out = np.zeros((len(ids), w.shape[2]), floats)
    for r in np.flatnonzero((ids >= 0) & (ids < len(w))):
        row = a[r].astype(floats)
        out[r] = row @ w[ids[r]].astype(floats)
        if 0 <= choice[r] < len(low):
            t = evaluate(op.attr("low"), {"x0": low[choice[r], ids[r]].astype(floats) @ row}, floats=floats)
            out[r] += b[choice[r], ids[r]].astype(floats) @ t
        out[r] += 0 if bias is None else bias[ids[r]].astype(floats)
    return out


def _kept(value: Array, bounds: Array) -> Array:
    """The rows of groups; zeros in those of nobody, whatever the map makes of them."""
    inside = (np.arange(len(value)) < bounds[-1])[:, None]
    return np.where(inside, value, value.dtype.type(0))


RULES: dict[str, Callable[[Op, Operands, type], tuple[Array, ...]]] = {
    "group": _group,
    "dequantize": _dequantize,
    "gather": _gather,
    "grouped_matmul": _grouped_matmul,
    "split": _split,
    "combine": _combine,
    "grouped_gemm": _grouped_gemm,
    "grouped_outer": _grouped_outer,
    "map_grad_rows": _map_grad_rows,
    "entry_gemm": _entry_gemm,
    "entry_combine": _entry_combine,
}

"""NumPy semantics of the operations of linear attention (see ir/linear.py); `graph_interpret` calls them.

Products of rows are formed in full: what kernels carry as a state is summed over keys here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .derivative import derivative
from .evaluate import evaluate
from .graph import Op
from .linear import X0, FeatureMap

Array = np.ndarray
Operands = list[Any]


def features_of(x: Array, by: FeatureMap | None, floats: type) -> Array:
    """The features of rows; the rows themselves without a map."""
    x = x.astype(floats)
    if by is None:
        return x
    parts = [np.broadcast_to(evaluate(part, {"x0": x}, floats=floats), x.shape) for part in by.parts]
    found = np.concatenate(parts, -1).astype(floats)
    if by.softmax:
        weights = np.exp(found - found.max(-1, keepdims=True))
        found = weights / weights.sum(-1, keepdims=True)
    return found


def rows_gradient(x: Array, df: Array, by: FeatureMap, floats: type) -> Array:
    """The gradient of rows, where df is that of their features."""
    x, df = x.astype(floats), df.astype(floats)
    if by.softmax:
        f = features_of(x, by, floats)
        df = f * (df - (f * df).sum(-1, keepdims=True))
    parts = np.split(df, len(by.parts), -1)
    slopes = [evaluate(derivative(part, X0), {"x0": x}, floats=floats) for part in by.parts]
    return sum((slope * part for slope, part in zip(slopes, parts, strict=True)), np.zeros_like(x))


def _features(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    return (features_of(x[0], op.attr("map"), floats),)


def _features_grad(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    return (rows_gradient(x[0], x[1], op.attr("map"), floats),)


class _Sums:
    """The operands of an operation by role, with heads repeated, and what they share."""

    def __init__(self, op: Op, x: Operands, floats: type, rows: str) -> None:
        self.op, self.floats = op, floats
        self.at = _operands(op, x, floats)
        self.at["f"] = features_of(self.at["f"], op.attr("f_map"), floats)
        self.heads = self.at[rows].shape[1]
        self.sources = self.at["f"].shape[1]
        self.least = min(self.heads, self.sources)
        ones = np.ones(self.at["f"].shape[:3], floats)
        self.c = self.at.get("c", ones)

    def spread(self, value: Array) -> Array:
        """By as many heads as there are of rows or sources, whichever are more."""
        return np.repeat(value, max(self.heads, self.sources) // value.shape[1], 1)

    def gathered(self, value: Array) -> Array:
        """By the heads of rows: summed where there are more sources."""
        if value.shape[1] == self.heads:
            return value
        return value.reshape(value.shape[0], self.heads, -1, *value.shape[2:]).sum(2)

    def allowed(self, weights: Array) -> Array:
        return np.tril(weights) if self.op.attr("order") == "forward" else np.triu(weights)

    def of_heads(self, name: str) -> Array:
        """What the sums begin with, by the heads of rows."""
        return np.repeat(self.at[name], self.heads // self.at[name].shape[1], 1)


def _operands(op: Op, x: Operands, floats: type) -> dict[str, Array]:
    """Operands by role, with quotients taken."""
    at = {role: np.asarray(v, floats) for role, v in zip(op.attr("operands"), x, strict=True)}
    if "over" in at:
        which = op.attr("divides")
        at[which] = at[which] / (at["over"] + floats(op.attr("eps")))[..., None]
    return at


def _grouped(value: Array, heads: int) -> Array:
    """Sums over the heads that share one of `heads`."""
    return value.reshape(value.shape[0], heads, -1, *value.shape[2:]).sum(2)


def _added(f: Array, g: Array, c: Array | None, heads: int) -> tuple[Array, Array]:
    """The state and the sums of rows f and g."""
    sums = f if c is None else f * c[..., None]
    return _grouped(f.swapaxes(2, 3) @ g, heads), _grouped(sums.sum(2), heads)


def _linear_states(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    at = _operands(op, x, floats)
    f = features_of(at["f"], op.attr("f_map"), floats)
    state, sums = _added(f, at["g"], at.get("c"), int(op.output.shape[1]))
    return (state + at.get("state", floats(0)), sums + at.get("sums", floats(0)))[: len(op.outputs)]


def _of_rows(at: dict[str, Array], name: str, rows: Array) -> Array:
    """A state or its sums by the heads of rows."""
    return np.repeat(at[name], rows.shape[1] // at[name].shape[1], 1)


def _read_values(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    at = _operands(op, x, floats)
    rows = features_of(at["x"], op.attr("x_map"), floats)
    out = rows @ _of_rows(at, "state", rows)
    if "sums" not in at:
        return (out,)
    den = (rows @ _of_rows(at, "sums", rows)[..., None])[..., 0]
    if op.attr("eps") is not None:
        out = out / (den + floats(op.attr("eps")))[..., None]
    return (out, den)[: len(op.outputs)]


def _read_features(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    at = _operands(op, x, floats)
    y = at["y"]
    found = y @ _of_rows(at, "state", y).swapaxes(2, 3)
    if "sums" in at:
        r = at.get("r", np.ones(y.shape[:3], floats))
        found = found + r[..., None] * _of_rows(at, "sums", y)[:, :, None]
    if "of" in at:
        found = rows_gradient(at["of"], found, op.attr("out_map"), floats)
    return (found,)


def _read_gradients(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    at = _operands(op, x, floats)
    by = op.attr("x_map")
    f, y = features_of(at["x"], by, floats), at["y"]
    state = _of_rows(at, "state", f)
    r = None
    if op.attr("eps") is not None:
        over = (f @ _of_rows(at, "sums", f)[..., None])[..., 0] + floats(op.attr("eps"))
        y = y / over[..., None]
        r = -((f @ state) * y).sum(-1) / over
    found = y @ state.swapaxes(2, 3)
    if r is not None:
        found = found + r[..., None] * _of_rows(at, "sums", f)[:, :, None]
    dx = found if by is None else rows_gradient(at["x"], found, by, floats)
    dstate, dsums = _added(f, y, r, at["state"].shape[1])
    return (dx, dstate + at.get("begin", floats(0)), dsums + at.get("begin_sums", floats(0)))[
        : len(op.outputs)
    ]


def _give_gradients(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    at = _operands(op, x, floats)
    by = op.attr("f_map")
    f = features_of(at["f"], by, floats)
    df = at["g"] @ at["state"].swapaxes(2, 3)
    if "sums" in at:
        df = df + at["sums"][:, :, None]
    return (df if by is None else rows_gradient(at["f"], df, by, floats)), f @ at["state"]


def _linear_values(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    sums = _Sums(op, x, floats, "x")
    at = sums.at
    rows = features_of(at["x"], op.attr("x_map"), floats)
    f, g, c = (sums.spread(v) for v in (at["f"], at["g"], sums.c))
    weights = sums.allowed(sums.spread(rows) @ f.swapaxes(2, 3))
    out, den = sums.gathered(weights @ g), sums.gathered((weights @ c[..., None])[..., 0])
    if "state" in at:
        out = out + rows @ sums.of_heads("state")
    if "sums" in at:
        den = den + (rows @ sums.of_heads("sums")[..., None])[..., 0]
    if op.attr("eps") is not None and "over" not in at:
        out = out / (den + floats(op.attr("eps")))[..., None]
    found = [out, *([den] if op.attr("keeps") else [])]
    if op.attr("final"):
        made = _added(at["f"], at["g"], sums.c, sums.least)
        kept = zip(("state", "sums")[: 1 + bool(op.attr("sums"))], made, strict=False)
        found += [value + at.get(name, floats(0)) for name, value in kept]
    return tuple(found)


def _linear_features(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    sums = _Sums(op, x, floats, "y")
    at = sums.at
    f, g, c, y = (sums.spread(v) for v in (at["f"], at["g"], sums.c, at["y"]))
    weights = y @ g.swapaxes(2, 3)
    r = at.get("r", np.ones(at["y"].shape[:3], floats))
    if op.attr("sums"):
        weights = weights + sums.spread(r)[..., None] * c[:, :, None]
    found = sums.gathered(sums.allowed(weights) @ f)
    if "state" in at:
        found = found + at["y"] @ sums.of_heads("state").swapaxes(2, 3)
    if "sums" in at and op.attr("sums"):
        found = found + r[..., None] * sums.of_heads("sums")[:, :, None]
    if "of" in at:
        found = rows_gradient(at["of"], found, op.attr("out_map"), floats)
    return (found,)


def _normalise(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    out, den = (v.astype(floats) for v in x)
    return (out / (den + floats(op.attr("eps")))[..., None],)


def _normalise_grad(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    do, o, den = (v.astype(floats) for v in x)
    over = den + floats(op.attr("eps"))
    found = do / over[..., None], -(do * o).sum(-1) / over
    return found if len(op.outputs) == 2 else found[1:]


RULES: dict[str, Callable[[Op, Operands, type], tuple[Array, ...]]] = {
    "features": _features,
    "features_grad": _features_grad,
    "linear_states": _linear_states,
    "read_values": _read_values,
    "read_features": _read_features,
    "read_gradients": _read_gradients,
    "give_gradients": _give_gradients,
    "linear_values": _linear_values,
    "linear_features": _linear_features,
    "normalise": _normalise,
    "normalise_grad": _normalise_grad,
}

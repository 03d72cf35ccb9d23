"""Reference semantics of graphs in NumPy: the oracle that every lower level must agree with.

Operations compute in float64 where an operand or result is f64, else in float32, and round each
result to its dtype once. Scores are held densely, -inf where the mask does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import gradient_interpret as gradients
from .errors import InputError, UnsupportedError
from .evaluate import evaluate, round_to
from .graph import Graph, Op, Value
from .graph_verify import verify
from .linear_interpret import RULES as LINEAR
from .mask import Mask
from .ragged_interpret import RULES as RAGGED
from .score import ProbMap, ScoreMap

Array = np.ndarray
Operands = list[Any]


def interpret(graph: Graph, arguments: Mapping[str, Any]) -> dict[str, Array]:
    """Run a graph on an array (or a number) for every input; its outputs by name.

    Raises VerifyError, UnsupportedError (a graph with sequences), InputError (a missing input, shapes
    that do not fit the declared ones).
    """
    verify(graph)
    if any(op.attr("sequences") is not None for op in graph.ops):
        raise UnsupportedError(
            f"graph @{graph.name} has sequences, which say how memory holds tensors. Interpret its kernels"
        )
    names = {v.name for v in graph.inputs}
    if set(arguments) != names:
        raise InputError(f"graph @{graph.name}", f"arguments {', '.join(sorted(names))}", sorted(arguments))
    lengths: dict[str, int] = {}
    values: dict[str, Any] = {}
    for value in graph.inputs:
        values[value.name] = _bind(value, np.asarray(arguments[value.name]), lengths)
    with np.errstate(all="ignore"):
        for op in graph.ops:
            sized = replace(op, outputs=tuple(_sized(v, lengths) for v in op.outputs))
            results = RULES[op.kind](sized, [values[i] for i in op.inputs], _floats(graph, op))
            for value, result in zip(op.outputs, results, strict=False):
                values[value.name] = np.asarray(round_to(result, value.dtype))
    return {name: values[name] for name in graph.outputs}


def _sized(value: Value, lengths: dict[str, int]) -> Value:
    """A value with numbers for the names of its extents."""
    return replace(value, shape=tuple(lengths.get(n, n) if isinstance(n, str) else n for n in value.shape))


def _bind(value: Value, array: Array, lengths: dict[str, int]) -> Array:
    """The array in its declared dtype; names of its shape are bound or compared."""
    expected = tuple(lengths.get(n, n) if isinstance(n, str) else n for n in value.shape)
    fits = array.ndim == len(expected) and all(
        isinstance(e, str) or e == n for e, n in zip(expected, array.shape, strict=True)
    )
    if not fits:
        raise InputError(f"%{value.name}", f"shape [{', '.join(map(str, expected))}]", array.shape)
    lengths |= {n: size for n, size in zip(value.shape, array.shape, strict=True) if isinstance(n, str)}
    return np.asarray(round_to(array, value.dtype))


def _floats(graph: Graph, op: Op) -> type:
    dtypes = {graph.values[i].dtype for i in op.inputs} | {v.dtype for v in op.outputs}
    return np.float64 if "f64" in dtypes else np.float32


def _heads(x: Array, queries: int) -> Array:
    """[B, Hk, ...] as [B, Hq, ...]: query head h reads key head h // (Hq // Hk)."""
    return np.repeat(x, queries // x.shape[1], axis=1)


def _grid(shape: tuple[int, ...]) -> tuple[Array, ...]:
    """b, h, q, k of scores [B, H, q_len, kv_len], broadcastable."""
    return tuple(np.ogrid[tuple(slice(n) for n in shape)])


def _runtime(holder: Mask | ScoreMap, operands: Operands) -> tuple[list[Any], list[Array]]:
    """The values of a mask's or score map's runtime numbers, and of its captured tensors."""
    count = len(holder.params)
    return [v.item() for v in operands[:count]], operands[count : count + len(holder.captures)]


def _scores(op: Op, q: Array, k: Array, operands: Operands, floats: type) -> Array:
    product = q.astype(floats) @ _heads(k, q.shape[1]).astype(floats).swapaxes(2, 3)
    product = product * floats(op.attr("scale", 1.0))
    mask = op.attr("mask")
    if mask is None:
        return product
    params, captures = _runtime(mask, operands)
    b, h, q_at, k_at = _grid(product.shape)
    q_len, kv_len = product.shape[2:]
    attends = mask.evaluate(b, h, q_at, k_at, params, captures, q_len, kv_len)
    return np.where(attends, product, floats(op.attr("outside", -np.inf)))


def _mapped(score: ScoreMap, scores: Array, operands: Operands, floats: type) -> Array:
    params, captures = _runtime(score, operands)
    b, h, q_at, k_at = _grid(scores.shape)
    found = score.evaluate(scores, b, h, q_at, k_at, params, captures, floats=floats)
    return np.where(np.isneginf(scores), scores, found)


def _normalised(scores: Array, sinks: Array | None = None) -> tuple[Array, Array, Array]:
    """Softmax of the last axis, its log-sum-exp and maximum; rows of -inf give zeros and -inf."""
    peak = scores.max(-1, keepdims=True, initial=-np.inf)
    safe = np.where(np.isneginf(peak), 0, peak)
    weights = np.exp(scores - safe)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    lse = np.where(empty, -np.inf, np.log(np.where(empty, 1, total)) + safe)[..., 0]
    if sinks is not None:
        return _weights_of(scores, lse, sinks), lse, peak[..., 0]
    return weights / np.where(empty, 1, total), lse, peak[..., 0]


def _weights_of(scores: Array, lse: Array, sinks: Array | None) -> Array:
    """exp(scores) over their known sum, which a sink joins; zero where a score is -inf."""
    norm = lse[..., None]
    if sinks is not None:
        norm = np.logaddexp(norm, np.minimum(sinks, np.finfo(scores.dtype).max)[:, None, None])
    return np.where(np.isneginf(scores), 0, np.exp(scores - norm)).astype(scores.dtype)


def _matmul(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    b = x[1].swapaxes(-1, -2) if op.attr("transpose_b") else x[1]
    return (x[0].astype(floats) @ b.astype(floats),)


def _sddmm(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    return (_scores(op, x[0], x[1], x[2:], floats),)


def _score_map(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    return (_mapped(op.attr("score"), x[0].astype(floats), x[1:], floats),)


def _softmax(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    return _normalised(*(operand.astype(floats) for operand in x))


def _prob_map(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    probabilities, scores, *rest = x
    return (_reweighed(op.attr("prob"), probabilities.astype(floats), scores, rest, floats),)


def _reweighed(
    prob: ProbMap | None, weights: Array, scores: Array, operands: Operands, floats: type
) -> Array:
    if prob is None:
        return weights
    params, captures = _runtime(prob, operands)
    b, h, q_at, k_at = _grid(weights.shape)
    found = prob.evaluate(weights, b, h, q_at, k_at, params, captures, floats=floats)
    return np.where(np.isneginf(scores), floats(0), found)


def _spmm(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    weights = x[0].astype(floats)
    if op.attr("transposed"):
        return (gradients.transposed(weights, x[1].astype(floats), int(op.output.shape[1])),)
    return (weights @ _heads(x[1], weights.shape[1]).astype(floats),)


def _reduce(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    reduction = {"sum": np.sum, "max": np.max, "min": np.min, "mean": np.mean}[op.attr("op")]
    return (reduction(x[0].astype(floats) if x[0].dtype.kind == "f" else x[0], axis=op.attr("axis")),)


def _map(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    found = evaluate(op.attr("expr"), {f"x{i}": v for i, v in enumerate(x)}, floats=floats)
    return (np.broadcast_to(found, np.broadcast_shapes(*(v.shape for v in x))),)


@dataclass(frozen=True)
class _Fused:
    """What fused operations share: the scores, the sinks, and the operands of the probability map."""

    scores: Array
    sinks: Array | None
    rest: Operands

    @staticmethod
    def of(op: Op, q: Array, k: Array, rest: Operands, floats: type) -> _Fused:
        sinks = None
        if op.attr("sinks"):
            sinks, rest = rest[0].astype(floats), rest[1:]
        scores = _scores(op, q, k, rest, floats)
        if op.attr("mask") is not None:
            rest = rest[sum(map(len, _runtime(op.attr("mask"), rest))) :]
        score = op.attr("score")
        if score is not None:
            scores = _mapped(score, scores, rest, floats)
            rest = rest[sum(map(len, _runtime(score, rest))) :]
        return _Fused(scores, sinks, rest)


def _attention(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    q, k, v, *rest = x
    of = _Fused.of(op, q, k, rest, floats)
    weights, *rows = _normalised(of.scores, of.sinks)
    weights = _reweighed(op.attr("prob"), weights, of.scores, of.rest, floats)
    return weights @ _heads(v, q.shape[1]).astype(floats), *rows


def _row_lse(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    _, lse, peak = _normalised(_Fused.of(op, x[0], x[1], x[2:], floats).scores)
    if not op.attr("apart"):
        return lse, peak
    top = peak * np.log2(np.e)
    total = np.where(np.isneginf(peak), 0, np.exp(lse - np.where(np.isneginf(peak), 0, peak)))
    return top.astype(floats), total.astype(floats), lse, peak


def _weigh(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    q, k, v, top, total, *rest = x
    of = _Fused.of(op, q, k, rest, floats)
    empty = total == 0
    log_sum = np.log(np.where(empty, 1, total)) + np.where(empty, 0, top) * np.log(2)
    weights = _weights_of(of.scores, np.where(empty, -np.inf, log_sum).astype(floats), of.sinks)
    weights = _reweighed(op.attr("prob"), weights, of.scores, of.rest, floats)
    return (weights @ _heads(v, q.shape[1]).astype(floats),)


def _column_sums(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    q, k, lse, *rest = x
    of = _Fused.of(op, q, k, rest, floats)
    return (_weights_of(of.scores, lse.astype(floats), of.sinks).sum(2),)


def _renormalize(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    scores, lse, *sinks = (operand.astype(floats) for operand in x)
    return (_weights_of(scores, lse, sinks[0] if sinks else None),)


def _map_grad(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    given, scores, grad, *rest = x
    of, pairs = op.attr("grad"), (given.astype(floats), scores, grad.astype(floats))
    return (gradients.mapped(of, *pairs, rest, floats),)


def _capture_grad(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    given, scores, grad, *rest = x
    pairs, reads = (given.astype(floats), scores, grad.astype(floats)), (op.attr("grads"), op.attr("indices"))
    shape = tuple(map(int, op.output.shape))
    return (gradients.scattered(*reads, shape, pairs, rest, floats),)


def _softmax_grad(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    p, dp, delta = (operand.astype(floats) for operand in x)
    return (p * (dp - delta[..., None]),)


def _row_dot(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    return ((x[0].astype(floats) * x[1].astype(floats)).sum(-1),)


def _row_shift(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    delta, dlse, lse, *sinks = (operand.astype(floats) for operand in x)
    return (gradients.shifted(delta, dlse, lse, sinks[0] if sinks else None),)


def _sink_grad(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    lse, sinks, delta = (operand.astype(floats) for operand in x)
    return (gradients.sink_rows(lse, sinks, delta),)


def _fused_gradient(op: Op, x: Operands, floats: type) -> tuple[Array, ...]:
    """q, k, v, what is `given`, the runtime values of the mask and of both maps."""
    heads, names = x[1].shape[1], op.attr("given")
    q, k, v = x[0].astype(floats), *(_heads(t, x[0].shape[1]).astype(floats) for t in x[1:3])
    given = {name: value.astype(floats) for name, value in zip(names, x[3:], strict=False)}
    rest = x[3 + len(names) :]
    raw = _scores(op, q, k, rest, floats)
    rest = rest[sum(map(len, _runtime(op.attr("mask"), rest))) :]
    scores = _mapped(op.attr("score"), raw, rest, floats)
    values = rest[: sum(map(len, _runtime(op.attr("score"), rest)))]
    if "norm" in given:
        weights = _weights_of(scores, given["lse"], None) * np.exp2(given["norm"])[..., None]
    else:
        weights = _weights_of(scores, given["lse"], given.get("sinks"))
    made = gradients.Gradients(op, q, k, v, raw, scores, weights, given, values, rest[len(values) :], floats)
    return gradients.FUSED[op.kind](made, [value.shape for value in op.outputs], heads)


RULES: dict[str, Callable[[Op, Operands, type], tuple[Array, ...]]] = {
    "matmul": _matmul,
    "sddmm": _sddmm,
    "score_map": _score_map,
    "softmax": _softmax,
    "prob_map": _prob_map,
    "spmm": _spmm,
    "reduce": _reduce,
    "map": _map,
    "attention": _attention,
    "row_lse": _row_lse,
    "weigh": _weigh,
    "column_sums": _column_sums,
    **RAGGED,
    **LINEAR,
    "renormalize": _renormalize,
    "map_grad": _map_grad,
    "capture_grad": _capture_grad,
    "softmax_grad": _softmax_grad,
    "row_dot": _row_dot,
    "row_shift": _row_shift,
    "sink_grad": _sink_grad,
    **dict.fromkeys(gradients.FUSED, _fused_gradient),
}

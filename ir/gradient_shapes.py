"""The rules of the operations of gradients: operands and shapes of results, for `graph_verify`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .mask import Mask
from .score import ProbGrad, ProbMap, ScoreGrad, ScoreMap

if TYPE_CHECKING:
    from .graph_verify import Checker, Shape

GIVEN = ("do", "o", "lse", "norm", "dlse", "delta", "sinks")
"""What fused gradients may be given beside q, k, v."""


def _renormalize(c: Checker) -> tuple[Shape, ...]:
    scores, lse = c.shapes(2, (4, 3))
    c.same("shape of rows", scores[:3], lse)
    sinks = len(c.operands) > 2
    if sinks:
        c.sinks(2, scores[1])
    c.captured(2 + sinks)
    return (scores,)


def _mapped(c: Checker, *maps: ScoreMap) -> Shape:
    """The shape of the pairs that a gradient of a map is over."""
    given, scores, grad = c.shapes(3, (4, 4, 4))
    if maps:
        c.captured(3, maps[0])
    c.same("shape of pairs", given, scores)
    c.same("shape of pairs", given, grad)
    return scores


def _map_grad(c: Checker) -> tuple[Shape, ...]:
    return (_mapped(c, c.attr("grad", (ScoreGrad, ProbGrad))),)


def _capture_grad(c: Checker) -> tuple[Shape, ...]:
    grads, indices = c.attr("grads", tuple), c.attr("indices", tuple)
    if len(grads) != len(indices):
        c.fail("attrs", f"expected one index a gradient; got {len(grads)} and {len(indices)}")
    _mapped(c, *grads)
    (shape,) = {v.shape for v in c.op.outputs}
    if any(len(index) != len(shape) for index in indices):
        c.fail("attrs", f"indices: expected {len(shape)} numbers each; got {indices}")
    return (shape,)


def _softmax_grad(c: Checker) -> tuple[Shape, ...]:
    p, dp, delta = c.shapes(3, (4, 4, 3))
    c.captured(3)
    c.same("shape of pairs", p, dp)
    c.same("shape of rows", p[:3], delta)
    return (p,)


def _row_dot(c: Checker) -> tuple[Shape, ...]:
    a, b = c.shapes(2)
    c.captured(2)
    c.same("shape", a, b)
    return (a[:-1],)


def _row_shift(c: Checker) -> tuple[Shape, ...]:
    delta, dlse, lse = c.shapes(3, (3, 3, 3))
    sinks = len(c.operands) > 3
    if sinks:
        c.sinks(3, delta[1])
    c.captured(3 + sinks)
    c.same("shape of rows", delta, dlse)
    c.same("shape of rows", delta, lse)
    return (delta,)


def _sink_grad(c: Checker) -> tuple[Shape, ...]:
    lse = c.shapes(1, (3,))[0]
    c.sinks(1, lse[1])
    if len(c.operands) != 3 or c.operands[2].shape != lse:
        c.fail("operands", "expected the log-sum-exp, sinks and delta of every row")
    return (lse,)


def _fused(c: Checker) -> tuple[Shape, Shape, Shape]:
    """The shapes of q, k and v of a fused gradient; operands: these, those `given`, runtime values."""
    q, k, v = c.shapes(3, (4, 4, 4))
    given = c.attr("given", tuple)
    known = {"do": (*q[:3], v[3]), "o": (*q[:3], v[3]), "sinks": (q[1],)}
    for name, value in zip(given, c.operands[3:], strict=False):
        if name not in GIVEN:
            c.fail("attrs", f"given: expected names of {', '.join(GIVEN)}; got {name!r}")
        c.same(f"shape of {name}", value.shape, known.get(name, q[:3]))
    c.captured(
        3 + len(given),
        c.attr("mask", Mask, needed=False),
        c.attr("score", ScoreMap, needed=False),
        c.attr("prob", ProbMap, needed=False),
    )
    c.same("batch", q[0], k[0])
    c.heads(q[1], k[1])
    c.same("head size", q[3], k[3])
    c.same("shape of keys and values", k[:3], v[:3])
    return q, k, v


def _row_norm(c: Checker) -> tuple[Shape, ...]:
    q, _, _ = _fused(c)
    return (q[:3],)


def _grad_delta(c: Checker) -> tuple[Shape, ...]:
    q, _, _ = _fused(c)
    return q[:3], q[:3]


def _grad_rows(c: Checker) -> tuple[Shape, ...]:
    q, _, _ = _fused(c)
    return q, q[:3], q[:3], q[:3]


def _grad_columns(c: Checker) -> tuple[Shape, ...]:
    _, k, v = _fused(c)
    return k, v


def _grad_captures(c: Checker) -> tuple[Shape, ...]:
    _fused(c)
    return tuple(v.shape for v in c.op.outputs)


SHAPES: dict[str, Callable[[Checker], tuple[Shape, ...]]] = {
    "renormalize": _renormalize,
    "map_grad": _map_grad,
    "capture_grad": _capture_grad,
    "softmax_grad": _softmax_grad,
    "row_dot": _row_dot,
    "row_shift": _row_shift,
    "sink_grad": _sink_grad,
    "row_norm": _row_norm,
    "grad_delta": _grad_delta,
    "grad_rows": _grad_rows,
    "grad_columns": _grad_columns,
    "grad_captures": _grad_captures,
}
"""As `graph_verify.SHAPES`."""

FEWER = ("grad_delta", "grad_rows")
"""Kinds that may leave out results from the end."""

"""Reference semantics of the operations of gradients in NumPy, for `graph_interpret`.

Arrays come in the dtype that the operation computes in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .derivative import derivative
from .evaluate import evaluate
from .expr import Expr, readf, real
from .graph import Op
from .score import ProbGrad, ProbMap, ScoreGrad, ScoreMap

Array = np.ndarray


def logs_with(lse: Array, sinks: Array | None) -> Array:
    """Rows' log-sum-exp with the sinks of their heads; sinks: [Hq] or None."""
    if sinks is None:
        return lse
    return np.logaddexp(lse, np.minimum(sinks, np.finfo(lse.dtype).max)[:, None])


def shifted(delta: Array, dlse: Array, lse: Array, sinks: Array | None) -> Array:
    """delta less what a gradient of the log-sum-exp adds to those of scores; sinks take their part."""
    alone = np.where(np.isneginf(lse), 0, dlse)
    return delta - alone * np.exp(np.where(np.isneginf(lse), 0, logs_with(lse, sinks) - lse))


def sink_rows(lse: Array, sinks: Array, delta: Array) -> Array:
    """What each row adds to the gradient of its head's sink."""
    return -np.exp(np.minimum(sinks, np.finfo(lse.dtype).max)[:, None] - logs_with(lse, sinks)) * delta


def mapped(
    grad: ScoreMap, given: Array, scores: Array, cotangent: Array, values: list[Any], floats: type
) -> Array:
    """A gradient map on every pair; zero where a score is -inf."""
    count = len(grad.params)
    params, captures = [v.item() for v in values[:count]], values[count : count + len(grad.captures)]
    b, h, q, k = np.ogrid[tuple(slice(n) for n in scores.shape)]
    found = grad.evaluate(given, b, h, q, k, params, captures, floats=floats, grad=cotangent)
    return np.where(np.isneginf(scores), floats(0), found)


def scattered(
    grads: tuple[ScoreMap, ...],
    indices: tuple[tuple[Expr, ...], ...],
    shape: tuple[int, ...],
    given: tuple[Array, Array, Array],
    values: list[Any],
    floats: type,
) -> Array:
    """Gradients of what a map read, added up at the indices where it read them."""
    out = np.zeros(shape, floats)
    scores = given[1]
    pairs = np.nonzero(~np.isneginf(scores))
    for grad, index in zip(grads, indices, strict=True):
        found = mapped(grad, *given, values, floats)
        names = dict(zip("bhqk", pairs, strict=True))
        names |= dict(zip((name for name, _ in grad.params), (v for v in values), strict=False))
        names |= {c.name: v for c, v in zip(grad.captures, values[len(grad.params) :], strict=False)}
        places = [np.broadcast_to(evaluate(i, names), pairs[0].shape).astype(np.int64) for i in index]
        np.add.at(out, tuple(places), found[pairs])
    return out


def transposed(weights: Array, rows: Array, heads: int) -> Array:
    """[B, Hq, M, N] x [B, Hq, M, E] -> [B, heads, N, E], summed over the query heads of a key head."""
    found = weights.swapaxes(2, 3) @ rows
    batch, queries, *inner = found.shape
    return found.reshape(batch, heads, queries // heads if heads else 1, *inner).sum(2)


@dataclass(frozen=True)
class Gradients:
    """The gradients of one attention, computed densely.

    raw, scores: before and after the score map, -inf where pairs do not attend. weights: the probabilities.
    given: operands by name. score_values, prob_values: runtime numbers and captured tensors of the maps."""

    op: Op
    q: Array
    k: Array
    v: Array
    raw: Array
    scores: Array
    weights: Array
    given: dict[str, Array]
    score_values: list[Any]
    prob_values: list[Any]
    floats: type

    @property
    def cotangent(self) -> Array:
        """The gradient of the weights of values."""
        return self.given["do"] @ self.v.swapaxes(2, 3)

    @property
    def dp(self) -> Array:
        """The gradient of the probabilities."""
        prob = self.op.attr("prob")
        if prob is None:
            return self.cotangent
        return self._mapped(ProbGrad, prob, self.weights, self.cotangent, self.prob_values)

    @property
    def delta(self) -> Array:
        """Rows, before the gradient of the log-sum-exp."""
        if "o" in self.given:
            return (self.given["o"] * self.given["do"]).sum(-1)
        return (self.weights * np.where(np.isneginf(self.scores), 0, self.dp)).sum(-1)

    @property
    def shifted(self) -> Array:
        if "delta" in self.given:
            return self.given["delta"]
        if "dlse" not in self.given:
            return self.delta
        return shifted(self.delta, self.given["dlse"], self.given["lse"], self.given.get("sinks"))

    @property
    def dt(self) -> Array:
        """The gradient of the mapped scores."""
        return self.weights * (np.where(np.isneginf(self.scores), 0, self.dp) - self.shifted[..., None])

    @property
    def ds(self) -> Array:
        """The gradient of the products."""
        return self._mapped(ScoreGrad, self.op.attr("score"), self.raw, self.dt, self.score_values)

    def _mapped(
        self, kind: type[ScoreMap], of: ScoreMap, given: Array, cotangent: Array, values: list[Any]
    ) -> Array:
        slope = real("grad") * derivative(of.expr, real(of.arguments[0]))
        grad = kind(slope, of.params, of.captures)
        return mapped(grad, given, self.scores, cotangent, values, self.floats)

    def of_norm(self) -> tuple[Array, ...]:
        lse, sinks = self.given["lse"], self.given.get("sinks")
        known = np.where(np.isneginf(lse), 0, lse)
        total = np.exp(self.scores - known[..., None]).sum(-1)
        if sinks is not None:
            total = total * (1 + np.exp(sinks[:, None] - known))
        return (np.where(np.isneginf(lse), 0, -np.log2(np.where(total == 0, 1, total))),)

    def of_rows(self) -> tuple[Array, ...]:
        rows, norm = self.shifted, any(v.name == "norm" for v in self.op.outputs)
        return (self.ds @ self.k, rows, *(self.of_norm() if norm else ()), *self._sinks())

    def of_delta(self) -> tuple[Array, ...]:
        return (self.shifted, *self._sinks())

    def _sinks(self) -> tuple[Array, ...]:
        if "sinks" not in self.given or "delta" in self.given:
            return ()
        return (sink_rows(self.given["lse"], self.given["sinks"], self.delta),)

    def of_columns(self, heads: int) -> tuple[Array, ...]:
        prob, weights = self.op.attr("prob"), self.weights
        if prob is not None:
            plain = ProbGrad(prob.expr, prob.params, prob.captures)
            weights = mapped(plain, weights, self.scores, weights, self.prob_values, self.floats)
        return transposed(self.ds, self.q, heads), transposed(weights, self.given["do"], heads)

    def of_captures(self, shapes: list[tuple[int, ...]]) -> tuple[Array, ...]:
        of = self.op.attr("of")
        score = isinstance(of, ScoreMap) and not isinstance(of, ProbMap)
        given = (self.raw, self.scores, self.dt) if score else (self.weights, self.scores, self.cotangent)
        values = self.score_values if score else self.prob_values
        found = []
        for (grads, indices), shape in zip(captured_reads(of, self.op.attr("captures")), shapes, strict=True):
            found.append(scattered(grads, indices, shape, given, values, self.floats))
        return tuple(found)


def captured_reads(
    of: ScoreMap, names: tuple[str, ...]
) -> list[tuple[tuple[ScoreMap, ...], tuple[tuple[Expr, ...], ...]]]:
    """For each captured tensor of a map: gradients by its reads, and the indices that these read.

    Reads that the map does not depend on, or that `stop_gradient` holds, have none."""
    kind = ProbGrad if isinstance(of, ProbMap) else ScoreGrad
    out = []
    for name in names:
        reads = sorted((r for r in of.expr.atoms(readf) if str(r.args[0]) == name), key=str)
        slopes = [(derivative(of.expr, r), tuple(r.args[1:])) for r in reads]
        found = [(slope, index) for slope, index in slopes if slope != 0]
        grads = (kind(real("grad") * slope, of.params, of.captures) for slope, _ in found)
        out.append((tuple(grads), tuple(index for _, index in found)))
    return out


def _fused(what: str) -> Callable[..., tuple[Array, ...]]:
    def rule(gradients: Gradients, shapes: list[tuple[int, ...]], heads: int) -> tuple[Array, ...]:
        if what == "columns":
            return gradients.of_columns(heads)
        if what == "captures":
            return gradients.of_captures(shapes)
        return {"rows": gradients.of_rows, "delta": gradients.of_delta, "norm": gradients.of_norm}[what]()

    return rule


FUSED = {f"grad_{what}": _fused(what) for what in ("delta", "rows", "columns", "captures")}
FUSED["row_norm"] = _fused("norm")
"""What fused gradients give; see `Gradients`."""

"""fuse, for gradients: what `differentiate` wrote as primitives becomes one kernel a kind of result.

Before (the gradients of q, k, v and a captured tensor t0)::

    %s, %t, %p, %w = ...                                         the scores and probabilities, anew
    %dw = sddmm %do, %v ; %dp = map_grad %p, %t, %dw ; %delta = row_dot %o, %do
    %dt = softmax_grad %p, %dp, %delta ; %ds = map_grad %s, %s, %dt
    %dq = spmm %ds, %k ; %dk = spmm %ds, %q {transposed = True} ; %dv = spmm %w, %do {transposed = True}
    %dt0 = capture_grad %s, %s, %dt

After::

    %dq, %delta = grad_rows %q, %k, %v, %do, %lse, %o {given = ('do', 'lse', 'o'), mask = m, score = f}
    %dk, %dv = grad_columns %q, %k, %v, %do, %lse, %delta {given = ('do', 'lse', 'delta'), ...}
    %dt0 = grad_captures %q, %k, %v, %do, %lse, %delta {captures = ('t0',), of = f, ...}

Each walks over the pairs of the mask on its own and computes scores and probabilities again; what a row
sums up, delta, is left behind by the first. Where no gradient of q is wanted, or delta is a sum over keys,
`grad_delta` makes it.

Leaves alone: graphs without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.graph import Graph, Op, Value
from .fuse import PLANS

PAIRS = ("sddmm", "score_map", "renormalize", "prob_map", "map_grad", "softmax_grad")
TRANSPOSED_PLANS = dict.fromkeys(PLANS)


def fuse_gradients(graph: Graph) -> Graph:
    """The gradients of one attention as fused operations."""
    return _Gradients(graph).fused() if graph.of_kind("renormalize") else graph


class _Gradients:
    """The operations of one graph of gradients, by the parts that they play."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        (self.known,) = graph.of_kind("renormalize")
        (self.score,) = graph.of_kind("score_map")
        (self.prob,) = graph.of_kind("prob_map") or (None,)
        (self.sums,) = graph.of_kind("row_dot") or (None,)
        (self.shift,) = graph.of_kind("row_shift") or (None,)
        (self.sink,) = graph.of_kind("sink_grad") or (None,)
        self.sddmm = next(op for op in graph.of_kind("sddmm") if op.attr("outside") is None)
        products = graph.of_kind("spmm")
        self.rows = next((op for op in products if not op.attr("transposed")), None)
        self.columns = tuple(op for op in products if op.attr("transposed"))
        self.captures = graph.of_kind("capture_grad")

    def fused(self) -> Graph:
        ops: list[Op] = []
        if self.sums is not None:
            ops += self._sums_and_rows(self.sums)
        if self.columns:
            ops.append(self._columns())
        for of in (self.score.attr("score"), self.prob and self.prob.attr("prob")):
            own = set() if of is None else {c.name for c in of.captures}
            wanted = [op for op in self.captures if op.attr("of") in own]
            if wanted:
                made = self._op("grad_captures", self._after(), [op.output for op in wanted])
                ops.append(made.with_attrs(of=of, captures=tuple(op.attr("of") for op in wanted)))
        return Graph(self.graph.name, self.graph.inputs, tuple(ops), self.graph.outputs)

    def _sums_and_rows(self, sums: Op) -> list[Op]:
        """What makes delta, and the gradient of q."""
        delta = self.shift.output if self.shift is not None else sums.output
        known, sinks = sums.inputs[0] == "o", [self.sink.output] if self.sink is not None else []
        given = ["do", "lse", *(["o"] if known else []), *(["dlse"] if self.shift is not None else [])]
        if self.rows is not None and known:
            return [self._op("grad_rows", given, [self.rows.output, delta, *sinks])]
        made = [self._op("grad_delta", given, [delta, *sinks])]
        return (
            made if self.rows is None else [*made, self._op("grad_rows", self._after(), [self.rows.output])]
        )

    def _columns(self) -> Op:
        k, v = (self.graph.values[name] for name in ("k", "v"))
        of = {op.inputs[1]: op.output for op in self.columns}
        outputs = [of.get("q", Value("dk", k.dtype, k.shape)), of.get("do", Value("dv", v.dtype, v.shape))]
        return self._op("grad_columns", self._after(), outputs).with_attrs(**TRANSPOSED_PLANS)

    def _after(self) -> list[str]:
        """What is given to operations that run when delta is known, if they need it."""
        return ["do", "lse", *([] if self.sums is None else ["delta"])]

    def _op(self, kind: str, given: Sequence[str], outputs: Sequence[Value]) -> Op:
        sinks = self.known.inputs[2:]
        given = (*given, *(["sinks"] if sinks else []))
        more = (*self.sddmm.inputs[2:], *self.score.inputs[1:])
        more += () if self.prob is None else self.prob.inputs[2:]
        op = Op(kind, ("q", "k", "v", *given, *more), tuple(outputs), self.sddmm.attrs)
        return op.with_attrs(
            given=given, score=self.score.attr("score"), prob=self.prob and self.prob.attr("prob")
        )

"""fuse: from sddmm to spmm, a chain becomes one attention; what probabilities are summed to, column_sums.

Before::

    %s = sddmm %q, %k {mask = m} ; %t = score_map %s {score = f} ; %p = softmax %t, %sinks
    %w = prob_map %p, %t {prob = g} ; %o = spmm %w, %v
    %c = reduce %p {axis = 2, op = 'sum'}

After, where g is linear in the probability, which then need not be normalised yet, or is not there::

    %o, %p_lse = attention %q, %k, %v, %sinks {mask = m, prob = g, score = f, sinks = True}
    %c = column_sums %q, %k, %p_lse, %sinks {mask = m, score = f, sinks = True}

and where it is not, so that the sum of a row has to be known first::

    %p_top, %p_sum = row_lse %q, %k {apart = True, mask = m, score = f}
    %o = weigh %q, %k, %v, %p_top, %p_sum, %sinks {mask = m, prob = g, score = f, sinks = True}

Leaves alone: chains whose scores or probabilities are used elsewhere or returned (SPLAT's three
kernels compute those).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.graph import Graph, Op, Value

PLANS = ("groups", "schedules", "terms", "widths")  # of rows that are queries


def fuse(graph: Graph) -> Graph:
    """Every fusible chain fused."""
    for spmm in graph.of_kind("spmm"):
        chain = _chain(graph, spmm)
        if chain is not None:
            graph = graph.replace_ops(chain.ops, chain.fused())
    return graph


@dataclass(frozen=True)
class _Chain:
    """The operations of one attention: `prob` if there is one, and the reductions of its probabilities."""

    sddmm: Op
    score: Op
    softmax: Op
    prob: Op | None
    spmm: Op
    reduces: tuple[Op, ...]

    @property
    def ops(self) -> tuple[Op, ...]:
        some = (self.sddmm, self.score, self.softmax, self.prob, self.spmm, *self.reduces)
        return tuple(op for op in some if op is not None)

    def fused(self) -> list[Op]:
        prob, outputs = self.prob and self.prob.attr("prob"), self.softmax.outputs
        rows = outputs[1:]
        single = prob is None or prob.is_linear
        p = outputs[0]
        if not rows and self.reduces:
            rows = (Value(f"{p.name}_lse", p.dtype, p.shape[:3]),)
        lse = rows[0].name if rows else ""
        more = () if self.prob is None else self.prob.inputs[2:]
        value = self.spmm.inputs[1]
        if single:
            made = [self._op("attention", (value,), (self.spmm.output, *rows), more, prob=prob)]
        else:
            top, total = (Value(f"{p.name}_{part}", p.dtype, p.shape[:3]) for part in ("top", "sum"))
            made = [
                self._op("row_lse", (), (top, total, *rows), sinks=False, apart=True),
                self._op("weigh", (value, top.name, total.name), (self.spmm.output,), more, prob=prob),
            ]
        for reduce in self.reduces:
            sums = self._op("column_sums", (lse,), (reduce.output,))
            made.append(sums.with_attrs(**dict.fromkeys(PLANS)))
        return made

    def _op(
        self,
        kind: str,
        tensors: Sequence[str],
        outputs: Sequence[Value],
        more: Sequence[str] = (),
        sinks: bool = True,
        **attrs: object,
    ) -> Op:
        given = self.softmax.inputs[1:] if sinks else ()
        first, last = self.sddmm.inputs[:2], (*self.sddmm.inputs[2:], *self.score.inputs[1:], *more)
        op = Op(kind, (*first, *tensors, *given, *last), tuple(outputs), self.sddmm.attrs)
        return op.with_attrs(score=self.score.attr("score"), sinks=True if given else None, **attrs)


def _chain(graph: Graph, spmm: Op) -> _Chain | None:
    before = graph.producer(spmm.inputs[0])
    prob = before if before is not None and before.kind == "prob_map" else None
    softmax = graph.producer(prob.inputs[0]) if prob else before
    score = softmax and graph.producer(softmax.inputs[0])
    sddmm = score and graph.producer(score.inputs[0])
    if softmax is None or score is None or sddmm is None:
        return None
    if (softmax.kind, score.kind, sddmm.kind) != ("softmax", "score_map", "sddmm"):
        return None
    if prob is not None and prob.inputs[1] != score.output.name:
        return None
    reduces = tuple(op for op in graph.users(softmax.output.name) if _sums_columns(op))
    chain = _Chain(sddmm, score, softmax, prob, spmm, reduces)
    inner = [op.output.name for op in (sddmm, score, softmax, prob) if op is not None]
    apart = any(op not in chain.ops for name in inner for op in graph.users(name))
    return None if apart or set(inner) & set(graph.outputs) else chain


def _sums_columns(op: Op) -> bool:
    return op.kind == "reduce" and op.attr("op") == "sum" and op.attr("axis") == 2

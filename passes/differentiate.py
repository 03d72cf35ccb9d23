"""differentiate: from a graph to the graph of its gradients, one rule a primitive.

The gradient of each result comes in as `d<result>`, those of the wanted inputs come out as `d<input>`:

    %p = softmax %t         %dt = softmax_grad %p, %dp, %delta     where %delta = row_dot %p, %dp
    %o = spmm %p, %v        %dp = sddmm %do, %v {mask = m, outside = 0}
                            %dv = spmm %p, %do {transposed = True}

Nothing of the size of the scores is kept: the graph computes them anew, and probabilities from the rows'
log-sum-exp, which it takes as an input. There is no rule for attention: masks, score maps and probability
maps have gradients because their primitives do.

Where probabilities meet values linearly, the sum over keys of p * dp is the sum over features of o * do
(Dao, FlashAttention, 2022, section B.2): `row_dot %o, %do`, of the result that the forward computed.

Leaves alone: nothing; a primitive without a rule is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import networkx as nx

from ..ir.derivative import derivative
from ..ir.errors import UnsupportedError
from ..ir.expr import Expr, read, reads, real
from ..ir.gradient_interpret import captured_reads
from ..ir.graph import Extent, Graph, Op, Value
from ..ir.score import ProbGrad, ProbMap, ScoreGrad, ScoreMap

Cotangents = dict[int, str]  # of operands, by position


@dataclass
class _Tape:
    """The gradient graph while it grows. active: values that a wanted input has a part in."""

    forward: Graph
    active: frozenset[str]
    inputs: dict[str, Value]
    ops: list[Op] = field(default_factory=list)

    def value(self, name: str) -> Value:
        made = {v.name: v for op in self.ops for v in op.outputs}
        return made[name] if name in made else self.inputs[name]

    def emit(
        self,
        name: str,
        kind: str,
        inputs: Iterable[str],
        shape: tuple[Extent, ...],
        dtype: str | None = None,
        **attrs: object,
    ) -> str:
        """One operation; its result is in `dtype`, or as wide as sums are."""
        inputs = tuple(inputs)
        wide = "f64" if "f64" in {self.value(i).dtype for i in inputs} else "f32"
        self.ops.append(Op(kind, inputs, (Value(name, dtype or wide, shape),)).with_attrs(**attrs))
        return name

    def pattern(self, scores: str) -> Op:
        """The sddmm whose mask says where scores, or what was made of them, are."""
        op = self.forward.producer(scores)
        while op is not None and op.kind != "sddmm":
            op = self.forward.producer(op.inputs[0])
        if op is None:
            raise UnsupportedError(f"%{scores} has no mask: gradients are those of sampled products")
        return op


def differentiate(graph: Graph, wanted: Iterable[str], given: Iterable[str]) -> Graph:
    """The graph of the gradients of `wanted` inputs, where those of the `given` results are known.

    Its inputs are the graph's, then "lse" (of every row), "o" where it is of use, and d<result> of each.
    Raises UnsupportedError for a result or a primitive that has no gradient."""
    wanted, given = tuple(wanted), tuple(given)
    active = frozenset(wanted).union(*(nx.descendants(graph.dag, name) for name in wanted))
    rows = next(op for op in graph.ops if op.kind == "softmax").inputs[0]
    scores = graph.values[rows]
    known = [Value("lse", scores.dtype, scores.shape[:3]), *(v for n, v in graph.values.items() if n == "o")]
    known += [_cotangent(graph.values[name]) for name in given]
    tape = _Tape(graph, active, {v.name: v for v in (*graph.inputs, *known)})
    for op in graph.ops:
        tape.ops += _replayed(op)
    found: dict[str, str] = {name: f"d{name}" for name in given}
    for op in reversed(graph.ops):
        results = [found.get(v.name) for v in op.outputs]
        if not any(results) or active.isdisjoint(op.inputs):
            continue
        if op.kind not in RULES:
            raise UnsupportedError(f"{op.kind} has no gradient rule, and %{op.output.name} needs one")
        for at, name in RULES[op.kind](tape, op, results).items():
            operand = op.inputs[at]
            if operand in found:
                raise UnsupportedError(f"%{operand} is used twice, and its gradients are not added up yet")
            found[operand] = name
    outputs = tuple(found[name] for name in wanted)
    made = Graph(f"{graph.name}_grad", tuple(tape.inputs.values()), tuple(tape.ops), outputs)
    made = _without_unused(_reassociated(made))
    read = {i for op in made.ops for i in op.inputs}
    inputs = (*graph.inputs, *(v for v in known if v.name in read))
    return Graph(made.name, inputs, made.ops, outputs)


def _without_unused(graph: Graph) -> Graph:
    """The graph without what no gradient needs. The map of probabilities stays: it says what they are of."""
    kept = {v.name for op in graph.of_kind("prob_map") for v in op.outputs}
    found = Graph(graph.name, graph.inputs, graph.ops, (*graph.outputs, *kept)).without_dead()
    return Graph(graph.name, graph.inputs, found.ops, graph.outputs)


def _cotangent(value: Value) -> Value:
    return Value(f"d{value.name}", value.dtype, value.shape)


def _replayed(op: Op) -> list[Op]:
    """A forward operation as gradients compute it anew: nothing that only results need."""
    if op.kind in ("spmm", "reduce"):
        return []
    if op.kind == "softmax":
        scores, *sinks = op.inputs
        return [Op("renormalize", (scores, "lse", *sinks), (op.output,))]
    return [op]


# ---- the rules: the gradients of operands, by position, from those of results ----


def _spmm(tape: _Tape, op: Op, results: list[str | None]) -> Cotangents:
    (weights, values), (grad,) = op.inputs, results
    assert grad is not None
    out: Cotangents = {}
    if weights in tape.active:
        sampled = tape.pattern(weights)
        attrs = {**dict(sampled.attrs), "outside": 0}
        operands = (grad, values, *sampled.inputs[2:])
        out[0] = tape.emit(f"d{weights}", "sddmm", operands, sampled.output.shape, **attrs)
    if values in tape.active:
        out[1] = _transposed(tape, f"d{values}", weights, grad, tape.forward.values[values])
    return out


def _transposed(tape: _Tape, name: str, pairs: str, rows: str, of: Value) -> str:
    return tape.emit(name, "spmm", (pairs, rows), of.shape, of.dtype, transposed=True, heads=of.shape[1])


def _prob_map(tape: _Tape, op: Op, results: list[str | None]) -> Cotangents:
    prob, scores, *more = op.inputs
    return _mapped(tape, op, op.attr("prob"), (prob, scores), more, results)


def _score_map(tape: _Tape, op: Op, results: list[str | None]) -> Cotangents:
    scores, *more = op.inputs
    return _mapped(tape, op, op.attr("score"), (scores, scores), more, results)


def _mapped(
    tape: _Tape, op: Op, of: ScoreMap, given: tuple[str, str], more: list[str], results: list[str | None]
) -> Cotangents:
    """Of a map of scores or probabilities, and of what it captured."""
    (grad,) = results
    assert grad is not None
    out: Cotangents = {}
    operands = (*given, grad, *more)
    if given[0] in tape.active:
        made = grad_map(of, derivative(of.expr, real(of.arguments[0])))
        out[0] = tape.emit(f"d{given[0]}", "map_grad", operands, op.output.shape, grad=made)
    first = len(op.inputs) - len(of.captures)
    for at, capture in enumerate(of.captures, first):
        name = op.inputs[at]
        if name in tape.active:
            if any(isinstance(r, read) and str(r.args[0]) == capture.name for r in reads(of.expr)):
                raise UnsupportedError(f"%{name} is not read as floats, so it has no gradient")
            ((grads, indices),) = captured_reads(of, (capture.name,))
            shape = tape.forward.values[name].shape
            attrs = {"grads": grads, "indices": indices, "of": capture.name}
            out[at] = tape.emit(f"d{name}", "capture_grad", operands, shape, **attrs)
    return out


def grad_map(of: ScoreMap, slope: Expr) -> ScoreGrad | ProbGrad:
    """What a gradient of a map's result becomes where the map has this slope."""
    kind = ProbGrad if isinstance(of, ProbMap) else ScoreGrad
    return kind(real("grad") * slope, of.params, of.captures)


def _softmax(tape: _Tape, op: Op, results: list[str | None]) -> Cotangents:
    grad, lse, *largest = (*results, None)[:3]
    if largest and largest[0] is not None:
        raise UnsupportedError(f"the largest scores (%{op.outputs[2].name}) have no gradient")
    scores, *sinks = op.inputs
    p, rows = op.output.name, op.output.shape[:3]
    if grad is None:
        raise UnsupportedError("a gradient of the log-sum-exp alone: pass that of the output, of zeros, too")
    sums = delta = tape.emit("delta" if lse is None else "sums", "row_dot", (p, grad), rows)
    if lse is not None:
        delta = tape.emit("delta", "row_shift", (sums, lse, "lse", *sinks), rows)
    out: Cotangents = {}
    if scores in tape.active:
        out[0] = tape.emit(f"d{scores}", "softmax_grad", (p, grad, delta), op.output.shape)
    if sinks and sinks[0] in tape.active:
        out[1] = tape.emit(f"d{sinks[0]}", "sink_grad", ("lse", sinks[0], sums), rows)
    return out


def _sddmm(tape: _Tape, op: Op, results: list[str | None]) -> Cotangents:
    (grad,), (rows, columns) = results, op.inputs[:2]
    assert grad is not None
    out: Cotangents = {}
    if rows in tape.active:
        of = tape.forward.values[rows]
        out[0] = tape.emit(f"d{rows}", "spmm", (grad, columns), of.shape, of.dtype)
    if columns in tape.active:
        out[1] = _transposed(tape, f"d{columns}", grad, rows, tape.forward.values[columns])
    return out


RULES: dict[str, Callable[[_Tape, Op, list[str | None]], Cotangents]] = {
    "spmm": _spmm,
    "prob_map": _prob_map,
    "softmax": _softmax,
    "score_map": _score_map,
    "sddmm": _sddmm,
}
"""For each primitive, what the gradients of its results make those of its operands."""


def _reassociated(graph: Graph) -> Graph:
    """Sums over keys of p * dp as sums over features of o * do, where o is linear in p."""

    def rule(op: Op) -> Op | None:
        if op.kind != "row_dot" or "o" not in graph.values:
            return None
        grad = graph.producer(op.inputs[1])
        if grad is not None and grad.kind == "map_grad":
            mapped = next(o.attr("prob") for o in graph.of_kind("prob_map"))
            grad = graph.producer(grad.inputs[2]) if mapped.is_linear else None
        if grad is None or grad.kind != "sddmm" or grad.inputs[0] != "do":
            return None
        return Op("row_dot", ("o", "do"), op.outputs)

    return graph.map_ops(rule)

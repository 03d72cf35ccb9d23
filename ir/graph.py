"""Graph IR: operations on whole tensors, as immutable values.

An operation reads values by name, makes one or two new ones and carries attributes. The primitives
are few, so that a pass or a gradient needs one rule each and none for attention as such:

    matmul       a [.., M, K] x b [.., K, N]; transpose_b: b is [.., N, K]; extents of 1 before are repeated
    sddmm        q [B, Hq, M, D] x k [B, Hk, N, D] -> scores [B, Hq, M, N] where `mask` holds, -inf elsewhere
    score_map    scores -> scores, by the ScoreMap `score`; -inf stays
    softmax      over the last axis; a row of -inf gives zeros; further results, if asked for: the
                 log-sum-exp, and the largest score, of every row. A second operand [Hq] holds sinks: one
                 more score a head, which takes its part of the sum and is left out of the results
    prob_map     probabilities p, and the scores they are of -> probabilities, by the ProbMap `prob`; where
                 a score is -inf, zero
    spmm         p [B, Hq, M, N] x v [B, Hk, N, E]; Hq is a multiple of Hk, as in sddmm
    reduce       `op` (sum, max, min, mean) over `axis`
    map          elementwise, by the expression `expr` of x0, x1, ...

What `differentiate` adds (passes/differentiate.py), for gradients of the above:

    renormalize  scores, their rows' log-sum-exp [, sinks] -> probabilities
    map_grad     what a score or probability map was given, the scores, the gradient of what it gave -> the
                 gradient of what it was given, by `grad`; zero where a score is -inf
    softmax_grad p, the gradient dp, rows delta -> p * (dp - delta)
    row_dot      a, b -> the sum of a * b over the last axis
    row_shift    rows delta, the gradient of the log-sum-exp, the log-sum-exp [, sinks] -> delta less what
                 that gradient adds to the gradients of scores, over p
    sink_grad    rows' log-sum-exp, sinks, delta -> what each row adds to the gradient of its head's sink
    capture_grad as map_grad -> the gradient of a captured tensor: values of `grads`, added up at `indices`

There, `sddmm` has an attribute `outside`, the value where the mask does not hold, and `spmm` may be
`transposed`: p [B, Hq, M, N] x a [B, Hq, M, E] -> [B, heads, N, E], summed over query heads of a key head.

What `fuse` makes of them; passes attach their plans. `sinks`: whether an operand of sinks follows.

    attention    sddmm, score_map, softmax, prob_map and spmm of q, k, v; the results of spmm and, if
                 asked for, of softmax
    row_lse      sddmm, score_map and softmax of q, k: the log-sum-exp and, if asked for, the largest score;
                 before these, if `apart`, a number t near the base-2 logarithm of the sum of a row's
                 exp(score), and that sum over exp2(t): the two that no rounding of the logarithm is in
    weigh        sddmm, score_map, prob_map and spmm of q, k, v and rows whose t and sum are known
    column_sums  sddmm, score_map and reduce of q, k and rows whose log-sum-exp is known: what each key
                 gets from all queries
    row_norm     of q, k, v and what `given` names, as all that follow: log2 of what
                 exp(score - log-sum-exp) is to be multiplied by
    grad_delta   of q, k, v and what `given` names: rows delta and, if asked for, those of the sinks
    grad_rows    likewise: the gradient of q, and both of these
    grad_columns the gradients of k and v
    grad_captures  the gradients of captured tensors, `of` a map

Operations over rows in groups (experts): ir/ragged.py. Linear attention: ir/linear.py.

Runtime numbers and captured tensors of a mask, then of a score map, then of a probability map, are
further operands, in the order in which these name them. Semantics: graph_interpret.py; rules:
graph_verify.py; text: graph_text.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import networkx as nx

Extent = int | str


@dataclass(frozen=True)
class Value:
    """A tensor: its name, dtype, shape (numbers and names of lengths) and format.

    format: 'dense', or how an intermediate is stored: 'acsr', 'blocks'. A number has shape ().
    """

    name: str
    dtype: str
    shape: tuple[Extent, ...]
    format: str = "dense"


@dataclass(frozen=True)
class Op:
    """An operation: kind, names of its operands, its results, attributes sorted by name."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[Value, ...]
    attrs: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "attrs", tuple(sorted(self.attrs, key=lambda a: a[0])))

    @property
    def output(self) -> Value:
        """The first result."""
        return self.outputs[0]

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute, or the default where the operation lacks it."""
        return next((value for key, value in self.attrs if key == name), default)

    def with_attrs(self, **attrs: Any) -> Op:
        """The same operation with attributes added or replaced; None removes one."""
        kept = {**dict(self.attrs), **attrs}
        return replace(self, attrs=tuple((k, v) for k, v in kept.items() if v is not None))


@dataclass(frozen=True)
class Graph:
    """Inputs, operations in topological order, and the names of the values returned."""

    name: str
    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]

    @cached_property
    def values(self) -> dict[str, Value]:
        """Every value by its name."""
        made = [v for op in self.ops for v in op.outputs]
        return {v.name: v for v in (*self.inputs, *made)}

    @cached_property
    def dag(self) -> nx.DiGraph:
        """Values as nodes, an edge from each operand to each result; edges and results carry `op`."""
        dag = nx.DiGraph()
        dag.add_nodes_from((v.name, {"value": v, "op": None}) for v in self.inputs)
        for op in self.ops:
            dag.add_nodes_from((v.name, {"value": v, "op": op}) for v in op.outputs)
            dag.add_edges_from((i, o.name, {"op": op}) for i in op.inputs for o in op.outputs)
        return dag

    def producer(self, name: str) -> Op | None:
        """The operation that makes a value; None for an input."""
        return next((op for op in self.ops if any(v.name == name for v in op.outputs)), None)

    def users(self, name: str) -> tuple[Op, ...]:
        """The operations that read a value."""
        return tuple(op for op in self.ops if name in op.inputs)

    def of_kind(self, kind: str) -> tuple[Op, ...]:
        return tuple(op for op in self.ops if op.kind == kind)

    # Rewriting: all of these return new graphs.

    def map_ops(self, rule: Callable[[Op], Op | Iterable[Op] | None]) -> Graph:
        """Each operation replaced by what the rule returns; None leaves it alone.

        Returns the graph itself when nothing changes."""
        ops: list[Op] = []
        for op in self.ops:
            new = rule(op)
            ops += [op] if new is None else [new] if isinstance(new, Op) else list(new)
        return self if tuple(ops) == self.ops else replace(self, ops=tuple(ops))

    def replace_ops(self, old: Iterable[Op], new: Iterable[Op]) -> Graph:
        """`old` operations taken out, `new` ones put where the last of them stood."""
        gone = set(map(id, old))
        last = max(i for i, op in enumerate(self.ops) if id(op) in gone)
        before = [op for op in self.ops[: last + 1] if id(op) not in gone]
        return replace(self, ops=(*before, *new, *self.ops[last + 1 :]))

    def without_dead(self) -> Graph:
        """The graph without operations that no output depends on."""
        needed = set(self.outputs).union(*(nx.ancestors(self.dag, o) for o in self.outputs if o in self.dag))
        kept = tuple(op for op in self.ops if any(v.name in needed for v in op.outputs))
        return self if kept == self.ops else replace(self, ops=kept)

    def renamed(self, names: dict[str, str]) -> Graph:
        """Values called by other names."""

        def rename(value: Value) -> Value:
            return replace(value, name=names.get(value.name, value.name))

        ops = tuple(
            replace(
                op, inputs=tuple(names.get(i, i) for i in op.inputs), outputs=tuple(map(rename, op.outputs))
            )
            for op in self.ops
        )
        outputs = tuple(names.get(o, o) for o in self.outputs)
        return Graph(self.name, tuple(map(rename, self.inputs)), ops, outputs)

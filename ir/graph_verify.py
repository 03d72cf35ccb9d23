"""The rules of graphs. `verify` raises VerifyError that names the rule and the operation.

Rules: name (single definitions, no words of the language), order (operands are made before they are
used), type (dtypes and shapes of results follow from the operands), operands (their number), attrs
(needed ones are there, of the right class), output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import networkx as nx
import sympy

from . import expr as E
from . import gradient_shapes as gradients
from .errors import VerifyError
from .graph import Extent, Graph, Op, Value
from .graph_text import FORMATS, op_text
from .linear_verify import SHAPES as LINEAR
from .mask import Mask
from .ragged_verify import SHAPES as RAGGED
from .score import ProbMap, ScoreMap

REDUCTIONS = ("sum", "max", "min", "mean")
Shape = tuple[Extent, ...]


def verify(graph: Graph) -> None:
    """Check a graph. Raises VerifyError."""
    known: dict[str, Value] = {}
    for value in graph.inputs:
        _define(known, value, f"input %{value.name} of graph @{graph.name}")
    for op in graph.ops:
        where = f"`{op_text(op)}` of graph @{graph.name}"
        for name in op.inputs:
            if name not in known:
                _fail("order", f"%{name} is used before it is made; known: {', '.join(known)}", where)
        if op.kind not in SHAPES:
            _fail("operands", f"expected an operation ({', '.join(SHAPES)}); got {op.kind!r}", where)
        expected = SHAPES[op.kind](Checker(op, tuple(known[i] for i in op.inputs), where))
        _results(op, expected, where)
        for value in op.outputs:
            _define(known, value, where)
    if not graph.outputs:
        _fail("output", "expected at least one value to return", f"graph @{graph.name}")
    for name in graph.outputs:
        if name not in known:
            _fail("output", f"%{name} is returned but not made", f"graph @{graph.name}")
    if not nx.is_directed_acyclic_graph(graph.dag):
        _fail("order", f"operations form a cycle: {nx.find_cycle(graph.dag)}", f"graph @{graph.name}")


def _fail(rule: str, message: str, where: str) -> NoReturn:
    raise VerifyError(f"{rule}: {message}\n  in {where}")


def _define(known: dict[str, Value], value: Value, where: str) -> None:
    if value.name in known:
        _fail("name", f"%{value.name} is defined twice", where)
    if not value.name.isidentifier():
        _fail("name", f"expected a name; got {value.name!r}", where)
    if value.dtype not in E.DTYPES:
        _fail("type", f"%{value.name}: expected a dtype ({', '.join(E.DTYPES)}); got {value.dtype!r}", where)
    if value.format not in FORMATS:
        _fail("type", f"%{value.name}: expected a format ({', '.join(FORMATS)}); got {value.format!r}", where)
    if any(isinstance(n, int) and n < 1 for n in value.shape):
        _fail("type", f"%{value.name}: expected extents of at least 1; got {value.shape}", where)
    known[value.name] = value


def _results(op: Op, expected: tuple[Shape, ...], where: str) -> None:
    shapes = tuple(v.shape for v in op.outputs)
    optional = op.kind in ("softmax", "attention", "row_lse", "grouped_gemm", *gradients.FEWER) and 1 <= len(
        shapes
    ) < len(expected)
    if len(shapes) != len(expected) and not optional:
        _fail("type", f"expected {len(expected)} result(s); got {len(shapes)}", where)
    for value, shape in zip(op.outputs, expected, strict=False):
        if value.shape != shape:
            _fail("type", f"%{value.name}: expected shape {_show(shape)}; got {_show(value.shape)}", where)


def _show(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


class Checker:
    """One operation with the types of its operands."""

    def __init__(self, op: Op, operands: tuple[Value, ...], where: str) -> None:
        self.op, self.operands, self.where = op, operands, where

    def fail(self, rule: str, message: str) -> NoReturn:
        _fail(rule, message, self.where)

    def shapes(self, count: int, ranks: tuple[int, ...] | None = None) -> list[Shape]:
        """Shapes of the first operands, of the given ranks."""
        if len(self.operands) < count:
            self.fail("operands", f"expected at least {count}; got {len(self.operands)}")
        shapes = [v.shape for v in self.operands[:count]]
        for value, shape, rank in zip(self.operands, shapes, ranks or (), strict=False):
            if len(shape) != rank:
                self.fail("type", f"%{value.name}: expected {rank} dimensions; got {_show(shape)}")
        return shapes

    def same(self, what: str, a: Extent | Shape, b: Extent | Shape) -> None:
        if a != b:
            self.fail("type", f"expected one {what}; got {a} and {b}")

    def heads(self, queries: Extent, keys: Extent) -> None:
        if isinstance(queries, int) and isinstance(keys, int) and queries % keys:
            self.fail("type", f"expected query heads to be a multiple of key heads; got {queries} and {keys}")

    def attr(self, name: str, kind: type | tuple[type, ...], *, needed: bool = True) -> Any:
        value = self.op.attr(name)
        if value is None and not needed:
            return None
        if not isinstance(value, kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            self.fail("attrs", f"{name}: expected {names}; got {value!r}")
        return value

    def sinks(self, at: int, heads: Extent) -> None:
        """The operand at this place is one number a query head."""
        if len(self.operands) <= at:
            self.fail("operands", f"expected sinks after the first {at}; got {len(self.operands)}")
        value = self.operands[at]
        if value.shape != (heads,):
            self.fail(
                "type", f"%{value.name}: expected sinks of shape {_show((heads,))}; got {_show(value.shape)}"
            )

    def captured(self, first: int, *holders: Mask | ScoreMap | None) -> None:
        """The operands from `first` on are the runtime numbers and tensors that the holders name."""
        wanted = [(n, r) for holder in holders if holder is not None for n, r in runtime_operands(holder)]
        extra = self.operands[first:]
        if len(extra) != len(wanted):
            names = ", ".join(n for n, _ in wanted) or "none"
            self.fail(
                "operands", f"expected {len(wanted)} after the first {first} ({names}); got {len(extra)}"
            )
        for value, (name, rank) in zip(extra, wanted, strict=True):
            if len(value.shape) != rank:
                self.fail(
                    "operands", f"%{value.name}: expected rank {rank} for {name}; got {_show(value.shape)}"
                )


def runtime_operands(holder: Mask | ScoreMap) -> list[tuple[str, int]]:
    """(name, rank) of the runtime numbers, then of the captured tensors, of a mask or a score map."""
    params = [p if isinstance(p, str) else p[0] for p in holder.params]
    return [*((p, 0) for p in params), *((c.name, c.rank) for c in holder.captures)]


def _matmul(c: Checker) -> tuple[Shape, ...]:
    a, b = c.shapes(2)
    c.captured(2)
    if min(len(a), len(b)) < 2:
        c.fail("type", f"expected at least 2 dimensions; got {_show(a)} and {_show(b)}")
    inner, columns = (b[-1], b[-2]) if c.attr("transpose_b", bool, needed=False) else (b[-2], b[-1])
    c.same("inner extent", a[-1], inner)
    long, short = (a[:-2], b[:-2]) if len(a) >= len(b) else (b[:-2], a[:-2])
    batch = list(long)
    for at, (x, y) in enumerate(zip(reversed(long), reversed(short), strict=False), 1):
        if 1 not in (x, y):
            c.same("batch extent", x, y)
        batch[-at] = y if x == 1 else x
    return ((*batch, a[-2], columns),)


def _sddmm(c: Checker) -> tuple[Shape, ...]:
    q, k = c.shapes(2, (4, 4))
    c.captured(2, c.attr("mask", Mask, needed=False))
    c.attr("scale", (int, float), needed=False)
    c.attr("outside", (int, float), needed=False)
    c.same("batch", q[0], k[0])
    c.heads(q[1], k[1])
    c.same("head size", q[3], k[3])
    return ((q[0], q[1], q[2], k[2]),)


def _score_map(c: Checker) -> tuple[Shape, ...]:
    (scores,) = c.shapes(1, (4,))
    c.captured(1, c.attr("score", ScoreMap))
    return (scores,)


def _softmax(c: Checker) -> tuple[Shape, ...]:
    (scores,) = c.shapes(1)
    if not scores:
        c.fail("type", "expected at least 1 dimension; got a number")
    sinks = len(c.operands) > 1
    if sinks:
        c.shapes(1, (4,))
        c.sinks(1, scores[1])
    c.captured(1 + sinks)
    return scores, scores[:-1], scores[:-1]


def _prob_map(c: Checker) -> tuple[Shape, ...]:
    probabilities, scores = c.shapes(2, (4, 4))
    c.captured(2, c.attr("prob", ProbMap))
    if probabilities != scores:
        c.fail("type", f"expected one shape; got {_show(probabilities)} and {_show(scores)}")
    return (probabilities,)


def _spmm(c: Checker) -> tuple[Shape, ...]:
    p, v = c.shapes(2, (4, 4))
    c.captured(2)
    c.same("batch", p[0], v[0])
    if c.attr("transposed", bool, needed=False):
        heads = c.attr("heads", (int, str))
        c.same("shape of rows", p[:3], v[:3])
        c.heads(p[1], heads)
        return ((p[0], heads, p[3], v[3]),)
    c.heads(p[1], v[1])
    c.same("number of keys", p[3], v[2])
    return ((*p[:3], v[3]),)


def _reduce(c: Checker) -> tuple[Shape, ...]:
    (x,) = c.shapes(1)
    c.captured(1)
    if c.attr("op", str) not in REDUCTIONS:
        c.fail("attrs", f"op: expected one of {', '.join(REDUCTIONS)}; got {c.op.attr('op')!r}")
    axis = c.attr("axis", int)
    if not 0 <= axis < len(x):
        c.fail("attrs", f"axis: expected a dimension of {_show(x)}; got {axis}")
    return ((*x[:axis], *x[axis + 1 :]),)


def _map(c: Checker) -> tuple[Shape, ...]:
    expr = c.attr("expr", sympy.Basic)
    names = {f"x{i}" for i in range(len(c.operands))}
    stray = sorted(s.name for s in E.symbols(expr) if s.name not in names)
    if stray or E.reads(expr):
        c.fail("attrs", f"expr: expected an expression of {', '.join(sorted(names))}; got {E.to_text(expr)}")
    out: list[Extent] = []
    for shape in (v.shape for v in c.operands):
        for d, extent in enumerate(reversed(shape)):
            if d == len(out):
                out.append(extent)
            elif out[d] == 1:
                out[d] = extent
            elif extent != 1:
                c.same(f"extent in dimension -{d + 1}", out[d], extent)
    return (tuple(reversed(out)),)


ROWS = ("lse", "top", "sum")


def _fused(c: Checker, tensors: str) -> list[Shape]:
    """The shapes of the first operands of a fused operation: q, k and what the words name of v and rows."""
    names = ["q", "k", *tensors.split()]
    q, k, *rest = shapes = c.shapes(len(names), tuple(3 if n in ROWS else 4 for n in names))
    sinks = c.attr("sinks", bool, needed=False) or False
    if sinks:
        c.sinks(len(names), q[1])
    maps = (c.attr("mask", Mask, needed=False), c.attr("score", ScoreMap, needed=False))
    c.captured(len(names) + sinks, *maps, c.attr("prob", ProbMap, needed=False))
    c.attr("scale", (int, float), needed=False)
    c.same("batch", q[0], k[0])
    c.heads(q[1], k[1])
    c.same("head size", q[3], k[3])
    for name, shape in zip(names[2:], rest, strict=True):
        for what, a, b in zip(
            ("batch", "number of heads", "length"), shape, k if name == "v" else q, strict=False
        ):
            c.same(f"{what} of {name}", a, b)
    return shapes


def _attention(c: Checker) -> tuple[Shape, ...]:
    q, _, v = _fused(c, "v")
    return (*q[:3], v[3]), q[:3], q[:3]


def _row_lse(c: Checker) -> tuple[Shape, ...]:
    q, _ = _fused(c, "")
    apart = c.attr("apart", bool, needed=False)
    return (q[:3],) * (4 if apart else 2)


def _weigh(c: Checker) -> tuple[Shape, ...]:
    q, _, v, *_ = _fused(c, "v top sum")
    return ((*q[:3], v[3]),)


def _column_sums(c: Checker) -> tuple[Shape, ...]:
    q, k, _ = _fused(c, "lse")
    return ((*q[:2], k[2]),)


SHAPES: dict[str, Callable[[Checker], tuple[Shape, ...]]] = {
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
    **gradients.SHAPES,
}
"""For each kind of operation, the shapes of its results; checks operands and attributes on the way."""

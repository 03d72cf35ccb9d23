"""Hypothesis strategies for every level: expressions, masks, graphs, kernels. Public in `gossamer.testing`.

What they draw is valid: it verifies, prints and parses back, and its interpreter runs it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy

from ..ir import expr as E
from ..ir import kernel as K
from ..ir.errors import MissingDependencyError
from ..ir.graph import Graph, Op, Value
from ..ir.score import ProbMap, ScoreMap

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

INTEGERS = ("q", "k", "b", "h", "p0")
FLOATS = ("x", "y", "z")


def _strategies() -> Any:
    try:
        from hypothesis import strategies
    except ImportError:
        raise MissingDependencyError("hypothesis", "dev", "gossamer.testing's strategies") from None
    return strategies


# expressions -----------------------------------------------------------------------------------------


@lru_cache
def expressions(
    kind: str = "int", integers: tuple[str, ...] = INTEGERS, floats: tuple[str, ...] = FLOATS
) -> SearchStrategy[E.Expr]:
    """Expressions of a kind ('int', 'float' or 'bool') over integer and float symbols of these names.

    They are canonical: sympy leaves them as they are when it builds them again. Divisors are
    positive constants, arguments of sqrt are at least 1: every value is defined.
    """
    made = {"int": _integers, "float": _floats, "bool": _conditions}[kind](integers, floats)
    return made.filter(_canonical)


def _canonical(expr: E.Expr) -> bool:
    odd = (sympy.zoo, sympy.nan, sympy.I, sympy.oo, -sympy.oo)
    return not expr.has(*odd) and all(e.func(*e.args) == e for e in sympy.preorder_traversal(expr) if e.args)


@lru_cache
def _integers(integers: tuple[str, ...], _: tuple[str, ...]) -> SearchStrategy[E.Expr]:
    st = _strategies()
    leaves = st.sampled_from([E.integer(n) for n in integers]) | st.integers(-9, 9).map(sympy.Integer)
    positive = st.integers(1, 9).map(sympy.Integer)

    def grow(inner: SearchStrategy[E.Expr]) -> SearchStrategy[E.Expr]:
        pair, divided = st.tuples(inner, inner), st.tuples(inner, positive)
        return st.one_of(
            pair.map(lambda p: p[0] + p[1]),
            pair.map(lambda p: p[0] - p[1]),
            pair.map(lambda p: p[0] * p[1]),
            divided.map(lambda p: E.floordiv(*p)),
            divided.map(lambda p: E.floormod(*p)),
            pair.map(lambda p: E.minimum(*p)),
            pair.map(lambda p: E.maximum(*p)),
            pair.map(lambda p: E.bitxor(*p)),
            inner.map(sympy.Abs),
            st.tuples(inner, inner, inner).map(lambda p: E.where(p[0] <= p[1], p[2], p[1])),
        )

    return st.recursive(leaves, grow, max_leaves=8)


def _floats(integers: tuple[str, ...], floats: tuple[str, ...]) -> SearchStrategy[E.Expr]:
    st = _strategies()
    numbers = st.floats(-8, 8, width=16).filter(bool).map(sympy.Float)
    leaves = st.sampled_from([E.real(n) for n in floats]) | numbers

    def grow(inner: SearchStrategy[E.Expr]) -> SearchStrategy[E.Expr]:
        pair = st.tuples(inner, inner)
        choice = st.tuples(_conditions(integers or INTEGERS, floats), inner, inner).map(lambda p: E.where(*p))
        return st.one_of(
            pair.map(lambda p: p[0] + p[1]),
            pair.map(lambda p: p[0] - p[1]),
            pair.map(lambda p: p[0] * p[1]),
            pair.map(lambda p: p[0] / (1 + sympy.Abs(p[1]))),
            pair.map(lambda p: E.maximum(*p)),
            inner.map(lambda x: sympy.sqrt(1 + x * x)),
            inner.map(lambda x: sympy.tanh(x / 30)),
            inner.map(lambda x: E.exp2(-sympy.Abs(x))),
            inner.map(E.sigmoid),
            choice if integers else inner.map(lambda x: -x),
        )

    made = st.recursive(leaves, grow, max_leaves=6)
    return made.filter(lambda e: E.kind(e) == "float")


@lru_cache
def _conditions(integers: tuple[str, ...], floats: tuple[str, ...]) -> SearchStrategy[E.Expr]:
    st = _strategies()
    sides = st.tuples(_integers(integers, floats), _integers(integers, floats))
    compare = st.sampled_from([sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne])
    leaves = st.tuples(compare, sides).map(lambda p: p[0](*p[1]))

    def grow(inner: SearchStrategy[E.Expr]) -> SearchStrategy[E.Expr]:
        pair = st.tuples(inner, inner)
        both = [pair.map(lambda p: sympy.And(*p)), pair.map(lambda p: sympy.Or(*p))]
        return st.one_of(*both, inner.map(sympy.Not), pair.map(lambda p: sympy.Xor(*p)))

    return st.recursive(leaves, grow, max_leaves=4)


# masks -----------------------------------------------------------------------------------------------


def masks(max_patterns: int = 4, max_length: int = 640, captures: bool = True) -> SearchStrategy[Any]:
    """`gossamer.Mask`: 1 to max_patterns patterns of the library with random integers, joined by & | ~.

    max_length: the longest q_len or kv_len they will be used with (captured tensors cover it).
    captures: whether patterns that read tensors may occur.
    """
    st = _strategies()
    leaves = _patterns(max_length, captures)

    def join(parts: list[tuple[Any, bool, bool]]) -> Any:
        mask, inverted, _ = parts[0]
        mask = ~mask if inverted else mask
        for other, inverted, both in parts[1:]:
            other = ~other if inverted else other
            mask = mask & other if both else mask | other
        return mask

    inverted = st.integers(0, 4).map(lambda n: n == 4)
    return st.lists(st.tuples(leaves, inverted, st.booleans()), min_size=1, max_size=max_patterns).map(join)


def _patterns(max_length: int, captures: bool) -> SearchStrategy[Any]:
    from . import masks as M

    st = _strategies()
    reach, size = st.integers(0, 70), st.integers(1, 70)
    stride = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16])
    grid = st.tuples(st.integers(4, 12), st.integers(4, 12))
    affine = [
        st.just(None).map(lambda _: M.full()),
        st.just(None).map(lambda _: M.causal()),
        st.builds(M.sliding_window, reach, reach),
        st.builds(M.dilated_window, st.integers(1, 12), stride),
        st.builds(M.strided, stride, reach),
        st.builds(lambda b, s: M.fixed(b, min(b, s)), size, st.integers(0, 8)),
        st.builds(M.blocked, size),
        st.builds(M.chunked_causal, size),
        st.builds(M.global_tokens, st.integers(0, 20)),
        st.builds(M.longformer, reach, st.integers(0, 20)),
        st.builds(M.prefix_lm, reach),
        st.builds(M.axial, grid, st.integers(0, 1)),
        st.builds(
            lambda shape, edges, causal: M.neighborhood(shape, (3, 3), causal=causal, edges=edges),
            grid,
            st.sampled_from(["clip", "shift"]),
            st.booleans(),
        ),
    ]
    if not captures:
        return st.one_of(affine)

    def document(lengths: list[int]) -> Any:
        ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        return M.document(np.pad(ids, (0, max(0, max_length - ids.size)), mode="edge"))

    seeded = st.builds(M.random_blocks, st.integers(1, 3), st.integers(4, 40), st.integers(0, 99))
    return st.one_of(*affine, seeded, st.lists(st.integers(1, 90), min_size=1, max_size=8).map(document))


# graphs ----------------------------------------------------------------------------------------------


def graphs(fused: bool | None = None) -> SearchStrategy[Graph]:
    """Attention as primitives or (fused=True) as one operation, and small graphs of the other primitives.

    fused: None draws all three, True or False attention graphs of that shape only.
    `random_arguments` makes inputs for them.
    """
    st = _strategies()
    attention = _attention_graphs(st.booleans() if fused is None else st.just(fused))
    return attention if fused is not None else st.one_of(attention, _small_graphs())


def _attention_graphs(fused: SearchStrategy[bool]) -> SearchStrategy[Graph]:
    st = _strategies()

    @st.composite
    def draw_graph(draw: DrawFn) -> Graph:
        mask = draw(st.none() | masks(3, 32, captures=False).map(lambda m: m.ir))
        score = draw(st.sampled_from([None, *SCORES]))
        size, out = draw(st.sampled_from([(4, 4), (8, 6), (5, 3)]))
        lse, sinks, prob, sums = (draw(st.booleans()) for _ in range(4))
        mapped = draw(st.sampled_from(PROBS)) if prob else None
        return _attention(mask, score, size, out, draw(fused), lse, sinks, mapped, sums)

    return draw_graph()


SCORES = (
    "score() { 20 * tanh(score / 20) }",
    "score(s0: float) { score + s0 * (k - q) }",
    "score() { where(q % 3 == 0, score, score / 2) }",
)

PROBS = (
    "prob(x0: float) { where(k <= q, prob * x0, prob / 3) }",
    "prob(x0: float) { max(prob - x0 / 20, 0) }",
)


def _attention(
    mask: Any,
    score: str | None,
    size: int,
    out: int,
    fused: bool,
    lse: bool,
    sinks: bool,
    prob: str | None,
    sums: bool,
) -> Graph:
    """fused: as one operation, which gives no column sums and takes linear maps of probabilities."""
    score_map = None if score is None else ScoreMap.parse(score)
    prob_map = None if prob is None else ProbMap.parse(prob)
    if fused and prob_map is not None and not prob_map.is_linear:
        prob_map = None
    q = Value("q", "f32", ("B", "Hq", "q_len", size))
    k = Value("k", "f32", ("B", "Hk", "kv_len", size))
    v = Value("v", "f32", ("B", "Hk", "kv_len", out))
    masked = () if mask is None else tuple(Value(p, "i64", ()) for p in mask.params)
    scored = () if score_map is None else tuple(Value(p, "f32", ()) for p, _ in score_map.params)
    sink = (Value("sinks", "f32", ("Hq",)),) if sinks else ()
    weighed = () if prob_map is None else tuple(Value(p, "f32", ()) for p, _ in prob_map.params)
    inputs = (q, k, v, *sink, *masked, *scored, *weighed)
    scores = Value("s", "f32", ("B", "Hq", "q_len", "kv_len"), "dense" if mask is None else "acsr")
    results = (Value("o", "f32", ("B", "Hq", "q_len", out)), Value("lse", "f32", ("B", "Hq", "q_len")))[
        : 1 + lse
    ]
    attrs = {"scale": 0.5} | ({} if mask is None else {"mask": mask})
    extra = {} if score_map is None else {"score": score_map}
    names = tuple(x.name for x in results)
    if fused:
        extra |= ({"sinks": True} if sinks else {}) | ({"prob": prob_map} if prob_map else {})
        op = Op("attention", tuple(x.name for x in inputs), results, tuple((attrs | extra).items()))
        return Graph("attention", inputs, (op,), names)
    ops = [Op("sddmm", ("q", "k", *(x.name for x in masked)), (scores,), tuple(attrs.items()))]
    if score_map is not None:
        mapped = Value("t", "f32", scores.shape, scores.format)
        ops.append(Op("score_map", ("s", *(x.name for x in scored)), (mapped,), tuple(extra.items())))
    weights = Value("p", "f32", scores.shape, scores.format)
    last = ops[-1].output.name
    ops.append(Op("softmax", (last, *(x.name for x in sink)), (weights, *results[1:])))
    if prob_map is not None:
        weighted = Value("w", "f32", scores.shape, scores.format)
        operands = ("p", last, *(x.name for x in weighed))
        ops.append(Op("prob_map", operands, (weighted,), (("prob", prob_map),)))
    ops.append(Op("spmm", (ops[-1].output.name, "v"), results[:1]))
    if sums:
        total = Value("sums", "f32", ("B", "Hq", "kv_len"))
        ops.append(Op("reduce", ("p",), (total,), (("axis", 2), ("op", "sum"))))
        names = (*names, "sums")
    return Graph("attention", inputs, tuple(ops), names)


def _small_graphs() -> SearchStrategy[Graph]:
    st = _strategies()
    kinds = st.sampled_from(["map", "matmul", "softmax", "reduce"])

    @st.composite
    def draw_graph(draw: DrawFn) -> Graph:
        shape = ("n", "n")
        inputs = tuple(Value(name, "f32", shape) for name in ("a", "b"))
        square, ops = [v.name for v in inputs], []
        for i, kind in enumerate(draw(st.lists(kinds, min_size=1, max_size=5))):
            x, y = draw(st.sampled_from(square)), draw(st.sampled_from(square))
            made = Value(f"r{i}", "f32", shape)
            match kind:
                case "map":
                    expr = draw(expressions("float", integers=(), floats=("x0", "x1")))
                    ops.append(Op("map", (x, y), (made,), (("expr", expr),)))
                case "matmul":
                    ops.append(Op("matmul", (x, y), (made,), (("transpose_b", draw(st.booleans())),)))
                case "softmax":
                    ops.append(Op("softmax", (x,), (made,)))
                case "reduce":
                    made = Value(f"r{i}", "f32", ("n",))
                    how = (
                        ("axis", draw(st.integers(0, 1))),
                        ("op", draw(st.sampled_from(["sum", "max", "mean"]))),
                    )
                    ops.append(Op("reduce", (x,), (made,), how))
            if made.shape == shape:
                square.append(made.name)
        return Graph("small", inputs, tuple(ops), (ops[-1].output.name,))

    return draw_graph()


# kernels ---------------------------------------------------------------------------------------------


def kernels() -> SearchStrategy[K.Kernel]:
    """Small kernels over x [n, m] and y [m, d]: loads, elementwise code, dots, reductions, loops, branches.

    Their tiles are 4 x 8 x 4, so that lengths from 1 to 24 leave remainders.
    """
    st = _strategies()

    @st.composite
    def draw_kernel(draw: DrawFn) -> K.Kernel:
        return _KernelMaker(draw).kernel()

    return draw_kernel()


class _KernelMaker:
    """Draws the statements of a kernel between fixed loads and a fixed store."""

    AXES = (K.Axis("i", 4, 4), K.Axis("j", 8, 8), K.Axis("d", 3, 4))

    def __init__(self, draw: DrawFn) -> None:
        self.draw, self.st = draw, _strategies()
        self.scope: list[tuple[str, tuple[str, ...]]] = []
        self.made = 0

    def kernel(self) -> K.Kernel:
        i, j, d, n, m, t = (E.integer(x) for x in ("i", "j", "d", "n", "m", "t"))
        x, y = K.Tensor("x", "f32", ("n", "m"), "in", 1), K.Tensor("y", "f32", ("m", 3), "in", 1)
        row, column = 4 * t + i, 8 * E.integer("u") + j
        inner: list[K.Stmt] = [
            K.Load("X", "f32", ("i", "j"), "x", (row, column), sympy.And(row < n, column < m)),
            K.Load("Y", "f32", ("j", "d"), "y", (E.minimum(column, m - 1), d)),
        ]
        self.scope = [("X", ("i", "j"))]
        for _ in range(self.draw(self.st.integers(0, 4))):
            inner += self.statements()
        tile = self.draw(self.st.sampled_from([name for name, axes in self.scope if axes == ("i", "j")]))
        inner.append(K.Dot("Z", "f32", ("i", "d"), tile, "Y", "j", accumulate=True, declares=False))
        spans = (K.Span(sympy.Integer(0), sympy.Integer(1)), K.Span(sympy.Integer(1), E.ceildiv(m, 8)))
        body = (
            K.Let("even", sympy.Eq(E.floormod(t, 2), 0)),
            K.Compute("Z", "f32", ("i", "d"), sympy.Integer(0)),
            K.For(
                "u",
                spans if self.draw(self.st.booleans()) else (K.Span(sympy.Integer(0), spans[1].hi),),
                tuple(inner),
            ),
            K.Store("z", (row, d), E.real("Z"), ("i", "d"), row < n),
        )
        z = K.Tensor("z", "f32", ("n", 3), "out", 1)
        grid = (K.GridDim("t", E.ceildiv(n, 4)),)
        return K.Kernel("drawn", (x, y, z, K.Scalar("p0", "i64")), grid, self.AXES, "i", body)

    def statements(self) -> list[K.Stmt]:
        """A new tile, an update of one, or an update under a condition."""
        st = self.st
        choice = self.draw(st.sampled_from(["tile", "update", "branch", "rows", "sums"]))
        axes = ("i",) if choice == "rows" else ("i", "j")
        if choice == "rows":
            made = self.name(axes)
            op = self.draw(st.sampled_from(["sum", "max", "min"]))
            return [K.Reduce(made, "f32", axes, op, self.value(("i", "j"), but=made), ("j",))]
        if choice == "sums":
            value = self.value(axes)
            return [K.Scan(self.name(axes), "f32", axes, value, self.draw(st.sampled_from(axes)))]
        if choice == "tile":
            value = self.value(axes)
            return [K.Compute(self.name(axes), "f32", axes, value)]
        name, axes = self.draw(st.sampled_from(self.scope))
        update = K.Compute(name, "f32", axes, self.value(axes), declares=False)
        if choice == "update":
            return [update]
        cond = self.draw(expressions("bool", integers=("t", "u", "p0", "n")) | st.just(E.boolean("even")))
        return [K.If(cond, (update,))] if cond not in (sympy.true, sympy.false) else [update]

    def value(self, axes: tuple[str, ...], but: str = "") -> E.Expr:
        """An expression of the tiles over these axes, tamed so that it stays finite."""
        floats = tuple(n for n, own in self.scope if set(own) <= set(axes) and n != but)
        made = self.draw(expressions("float", integers=(*axes, "t", "u", "p0"), floats=floats or ("X",)))
        return sympy.tanh(made / 8) if floats else sympy.Float(0.5)

    def name(self, axes: tuple[str, ...]) -> str:
        self.made += 1
        self.scope.append((f"T{self.made}", axes))
        return f"T{self.made}"

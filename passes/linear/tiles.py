"""tiles: the statements that kernels of linear attention have in common.

Rows of a chunk come as tiles over (i or j, m) and (i or j, e): i runs over rows that get something, j over
those that give, m over the elements of rows that features are made of, e over those of values. Features of
several parts are several tiles over m; so are the parts of a state. What lies behind the last row gives
nothing: features of zeros need not be zeros, so they are made so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from ...ir.derivative import derivative
from ...ir.errors import InputError
from ...ir.expr import Expr, all_of, ceildiv, floordiv, integer, maximum, minimum, real, where
from ...ir.graph import Graph, Op, Value
from ...ir.kernel import (
    Axis,
    Compute,
    Dot,
    For,
    GridDim,
    If,
    Kernel,
    Let,
    Load,
    Reduce,
    Scalar,
    Span,
    Stmt,
    Store,
    Tensor,
)
from ...ir.linear import X0, Chunks, FeatureMap
from .schedule import padded
from .spec import LinearSpec

ZERO, NONE = sympy.Integer(0), sympy.Float(0.0)
B, H, I, J, M, E, Y, S = map(integer, ("b", "h", "i", "j", "m", "e", "y", "s"))  # noqa: E741
GROUP, N0 = integer("group"), integer("n0")
SEGMENTS = "segments"


def map_of(op: Op, name: str) -> FeatureMap | None:
    """A feature map among an operation's attributes; None for the identity."""
    by = op.attr(name)
    return None if by is None or by.is_identity else by


def is_normalised(op: Op) -> bool:
    """Whether an operation divides what it gives by its denominators."""
    return op.attr("eps") is not None and "over" not in op.attr("operands")


@dataclass(frozen=True)
class Source:
    """Rows that give to a state, or read it: of features f and of values g, and a column c. over: what g is
    divided by. name: of the tensors that hold its states, made of those names."""

    f: Value
    g: Value
    by: FeatureMap | None
    c: str | None
    over: str | None
    eps: float
    sums: bool
    state: str | None
    totals: str | None
    order: str | None = None

    @staticmethod
    def of(graph: Graph, op: Op, at: dict[str, str]) -> Source:
        divided = at.get("over") if op.attr("divides") == "g" else None
        sums = bool(op.attr("sums") or op.attr("keeps")) or is_normalised(op)
        return Source(
            graph.values[at["f"]], graph.values[at["g"]], op.attr("f_map"), at.get("c"), divided,
            float(op.attr("eps") or 0.0), sums, at.get("state"), at.get("sums"), op.attr("order"),
        )  # fmt: skip

    @property
    def name(self) -> str:
        """A name for its states: those of keys, or of queries, who give to keys."""
        return f"{self.f.name}_{self.g.name}"

    @property
    def parts(self) -> int:
        return 1 if self.by is None else len(self.by.parts)

    @property
    def features(self) -> int:
        return self.parts * int(self.f.shape[3])


class Tiles:
    """Statements of one kernel over tiles."""

    lanes = "e"

    def __init__(self, graph: Graph, op: Op, spec: LinearSpec, source: Source | None = None) -> None:
        chunks = op.attr("chunks")
        if not isinstance(chunks, Chunks):
            raise InputError("passes.linear.tiles", "what has passed passes.linear.schedule", op.kind)
        self.graph, self.op, self.spec, self.chunks = graph, op, spec, chunks
        self.at = dict(zip(op.attr("operands"), op.inputs, strict=True))
        self.source = source or Source.of(graph, op, self.at)
        self.acc, self.operand = spec.accumulator, spec.operand
        self.rows = chunks.rows
        self.parts = range(self.source.parts)
        self.size, self.v_size = int(self.source.f.shape[3]), int(self.source.g.shape[3])
        self.length = integer(str(self.source.f.shape[2]))
        self.used: dict[str, Tensor] = {}
        self.made = 0
        self.narrow = self.operand != self.acc
        self.m: Expr = M
        self.e: Expr = E
        self.spans = False

    # segments ---------------------------------------------------------------------------------------

    @property
    def span(self) -> Expr:
        """Chunks of a segment, an argument."""
        self.spans = True
        return integer(f"span_{self.length}")

    def segments(self) -> Expr:
        """How many segments a sequence has."""
        found: Expr = floordiv(ceildiv(self.length, self.rows) + self.span - 1, self.span)
        return found

    def chunks_of(self, segment: Expr) -> Span:
        """The chunks of a segment."""
        first = segment * self.span
        return Span(first, minimum(first + self.span, ceildiv(self.length, self.rows)))

    # arguments --------------------------------------------------------------------------------------

    def tensor(self, value: Value, role: str = "in") -> str:
        """An argument: a tensor of rows, or of one number a row."""
        shape = tuple(value.shape)
        if value.name not in self.used:
            last = len(shape) - 1
            align = self.spec.align(shape[last], value.dtype) if last == 3 else 1
            self.used[value.name] = Tensor(value.name, value.dtype, shape, role, last, align)
        return value.name

    def states(self, name: str, shape: tuple[int | str, ...], role: str = "in", heads: str = "Hk") -> str:
        shape = ("B", heads, *shape)
        align = self.spec.align(shape[-1], self.acc)
        self.used[name] = Tensor(name, self.acc, shape, role, len(shape) - 1, align)
        return name

    def kernel(
        self, name: str, grid: Sequence[GridDim], axes: Sequence[Axis], body: Sequence[Stmt]
    ) -> Kernel:
        tensors = sorted(self.used.values(), key=lambda t: t.role != "in")
        scalars = [Scalar(str(self.span), "i64")] if self.spans else []
        source = self.source
        what = f"{self.op.kind}, {source.order}" if source.order else self.op.kind
        comment = (
            f"{what}: {source.features} features by {self.v_size} values",
            f"{self.rows} rows a chunk",
        )
        lanes = self.lanes if self.spec.is_cpu else None
        return Kernel(
            name,
            (*tensors, *scalars),
            tuple(grid),
            tuple(axes),
            lanes,
            tuple(body),
            self.chunks.meta,
            comment,
        )

    def axis(self, name: str, extent: int) -> Axis:
        return Axis(name, extent, extent if self.spec.is_cpu else padded(extent))

    # rows -------------------------------------------------------------------------------------------

    def row(self, axis: str, chunk: Expr, name: str) -> Compute:
        return Compute(name, "i32", (axis,), chunk * self.rows + integer(axis))

    def load(self, dst: str, value: Value, head: Expr, axis: str, row: Expr, along: str, dtype: str) -> Load:
        """A tile of rows along m or e; zeros behind the last row and column."""
        at, symbol = (self.m, M) if along == "m" else (self.e, E)
        guard = row < integer(str(value.shape[2]))
        if at != symbol:
            guard = sympy.And(guard, at < int(value.shape[3]))
        return Load(dst, dtype, (axis, along), self.tensor(value), (B, head, row, at), guard, NONE)

    def numbers(self, dst: str, name: str, head: Expr, axis: str, row: Expr, other: Expr = NONE) -> Load:
        """One number a row."""
        value = self.graph.values[name]
        self.tensor(value)
        inside = row < integer(str(value.shape[2]))
        return Load(dst, self.acc, (axis,), name, (B, head, row), inside, other)

    def featured(
        self,
        dst: str,
        value: Value,
        by: FeatureMap | None,
        head: Expr,
        axis: str,
        row: Expr,
        *,
        dtype: str | None = None,
    ) -> list[Stmt]:
        """Tiles dst0, dst1, ... of the features of rows, one a part; ready for products, or of a dtype."""
        dtype = dtype or self.operand
        if by is None:
            return [self.load(f"{dst}0", value, head, axis, row, "m", dtype)]
        raw = f"{dst}_rows"
        out: list[Stmt] = [self.load(raw, value, head, axis, row, "m", self.acc)]
        inside = row < integer(str(value.shape[2]))
        parts, more = self.mapped(dst, raw, by, axis)
        out += more
        for p, part in enumerate(parts):
            out.append(Compute(f"{dst}{p}", dtype, (axis, "m"), where(inside, part, NONE)))
        return out

    def mapped(self, dst: str, raw: str, by: FeatureMap, axis: str) -> tuple[list[Expr], list[Stmt]]:
        """The features of a tile of rows, as expressions, and what these need."""
        parts = [part.xreplace({X0: real(raw)}) for part in by.parts]
        if not by.softmax:
            return parts, []
        most, total = f"{dst}_most", f"{dst}_total"
        at, out = (axis, "m"), []
        for p, part in enumerate(parts):
            out += [
                Compute(f"{dst}_u{p}", self.acc, at, part),
                Reduce(f"{most}{p}", self.acc, (axis,), "max", real(f"{dst}_u{p}"), ("m",)),
            ]
        top: Expr = real(f"{most}0")
        for p in range(1, len(parts)):
            top = maximum(top, real(f"{most}{p}"))
        out.append(Compute(most, self.acc, (axis,), top))
        for p in range(len(parts)):
            weight = sympy.exp(real(f"{dst}_u{p}") - real(most))
            out += [
                Compute(f"{dst}_w{p}", self.acc, at, weight),
                Reduce(f"{total}{p}", self.acc, (axis,), "sum", real(f"{dst}_w{p}"), ("m",)),
            ]
        whole = sympy.Add(*(real(f"{total}{p}") for p in range(len(parts))))
        out.append(Compute(total, self.acc, (axis,), whole))
        return [real(f"{dst}_w{p}") / real(total) for p in range(len(parts))], out

    def divided(
        self, dst: str, value: Value, over: str | None, head: Expr, axis: str, row: Expr
    ) -> list[Stmt]:
        """A tile of values, divided by what their rows are."""
        if over is None:
            return [self.load(dst, value, head, axis, row, "e", self.operand)]
        eps = sympy.Float(self.source.eps)
        return [
            self.load(f"{dst}_rows", value, head, axis, row, "e", self.acc),
            self.numbers(f"{dst}_over", over, head, axis, row, sympy.Float(1.0)),
            Compute(dst, self.operand, (axis, "e"), real(f"{dst}_rows") / (real(f"{dst}_over") + eps)),
        ]

    # products ---------------------------------------------------------------------------------------

    def product(
        self, dst: str, axes: tuple[str, str], a: str, b: str, over: str, *, adds: bool
    ) -> list[Stmt]:
        """dst = or += the product. On a CPU what is added is summed apart: rounding errors stay small."""
        precision = self.spec.product_precision
        if not adds:
            return [Dot(dst, self.acc, axes, a, b, over, precision=precision)]
        if self.spec.is_cpu:
            self.made += 1
            more = f"{dst}_more{self.made}"
            return [
                Dot(more, self.acc, axes, a, b, over, precision=precision),
                self.set(dst, axes, real(dst) + real(more)),
            ]
        return [Dot(dst, self.acc, axes, a, b, over, accumulate=True, declares=False, precision=precision)]

    def products(
        self,
        dst: str,
        axes: tuple[str, str],
        pairs: Sequence[tuple[str, str]],
        over: str,
        *,
        adds: bool = False,
    ) -> list[Stmt]:
        """The sum of several products."""
        return [
            s
            for n, (a, b) in enumerate(pairs)
            for s in self.product(dst, axes, a, b, over, adds=adds or n > 0)
        ]

    def set(self, dst: str, axes: tuple[str, ...], value: Expr) -> Compute:
        return Compute(dst, self.acc, axes, value, declares=False)

    def as_operand(self, name: str, axes: tuple[str, ...]) -> tuple[list[Stmt], str]:
        """A tile as products take it."""
        if not self.narrow:
            return [], name
        return [Compute(f"{name}_n", self.operand, axes, real(name))], f"{name}_n"

    # states -----------------------------------------------------------------------------------------

    def give(self, head: Expr, row: Expr) -> list[Stmt]:
        """Tiles F0, .. and G of rows j, and their column C."""
        source = self.source
        out = self.featured("F", source.f, source.by, head, "j", row)
        out += self.divided("G", source.g, source.over, head, "j", row)
        if source.sums and source.c is not None:
            out.append(self.numbers("C", source.c, head, "j", row))
        return out

    @property
    def column(self) -> Expr:
        return sympy.Integer(1) if self.source.c is None else real("C")

    def add(self) -> list[Stmt]:
        """The state with what rows j give."""
        out: list[Stmt] = []
        for p in self.parts:
            out += self.product(f"S{p}", ("m", "e"), f"F{p}", "G", "j", adds=True)
            if self.source.sums:
                given = real(f"F{p}") * self.column
                out += [
                    Reduce(f"Z{p}_more", self.acc, ("m",), "sum", given, ("j",)),
                    self.set(f"Z{p}", ("m",), real(f"Z{p}") + real(f"Z{p}_more")),
                ]
        return out

    def inside(self, *along: str) -> Expr:
        """Whether columns that tiles of m or e begin elsewhere with lie within their sizes."""
        known = {"m": (self.m, M, self.size), "e": (self.e, E, self.v_size)}
        pairs = [known[name] for name in along]
        return all_of([at < size for at, symbol, size in pairs if at != symbol])

    def begin(self, state: str | None, sums: str | None, at: tuple[Expr, ...]) -> list[Stmt]:
        """The state S0, .. and its sums Z0, .., from tensors or from nothing."""
        out: list[Stmt] = []
        for p in self.parts:
            out.append(self._begun(f"S{p}", state, (*at, self.place(p), self.e), ("m", "e")))
            if self.source.sums:
                out.append(self._begun(f"Z{p}", sums, (*at, self.place(p)), ("m",)))
        return out

    def _begun(self, dst: str, tensor: str | None, at: tuple[Expr, ...], axes: tuple[str, ...]) -> Stmt:
        if tensor is None:
            return Compute(dst, self.acc, axes, NONE)
        return Load(dst, self.acc, axes, tensor, (B, *at), self.inside(*axes), NONE)

    def place(self, part: int) -> Expr:
        """Where features of a part are in a state."""
        found: Expr = part * self.size + self.m
        return found

    def keep(self, state: str, sums: str | None, at: tuple[Expr, ...]) -> list[Stmt]:
        """The state to tensors; its sums by the programs of the first values."""
        out: list[Stmt] = []
        for p in self.parts:
            place = (B, *at, self.place(p))
            out.append(Store(state, (*place, self.e), real(f"S{p}"), ("m", "e"), self.inside("m", "e")))
            if sums is not None:
                store = Store(sums, place, real(f"Z{p}"), ("m",), self.inside("m"))
                out.append(store if self.e == E else If(sympy.Eq(N0, 0), (store,)))
        return out

    # heads ------------------------------------------------------------------------------------------

    def heads(self, rows: str) -> tuple[list[Stmt], Expr, bool]:
        """What finds the head of a state for rows of some heads: statements, it, and whether several heads
        give to one."""
        sources = str(self.source.f.shape[1])
        if not self.spec.grouped:
            return [], H, False
        if rows == "Hq":
            if sources == "Hk":
                group = Let("group", floordiv(integer("Hq"), integer("Hk")))
                return [group], floordiv(H, GROUP), False
            return [], H, False
        if sources == "Hq":
            return [Let("group", floordiv(integer("Hq"), integer("Hk")))], H, True
        return [], H, False

    def members(self, several: bool, head: Expr, body: Sequence[Stmt]) -> list[Stmt]:
        """The body, or a loop of it over the heads that give: `giver` is the head."""
        if not several:
            return [Let("giver", head), *body]
        inner = (Let("giver", head * GROUP + Y), *body)
        return [For("y", (Span(ZERO, GROUP),), inner)]


def rows_gradient(tiles: Tiles, by: FeatureMap, raw: str) -> list[Stmt]:
    """The gradient R of rows `raw`, where D0, .. are those of their features."""
    out: list[Stmt] = []
    grads = [real(f"D{p}") for p in range(len(by.parts))]
    if by.softmax:
        features, more = tiles.mapped("of", raw, by, "i")
        out += more
        for p, feature in enumerate(features):
            out += [
                Compute(f"of{p}", tiles.acc, ("i", "m"), feature),
                Reduce(f"delta{p}", tiles.acc, ("i",), "sum", real(f"of{p}") * grads[p], ("m",)),
            ]
        delta = sympy.Add(*(real(f"delta{p}") for p in range(len(features))))
        out.append(Compute("delta", tiles.acc, ("i",), delta))
        grads = [real(f"of{p}") * (grads[p] - real("delta")) for p in range(len(features))]
    slopes = [derivative(part, X0).xreplace({X0: real(raw)}) for part in by.parts]
    total = sympy.Add(*(slope * grad for slope, grad in zip(slopes, grads, strict=True)))
    return [*out, Compute("R", tiles.acc, ("i", "m"), total)]

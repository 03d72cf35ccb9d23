"""light: experts that multiply nothing, as one kernel, and one for gradients.

Ids from `first` on mean, in this order: `zeros` experts that give nothing, `copies` that give x, and
`constants` that give a x + (1 - a) v, with a vector v each; a is the first of softmax(gates x), two numbers,
or 0 without gates. They are MoE++'s (Jin et al., arXiv:2410.07348). A token needs two sums over its ids:

    o = base + (sum of weights of x) x + sum over constants of (sum of weights of v) v

    dweights [T, k], dx [T, H]; mixed [T, C], what each v was weighted by; slopes [T, C], the gradient of the
    difference of each gate's two logits: sums of these times do and x are left to products.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ...ir.expr import Expr, all_of, cast, ceildiv, integer, real, sigmoid, where
from ...ir.kernel import (
    Axis,
    Compute,
    For,
    GridDim,
    Kernel,
    Load,
    Program,
    Reduce,
    Span,
    Stmt,
    Store,
    Tensor,
)

ZERO, NONE = sympy.Integer(0), sympy.Float(0.0)
TOKEN, ROW, K, C, D = map(integer, ("token", "i", "k", "c", "d"))
ROWS = 4


@dataclass(frozen=True)
class LightSpec:
    """first: the id of the first of these experts. gated: whether constants have gates. ids, weights: their
    dtypes. aligned: whether rows of x and of what goes with it start on 16 bytes."""

    first: int
    zeros: int
    copies: int
    constants: int
    gated: bool
    top_k: int
    hidden: int
    dtype: str
    ids: str = "i64"
    weights: str = "f32"
    target: str = "cpu"
    aligned: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.target.partition(":")[0] == "cpu"

    @property
    def accumulator(self) -> str:
        return "f64" if self.dtype == "f64" else "f32"


def compile_light(spec: LightSpec) -> Program:
    """base, x [T, H], ids, weights [T, k] (, vectors [C, H]) (, gates [C, 2, H]) -> o [T, H]."""
    builder = _Builder(spec)
    value = real("Base") + _weighted("x_sum", "X")
    step: list[Stmt] = [builder.rows("X", "x"), builder.rows("Base", "base")]
    if spec.constants:
        step += [*builder.vectors(), builder.mixture("Mixed", _weighted("v_sum", "Vector"))]
        value = value + real("Mixed")
    step.append(builder.store("o", value))
    body = [*builder.head(), *builder.mixing([]), *builder.sums(), builder.loop("u", step)]
    return builder.program("light", ("base", "x"), ("o",), body)


def compile_light_gradient(spec: LightSpec) -> Program:
    """do, x, ids, weights (, vectors) (, gates) -> dx, dweights (, mixed) (, slopes)."""
    builder, acc = _Builder(spec), spec.accumulator
    extra: list[Stmt] = [
        builder.rows("Do", "do"),
        *([] if spec.gated else [builder.rows("X", "x")]),
        Reduce("s_x", acc, ("i",), "sum", real("Do") * real("X"), ("d",)),
        Compute("along_x", acc, ("i",), real("along_x") + real("s_x"), declares=False),
    ]
    start: list[Stmt] = [Compute("along_x", acc, ("i",), NONE)]
    given = where(builder.copied, real("along_x"), NONE)
    if spec.constants:
        extra += [
            *builder.vectors(),
            Reduce("s_v", acc, ("i", "c"), "sum", real("Do") * real("Vector"), ("d",)),
            Compute("along_v", acc, ("i", "c"), real("along_v") + real("s_v"), declares=False),
        ]
        start.append(Compute("along_v", acc, ("i", "c"), NONE))
    body: list[Stmt] = [*builder.head(), *start, *builder.mixing(extra), *builder.sums()]
    value = _weighted("x_sum", "Do")
    step: list[Stmt] = [builder.rows("Do", "do")]
    if spec.constants:
        both = real("a") * real("along_x") + (1 - real("a")) * real("along_v")
        mine = sympy.Eq(integer("constant"), C)
        body += [
            Compute("both", acc, ("i", "c"), both),
            Reduce("of_constants", acc, ("i", "k"), "sum", where(mine, real("both"), NONE), ("c",)),
            builder.store_by("mixed", real("v_sum")),
        ]
        given = given + real("of_constants")
    if spec.gated:
        apart = _times("all_sum", real("a") * (1 - real("a")) * (real("along_x") - real("along_v")))
        body += [Compute("slope", acc, ("i", "c"), apart), builder.store_by("slopes", real("slope"))]
        step += [*builder.gates(), builder.mixture("Turned", real("slope") * real("Gate"))]
        value = value + real("Turned")
    body.append(Store("dweights", (TOKEN, K), given, ("i", "k"), builder.inside))
    step.append(builder.store("dx", value))
    body.append(builder.loop("v", step))
    made = ("dx", "dweights", *(["mixed"] if spec.constants else []), *(["slopes"] if spec.gated else []))
    return builder.program("light_gradient", ("do", "x"), made, body)


class _Builder:
    def __init__(self, spec: LightSpec) -> None:
        self.spec, self.acc = spec, spec.accumulator
        self.inside = integer("T") > TOKEN
        self.width = min(spec.hidden, 256)
        self.copies = spec.first + spec.zeros
        self.constants = self.copies + spec.copies
        number = integer("id")
        self.copied = all_of([number >= self.copies, number < self.constants])

    @property
    def feature(self) -> Expr:
        return integer("at")

    def within(self) -> Expr:
        whole = self.spec.hidden % self.width == 0
        return sympy.true if whole else self.feature < self.spec.hidden

    def loop(self, var: str, body: list[Stmt]) -> For:
        """Over tiles of features, `at` [d]."""
        steps = sympy.Integer(-(-self.spec.hidden // self.width))
        tile = Compute("at", "i32", ("d",), integer(var) * self.width + D)
        return For(var, (Span(ZERO, steps),), (tile, *body))

    def head(self) -> list[Stmt]:
        """id, weight [i, k]; constant [i, k], which of these an id names."""
        by = (TOKEN, K)
        number = integer("id64") if self.spec.ids == "i64" else integer("id")
        # Ids too large for 32 bits are nobody's.
        low = where(all_of([number >= 0, number < 2**30]), number, -1)
        narrow = [Compute("id", "i32", ("i", "k"), cast(sympy.Symbol("i32"), low))]
        return [
            Compute("token", "i32", ("i",), integer("c0") * ROWS + ROW),
            Load(str(number), self.spec.ids, ("i", "k"), "ids", by, self.inside, sympy.Integer(-1)),
            *(narrow if self.spec.ids == "i64" else []),
            Load("weight", self.acc, ("i", "k"), "weights", by, self.inside, NONE),
            Compute("constant", "i32", ("i", "k"), integer("id") - self.constants),
        ]

    def rows(self, name: str, tensor: str) -> Load:
        guard = all_of([self.inside, self.within()])
        return Load(name, self.acc, ("i", "d"), tensor, (TOKEN, self.feature), guard, NONE)

    def vectors(self) -> list[Stmt]:
        return [Load("Vector", self.acc, ("c", "d"), "vectors", (C, self.feature), self.within(), NONE)]

    def gates(self) -> list[Stmt]:
        """Gate [c, d]: the difference of a gate's two rows."""
        loads: list[Stmt] = [
            Load(
                f"Gate{n}",
                self.acc,
                ("c", "d"),
                "gates",
                (C, sympy.Integer(n), self.feature),
                self.within(),
                NONE,
            )
            for n in (0, 1)
        ]
        return [*loads, Compute("Gate", self.acc, ("c", "d"), real("Gate0") - real("Gate1"))]

    def mixing(self, more: list[Stmt]) -> list[Stmt]:
        """a [i, c], and what else is summed over features on the way."""
        out: list[Stmt] = []
        body = list(more)
        if self.spec.gated:
            out.append(Compute("apart", self.acc, ("i", "c"), NONE))
            body = [
                self.rows("X", "x"),
                *self.gates(),
                Reduce("s_z", self.acc, ("i", "c"), "sum", real("X") * real("Gate"), ("d",)),
                Compute("apart", self.acc, ("i", "c"), real("apart") + real("s_z"), declares=False),
                *more,
            ]
        out += [self.loop("u" if more else "v", body)] if body else []
        if self.spec.constants:
            value = sigmoid(real("apart")) if self.spec.gated else NONE
            out.append(Compute("a", self.acc, ("i", "c"), value))
        return out

    def sums(self) -> list[Stmt]:
        """x_sum [i]; all_sum, v_sum [i, c]: weights of x, of each constant, and of its vector."""
        copied = where(self.copied, real("weight"), NONE)
        out: list[Stmt] = [Reduce("x_sum", self.acc, ("i",), "sum", copied, ("k",))]
        if not self.spec.constants:
            return out
        mine = where(sympy.Eq(integer("constant"), C), real("weight"), NONE)
        return [
            *out,
            Reduce("all_sum", self.acc, ("i", "c"), "sum", mine, ("k",)),
            Compute("v_sum", self.acc, ("i", "c"), _times("all_sum", 1 - real("a"))),
            Reduce("x_more", self.acc, ("i",), "sum", _times("all_sum", real("a")), ("c",)),
            Compute("x_sum", self.acc, ("i",), real("x_sum") + real("x_more"), declares=False),
        ]

    def mixture(self, name: str, value: Expr) -> Reduce:
        """The sum over constants of a value."""
        return Reduce(name, self.acc, ("i", "d"), "sum", value, ("c",))

    def store(self, name: str, value: Expr) -> Store:
        guard = all_of([self.inside, self.within()])
        return Store(name, (TOKEN, self.feature), value, ("i", "d"), guard)

    def store_by(self, name: str, value: Expr) -> Store:
        """By token and constant."""
        return Store(name, (TOKEN, C), value, ("i", "c"), self.inside)

    def program(self, name: str, given: tuple[str, ...], made: tuple[str, ...], body: list[Stmt]) -> Program:
        spec = self.spec
        wide, by_token = ("T", spec.hidden), ("T", spec.top_k)
        shapes = {"dweights": (self.acc, by_token)}
        shapes |= {n: (self.acc, ("T", spec.constants)) for n in ("mixed", "slopes")}
        align = 16 if spec.aligned and not spec.is_cpu else 1
        args = [Tensor(n, spec.dtype, wide, unit=1, align=align) for n in given]
        args += [Tensor("ids", spec.ids, by_token, unit=1), Tensor("weights", spec.weights, by_token, unit=1)]
        if spec.constants:
            args.append(Tensor("vectors", spec.dtype, (spec.constants, spec.hidden), unit=1))
        if spec.gated:
            args.append(Tensor("gates", spec.dtype, (spec.constants, 2, spec.hidden), unit=2))
        for n in made:
            dtype, shape = shapes.get(n, (spec.dtype, wide))
            args.append(Tensor(n, dtype, shape, "out", unit=1, align=1 if n in shapes else align))
        used = {a.name for a in args if isinstance(a, Tensor)} & _read(body)
        args = [a for a in args if a.name in used or a.role == "out"]
        sizes = {"i": ROWS, "k": spec.top_k, "d": self.width} | (
            {"c": spec.constants} if spec.constants else {}
        )
        axes = [Axis(n, e, e if spec.is_cpu else 1 << (e - 1).bit_length()) for n, e in sizes.items()]
        grid = (GridDim("c0", ceildiv(integer("T"), ROWS)),)
        meta = () if spec.is_cpu else (("stages", 2), ("warps", 4))
        comment = (f"{spec.zeros} zero, {spec.copies} copy, {spec.constants} constant experts",)
        kernel = Kernel(
            name, tuple(args), grid, tuple(axes), "d" if spec.is_cpu else None, tuple(body), meta, comment
        )
        return Program((kernel,), text=f"# {spec}")


def _weighted(weight: str, value: str) -> Expr:
    """A product that does not look at what has no weight."""
    return _times(weight, real(value))


def _times(weight: str, value: Expr) -> Expr:
    found: Expr = where(sympy.Eq(real(weight), 0), NONE, real(weight) * value)
    return found


def _read(body: list[Stmt]) -> set[str]:
    """The tensors that are loaded from."""
    found: set[str] = set()
    for stmt in body:
        if isinstance(stmt, Load):
            found.add(stmt.tensor)
        elif isinstance(stmt, For):
            found |= _read(list(stmt.body))
    return found

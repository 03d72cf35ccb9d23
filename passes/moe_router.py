"""moe_router: from router logits to the experts of each token, as one kernel.

A program takes a few tokens: scores, then top_k times the best expert that is left. Equal scores go to the
expert with the smaller number, as a stable sort would have it.

Group-limited choice is DeepSeek-V3's (arXiv:2412.19437): groups are ranked by the sum of their two best
scores, and experts of the best groups alone can be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ..ir.errors import InputError
from ..ir.expr import (
    Expr,
    all_of,
    any_of,
    bitand,
    cast,
    ceildiv,
    floordiv,
    integer,
    maximum,
    minimum,
    random_bits,
    real,
    sigmoid,
    where,
)
from ..ir.kernel import (
    Axis,
    Compute,
    For,
    GridDim,
    Kernel,
    Load,
    Program,
    Reduce,
    Scalar,
    Scan,
    Span,
    Stmt,
    Store,
    Tensor,
)

SCORINGS = ("softmax", "sigmoid", "logits", "random", "map")
CUTS = (None, "top_p", "threshold")
LOWEST = sympy.Float(-3.0e38)  # above what is chosen already, below what anybody scores
TINY = sympy.Float(1e-20)
ZERO, MINUS_INF = sympy.Integer(0), -sympy.oo
ROW, E_AXIS, K_AXIS, G, U = map(integer, ("i", "e", "k", "g", "u"))


@dataclass(frozen=True)
class RouterSpec:
    """Which experts a token takes, and their weights.

    scoring: of the logits, over all experts: 'softmax', 'sigmoid', or 'logits' themselves, whose softmax over
    the chosen ones gives weights. renormalize: weights of a token add up to 1. corrected: scores of choice
    have a bias [E] added, weights have not. groups, top_groups: experts lie in so many groups, of which so
    many are open to a token. logits: their dtype.

    scoring 'random': of random bits by seed, token and expert, or, if `hashed`, by what stands in token_ids
    in place of the token. 'map': `expr` of a logit, x0. cut: 'top_p' keeps the best experts until their
    scores add up to p, 'threshold' those that score so much; the others get the id -1. Raises InputError."""

    experts: int
    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    corrected: bool = False
    groups: int = 1
    top_groups: int = 1
    logits: str = "f32"
    target: str = "cpu"
    cut: str | None = None
    hashed: bool = False
    expr: Expr | None = None

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise InputError("RouterSpec.scoring", f"one of {', '.join(SCORINGS)}", repr(self.scoring))
        if self.cut not in CUTS:
            raise InputError("RouterSpec.cut", f"one of {', '.join(map(str, CUTS))}", repr(self.cut))
        if not 1 <= self.top_k <= self.experts:
            raise InputError("RouterSpec.top_k", f"1 to {self.experts}", self.top_k)
        if self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise InputError("RouterSpec.groups", f"a divisor of {self.experts}", self.groups)


def compile_router(spec: RouterSpec) -> Program:
    """The program of a router: logits [T, E] (, bias [E]), scale -> ids [T, top_k], weights [T, top_k]."""
    return Program((_Builder(spec).kernel(),), text=f"# {spec}")


class _Builder:
    def __init__(self, spec: RouterSpec) -> None:
        self.spec = spec
        self.cpu = spec.target.partition(":")[0] == "cpu"
        self.acc = "f64" if spec.logits == "f64" else "f32"
        self.rows = 4 if spec.groups > 1 or spec.experts > 256 else 16
        self.token = integer("token")

    def kernel(self) -> Kernel:
        spec, e, k = self.spec, self.spec.experts, self.spec.top_k
        inside = self.token < integer("T")
        zero = sympy.Float(0.0)
        body: list[Stmt] = [
            Compute("token", "i32", ("i",), integer("c") * self.rows + ROW),
            Load("L", self.acc, ("i", "e"), "logits", (self.token, E_AXIS), inside, zero),
            *self._scores(),
            *self._choice(),
            Compute("W", self.acc, ("i", "k"), zero),
            Compute("A", "i32", ("i", "k"), ZERO),
            For("u", (Span(ZERO, sympy.Integer(k)),), tuple(self._pick())),
            *self._weights(),
            Store("ids", (self.token, K_AXIS), integer("A"), ("i", "k"), inside),
            Store("weights", (self.token, K_AXIS), real("W"), ("i", "k"), inside),
        ]
        bias = [Tensor("bias", self.acc, (e,), unit=0)] if spec.corrected else []
        args = (
            Tensor("logits", spec.logits, ("T", e), unit=1),
            *bias,
            Tensor("ids", "i32", ("T", k), "out", unit=1),
            Tensor("weights", self.acc, ("T", k), "out", unit=1),
            Scalar("scale", self.acc),
            *([Scalar("limit", self.acc)] if spec.cut else []),
            *([Scalar("seed", "i64")] if spec.scoring == "random" else []),
            *([Tensor("token_ids", "i64", ("T",), unit=0)] if spec.hashed else []),
        )
        axes = [self._axis("i", self.rows), self._axis("e", e), self._axis("k", k)]
        if spec.groups > 1:
            axes.insert(1, self._axis("g", spec.groups))
        return Kernel(
            "router",
            args,
            (GridDim("c", ceildiv(integer("T"), self.rows)),),
            tuple(axes),
            None,
            tuple(body),
            (("stages", 1), ("warps", 4 if e <= 128 else 8)),
            (f"{spec.scoring} of {e} experts, {k} a token",),
        )

    def _axis(self, name: str, extent: int) -> Axis:
        return Axis(name, extent, extent if self.cpu else 1 << (extent - 1).bit_length())

    def _scores(self) -> list[Stmt]:
        """P: the scores of all experts."""
        logits, ie = real("L"), ("i", "e")
        match self.spec.scoring:
            case "softmax":
                return [
                    Reduce("peak", self.acc, ("i",), "max", logits, ("e",)),
                    Compute("P", self.acc, ie, sympy.exp(logits - real("peak"))),
                    Reduce("all", self.acc, ("i",), "sum", real("P"), ("e",)),
                    Compute("P", self.acc, ie, real("P") / real("all"), declares=False),
                ]
            case "sigmoid":
                return [Compute("P", self.acc, ie, sigmoid(logits))]
            case "random":
                return self._random()
            case "map":
                assert self.spec.expr is not None
                return [
                    Compute("P", self.acc, ie, sympy.sympify(self.spec.expr).xreplace({real("x0"): logits}))
                ]
        return [Compute("P", self.acc, ie, logits)]

    def _random(self) -> list[Stmt]:
        """Numbers in (0, 1), of 23 random bits each."""
        word, out = integer("token"), []
        if self.spec.hashed:
            inside = integer("token") < integer("T")
            out.append(Load("name", "i32", ("i",), "token_ids", (integer("token"),), inside, ZERO))
            word = integer("name")
        bits = bitand(random_bits(integer("seed"), word, E_AXIS), sympy.Integer(2**23 - 1))
        value = (cast(sympy.Symbol(self.acc), bits) + sympy.Float(0.5)) * sympy.Float(2.0**-23)
        return [*out, Compute("P", self.acc, ("i", "e"), value)]

    def _choice(self) -> list[Stmt]:
        """C: what experts are chosen by; those that are not open get the lowest value."""
        ie, value = ("i", "e"), real("P")
        out: list[Stmt] = []
        if self.spec.corrected:
            out.append(Load("correction", self.acc, ("e",), "bias", (E_AXIS,)))
            value = value + real("correction")
        out.append(Compute("C", self.acc, ie, maximum(value, LOWEST)))
        return out if self.spec.groups == 1 else [*out, *self._groups()]

    def _groups(self) -> list[Stmt]:
        size = sympy.Integer(self.spec.experts // self.spec.groups)
        ig, within = ("i", "g"), sympy.Eq(floordiv(E_AXIS, size), G)
        chosen = real("C")
        second: Expr = where(all_of([within, sympy.Ne(E_AXIS, integer("best_at"))]), chosen, LOWEST)
        open_, best = sympy.Eq(floordiv(E_AXIS, size), integer("group")), real("best_group")
        pick: tuple[Stmt, ...] = (
            Reduce("best_group", self.acc, ("i",), "max", real("R"), ("g",)),
            Reduce(
                "group", "i32", ("i",), "min", where(sympy.Eq(real("R"), best), G, self.spec.groups), ("g",)
            ),
            Compute("open", "bool", ("i", "e"), any_of([sympy.Symbol("open"), open_]), declares=False),
            Compute(
                "R", self.acc, ig, where(sympy.Eq(G, integer("group")), MINUS_INF, real("R")), declares=False
            ),
        )
        first = where(all_of([within, sympy.Eq(chosen, real("best"))]), E_AXIS, self.spec.experts)
        return [
            Reduce("best", self.acc, ig, "max", where(within, chosen, LOWEST), ("e",)),
            Reduce("best_at", "i32", ig, "min", first, ("e",)),
            Reduce("next_best", self.acc, ig, "max", second, ("e",)),
            Compute("R", self.acc, ig, real("best") + (real("next_best") if size > 1 else 0)),
            Compute("open", "bool", ("i", "e"), E_AXIS < 0),
            For("v", (Span(ZERO, sympy.Integer(self.spec.top_groups)),), pick),
            Compute("C", self.acc, ("i", "e"), where(sympy.Symbol("open"), chosen, LOWEST), declares=False),
        ]

    def _pick(self) -> list[Stmt]:
        """The best expert that is left, its score into W and its number into A at place u."""
        ie, ik, chosen, here = ("i", "e"), ("i", "k"), real("C"), sympy.Eq(K_AXIS, U)
        first = where(sympy.Eq(chosen, real("top")), E_AXIS, self.spec.experts)
        taken = sympy.Eq(E_AXIS, integer("expert"))
        return [
            Reduce("top", self.acc, ("i",), "max", chosen, ("e",)),
            Reduce("found", "i32", ("i",), "min", first, ("e",)),
            # No score equals the best one: they are NaN, and any expert spreads it in this token.
            Compute(
                "expert", "i32", ("i",), where(integer("found") < self.spec.experts, integer("found"), U)
            ),
            Reduce("score", self.acc, ("i",), "sum", where(taken, real("P"), sympy.Float(0.0)), ("e",)),
            Compute("W", self.acc, ik, where(here, real("score"), real("W")), declares=False),
            Compute("A", "i32", ik, where(here, integer("expert"), integer("A")), declares=False),
            Compute("C", self.acc, ie, where(taken, MINUS_INF, chosen), declares=False),
        ]

    def _weights(self) -> list[Stmt]:
        ik, out = ("i", "k"), self._cut()
        value = real("W")
        if self.spec.scoring == "logits":
            out = [
                Reduce("most", self.acc, ("i",), "max", value, ("k",)),
                Compute("W", self.acc, ik, sympy.exp(value - real("most")), declares=False),
            ]
        if self.spec.renormalize or self.spec.scoring == "logits":
            out.append(Reduce("sum_of", self.acc, ("i",), "sum", value, ("k",)))
            value = value / (real("sum_of") + TINY)
        return [*out, Compute("W", self.acc, ik, value * real("scale"), declares=False)]

    def _cut(self) -> list[Stmt]:
        """Experts that a token does without: their id becomes -1, their weight 0."""
        if self.spec.cut is None:
            return []
        ik, weight, out = ("i", "k"), real("W"), []
        keep = weight >= real("limit")
        if self.spec.cut == "top_p":
            out.append(Scan("upto", self.acc, ik, weight, "k"))
            keep = any_of([sympy.Eq(K_AXIS, 0), real("upto") - weight < real("limit")])
        return [
            *out,
            Compute("kept", "bool", ik, keep),
            Compute("A", "i32", ik, where(sympy.Symbol("kept"), integer("A"), -1), declares=False),
            Compute("W", self.acc, ik, where(sympy.Symbol("kept"), weight, sympy.Float(0.0)), declares=False),
        ]


def compile_capacity(experts: int, ids: str, target: str) -> Program:
    """ids [entries], place [entries], bounds [E + 1], capacity -> limited [entries]: ids, -1 for entries that
    come after the first `capacity` ones of their expert."""
    entries, at, expert = integer("entries"), integer("at"), integer("id")
    inside = at < entries
    slot = minimum(maximum(expert, ZERO), sympy.Integer(experts - 1))
    there = all_of([integer("row") >= 0, integer("row") - integer("first") < integer("capacity")])
    i32 = cast(sympy.Symbol("i32"), slot) if ids == "i64" else slot
    body: tuple[Stmt, ...] = (
        Compute("at", "i32", ("i",), integer("c") * 256 + ROW),
        Load("id", ids, ("i",), "ids", (at,), inside, sympy.Integer(-1)),
        Load("row", "i32", ("i",), "place", (at,), inside, sympy.Integer(-1)),
        Compute("slot", "i32", ("i",), i32),
        Load("first", "i32", ("i",), "bounds", (integer("slot"),)),
        Store("limited", (at,), where(there, expert, -1), ("i",), inside),
    )
    args = (
        Tensor("ids", ids, ("entries",), unit=0),
        Tensor("place", "i32", ("entries",), unit=0),
        Tensor("bounds", "i32", (experts + 1,), unit=0),
        Tensor("limited", ids, ("entries",), "out", unit=0),
        Scalar("capacity", "i64"),
    )
    grid = (GridDim("c", ceildiv(entries, 256)),)
    kernel = Kernel("capacity", args, grid, (Axis("i", 256, 256),), None, body, (("stages", 1), ("warps", 4)))
    return Program((kernel,), text=f"# capacity of {experts} experts, {target}")

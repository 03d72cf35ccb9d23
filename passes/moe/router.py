"""router: from router logits to the experts of each token, as one kernel, two with a capacity.

A program takes a few tokens: scores, then top_k times the best expert that is left. Equal scores go to the
expert with the smaller number, as a stable sort would have it. Where experts take a number of tokens at most,
programs also count how many rows of theirs each expert has; see passes/moe/router_limit.py.

Group-limited choice is DeepSeek-V3's (arXiv:2412.19437): groups are ranked by the sum of their two best
scores, and experts of the best groups alone can be chosen. Two levels are SMILE's (arXiv:2212.05191); that
tokens of large Tsallis entropy take all experts is DynMoLE's (arXiv:2504.00661); tables of ids for each
request are ExpertWeave's (arXiv:2508.17624).
"""

from __future__ import annotations

import sympy

from ...ir.expr import (
    Expr,
    all_of,
    any_of,
    ceildiv,
    exp2,
    integer,
    log2,
    maximum,
    minimum,
    real,
    where,
)
from ...ir.kernel import (
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
from .router_limit import BLOCKS, counts_tensor, limit_kernel
from .router_scores import (
    E_AXIS,
    INSIDE,
    MINUS_INF,
    NONE,
    TOKEN,
    ZERO,
    G,
    axis,
    logits_of,
    score_arguments,
    score_axes,
    scores_of,
    within,
)
from .router_spec import RouterSpec

LOWEST = sympy.Float(-3.0e38)  # above what is chosen already, below what anybody scores
TINY = sympy.Float(1e-20)
ROW, K_AXIS, U, Z = map(integer, ("i", "k", "u", "z"))
KEPT = sympy.Symbol("kept")


def compile_router(spec: RouterSpec) -> Program:
    """The program of a router, logits [T, E] -> ids [T, top_k], weights [T, top_k].

    With spec.keeps also what gradients read: `chosen` [T, top_k], the ids before a table or a limit changed
    them, where one does; `scored` [T, E], the logits, where they are made of features."""
    builder = _Builder(spec)
    kernels = [builder.kernel()]
    between = []
    if spec.limited:
        kernels.append(limit_kernel(spec, builder.last))
        between = [counts_tensor(spec)]
        if builder.last != "chosen" or not spec.keeps:
            between.append(Tensor(builder.last, "i32", ("T", spec.top_k), unit=1))
    return Program(tuple(kernels), tuple(between), text=f"# {spec}")


def _ranked(score: Expr) -> Expr:
    """What scores are compared by. NaN comes first, as in torch's topk: its token's weights are NaN."""
    return where(score >= LOWEST, score, where(score < LOWEST, LOWEST, sympy.oo))


class _Builder:
    def __init__(self, spec: RouterSpec) -> None:
        self.spec, self.acc = spec, spec.accumulator
        # What this kernel calls its last ids: a limit comes behind.
        self.last = "ids" if not spec.limited else "remapped" if spec.remapped else "chosen"
        self.keeps_chosen = spec.keeps and bool(spec.remapped)

    def kernel(self) -> Kernel:
        spec, e, k = self.spec, self.spec.experts, self.spec.top_k
        ik = ("i", "k")
        block: list[Stmt] = [
            *logits_of(spec),
            *scores_of(spec),
            *self._choice(),
            Compute("W", self.acc, ik, NONE),
            Compute("A", "i32", ik, ZERO),
            For("u", (Span(ZERO, sympy.Integer(k)),), tuple(self._pick())),
            *self._weights(),
            *([Store("chosen", (TOKEN, K_AXIS), integer("A"), ik, INSIDE)] if self.keeps_chosen else []),
            *(self._remap() if spec.remapped else []),
            Store(self.last, (TOKEN, K_AXIS), integer("A"), ik, INSIDE),
            Store("weights", (TOKEN, K_AXIS), real("W"), ik, INSIDE),
        ]
        if spec.features:
            block.append(Store("scored", (TOKEN, E_AXIS), real("L"), ("i", "e"), INSIDE))
        at = integer("c") * spec.rows + ROW
        if spec.limited:
            at = (integer("c") * BLOCKS + integer("v")) * spec.rows + ROW
        block.insert(0, Compute("token", "i32", ("i",), at))
        axes, rows = [*score_axes(spec), axis(spec, "k", k)], spec.rows
        if spec.limited:
            rows *= BLOCKS
            axes.append(axis(spec, "z", spec.counted))
        return Kernel(
            "router",
            tuple(self._arguments()),
            (GridDim("c", ceildiv(integer("T"), rows)),),
            tuple(axes),
            None,
            tuple(self._counting(block) if spec.limited else block),
            (("stages", 1), ("warps", 4 if e <= 128 else 8)),
            (f"{spec.scoring} of {e} experts, {k} a token",),
        )

    def _arguments(self) -> list[Tensor | Scalar]:
        spec, by_token = self.spec, ("T", self.spec.top_k)
        found = score_arguments(spec)
        if spec.corrected:
            found.append(Tensor("bias", spec.corrected, (spec.experts,), unit=0))
        if spec.remapped:
            table, request = spec.routing
            found.append(Tensor("table", table, ("requests", spec.experts), unit=1))
            found.append(Tensor("request", request, ("T",), unit=0))
        names = [self.last, *(["chosen"] if self.keeps_chosen else [])]
        found += [Tensor(name, "i32", by_token, "out", unit=1) for name in names]
        found.append(Tensor("weights", self.acc, by_token, "out", unit=1))
        if spec.features:
            found.append(Tensor("scored", self.acc, ("T", spec.experts), "out", unit=1))
        if spec.limited:
            found.append(Tensor("counts", "i32", ("chunks", *counts_tensor(spec).shape[1:]), "out", unit=2))
        found.append(Scalar("scale", self.acc))
        found += [Scalar("limit", self.acc)] if spec.cut else []
        found += [Scalar("most_entropy", self.acc)] if spec.entropy else []
        found += [Scalar("entropy_index", self.acc)] if spec.entropy == "tsallis" else []
        return found

    def _choice(self) -> list[Stmt]:
        """C: what experts are chosen by; those that are not open get the lowest value."""
        value, out = real("P"), []
        if self.spec.corrected:
            out.append(Load("correction", self.acc, ("e",), "bias", (E_AXIS,)))
            value = value + real("correction")
        out.append(Compute("C", self.acc, ("i", "e"), _ranked(value)))
        return out if self.spec.groups == self.spec.top_groups else [*out, *self._groups()]

    def _groups(self) -> list[Stmt]:
        """R: what groups are ranked by. Experts of the best groups stay open."""
        spec, ig, ie = self.spec, ("i", "g"), ("i", "e")
        chosen, inner, best = real("C"), within(spec), real("best_group")
        first = where(all_of([inner, sympy.Eq(chosen, real("best"))]), E_AXIS, spec.experts)
        second: Expr = where(all_of([inner, sympy.Ne(E_AXIS, integer("best_at"))]), chosen, LOWEST)
        two = real("best") + (real("next_best") if spec.experts > spec.groups else 0)
        rank: list[Stmt] = [
            Reduce("best", self.acc, ig, "max", where(inner, chosen, LOWEST), ("e",)),
            Reduce("best_at", "i32", ig, "min", first, ("e",)),
            Reduce("next_best", self.acc, ig, "max", second, ("e",)),
            Compute("R", self.acc, ig, two),
        ]
        if spec.scoring == "levels":
            rank = [Compute("R", self.acc, ig, _ranked(real("p")))]
        group, ranks = integer("group"), real("R")
        here = sympy.Eq(integer("group_of_it"), group)
        pick: tuple[Stmt, ...] = (
            Reduce("best_group", self.acc, ("i",), "max", ranks, ("g",)),
            Reduce("group", "i32", ("i",), "min", where(sympy.Eq(ranks, best), G, spec.groups), ("g",)),
            Compute("open", "bool", ie, any_of([sympy.Symbol("open"), here]), declares=False),
            Compute("R", self.acc, ig, where(sympy.Eq(G, group), MINUS_INF, ranks), declares=False),
        )
        return [
            *rank,
            Reduce("group_of_it", "i32", ("e",), "sum", where(inner, G, 0), ("g",)),
            Compute("open", "bool", ie, E_AXIS < 0),
            For("v_group", (Span(ZERO, sympy.Integer(spec.top_groups)),), pick),
            Compute("C", self.acc, ie, where(sympy.Symbol("open"), chosen, LOWEST), declares=False),
        ]

    def _pick(self) -> list[Stmt]:
        """The best expert that is left, its score into W and its number into A at place u."""
        ie, ik, chosen, here = ("i", "e"), ("i", "k"), real("C"), sympy.Eq(K_AXIS, U)
        first = where(sympy.Eq(chosen, real("top")), E_AXIS, self.spec.experts)
        taken = sympy.Eq(E_AXIS, integer("expert"))
        return [
            Reduce("top", self.acc, ("i",), "max", chosen, ("e",)),
            Reduce("expert", "i32", ("i",), "min", first, ("e",)),
            Reduce("score", self.acc, ("i",), "sum", where(taken, real("P"), NONE), ("e",)),
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
        ik, weight, limit, out = ("i", "k"), real("W"), real("limit"), self._entropy()
        match self.spec.cut:
            case "top_p":
                out.append(Scan("upto", self.acc, ik, weight, "k"))
                keep = [sympy.Eq(K_AXIS, 0), real("upto") - weight < limit]
            case "relative":
                out.append(Reduce("best_of_all", self.acc, ("i",), "max", weight, ("k",)))
                keep = [weight >= limit * real("best_of_all")]
            case _:
                keep = [weight >= limit]
        if self.spec.least:
            keep.append(self.spec.least > K_AXIS)
        if self.spec.entropy:
            keep.append(real("entropy") >= real("most_entropy"))
        return [
            *out,
            Compute("kept", "bool", ik, any_of(keep)),
            Compute("A", "i32", ik, where(KEPT, integer("A"), -1), declares=False),
            Compute("W", self.acc, ik, where(KEPT, weight, NONE), declares=False),
        ]

    def _entropy(self) -> list[Stmt]:
        """entropy [i]: Tsallis's of the scores, (1 - sum of P**index) / (index - 1), or Shannon's."""
        if self.spec.entropy is None:
            return []
        p, index = real("P"), real("entropy_index")
        safe = maximum(p, sympy.Float(1e-30))
        if self.spec.entropy == "shannon":
            return [Reduce("entropy", self.acc, ("i",), "sum", -p * sympy.log(safe), ("e",))]
        return [
            Reduce("powers", self.acc, ("i",), "sum", exp2(index * log2(safe)), ("e",)),
            Compute("entropy", self.acc, ("i",), (1 - real("powers")) / (index - 1)),
        ]

    def _remap(self) -> list[Stmt]:
        """A by the table of each token's request; tokens whose request has none keep their ids."""
        number, ids = integer("number"), integer("A")
        known = all_of([number >= 0, number < integer("requests")])
        at = (maximum(minimum(number, integer("requests") - 1), ZERO), maximum(ids, ZERO))
        there = all_of([INSIDE, known, ids >= 0])
        return [
            Load("number", self.spec.routing[1], ("i",), "request", (TOKEN,), INSIDE, sympy.Integer(-1)),
            Load("other", "i32", ("i", "k"), "table", at, there, sympy.Integer(-1)),
            Compute("A", "i32", ("i", "k"), where(known, integer("other"), ids), declares=False),
        ]

    def _counting(self, block: list[Stmt]) -> list[Stmt]:
        """The block for each of this program's tokens, and counts [chunks, 1 or top_k, experts]."""
        orders = sympy.Eq(K_AXIS, integer("n"))
        one = where(sympy.Eq(integer("id"), Z), 1, 0)
        count: list[Stmt] = [
            Reduce("id", "i32", ("i",), "sum", where(orders, integer("A"), 0), ("k",)),
            Compute("id", "i32", ("i",), where(INSIDE, integer("id"), -1), declares=False),
            Reduce("more", "i32", ("z",), "sum", one, ("i",)),
        ]
        if self.spec.limited == "choice":
            shape, more = ("k", "z"), where(orders, integer("more"), 0)
            at = (integer("c"), K_AXIS, Z)
        else:
            shape, more, at = ("z",), integer("more"), (integer("c"), ZERO, Z)
        count.append(Compute("total", "i32", shape, integer("total") + more, declares=False))
        counting = For("n", (Span(ZERO, sympy.Integer(self.spec.top_k)),), tuple(count))
        return [
            Compute("total", "i32", shape, ZERO),
            For("v", (Span(ZERO, sympy.Integer(BLOCKS)),), (*block, counting)),
            Store("counts", at, integer("total"), shape),
        ]

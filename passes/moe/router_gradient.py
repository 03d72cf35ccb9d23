"""router_gradient: from the gradients of weights to those of logits, as one kernel.

    logits [T, E], chosen ids [T, top_k], dweights [T, top_k] -> dlogits [T, E] (, dgroup_logits [T, groups])

Where experts chose, gradients of scores are given, dscores [T, E]. Scores are computed anew; ids are those
before a table or a limit changed them. What has the id -1 passes no gradient on.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from ...ir.expr import ceildiv, integer, real, where
from ...ir.kernel import (
    Compute,
    For,
    GridDim,
    Kernel,
    Load,
    Program,
    Reduce,
    Scalar,
    Span,
    Stmt,
    Store,
    Tensor,
)
from .router import TINY
from .router_scores import (
    E_AXIS,
    INSIDE,
    NONE,
    TOKEN,
    ZERO,
    G,
    axis,
    logits_of,
    score_arguments,
    score_axes,
    scores_of,
    slopes_of,
)
from .router_spec import RouterSpec

K_AXIS = integer("k")


def compile_router_gradient(spec: RouterSpec, *, by_expert: bool = False) -> Program:
    """The program of the gradients of a router. Of cosines: those of the logits that they make."""
    spec = replace(spec, features=0, logits=spec.accumulator if spec.features else spec.logits)
    acc, by_token, k = spec.accumulator, ("T", spec.top_k), sympy.Integer(spec.top_k)
    ik, ie = ("i", "k"), ("i", "e")
    softmax_of_chosen = spec.scoring == "logits"
    here, there = (sympy.Eq(K_AXIS, integer(n)) for n in ("u", "n"))
    ids = [
        Reduce(f"id_{k}", "i32", ("i",), "sum", where(at, integer("A"), 0), ("k",))
        for k, at in ((0, here), (1, there))
    ]
    owners = [sympy.Eq(integer(id_.dst), E_AXIS) for id_ in ids]
    weight, slope = real("W"), real("DW")
    gather: tuple[Stmt, ...] = (
        ids[0],
        Reduce("score", acc, ("i",), "sum", where(owners[0], real("P"), NONE), ("e",)),
        Compute("W", acc, ik, where(here, real("score"), weight), declares=False),
    )
    scatter: tuple[Stmt, ...] = (
        ids[1],
        Reduce("slope", acc, ("i",), "sum", where(there, slope, NONE), ("k",)),
        Compute("DP", acc, ie, real("DP") + where(owners[1], real("slope"), NONE), declares=False),
    )
    from_weights: list[Stmt] = [
        Load("A", "i32", ik, "chosen", (TOKEN, K_AXIS), INSIDE, sympy.Integer(-1)),
        Load("DW", acc, ik, "dweights", (TOKEN, K_AXIS), INSIDE, NONE),
        Compute("DW", acc, ik, where(integer("A") >= 0, slope * real("scale"), NONE), declares=False),
        Compute("W", acc, ik, NONE),
        For("u", (Span(ZERO, k),), gather),
        *_behind_choice(spec, softmax_of_chosen),
        Compute("DP", acc, ie, NONE),
        For("n", (Span(ZERO, k),), scatter),
    ]
    slopes = Load("DP", acc, ie, "dscores", (TOKEN, E_AXIS), INSIDE, NONE)
    body: list[Stmt] = [
        Compute("token", "i32", ("i",), integer("c") * spec.rows + integer("i")),
        *logits_of(spec),
        *scores_of(spec),
        *([slopes] if by_expert else from_weights),
        *slopes_of(spec),
        Store("dlogits", (TOKEN, E_AXIS), real("DL"), ie, INSIDE),
    ]
    made = [Tensor("dlogits", spec.logits, ("T", spec.experts), "out", unit=1)]
    if spec.scoring == "levels":
        body.append(Store("dgroup_logits", (TOKEN, G), real("DL_g"), ("i", "g"), INSIDE))
        made.append(Tensor("dgroup_logits", spec.logits, ("T", spec.groups), "out", unit=1))
    given = [Tensor("chosen", "i32", by_token, unit=1), Tensor("dweights", acc, by_token, unit=1)]
    if by_expert:
        given = [Tensor("dscores", acc, ("T", spec.experts), unit=1)]
    scale = [] if by_expert else [Scalar("scale", acc)]
    args = (*score_arguments(spec), *given, *made, *scale)
    axes = (*score_axes(spec), *([] if by_expert else [axis(spec, "k", spec.top_k)]))
    grid = (GridDim("c", ceildiv(integer("T"), spec.rows)),)
    meta = (("stages", 1), ("warps", 4 if spec.experts <= 128 else 8))
    comment = (f"gradients of {spec.scoring} of {spec.experts} experts, {spec.top_k} a token",)
    return Program(
        (Kernel("router_gradient", args, grid, axes, None, tuple(body), meta, comment),), text=f"# {spec}"
    )


def _behind_choice(spec: RouterSpec, softmax_of_chosen: bool) -> list[Stmt]:
    """DW, the gradient of weights, to that of the chosen scores, which are in W."""
    acc, ik, weight, slope = spec.accumulator, ("i", "k"), real("W"), real("DW")
    if softmax_of_chosen:
        there = integer("A") >= 0
        out: list[Stmt] = [
            Reduce("most", acc, ("i",), "max", where(there, weight, -sympy.oo), ("k",)),
            Compute("W", acc, ik, where(there, sympy.exp(weight - real("most")), NONE), declares=False),
        ]
    elif spec.renormalize:
        out = []
    else:
        return []
    part = weight / (real("total") + TINY)
    shared = Reduce("shared_k", acc, ("i",), "sum", part * slope, ("k",))
    behind = slope - real("shared_k")
    behind = part * behind if softmax_of_chosen else behind / (real("total") + TINY)
    return [
        *out,
        Reduce("total", acc, ("i",), "sum", weight, ("k",)),
        shared,
        Compute("DW", acc, ik, where(integer("A") >= 0, behind, NONE), declares=False),
    ]

"""expert_choice: experts choose tokens, those with the largest scores; two kernels.

    logits [T, E], capacity -> tokens [E capacity], bounds [E + 1], place [T, E], scores [T, E]

Expert choice is due to Zhou et al. (arXiv:2202.09368). The first kernel computes scores; a program of the
second one takes an expert and finds the capacity-th largest score by its bits, four at a time from the
highest on: counts of each digit among the scores that agree so far, and their sums. Then tokens follow in
their own order; of equal scores the first ones are taken. Scores are compared as float32.

place is the row of a token with an expert, -1 where it was not chosen: the form that a combine reads.
"""

from __future__ import annotations

import sympy

from ...ir.expr import (
    Expr,
    all_of,
    any_of,
    bits_of_float,
    bitxor,
    ceildiv,
    integer,
    minimum,
    real,
    shr,
    where,
)
from ...ir.kernel import (
    Axis,
    Compute,
    For,
    GridDim,
    If,
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
from .router_scores import (
    E_AXIS,
    INSIDE,
    NONE,
    TOKEN,
    ZERO,
    logits_of,
    score_arguments,
    score_axes,
    scores_of,
)
from .router_spec import RouterSpec

BLOCK = 512  # scores that are looked at together
DIGIT = 4  # bits
BITS = 32
ROW, Z, B, U, V, EXPERT = map(integer, ("i", "z", "b", "u", "v", "expert"))
T, KEY, BASE, ABOVE, AT = map(integer, ("T", "key", "base", "above", "at"))
CAPACITY = minimum(integer("capacity"), T)


def compile_expert_choice(spec: RouterSpec) -> Program:
    """The program of a router whose experts choose."""
    by_expert = Tensor("by_expert", "f32", (spec.experts, "T"), unit=1)
    return Program((_scores(spec), _choose(spec)), (by_expert,), text=f"# expert choice, {spec}")


def _scores(spec: RouterSpec) -> Kernel:
    body = [
        Compute("token", "i32", ("i",), integer("c") * spec.rows + ROW),
        *logits_of(spec),
        *scores_of(spec),
        Store("scores", (TOKEN, E_AXIS), real("P"), ("i", "e"), INSIDE),
        Store("by_expert", (E_AXIS, TOKEN), real("P"), ("i", "e"), INSIDE),
    ]
    args = [
        *score_arguments(spec),
        Tensor("scores", spec.accumulator, ("T", spec.experts), "out", unit=1),
        Tensor("by_expert", "f32", (spec.experts, "T"), "out", unit=1),
    ]
    if spec.features:
        body.append(Store("scored", (TOKEN, E_AXIS), real("L"), ("i", "e"), INSIDE))
        args.append(Tensor("scored", spec.accumulator, ("T", spec.experts), "out", unit=1))
    grid = (GridDim("c", ceildiv(T, spec.rows)),)
    comment = (f"{spec.scoring} of {spec.experts} experts",)
    meta = (("stages", 1), ("warps", 4))
    return Kernel(
        "router_scores", tuple(args), grid, tuple(score_axes(spec)), None, tuple(body), meta, comment
    )


def _choose(spec: RouterSpec) -> Kernel:
    """Programs of an expert each. base: the bits of the threshold that are known, as a number whose next
    digit is to be added; above: scores that lie above all that agree with it."""
    matching = sympy.Eq(shr(KEY, integer("shift")), BASE + B)
    enough = all_of(
        [ABOVE + integer("higher") < CAPACITY, ABOVE + integer("higher") + integer("many") >= CAPACITY]
    )
    count = For(
        "v",
        (Span(ZERO, ceildiv(T, BLOCK)),),
        (
            *_keys(V),
            Reduce("some", "i32", ("b",), "sum", where(all_of([AT < T, matching]), 1, 0), ("z",)),
            Compute("many", "i32", ("b",), integer("many") + integer("some"), declares=False),
        ),
    )
    digit: tuple[Stmt, ...] = (
        Compute("shift", "i32", (), BITS - DIGIT - DIGIT * U),
        Compute("many", "i32", ("b",), ZERO),
        count,
        Scan("upto", "i32", ("b",), integer("many"), "b"),
        Reduce("sum_of", "i32", (), "sum", integer("many"), ("b",)),
        Compute("higher", "i32", ("b",), integer("sum_of") - integer("upto")),
        Reduce("digit", "i32", (), "sum", where(enough, B, 0), ("b",)),
        Reduce(
            "passed", "i32", (), "sum", where(sympy.Eq(B, integer("digit")), integer("higher"), 0), ("b",)
        ),
        Compute("above", "i32", (), ABOVE + integer("passed"), declares=False),
        Compute("threshold", "i32", (), BASE + integer("digit"), declares=False),
        Compute("base", "i32", (), integer("threshold") * 2**DIGIT, declares=False),
    )
    limit = integer("threshold")
    equal = all_of([AT < T, sympy.Eq(KEY, limit)])
    higher = all_of([AT < T, limit < KEY])
    # Of those that equal the threshold the first ones, as many as are wanted yet.
    chosen = any_of([higher, all_of([equal, integer("equals") + integer("earlier") <= CAPACITY - ABOVE])])
    row = EXPERT * CAPACITY + integer("before") + integer("rank") - 1
    taken = sympy.Symbol("taken")
    take = For(
        "w",
        (Span(ZERO, ceildiv(T, BLOCK)),),
        (
            *_keys(integer("w")),
            Scan("equals", "i32", ("z",), where(equal, 1, 0), "z"),
            Compute("taken", "bool", ("z",), chosen),
            Scan("rank", "i32", ("z",), where(taken, 1, 0), "z"),
            Compute("row", "i32", ("z",), row),
            Store("tokens", (integer("row"),), AT, ("z",), taken),
            Store("place", (AT, EXPERT), where(taken, integer("row"), -1), ("z",), AT < T),
            Reduce("some_equal", "i32", (), "sum", where(equal, 1, 0), ("z",)),
            Reduce("some_taken", "i32", (), "sum", where(taken, 1, 0), ("z",)),
            Compute("earlier", "i32", (), integer("earlier") + integer("some_equal"), declares=False),
            Compute("before", "i32", (), integer("before") + integer("some_taken"), declares=False),
        ),
    )
    body: tuple[Stmt, ...] = (
        Compute("base", "i32", (), sympy.Integer(-(2 ** (DIGIT - 1)))),
        Compute("threshold", "i32", (), ZERO),
        Compute("above", "i32", (), ZERO),
        For("u", (Span(ZERO, sympy.Integer(BITS // DIGIT)),), digit),
        Compute("earlier", "i32", (), ZERO),
        Compute("before", "i32", (), ZERO),
        take,
        Store("bounds", (EXPERT + 1,), (EXPERT + 1) * CAPACITY, ()),
        If(sympy.Eq(EXPERT, 0), (Store("bounds", (ZERO,), ZERO, ()),)),
    )
    args = (
        Tensor("by_expert", "f32", (spec.experts, "T"), unit=1),
        Tensor("tokens", "i32", ("rows",), "out", unit=0),
        Tensor("bounds", "i32", (spec.experts + 1,), "out", unit=0),
        Tensor("place", "i32", ("T", spec.experts), "out", unit=1),
        Scalar("capacity", "i64"),
    )
    axes = (Axis("z", BLOCK, BLOCK), Axis("b", 2**DIGIT, 2**DIGIT))
    grid = (GridDim("expert", sympy.Integer(spec.experts)),)
    meta = (("stages", 1), ("warps", 4))
    return Kernel("router_choose", args, grid, axes, None, body, meta, ("tokens that experts choose",))


def _keys(block: sympy.Symbol) -> list[Stmt]:
    """key [z]: integers in the order of the scores of a block."""
    bits = integer("bits")
    flipped: Expr = bitxor(bits, sympy.Integer(2**31 - 1))
    return [
        Compute("at", "i32", ("z",), block * BLOCK + Z),
        Load("score", "f32", ("z",), "by_expert", (EXPERT, AT), AT < T, NONE),
        Compute("bits", "i32", ("z",), bits_of_float(real("score"))),
        Compute("key", "i32", ("z",), where(bits < 0, flipped, bits)),
    ]

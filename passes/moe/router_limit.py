"""router_limit: experts take a number of tokens at most; the second kernel of a router.

The first kernel has counted the rows of each expert in each chunk of tokens. A program of this one adds up
what comes before its chunk, ranks its own rows by prefix sums, and drops those whose rank is too large. No
program waits for another, and the order is always the same: 'token' is that of tokens (Switch,
arXiv:2101.03961); 'choice' has all first choices before all second ones (GShard, arXiv:2006.16668).
"""

from __future__ import annotations

import sympy

from ...ir.expr import all_of, ceildiv, integer, where
from ...ir.kernel import (
    Axis,
    Compute,
    For,
    GridDim,
    Kernel,
    Load,
    Reduce,
    Scalar,
    Scan,
    Span,
    Stmt,
    Store,
    Tensor,
)
from .router_scores import axis
from .router_spec import RouterSpec

BLOCKS = 4  # of a router's rows, in a chunk
COUNTS = 16  # chunks whose counts are added up at once
ZERO = sympy.Integer(0)
TOKEN, ROW, C, U, V, W, Z, B = map(integer, ("token", "i", "c", "u", "v", "w", "z", "b"))


def counts_tensor(spec: RouterSpec) -> Tensor:
    """counts [chunks, 1 or top_k, experts], the rows of each expert in each chunk (, by choice)."""
    choices = spec.top_k if spec.limited == "choice" else 1
    return Tensor("counts", "i32", (ceildiv(integer("T"), BLOCKS * spec.rows), choices, spec.counted), unit=2)


def limit_kernel(spec: RouterSpec, source: str) -> Kernel:
    """source [T, top_k], counts, capacity -> ids [T, top_k]: -1 for what comes too late."""
    by_choice, top_k = spec.limited == "choice", sympy.Integer(spec.top_k)
    id_, base = integer("id"), integer("base")

    def choices(*body: Stmt, var: str = "u") -> For:
        return For(var, (Span(ZERO, top_k),), body)

    def blocks(*body: Stmt) -> For:
        token = Compute("token", "i32", ("i",), (C * BLOCKS + V) * spec.rows + ROW)
        return For("v", (Span(ZERO, sympy.Integer(BLOCKS)),), (token, *body))

    def load(choice: sympy.Symbol) -> Load:
        return Load("id", "i32", ("i",), source, (TOKEN, choice), integer("T") > TOKEN, sympy.Integer(-1))

    def store(choice: sympy.Symbol) -> Store:
        return Store("ids", (TOKEN, choice), kept, ("i",), integer("T") > TOKEN)

    mine = sympy.Eq(id_, Z)
    kept = where(all_of([id_ >= 0, integer("rank") < integer("capacity")]), id_, -1)
    rank = Reduce("rank", "i32", ("i",), "sum", where(mine, integer("at"), 0), ("z",))
    if by_choice:
        body: list[Stmt] = [
            Compute("upto", "i32", ("z",), ZERO),
            choices(
                *_sums(U),
                Compute("base", "i32", ("z",), integer("upto") + integer("before")),
                _add("upto", "all_of_it"),
                blocks(
                    load(U),
                    Scan("at", "i32", ("i", "z"), where(mine, 1, 0), "i"),
                    Compute("at", "i32", ("i", "z"), integer("at") - 1 + base, declares=False),
                    rank,
                    store(U),
                    Reduce("more", "i32", ("z",), "sum", where(mine, 1, 0), ("i",)),
                    _add("base", "more"),
                ),
            ),
        ]
    else:
        body = [
            *_sums(ZERO),
            Compute("base", "i32", ("z",), integer("before")),
            blocks(
                Compute("member", "i32", ("i", "z"), ZERO),
                choices(
                    load(U),
                    Compute(
                        "member", "i32", ("i", "z"), integer("member") + where(mine, 1, 0), declares=False
                    ),
                ),
                Scan("at", "i32", ("i", "z"), integer("member"), "i"),
                Compute("at", "i32", ("i", "z"), integer("at") - integer("member") + base, declares=False),
                choices(
                    load(integer("n")),
                    rank,
                    store(integer("n")),
                    Compute("at", "i32", ("i", "z"), integer("at") + where(mine, 1, 0), declares=False),
                    var="n",
                ),
                Reduce("more", "i32", ("z",), "sum", integer("member"), ("i",)),
                _add("base", "more"),
            ),
        ]
    by_token = ("T", spec.top_k)
    args = (
        Tensor(source, "i32", by_token, unit=1),
        Tensor("counts", "i32", ("chunks", *counts_tensor(spec).shape[1:]), unit=2),
        Tensor("ids", "i32", by_token, "out", unit=1),
        Scalar("capacity", "i64"),
    )
    axes = (axis(spec, "i", spec.rows), axis(spec, "z", spec.counted), Axis("b", COUNTS, COUNTS))
    grid = (GridDim("c", ceildiv(integer("T"), BLOCKS * spec.rows)),)
    meta = (("stages", 1), ("warps", 4 if spec.counted <= 128 else 8))
    comment = (f"the first rows of {spec.counted} experts, {spec.top_k} a token",)
    return Kernel("router_limit", args, grid, axes, None, tuple(body), meta, comment)


def _sums(choice: sympy.Expr) -> list[Stmt]:
    """all_of_it [z]: rows of each expert in all chunks; before: in those before this one."""
    chunk = COUNTS * W + B
    earlier = where(chunk < C, integer("part"), 0)
    add: tuple[Stmt, ...] = (
        Load("part", "i32", ("b", "z"), "counts", (chunk, choice, Z), chunk < integer("chunks"), ZERO),
        Reduce("some", "i32", ("z",), "sum", integer("part"), ("b",)),
        Reduce("earlier", "i32", ("z",), "sum", earlier, ("b",)),
        _add("all_of_it", "some"),
        _add("before", "earlier"),
    )
    return [
        Compute("all_of_it", "i32", ("z",), ZERO),
        Compute("before", "i32", ("z",), ZERO),
        For("w", (Span(ZERO, ceildiv(integer("chunks"), COUNTS)),), add),
    ]


def _add(name: str, value: str) -> Compute:
    return Compute(name, "i32", ("z",), integer(name) + integer(value), declares=False)

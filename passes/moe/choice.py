"""choice: matrices that rows choose, one after another, for the rows of a tile.

Before::  %y = grouped_gemm %h, %w, %bounds, .. %tokens, %choice {chooses = ..}
After::   for each different choice of the tile's rows { a product with its matrix, of the rows that took it }

Rows stay in the order of their group: a tile of one expert may hold rows of several adapters, mostly of few,
as rows keep the order of tokens and those of a request follow each other. A tile multiplies by as many
matrices as its rows have different choices: nothing is sorted anew, and nothing else is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy

from ...ir.expr import Expr, all_of, cast, integer, maximum, minimum, real, where
from ...ir.graph import Graph, Op
from ...ir.kernel import Compute, For, If, Let, Load, Reduce, Span, Stmt, Tensor
from .tiles import Part

ZERO, NOBODY, BEHIND = sympy.Integer(0), sympy.Integer(-1), sympy.Integer(2**31 - 1)
ADAPTER, CHOSEN = integer("adapter"), integer("chosen")
ROW0, LAST = integer("row0"), integer("last")
MINE = sympy.Eq(CHOSEN, ADAPTER)


@dataclass(frozen=True)
class Choice:
    """Who chooses: an operand [T] of ids, those outside of 0 .. adapters - 1 for nothing."""

    ids: str
    dtype: str

    def tensor(self) -> Tensor:
        return Tensor(self.ids, self.dtype, ("T",), unit=0)

    def of(self, token: Expr, axes: tuple[str, ...], mark: str = "") -> list[Stmt]:
        """The tile `chosen` of tokens: the number of a matrix, -1 for none."""
        name = integer(f"asked{mark}")
        there = all_of([name >= 0, integer("adapters") > name])
        narrow = cast(sympy.Symbol("i32"), name) if self.dtype == "i64" else name
        return [
            Load(str(name), self.dtype, axes, self.ids, (token,)),
            Compute(f"chosen{mark}", "i32", axes, where(there, narrow, NOBODY)),
        ]

    def of_rows(self, *, known: bool) -> list[Stmt]:
        """`chosen` [i] of the rows of a tile, and `turns`, no fewer than there are different ones: one more
        than it changes from a row to the next. known: the tokens of these rows are."""
        out: list[Stmt] = [] if known else [Load("token", "i32", ("i",), "tokens", (integer("row"),))]
        out += self.of(integer("token"), ("i",))
        for mark, behind in (("s", 0), ("b", 1)):  # another axis: along rows, a CPU sums nothing
            row = minimum(ROW0 + maximum(integer("s") - behind, ZERO), LAST - 1)
            out.append(Load(f"token_{mark}", "i32", ("s",), "tokens", (row,)))
            out += self.of(integer(f"token_{mark}"), ("s",), f"_{mark}")
        changes = where(sympy.Ne(integer("chosen_s"), integer("chosen_b")), 1, 0)
        counted = Reduce("changes", "i32", (), "sum", changes, ("s",))
        return [*out, counted, Let("turns", integer("changes") + 1)]

    def sum(self, parts: list[Part], acc: str, products: Callable[[list[Part]], list[Stmt]]) -> list[Stmt]:
        """The sums of parts, which are there, where every row takes those by the matrix of its choice."""
        mine = [replace(part, acc=f"P{part.number}") for part in parts]
        taken: list[Stmt] = [
            Compute(p.acc, acc, ("i", "n"), where(MINE, real(q.acc), real(p.acc)), declares=False)
            for p, q in zip(parts, mine, strict=True)
        ]
        return self.each([*products(mine), *taken])

    def each(self, work: list[Stmt]) -> list[Stmt]:
        """The work of each choice of the tile's rows, `adapter`, in ascending order."""
        one, upto = integer("chosen_s"), integer("upto")
        later = where(one > upto, one, BEHIND)
        body: tuple[Stmt, ...] = (
            Reduce("following", "i32", (), "min", later, ("s",)),
            Let("adapter", integer("following")),
            Compute("upto", "i32", (), integer("following"), declares=False),
            If(ADAPTER < BEHIND, tuple(work)),
        )
        return [Compute("upto", "i32", (), NOBODY), For("v", (Span(ZERO, integer("turns")),), body)]


def choice_of(graph: Graph, op: Op) -> Choice | None:
    """How the rows of an operation choose; None where they do not. Its last operand says so."""
    if not op.attr("chooses"):
        return None
    ids = graph.values[op.inputs[-1]]
    return Choice(ids.name, ids.dtype)

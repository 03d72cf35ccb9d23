"""kernels: what rows get, linear_values and linear_features, to kernels.

Before::  %o, %den = linear_values %q, %k, %v {chunks, order = 'forward', x_map, f_map, eps, ...}
After::   kernel @linear_o grid(h, b) { the state; for each chunk: rows x, f, g; x by the state, and by the
          rows of the chunk before each; store; the state with what the chunk gives }

Leaves alone: nothing; an operation without chunks is an error.
"""

from __future__ import annotations

import sympy

from ...ir.expr import Expr, ceildiv, floormod, integer, real, where
from ...ir.graph import Graph, Op, Value
from ...ir.kernel import Compute, For, GridDim, If, Kernel, Let, Reduce, Span, Stmt, Store
from .spec import LinearSpec
from .states import initial, state_names
from .tiles import (
    GROUP,
    N0,
    NONE,
    SEGMENTS,
    ZERO,
    B,
    E,
    H,
    M,
    S,
    Tiles,
    is_normalised,
    rows_gradient,
)

CHUNK, ROW, COL, GIVER = map(integer, ("chunk", "row", "col", "giver"))


def linear_kernel(graph: Graph, op: Op, spec: LinearSpec, final: tuple[str, ...]) -> Kernel:
    """The kernel of one linear_values or linear_features. final: the results that this kernel stores."""
    made = _Values if op.kind == "linear_values" else _Features
    return made(graph, op, spec).kernel_of(final)


class _Rows(Tiles):
    """A kernel over chunks of rows i."""

    along = ""

    def kernel_of(self, final: tuple[str, ...]) -> Kernel:
        source, split = self.source, self.chunks.split
        width, extent = self.chunks.width, self.extent()
        tiles = -(-extent // width)
        if tiles > 1:
            self.tiled(N0 * width)
        rows = self.rows_value()
        setup, head, several = self.heads(str(rows.shape[1]))
        length = integer(str(rows.shape[2]))
        self.head, self.several = head, several
        dims = [GridDim("n0", sympy.Integer(tiles))] if tiles > 1 else []
        if split:
            before, sums = state_names(self)
            self.states(before, (SEGMENTS, source.features, self.v_size))
            if sums is not None:
                self.states(sums, (SEGMENTS, source.features))
            begin = self.begin(before, sums, (head, S))
            walked = self.chunks_of(S)
            dims.append(GridDim("s", self.segments()))
        else:
            begin = self.begin(*initial(self), (head,))
            walked = Span(ZERO, ceildiv(length, self.rows))
        u = integer("u")
        chunk = u if source.order == "forward" else walked.lo + walked.hi - 1 - u
        step = [Let("chunk", chunk), *self.take(), *self.exchange(), *self.store()]
        body = [*setup, *begin, For("u", (walked,), tuple(step))]
        if final and not split:
            for n, name in enumerate(final):
                self.states(name, (source.features, self.v_size)[: 2 - n], "out")
            keep = self.keep(final[0], final[1] if len(final) > 1 else None, (head,))
            # Query heads that share a key head end with one state.
            shared = self.spec.grouped and not several and head != H
            body += [If(sympy.Eq(floormod(H, GROUP), 0), tuple(keep))] if shared else keep
        dims += [GridDim("h", integer(str(rows.shape[1]))), GridDim("b", integer("B"))]
        axes = [self.axis("i", self.rows), self.axis("j", self.rows)]
        axes += [
            self.axis(n, min(width, extent) if n == self.along else size)
            for n, size in (("m", self.size), ("e", self.v_size))
        ]
        return self.kernel(f"linear_{self.op.output.name}", dims, axes, body)

    def exchange(self) -> list[Stmt]:
        """What rows of a chunk give each other, and the state behind the chunk."""
        head = self.head
        weights, narrow = self.as_operand("P", ("i", "j"))
        allowed = COL <= ROW if self.source.order == "forward" else COL >= ROW
        inner: list[Stmt] = [
            *self.give(GIVER, COL),
            *self.weigh(),
            self.set("P", ("i", "j"), where(allowed, real("P"), NONE)),
            *weights,
            *self.receive(narrow),
            *self.add(),
        ]
        return [self.row("j", CHUNK, "col"), *self.members(self.several, head, inner)]

    def take(self) -> list[Stmt]:
        raise NotImplementedError

    def weigh(self) -> list[Stmt]:
        raise NotImplementedError

    def receive(self, weights: str) -> list[Stmt]:
        raise NotImplementedError

    def store(self) -> list[Stmt]:
        raise NotImplementedError

    def extent(self) -> int:
        raise NotImplementedError

    def tiled(self, start: Expr) -> None:
        raise NotImplementedError

    def rows_value(self) -> Value:
        raise NotImplementedError

    def operands_of_state(self) -> tuple[list[Stmt], list[str]]:
        """The parts of the state as products take them."""
        out: list[Stmt] = []
        names = []
        for p in self.parts:
            more, name = self.as_operand(f"S{p}", ("m", "e"))
            out += more
            names.append(name)
        return out, names


class _Values(_Rows):
    lanes = along = "e"

    def extent(self) -> int:
        return self.v_size

    def tiled(self, start: Expr) -> None:
        self.e = start + E

    def rows_value(self) -> Value:
        return self.graph.values[self.at["x"]]

    def take(self) -> list[Stmt]:
        value = self.rows_value()
        states, names = self.operands_of_state()
        pairs = [(f"X{p}", names[p]) for p in self.parts]
        out = [
            self.row("i", CHUNK, "row"),
            *self.featured("X", value, self.op.attr("x_map"), H, "i", ROW),
            *states,
            *self.products("O", ("i", "e"), pairs, "m"),
        ]
        if self.source.sums:
            for p in self.parts:
                summed = real(f"X{p}") * real(f"Z{p}")
                out.append(Reduce(f"den{p}", self.acc, ("i",), "sum", summed, ("m",)))
            whole = sympy.Add(*(real(f"den{p}") for p in self.parts))
            out.append(Compute("D", self.acc, ("i",), whole))
        return out

    def weigh(self) -> list[Stmt]:
        return self.products("P", ("i", "j"), [(f"X{p}", f"F{p}") for p in self.parts], "m")

    def receive(self, weights: str) -> list[Stmt]:
        out = self.product("O", ("i", "e"), weights, "G", "j", adds=True)
        if self.source.sums:
            given = real("P") * self.column
            out += [
                Reduce("D_more", self.acc, ("i",), "sum", given, ("j",)),
                self.set("D", ("i",), real("D") + real("D_more")),
            ]
        return out

    def store(self) -> list[Stmt]:
        made = self.op.outputs[0]
        result = real("O")
        if is_normalised(self.op):
            result = result / (real("D") + sympy.Float(self.op.attr("eps")))
        inside = integer(str(made.shape[2])) > ROW
        self.tensor(made, "out")
        within = sympy.And(inside, self.inside("e"))
        out: list[Stmt] = [
            Compute("R", self.acc, ("i", "e"), result),
            Store(made.name, (B, H, ROW, self.e), real("R"), ("i", "e"), within),
        ]
        if self.op.attr("keeps"):
            den = self.op.outputs[1]
            self.tensor(den, "out")
            store = Store(den.name, (B, H, ROW), real("D"), ("i",), inside)
            out.append(store if self.e == E else If(sympy.Eq(N0, 0), (store,)))
        return out


class _Features(_Rows):
    lanes = along = "m"

    def extent(self) -> int:
        return self.size

    def tiled(self, start: Expr) -> None:
        self.m = start + M

    def rows_value(self) -> Value:
        return self.graph.values[self.at["y"]]

    @property
    def given(self) -> Expr:
        return real("r") if "r" in self.at else sympy.Integer(1)

    def take(self) -> list[Stmt]:
        value = self.rows_value()
        over = self.at.get("over") if self.op.attr("divides") == "y" else None
        out = [self.row("i", CHUNK, "row"), *self.divided("X", value, over, H, "i", ROW)]
        if self.source.sums and "r" in self.at:
            out.append(self.numbers("r", self.at["r"], H, "i", ROW))
        states, names = self.operands_of_state()
        out += states
        for p in self.parts:
            out += self.product(f"D{p}", ("i", "m"), "X", names[p], "e", adds=False)
            if self.source.sums:
                out.append(self.set(f"D{p}", ("i", "m"), real(f"D{p}") + self.given * real(f"Z{p}")))
        return out

    def weigh(self) -> list[Stmt]:
        out = self.product("P", ("i", "j"), "X", "G", "e", adds=False)
        if self.source.sums:
            out.append(self.set("P", ("i", "j"), real("P") + self.given * self.column))
        return out

    def receive(self, weights: str) -> list[Stmt]:
        return [
            s for p in self.parts for s in self.product(f"D{p}", ("i", "m"), weights, f"F{p}", "j", adds=True)
        ]

    def store(self) -> list[Stmt]:
        made = self.op.outputs[0]
        inside = sympy.And(integer(str(made.shape[2])) > ROW, self.inside("m"))
        self.tensor(made, "out")
        if "of" not in self.at:
            return [
                Store(made.name, (B, H, ROW, self.place(p)), real(f"D{p}"), ("i", "m"), inside)
                for p in self.parts
            ]
        of = self.graph.values[self.at["of"]]
        return [
            self.load("of_rows", of, H, "i", ROW, "m", self.acc),
            *rows_gradient(self, self.op.attr("out_map"), "of_rows"),
            Store(made.name, (B, H, ROW, self.m), real("R"), ("i", "m"), inside),
        ]

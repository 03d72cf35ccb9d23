"""reads: rows that read a state which is known beforehand, to kernels.

Before::  %dq, %ds, %dz = read_gradients %q, %do, %s, %z {chunks, x_map, eps}
After::   kernel @linear_dq grid(h, s, b) { the state; for each chunk of a segment: rows x and y; the gradient
          of x stored; what they give to the state's, which is stored last }, and one that adds up segments

Programs walk over the chunks of a segment: the state is loaded once for all of them. Programs of neighbouring
heads, whose rows may lie side by side in memory, run at the same time.

Leaves alone: nothing; an operation without chunks is an error.
"""

from __future__ import annotations

import sympy

from ...ir.expr import Expr, floordiv, integer, real, where
from ...ir.graph import Graph, Op, Value
from ...ir.kernel import Axis, Compute, For, GridDim, If, Kernel, Let, Reduce, Stmt, Store, Tensor
from .spec import LinearSpec
from .states import total_kernel
from .tiles import GROUP, N0, NONE, SEGMENTS, B, E, H, M, S, Source, Tiles, map_of, rows_gradient

READS = ("read_values", "read_features", "read_gradients", "give_gradients")
ROW, CHUNK = integer("row"), integer("u")
# By kind: the operands whose features the rows have, and whose values.
FEATURES = {
    "read_values": ("x", "x_map"),
    "read_features": ("of", "out_map"),
    "read_gradients": ("x", "x_map"),
}
VALUES = {"read_features": "y", "read_gradients": "y", "give_gradients": "g"}


def read_kernels(graph: Graph, op: Op, spec: LinearSpec) -> tuple[list[Kernel], list[Tensor]]:
    """The kernels of an operation of READS, and the tensors that these leave to one another."""
    rows = _Reads(graph, op, spec, _source(graph, op))
    kernel = rows.kernel_of()
    if op.kind != "read_gradients":
        return [kernel], []
    names = (op.outputs[1].name, op.outputs[2].name if rows.source.sums else None)
    begin = rows.at.get("begin"), rows.at.get("begin_sums")
    total = Tiles(graph, op, spec, _source(graph, op, *begin))
    more, between = total_kernel(total, names, rows.parts_names, "Hq")
    return [kernel, more], between


def _source(graph: Graph, op: Op, state: str | None = None, totals: str | None = None) -> Source:
    at = dict(zip(op.attr("operands"), op.inputs, strict=True))
    role, by = FEATURES.get(op.kind, ("f", "f_map"))
    f = graph.values[at[role]] if role in at else op.output
    g = graph.values[at[VALUES[op.kind]]] if op.kind in VALUES else op.output
    eps = float(op.attr("eps") or 0.0)
    return Source(f, g, map_of(op, by), None, at.get("over"), eps, "sums" in at, state, totals)


class _Reads(Tiles):
    """A kernel over chunks of rows, features X0, .. and values Y, that reads a state S0, .. (and Z0, ..)."""

    @property
    def parts_names(self) -> tuple[str, str | None]:
        name = f"parts_{self.op.outputs[1].name}"
        return name, f"{name}_sums" if self.source.sums else None

    def kernel_of(self) -> Kernel:
        op, source = self.op, self.source
        by_features = op.kind == "read_features"
        self.lanes = "e" if op.kind in ("read_values", "give_gradients") else "m"
        width, extent = self.chunks.width, self.size if by_features else self.v_size
        tiles = -(-extent // width)
        if tiles > 1:
            self.m, self.e = (N0 * width + M, E) if by_features else (M, N0 * width + E)
        heads = str((source.g if op.kind in VALUES else source.f).shape[1])
        setup: list[Stmt] = []
        head: Expr = H
        if self.spec.grouped and heads == "Hq":
            setup, head = [Let("group", floordiv(integer("Hq"), integer("Hk")))], floordiv(H, GROUP)
        self.states(self.at["state"], (source.features, self.v_size))
        sums = self.at.get("sums")
        if sums is not None:
            self.states(sums, (source.features,))
        narrow, names = [], []
        for p in self.parts:
            more, name = self.as_operand(f"S{p}", ("m", "e"))
            narrow += more
            names.append(name)
        make = {
            "read_values": self.values, "read_features": self.features,
            "read_gradients": self.gradients, "give_gradients": self.givers,
        }  # fmt: skip
        before, step, after = make[op.kind](names)
        body = [
            *setup,
            *self.begin(self.at["state"], sums, (head,)),
            *narrow,
            *before,
            For("u", (self.chunks_of(S),), (self.row("i", CHUNK, "row"), *step)),
            *after,
        ]
        dims = [GridDim("n0", sympy.Integer(tiles))] if tiles > 1 else []
        dims += [GridDim("h", integer(heads)), GridDim("s", self.segments()), GridDim("b", integer("B"))]
        axes: list[Axis] = [self.axis("i", self.rows)]
        axes.append(self.axis("m", min(width, self.size) if by_features else self.size))
        axes.append(self.axis("e", self.v_size if by_features else min(width, self.v_size)))
        return self.kernel(f"linear_{op.output.name}", dims, axes, body)

    # what rows are ----------------------------------------------------------------------------------

    def rows_of(self, value: Value, by: str) -> list[Stmt]:
        """Tiles X0, .. of features, and X_rows of what they are made of."""
        return self.featured("X", value, map_of(self.op, by), H, "i", ROW)

    def read(self, names: list[str]) -> list[Stmt]:
        """O: what the state gives to features X0, .."""
        return self.products("O", ("i", "e"), [(f"X{p}", names[p]) for p in self.parts], "m")

    def returned(self, names: list[str]) -> list[Stmt]:
        """D0, ..: what the state gives to values Y."""
        out: list[Stmt] = []
        for p in self.parts:
            out += self.product(f"D{p}", ("i", "m"), "Y", names[p], "e", adds=False)
        return out

    def plus(self, times: Expr) -> list[Stmt]:
        """D0, .. with the sums, times a number of each row."""
        return [self.set(f"D{p}", ("i", "m"), real(f"D{p}") + times * real(f"Z{p}")) for p in self.parts]

    def summed(self, dst: str, other: str) -> list[Stmt]:
        """The products of features and tiles other0, .., summed over all features."""
        out: list[Stmt] = []
        for p in self.parts:
            value = real(f"X{p}") * real(f"{other}{p}")
            out.append(Reduce(f"{dst}{p}", self.acc, ("i",), "sum", value, ("m",)))
        total = sympy.Add(*(real(f"{dst}{p}") for p in self.parts))
        return [*out, Compute(dst, self.acc, ("i",), total)]

    def inside_rows(self, value: Value) -> Expr:
        found: Expr = integer(str(value.shape[2])) > ROW
        return found

    def put(self, value: Value, result: Expr, along: str) -> Store:
        """A tile of results over rows and m or e."""
        at = self.m if along == "m" else self.e
        self.tensor(value, "out")
        inside = sympy.And(self.inside_rows(value), self.inside(along))
        return Store(value.name, (B, H, ROW, at), result, ("i", along), inside)

    def back(self, value: Value, by: str, raw: str) -> list[Stmt]:
        """The gradient of rows `raw` from D0, .., stored."""
        made = map_of(self.op, by)
        if made is None:
            return [self.put(value, real("D0"), "m")]
        return [*rows_gradient(self, made, raw), self.put(value, real("R"), "m")]

    # kinds ------------------------------------------------------------------------------------------

    def values(self, names: list[str]) -> tuple[list[Stmt], list[Stmt], list[Stmt]]:
        made = self.op.outputs[0]
        step = [*self.rows_of(self.source.f, "x_map"), *self.read(names)]
        result: Expr = real("O")
        if self.source.sums:
            step += self.summed("D", "Z")
            if self.op.attr("eps") is not None:
                result = result / (real("D") + sympy.Float(self.op.attr("eps")))
        step += [Compute("R", self.acc, ("i", "e"), result), self.put(made, real("R"), "e")]
        if self.op.attr("keeps"):
            den = self.op.outputs[1]
            self.tensor(den, "out")
            store = Store(den.name, (B, H, ROW), real("D"), ("i",), self.inside_rows(den))
            step.append(store if self.e == E else If(sympy.Eq(N0, 0), (store,)))
        return [], step, []

    def features(self, names: list[str]) -> tuple[list[Stmt], list[Stmt], list[Stmt]]:
        made = self.op.output
        step = self.divided("Y", self.source.g, self.source.over, H, "i", ROW)
        step += self.returned(names)
        if self.source.sums:
            if "r" in self.at:
                step.append(self.numbers("r", self.at["r"], H, "i", ROW))
            step += self.plus(real("r") if "r" in self.at else sympy.Integer(1))
        if "of" not in self.at:
            return [], [*step, self.put(made, real("D0"), "m")], []
        if map_of(self.op, "out_map") is not None:
            step.append(self.load("X_rows", self.source.f, H, "i", ROW, "m", self.acc))
        return [], [*step, *self.back(made, "out_map", "X_rows")], []

    def gradients(self, names: list[str]) -> tuple[list[Stmt], list[Stmt], list[Stmt]]:
        eps, source = self.op.attr("eps"), self.source
        step = self.featured("X", source.f, map_of(self.op, "x_map"), H, "i", ROW, dtype=self.acc)
        step.append(self.load("Y", source.g, H, "i", ROW, "e", self.operand))
        step += self.returned(names)
        given = [real(f"X{p}") for p in self.parts]
        if eps is not None:
            inverse = where(self.inside_rows(source.f), 1 / (real("den") + sympy.Float(eps)), NONE)
            step += [
                *self.summed("den", "Z"),
                Compute("inverse", self.acc, ("i",), inverse),
                *self.summed("back", "D"),
                Compute("r", self.acc, ("i",), -real("back") * real("inverse") * real("inverse")),
                *(self.set(f"D{p}", ("i", "m"), real(f"D{p}") * real("inverse")) for p in self.parts),
                *self.plus(real("r")),
            ]
            given = [x * real("inverse") for x in given]  # for y / den: x can be divided as well
        for p in self.parts:
            step.append(Compute(f"W{p}", self.operand, ("i", "m"), given[p]))
            step += self.product(f"T{p}", ("m", "e"), f"W{p}", "Y", "i", adds=True)
            if source.sums:
                gift = real(f"X{p}") * real("r")
                step += [
                    Reduce(f"U{p}_more", self.acc, ("m",), "sum", gift, ("i",)),
                    self.set(f"U{p}", ("m",), real(f"U{p}") + real(f"U{p}_more")),
                ]
        step += self.back(self.op.outputs[0], "x_map", "X_rows")
        before: list[Stmt] = []
        after: list[Stmt] = []
        state, sums = self.parts_names
        self.states(state, (SEGMENTS, source.features, self.v_size), "out", "Hq")
        if sums is not None:
            self.states(sums, (SEGMENTS, source.features), "out", "Hq")
        for p in self.parts:
            place = (B, H, S, self.place(p))
            before.append(Compute(f"T{p}", self.acc, ("m", "e"), NONE))
            after.append(Store(state, (*place, self.e), real(f"T{p}"), ("m", "e"), self.inside("m", "e")))
            if sums is not None:
                before.append(Compute(f"U{p}", self.acc, ("m",), NONE))
                after.append(Store(sums, place, real(f"U{p}"), ("m",), self.inside("m")))
        return before, step, after

    def givers(self, names: list[str]) -> tuple[list[Stmt], list[Stmt], list[Stmt]]:
        df, dg = self.op.outputs
        step = [
            *self.rows_of(self.source.f, "f_map"),
            self.load("Y", self.source.g, H, "i", ROW, "e", self.operand),
            *self.read(names),
            self.put(dg, real("O"), "e"),
            *self.returned(names),
            *(self.plus(sympy.Integer(1)) if self.source.sums else []),
            *self.back(df, "f_map", "X_rows"),
        ]
        return [], step, []

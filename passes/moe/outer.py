"""outer: gradients of matrices, and of the map between the two products, to kernels.

Before::  %dw = grouped_outer %dg, %x, %bounds, %tokens {gathers = 'b'}
After::   kernel @experts_dw grid(n0, m0, e) { for each block of the group's rows: a dot over them; store }

Before::  %dg, %hw, %dw = map_grad_rows %g, %du, %weights, %bounds {expr, halves}
After::   kernel @experts_dg grid(c) { for each block of columns: slopes, and the sum of h * du of every row }

Leaves alone: nothing; other operations are lowered elsewhere.
"""

from __future__ import annotations

import sympy

from ...ir.derivative import derivative
from ...ir.expr import Expr, all_of, boolean, ceildiv, floordiv, integer, maximum, minimum, read, real
from ...ir.graph import Graph, Op
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
    Span,
    Stmt,
    Store,
    Tensor,
)
from ...ir.rename import apart
from ..devices import device_of, has_copy_engine
from .choice import ADAPTER, MINE, choice_of
from .spec import BYTES, ExpertsSpec

ZERO, NONE = sympy.Integer(0), sympy.Float(0.0)
M, N, R, I = map(integer, ("m", "n", "r", "i"))  # noqa: E741
ENTRIES, ROW, FIRST, LAST, FULL, U = map(integer, ("entries", "row", "first", "last", "full", "u"))
# (rows of the matrix, its columns, rows of a group at once, warps, stages). Rows that are gathered have the
# shorter side: their addresses take instructions, boxes of the others none.
CPU, GPU, GPU_WIDE = (32, 64, 32, 1, 1), (128, 128, 32, 8, 3), (64, 64, 16, 4, 2)
GPU_GROUPS = (128, 256, 64, 8, 3)  # products of warp groups


def outer_kernel(graph: Graph, op: Op, spec: ExpertsSpec) -> Kernel:
    """The kernel of one grouped_outer."""
    a, b, bounds = (graph.values[name] for name in op.inputs[:3])
    gathers, out = op.attr("gathers"), op.output
    experts, rows, cols = map(int, out.shape[-3:])
    choice = choice_of(graph, op)
    cpu, acc = spec.is_cpu, spec.accumulator
    tile_m, tile_n, step, warps, stages = _sizes(spec)
    if gathers == "b" and not cpu:
        tile_m, tile_n = tile_n, tile_m
    axes = [_axis("m", min(tile_m, rows), cpu), _axis("n", min(tile_n, cols), cpu), _axis("r", step, cpu)]
    tile_m, tile_n = axes[0].extent, axes[1].extent
    row_at, col_at = integer("m0") * tile_m + M, integer("n0") * tile_n + N
    operand = acc if cpu else spec.dtype
    in_m = sympy.true if rows % tile_m == 0 else row_at < rows
    in_n = sympy.true if cols % tile_n == 0 else col_at < cols
    count = LAST - FIRST
    # Tokens of the next rows are loaded a step before: copies of rows that wait for them would come late.
    follows = bool(gathers or choice)
    ahead = [_tokens("next", FIRST + (U + 1) * step + R)] if follows else []
    moved = [Compute("token", "i32", ("r",), integer("next"), declares=False)] if follows else []

    def product(row: Expr, here: Expr) -> list[Stmt]:
        """A tile of each operand, whose rows are where `row` says, added up."""
        row_of = {which: integer("token") if gathers == which else row for which in "ab"}
        if choice:
            here = all_of([here, MINE])
        work: list[Stmt] = [
            Load("A", operand, ("r", "m"), a.name, (row_of["a"], row_at), all_of([here, in_m]), NONE),
            Load("B", operand, ("r", "n"), b.name, (row_of["b"], col_at), all_of([here, in_n]), NONE),
            Dot("acc", acc, ("m", "n"), "A", "B", "r", True, False, spec.precision),
        ]
        if not choice:
            return work
        # Only the blocks of rows that chose this result.
        some = Reduce("some", "bool", (), "any", here, ("r",))
        return [*choice.of(integer("token"), ("r",)), some, If(boolean("some"), tuple(work))]

    last_rows: list[Stmt] = [
        Compute("at", "i32", ("r",), FIRST + FULL * step + R),
        Compute("row", "i32", ("r",), minimum(integer("at"), LAST - 1)),
        *product(ROW, integer("at") < LAST),
    ]
    end = _bounded(bounds.name, integer("e") + 1)
    if op.attr("masked"):  # no rows where nothing is learnt
        end = FIRST + (end - FIRST) * read(integer("trains"), integer("e"))
    made = (ADAPTER, integer("e")) if choice else (integer("e"),)
    body: tuple[Stmt, ...] = (
        Let("first", _bounded(bounds.name, integer("e"))),
        Let("last", maximum(end, FIRST)),
        Let("full", floordiv(count, step)),
        Compute("acc", acc, ("m", "n"), NONE),
        *([_tokens("token", FIRST + R)] if follows else []),
        For("u", (Span(ZERO, FULL),), (*ahead, *product(FIRST + U * step + R, sympy.true), *moved)),
        If(FULL * step < count, apart(tuple(last_rows), {}, "_rest")),
        Store(out.name, (*made, row_at, col_at), real("acc"), ("m", "n"), all_of([in_m, in_n])),
    )
    lengths = {"a": "T" if gathers == "a" else "entries", "b": "T" if gathers == "b" else "entries"}
    tokens = [Tensor("tokens", "i32", ("entries",), unit=0)] if gathers or choice else []
    tokens += [choice.tensor()] if choice else []
    tensors = [
        Tensor(a.name, a.dtype, (lengths["a"], int(a.shape[1])), unit=1, align=spec.align(int(a.shape[1]))),
        Tensor(b.name, b.dtype, (lengths["b"], int(b.shape[1])), unit=1, align=spec.align(int(b.shape[1]))),
        Tensor(bounds.name, "i32", (experts + 1,), unit=0),
        *tokens,
        *([Tensor("trains", "i32", (experts,), unit=0)] if op.attr("masked") else []),
        Tensor(out.name, out.dtype, out.shape, "out", unit=len(out.shape) - 1, align=spec.align(cols)),
    ]
    grid = (
        GridDim("n0", sympy.Integer(-(-cols // tile_n))),
        GridDim("m0", sympy.Integer(-(-rows // tile_m))),
        GridDim("e", sympy.Integer(experts)),
        *([GridDim("adapter", integer("adapters"))] if choice else []),
    )
    # Boxes leave more instructions to those that compute.
    described = spec.descriptors and spec.aligned and BYTES[spec.dtype] == 2 and has_copy_engine(spec.target)
    boxes = (("descriptors", 1),) if described else ()
    meta = () if cpu else (*boxes, ("stages", stages), ("warps", warps))
    return Kernel(
        f"experts_{out.name}",
        tuple(tensors),
        grid,
        tuple(axes),
        "n" if cpu else None,
        body,
        meta,
        (f"{experts} groups, [{rows}, rows] x [rows, {cols}]",),
    )


def map_grad_kernel(graph: Graph, op: Op, spec: ExpertsSpec) -> Kernel:
    """The kernel of one map_grad_rows."""
    g, du, weights, bounds = (graph.values[name] for name in op.inputs)
    dg, hw, dw = op.outputs
    columns, halves, acc = int(du.shape[1]), op.attr("halves"), spec.accumulator
    cpu = spec.is_cpu
    rows, width = (4, 64) if cpu else (4, 256)
    axes = (_axis("i", rows, True), _axis("n", min(width, columns), cpu))
    width = axes[1].extent
    col, row = integer("col"), integer("row")
    match halves:
        case None:
            at = [col]
        case "split":
            at = [col, col + columns]
        case _:
            at = [2 * col, 2 * col + 1]
    here, inside = row < LAST, sympy.true if columns % width == 0 else col < columns
    both, axes_in = all_of([here, inside]), ("i", "n")
    parts = [real(f"x{k}") for k in range(len(at))]
    expr = sympy.sympify(op.attr("expr"))
    step: list[Stmt] = [
        Compute("col", "i32", ("n",), U * width + N),
        *(Load(f"x{k}", acc, axes_in, g.name, (row, place), both, NONE) for k, place in enumerate(at)),
        Load("du_at", acc, axes_in, du.name, (row, col), both, NONE),
        Compute("h", acc, axes_in, expr),
        Reduce("part", acc, ("i",), "sum", real("h") * real("du_at"), ("n",)),
        Compute("total", acc, ("i",), real("total") + real("part"), declares=False),
        Store(hw.name, (row, col), real("h") * real("weight"), axes_in, both),
    ]
    for k, place in enumerate(at):
        slope = derivative(expr, parts[k]) * real("du_at") * real("weight")
        step += [
            Compute(f"d{k}", acc, axes_in, slope),
            Store(dg.name, (row, place), real(f"d{k}"), axes_in, both),
        ]
    body: tuple[Stmt, ...] = (
        Let("last", _bounded(bounds.name, sympy.Integer(spec.experts))),
        Compute("row", "i32", ("i",), integer("c") * rows + I),
        Load("weight", acc, ("i",), weights.name, (row,), here, NONE),
        Compute("total", acc, ("i",), NONE),
        If(
            integer("c") * rows < LAST,
            (
                For("u", (Span(ZERO, sympy.Integer(-(-columns // width))),), tuple(step)),
                Store(dw.name, (row,), real("total"), ("i",), here),
            ),
        ),
    )
    wide = int(g.shape[1])
    aligned = spec.align(wide), spec.align(columns)
    tensors = (
        Tensor(g.name, g.dtype, ("entries", wide), unit=1, align=aligned[0]),
        Tensor(du.name, du.dtype, ("entries", columns), unit=1, align=aligned[1]),
        Tensor(weights.name, weights.dtype, ("entries",), unit=0),
        Tensor(bounds.name, "i32", (spec.experts + 1,), unit=0),
        Tensor(dg.name, dg.dtype, ("entries", wide), "out", unit=1, align=aligned[0]),
        Tensor(hw.name, hw.dtype, ("entries", columns), "out", unit=1, align=aligned[1]),
        Tensor(dw.name, dw.dtype, ("entries",), "out", unit=0),
    )
    meta = () if cpu else (("stages", 2), ("warps", 4))
    grid = (GridDim("c", ceildiv(ENTRIES, rows)),)
    comment = (f"rows of {columns} activations and their gradients",)
    return Kernel("experts_dg", tensors, grid, axes, "n" if cpu else None, body, meta, comment)


def _sizes(spec: ExpertsSpec) -> tuple[int, int, int, int, int]:
    """The sizes of a tile: wide where products take operands from shared memory, and have registers left."""
    if spec.is_cpu or BYTES[spec.dtype] != 2:
        return CPU if spec.is_cpu else GPU_WIDE
    chip = getattr(device_of(spec.target), "chip", None)
    return GPU_GROUPS if chip and chip.warp_groups else GPU


def _tokens(name: str, row: Expr) -> Stmt:
    """The tokens of rows, those beyond a group's like its last."""
    return Load(name, "i32", ("r",), "tokens", (maximum(minimum(row, LAST - 1), ZERO),))


def _axis(name: str, extent: int, exact: bool) -> Axis:
    return Axis(name, extent, extent if exact else max(16, 1 << (extent - 1).bit_length()))


def _bounded(bounds: str, index: Expr) -> Expr:
    """An entry of bounds, kept within the rows that there are."""
    found: Expr = minimum(maximum(read(integer(bounds), index), ZERO), ENTRIES)
    return found

"""once: matrices of codes are decoded once, before their product, instead of by every row tile of it.

Before::  %y = grouped_gemm %h, %codes, %bounds, %scales {quantized = q}
After::   %down = dequantize %codes, %scales, %bounds {format = q, used = True} : bf16[E, N, K]
          %y = grouped_gemm %h, %down, %bounds {unit = 2}

A product whose experts have many rows decodes each matrix as often as it has row tiles of them; decoding it
once costs what its codes and its numbers take to pass through memory, of experts that have rows, and room for
the matrices of one product: those of another are free by then. `decodes_once` compares the two.

Leaves alone: matrices of which the spec does not say so.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from ...ir.expr import Expr, all_of, integer, read, real
from ...ir.graph import Graph, Op, Value
from ...ir.kernel import Axis, GridDim, If, Kernel, Let, Stmt, Store, Tensor
from ...ir.quantized import Quantized
from ...ir.ragged import storage_of
from ..devices import device_of
from .codes import EXPERT, codes_of, is_uniform, steps_of
from .spec import BYTES, ExpertsSpec

ROWS, BYTES_OF_STEP = 16, 128  # of a program: rows of a matrix, and bytes of a slice of each
# What decoding in registers adds to a product, as a share of the time that its operations take at least, by
# bits of a code: measured on an H100 (Mixtral, 8192 tokens; int2 and e2m1 take as many instructions as int4).
SHARE = {8: 0.25, 4: 0.67, 2: 0.67}
NESTED = 1.2  # codes of several planes, of which no two are decoded by one instruction
D, N, U, E_AT = integer("d"), integer("n"), integer("u"), integer("e")


def decodes_once(q: Quantized, rows: float, dtype: str, target: str) -> bool:
    """Whether to decode matrices before their product, whose experts have so many rows on average."""
    device = device_of(target) if target.startswith("cuda") else None
    if device is None or device.chip is None or dtype not in ("f16", "bf16"):
        return False
    number = sum(q.row_bytes(n) for n in range(len(q.read))) / q.columns
    once = (number + BYTES[dtype]) / device.bandwidth
    share = SHARE[q.planes[0]] if len(q.planes) == 1 else NESTED
    return share * 2 * rows / device.peak(dtype) > once


def decode_once(graph: Graph, spec: ExpertsSpec) -> Graph:
    """The graph with a dequantize before each product of the matrices that spec.once names."""
    chosen: dict[str, bool] = dict(zip(("gate_up", "down"), spec.once, strict=True))
    ops: list[Op] = []
    made: set[str] = set()
    for op in graph.ops:
        q = op.attr("quantized") if op.kind == "grouped_gemm" else None
        matrix = op.inputs[1].removesuffix("_codes") if q is not None else ""
        if q is None or not chosen[matrix]:
            ops.append(op)
            continue
        plain, stored = storage_of(op)
        if matrix not in made:
            experts, rows, _ = graph.values[stored[0]].shape
            dense = Value(matrix, spec.dtype, (experts, rows, q.columns))
            attrs = (("format", q), ("used", True))
            ops.append(Op("dequantize", (*stored, plain[2]), (dense,), attrs))
            made.add(matrix)
        attrs = tuple((name, value) for name, value in op.attrs if name != "quantized")
        product = replace(op, inputs=(plain[0], matrix, *plain[2:]), attrs=attrs)
        ops.append(product.with_attrs(unit=2))
    return replace(graph, ops=tuple(ops))


def decode_kernel(graph: Graph, op: Op, spec: ExpertsSpec) -> Kernel:
    """The kernel of a dequantize: a tile of bytes of every slice, of an expert that has rows."""
    q: Quantized = op.attr("format")
    *stored, bounds = op.inputs
    codes = codes_of(graph, op.with_attrs(quantized=q), tuple(stored), spec)
    assert codes is not None
    step, _ = steps_of(q, BYTES_OF_STEP, cpu=spec.is_cpu)
    even, out = is_uniform(q, step), op.output
    tiles, rows = -(-q.stretch // step), ROWS
    at, row = U * step, integer("n0") * rows + N
    here = [] if q.stretch % step == 0 else [at + D < q.stretch]
    valid = [] if codes.rows % rows == 0 else [row < codes.rows]
    body: list[Stmt] = codes.load("W", spec.accumulator, ("n", "d"), (row, at + D), all_of([*here, *valid]))
    for number in range(q.slices):
        column = number * q.stretch + at + D
        inside = [column < q.columns] if (number + 1) * q.stretch > q.columns else []
        whole = all_of([*here, *inside, *valid])
        first: Expr = number * q.stretch + at
        behind = [first < q.columns] if q.groups > 1 and q.stretch % step else []
        axes, place = (("n",), (row, first)) if even else (("n", "d"), (row, column))
        body += codes.scale(
            f"S{number}", spec.accumulator, axes, place, all_of([*valid, *behind]) if even else whole
        )
        body += codes.decode("W", number, spec.accumulator, ("n", "d"))
        value = codes.scaled(real(f"W{number}"), real(f"S{number}"), codes.zero(f"S{number}"))
        body.append(Store(out.name, (EXPERT, row, column), value, ("n", "d"), whole))
    name = integer(bounds)
    head: list[Stmt] = [Let("expert", E_AT), *codes.widths()]
    used = sympy.Lt(read(name, E_AT), read(name, E_AT + 1))
    align = 16 if spec.aligned and not spec.is_cpu and q.columns * BYTES[spec.dtype] % 16 == 0 else 1
    tensors = (
        *codes.tensors(aligned=spec.aligned),
        Tensor(bounds, "i32", (codes.experts + 1,), unit=0),
        Tensor(out.name, out.dtype, tuple(out.shape), "out", unit=2, align=align),
    )
    grid = (
        GridDim("u", sympy.Integer(tiles)),
        GridDim("n0", sympy.Integer(-(-codes.rows // rows))),
        GridDim("e", sympy.Integer(codes.experts)),
    )
    meta = () if spec.is_cpu else tuple(sorted((("stages", 1), ("warps", 4), *codes.hints)))
    return Kernel(
        f"experts_{out.name}",
        tensors,
        grid,
        (Axis("n", rows, rows), Axis("d", step, step)),
        "d" if spec.is_cpu else None,
        (If(used, (*head, *body)),),
        meta,
        (f"[{codes.experts}, {codes.rows}, {q.columns}] of codes",),
    )

"""The passes of linear attention, in order, from a spec to a program. See passes/pipeline.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import sympy

from ...ir.errors import InputError
from ...ir.expr import ceildiv, integer, real
from ...ir.graph import Graph, Op
from ...ir.graph_text import to_text
from ...ir.kernel import Axis, Compute, GridDim, Kernel, Load, Program, Reduce, Store, Tensor
from .build import build_linear, build_linear_gradients
from .fuse import fuse_linear
from .join import join_linear
from .kernels import linear_kernel
from .reads import READS, read_kernels
from .schedule import padded, schedule_linear
from .spec import LinearSpec
from .states import prefix_kernels, state_names, sum_kernels
from .tiles import Tiles

Watcher = Callable[[str, Any], None]


def compile_linear(spec: LinearSpec, watch: Watcher | None = None) -> Program:
    """From a spec to the kernels of a linear attention."""
    return lower_linear(run_linear(build_linear(spec), spec, watch), spec)


def compile_linear_gradients(
    spec: LinearSpec, wanted: Iterable[str], watch: Watcher | None = None
) -> Program:
    """From a spec to the kernels of the gradients of some of its inputs."""
    return lower_linear(run_linear(build_linear_gradients(spec, wanted), spec, watch), spec)


def run_linear(graph: Graph, spec: LinearSpec, watch: Watcher | None = None) -> Graph:
    """The graph fused, joined and scheduled; `watch(name, graph)` sees each result."""
    passes: tuple[tuple[str, Callable[[Graph], Graph]], ...] = (
        ("fuse", fuse_linear),
        ("join", lambda g: join_linear(g, spec)),
        ("schedule", lambda g: schedule_linear(g, spec)),
    )
    for name, apply in passes:
        graph = apply(graph)
        if watch is not None:
            watch(name, graph)
    return graph


def lower_linear(graph: Graph, spec: LinearSpec) -> Program:
    """The kernels of a scheduled graph, in launch order. Operations with one source share its states."""
    kernels: list[Kernel] = []
    kept: list[Tensor] = []
    finals: dict[str, tuple[str, ...]] = {}
    for op in graph.of_kind("linear_values"):
        if op.attr("final"):
            finals[_source(graph, op, spec)] = tuple(v.name for v in op.outputs[1 + bool(op.attr("keeps")) :])
    known: set[str] = set()
    for op in graph.ops:
        made, between = [], []
        if op.kind == "normalise_grad":
            made = [delta_kernel(graph, op, spec)]
        elif op.kind == "linear_states":
            made, between = sum_kernels(graph, op, spec)
        elif op.kind in READS:
            made, between = read_kernels(graph, op, spec)
        elif op.kind in ("linear_values", "linear_features"):
            source = _source(graph, op, spec)
            final = finals.get(source, ())
            if source not in known:
                known.add(source)
                made, between = prefix_kernels(graph, op, spec, final)
            stores = final if op.attr("final") and not op.attr("chunks").split else ()
            made = [*made, linear_kernel(graph, op, spec, stores)]
        else:
            raise InputError("lower_linear", "a graph that is fused and scheduled", to_text(graph))
        kernels += made
        kept += between
    written = {t.name: t for k in kernels for t in k.tensors if t.role == "out"}
    there = {t.name for t in kept} | set(graph.outputs)
    kept += [Tensor(t.name, t.dtype, t.shape, unit=t.unit) for n, t in written.items() if n not in there]
    return Program(tuple(kernels), tuple(kept), to_text(graph))


def _source(graph: Graph, op: Op, spec: LinearSpec) -> str:
    return state_names(Tiles(graph, op, spec))[0]


def delta_kernel(graph: Graph, op: Op, spec: LinearSpec) -> Kernel:
    """%dden = normalise_grad %do, %o, %den: -(do . o) / (den + eps) of every row."""
    do, o, den = (graph.values[name] for name in op.inputs)
    acc, size = spec.accumulator, int(o.shape[3])
    width = size if spec.is_cpu else padded(size)
    rows = 64 if spec.is_cpu else max(16, min(64, 4096 // width))  # registers hold two tiles of them
    b, h, row, e = map(integer, ("b", "h", "row", "e"))
    inside = row < integer("L")
    one = sympy.Float(1.0)
    body = (
        Compute("row", "i32", ("i",), integer("t") * rows + integer("i")),
        Load("dO", acc, ("i", "e"), do.name, (b, h, row, e), inside, sympy.Float(0.0)),
        Load("O", acc, ("i", "e"), o.name, (b, h, row, e), inside, sympy.Float(0.0)),
        Load("D", acc, ("i",), den.name, (b, h, row), inside, one),
        Reduce("total", acc, ("i",), "sum", real("dO") * real("O"), ("e",)),
        Compute("R", acc, ("i",), -real("total") / (real("D") + sympy.Float(op.attr("eps")))),
        Store(op.output.name, (b, h, row), real("R"), ("i",), inside),
    )
    tensors = (
        *(Tensor(v.name, v.dtype, v.shape, unit=3, align=spec.align(size, v.dtype)) for v in (do, o)),
        Tensor(den.name, den.dtype, den.shape, unit=2),
        Tensor(op.output.name, op.output.dtype, op.output.shape, "out", unit=2),
    )
    grid = (
        GridDim("t", ceildiv(integer("L"), rows)),
        GridDim("h", integer("Hq")),
        GridDim("b", integer("B")),
    )
    axes = (Axis("i", rows, rows), Axis("e", size, width))
    meta = () if spec.is_cpu else (("stages", 2), ("warps", 4))
    comment = ("what the gradients of rows give their denominators",)
    return Kernel(
        f"linear_{op.output.name}", tensors, grid, axes, "e" if spec.is_cpu else None, body, meta, comment
    )

"""The passes of layers of experts, in order, from a spec to a program. See passes/pipeline.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...ir.errors import InputError
from ...ir.expr import integer
from ...ir.graph import Graph, Op, Value
from ...ir.graph_text import to_text
from ...ir.kernel import Kernel, Program, Tensor
from .build import build_experts, build_groups
from .combine import combine_kernel
from .direct import direct
from .entries import entry_kernel
from .fuse import fuse_experts
from .gemm import gemm_kernel, slots
from .gradient import build_gradients
from .group import group_kernels
from .once import decode_kernel, decode_once
from .outer import map_grad_kernel, outer_kernel
from .schedule import schedule_experts
from .spec import ExpertsSpec

Watcher = Callable[[str, Any], None]


def compile_experts(spec: ExpertsSpec, watch: Watcher | None = None) -> Program:
    """From a spec to the kernels of the whole layer."""
    return lower_experts(run_experts(build_experts(spec), spec, watch), spec)


def compile_groups(spec: ExpertsSpec) -> Program:
    """From a spec to the kernels that sort its entries by expert."""
    return lower_experts(build_groups(spec), spec)


def compile_gradients(spec: ExpertsSpec, wanted: Iterable[str]) -> Program:
    """From a spec to the kernels of the gradients of some of its inputs."""
    return lower_experts(run_experts(build_gradients(spec, wanted), spec), spec)


def compile_product(spec: ExpertsSpec, *, outer: bool, biased: bool = False) -> Program:
    """One product by groups: a [rows, hidden] by w [E, hidden, inner], or, if `outer`, the sums over rows of
    a's rows times those of b, [E, hidden, inner]."""
    e, unit = spec.experts, spec.units[0]
    a, bounds = Value("a", spec.dtype, ("rows", spec.hidden)), Value("bounds", "i32", (e + 1,))
    if outer:
        b = Value("b", spec.dtype, ("rows", spec.inner))
        made = Value("o", spec.dtype, (e, spec.hidden, spec.inner))
        op, inputs = Op("grouped_outer", ("a", "b", "bounds"), (made,)), (a, b, bounds)
    else:
        w, bias = (
            Value("w", spec.dtype, (e, spec.hidden, spec.inner)),
            Value("bias", spec.dtype, (e, spec.inner)),
        )
        made = Value("o", spec.dtype, ("rows", spec.inner))
        operands = ("a", "w", "bounds", *(["bias"] if biased else []))
        op = Op("grouped_gemm", operands, (made,)).with_attrs(unit=unit, biased=biased or None)
        inputs = (a, w, bounds, *([bias] if biased else []))
    graph = schedule_experts(Graph("product", inputs, (op,), ("o",)), spec)
    return lower_experts(graph, spec)


def run_experts(graph: Graph, spec: ExpertsSpec, watch: Watcher | None = None) -> Graph:
    """The graph fused and scheduled; `watch(name, graph)` sees each result."""
    passes: list[tuple[str, Callable[[Graph], Graph]]] = [("fuse", fuse_experts)]
    if spec.load == "one":
        passes.append(("direct", direct))
    passes.append(("once", lambda g: decode_once(g, spec)))
    passes.append(("schedule", lambda g: schedule_experts(g, spec)))
    for name, apply in passes:
        graph = apply(graph)
        if watch is not None:
            watch(name, graph)
    return graph


def lower_experts(graph: Graph, spec: ExpertsSpec) -> Program:
    """The kernels of a scheduled graph, in launch order."""
    blocked = _blocked(graph)
    kernels: list[Kernel] = []
    kept: list[Tensor] = []
    for op in graph.ops:
        match op.kind:
            case "group":
                made, between = group_kernels(graph, op, padded=not spec.is_cpu)
                kernels += made
                kept += between
            case "grouped_gemm":
                kernels.append(gemm_kernel(graph, op, spec, blocked))
            case "dequantize":
                kernels.append(decode_kernel(graph, op, spec))
            case "entry_gemm" | "entry_combine":
                kernels.append(entry_kernel(graph, op, spec))
            case "grouped_outer":
                kernels.append(outer_kernel(graph, op, spec))
            case "map_grad_rows":
                kernels.append(map_grad_kernel(graph, op, spec))
            case "combine":
                kernels.append(combine_kernel(graph, op, spec))
            case _:
                raise InputError("lower_experts", "a graph that is fused and scheduled", to_text(graph))
    written = {t.name: t for k in kernels for t in k.tensors if t.role == "out"}
    known = {t.name for t in kept} | set(graph.outputs)
    for name, tensor in written.items():
        if name not in known:
            kept.append(_sized(graph, tensor))
    return Program(tuple(kernels), tuple(kept), to_text(graph))


def _blocked(graph: Graph) -> frozenset[str]:
    """Intermediates that one grouped_gemm leaves to another by row tiles of the same size."""

    def agree(made: Op, op: Op) -> bool:
        if op.kind != "grouped_gemm" or op.attr("gathers") or op.inputs[0] != made.output.name:
            return False
        tilings = made.attr("tiling"), op.attr("tiling")
        return all(t and t.blocked for t in tilings) and tilings[0].rows == tilings[1].rows

    found = [(op, graph.users(op.output.name)) for op in graph.of_kind("grouped_gemm")]
    returned = frozenset(graph.outputs)
    names = (made.output.name for made, users in found if users and all(agree(made, op) for op in users))
    return frozenset(names) - returned


def _sized(graph: Graph, tensor: Tensor) -> Tensor:
    """An intermediate with its extents as expressions of those of the call."""
    if tensor.shape[0] != "slots":
        return Tensor(tensor.name, tensor.dtype, tensor.shape, unit=tensor.unit)
    op = graph.producer(tensor.name)
    assert op is not None
    experts = int(graph.values[op.inputs[1]].shape[-3])
    rows = slots(integer("entries"), op.attr("tiling").rows, experts)
    return Tensor(tensor.name, tensor.dtype, (rows, *tensor.shape[1:]), unit=2)

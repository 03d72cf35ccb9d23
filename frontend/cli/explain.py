"""``gossamer explain``: what the compiler makes of a mask, step by step, and how long it should take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...ir.errors import InputError
from .options import (
    Batch,
    Debug,
    DeviceName,
    Dim,
    Dtype,
    Heads,
    KvHeads,
    KvLen,
    MaskText,
    QLen,
    Target,
    VDim,
    dtype_of,
)

if TYPE_CHECKING:
    from ...ir.graph import Graph, Op
    from ...ir.order import Order
    from ...passes.cost import Device, Plan, Size
    from ..mask import Mask

WIDTH = 110


def explain(
    mask: MaskText,
    q_len: QLen = 1024,
    kv_len: KvLen = None,
    dtype: Dtype = "f32",
    dim: Dim = 64,
    v_dim: VDim = None,
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    batch: Batch = 1,
    target: Target = "cpu",
    device: DeviceName = None,
    sinks: Annotated[bool, typer.Option("--sinks", help="With attention sinks.")] = False,
    dropout: Annotated[bool, typer.Option("--dropout", help="With dropout.")] = False,
    column_sums: Annotated[
        bool, typer.Option("--column-sums", help="With column sums of the probabilities.")
    ] = False,
    ir: Annotated[
        bool, typer.Option("--ir/--no-ir", help="What each pass changes, and the kernel IR.")
    ] = True,
    source: Annotated[bool, typer.Option("--source", help="Also the generated source.")] = False,
    debug: Debug = False,
) -> None:
    """Show what the compiler makes of a mask: its terms, tiles, schedule, IR, and predicted time.

    Of a whole model or function: which parts gossamer.jit compiles, and which are left to
    PyTorch and why. FILE.py:NAME is then a function without parameters, which gives the model
    and its arguments: (model, inputs) or (model, inputs, keywords). It is run once.

    \b
    Prints, in this order
      mask      as captured: integers p0, p1, ..., tensors c0, c1, ...
      geometry  number of pairs, disjoint terms in closed form, tiles, proofs
      schedule  kernels: row order, tile shape, tiles visited
      passes    what each pass adds to the IR, then the kernel IR
      source    the generated kernels, with --source
      time      predicted by a roofline model, and the floor of any kernel

    Of a mask nothing is compiled or run.

    \b
    Examples:
      gossamer explain causal
      gossamer explain "strided(64, 64) & causal" --q-len 4096 --no-ir
      gossamer explain "longformer(128, 16)" --target cuda:sm_90 --source
      gossamer explain causal --target cuda:sm_80 --dtype bf16 --no-ir
      gossamer explain causal --sinks --dropout --column-sums
      gossamer explain my_model.py:example
    """
    from ...passes.cost import Size
    from ...passes.pipeline import compile_spec
    from ...passes.spec import AttentionSpec
    from ...runtime.target import Target as ParsedTarget
    from ..kernel import AttentionSpec as AskedSpec
    from ..pattern_text import parse_mask, parse_program
    from . import output as show

    program_of = parse_program(mask)
    if program_of is not None:
        show.text(str(report_of(program_of)))
        return
    dtype = dtype_of(dtype)
    ParsedTarget.parse(target)
    if kv_heads is not None and heads % kv_heads:
        raise InputError("--kv-heads", f"a number that divides --heads {heads}", kv_heads)
    graphs: list[tuple[str, Any]] = []
    with show.working("reading the mask") as say:
        bound = parse_mask(mask)
        values = _values(bound)
        size = Size(q_len, kv_len or q_len, batch, heads, kv_heads or heads, dim, v_dim or dim, dtype, values)
        say("running the passes")
        softmax = AskedSpec(sinks="f32" if sinks else None, dropout=dropout).softmax
        spec = AttentionSpec(
            bound.ir,
            None,
            dtype,
            dim,
            v_dim or dim,
            target=target,
            monotone=_sorted_ids(bound),
            return_column_sums=column_sums,
            **softmax.spec_fields,
        )
        program = compile_spec(spec, watch=lambda name, graph: graphs.append((name, graph)))
        plans = _plans(graphs[-1][1])
        say("counting pairs")
        geometry = bound.analyze(size.q_len, size.kv_len)
        findings = geometry.explain(*_tile_shape(plans))
        nnz = count_pairs(bound, size, geometry.nnz)
        say("measuring this machine")
        machine = device_for(target, device)

    show.heading("mask")
    show.text(f"{mask}\n{bound!r}")
    show.heading("geometry")
    show.text(findings)
    show.heading("schedule")
    for op in graphs[-1][1].ops:
        if op.kind == "column_sums":
            show.text("column_sums: rows are keys, and key tiles hold queries")
            _print_schedule(_plans_of(op), replace(size, q_len=size.kv_len, kv_len=size.q_len))
        else:
            _print_schedule(_plans_of(op), size)
    if ir:
        from ...ir.kernel_text import to_text

        show.heading("passes")
        print_passes(graphs)
        show.heading("kernel IR")
        for kernel in program.kernels:
            show.text(to_text(kernel))
    if source:
        from importlib import import_module

        emitter = "tvm" if spec.target_kind == "cpu" else "triton"
        emit = import_module(f"....codegen.{emitter}", __name__).emit
        for kernel in program.kernels:
            show.heading(f"source of {kernel.name}")
            show.code(emit(kernel), "python")
    show.heading("time")
    _print_time(machine, size, plans, nnz, target)
    if column_sums:
        show.text("attention alone; column sums come on top")


def report_of(function: Callable[[], Any]) -> Any:
    """The report of a model or function that another one gives, with its arguments.

    Raises InputError where it gives something else."""
    import torch

    from ..capture.jit import jit

    given = function()
    target, args, kwargs = (
        (*given, {})[:3] if isinstance(given, tuple) and len(given) in (2, 3) else (None,) * 3
    )
    if not callable(target) or not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        expected = "(a model or function, a tuple of its arguments), and a dict of those by name if need be"
        raise InputError(f"{function.__name__}()", expected, type(given).__name__)
    compiled = jit(target)
    with torch.no_grad():
        compiled(*args, **kwargs)
    return compiled.report()


# ---- what is needed ----


def _values(mask: Mask) -> dict[str, Any]:
    """The mask's integers and captured tensors by name."""
    from ..captured import as_numpy

    values: dict[str, Any] = {f"p{i}": v for i, v in enumerate(mask.values)}
    return values | {f"c{i}": as_numpy(t) for i, t in enumerate(mask.tensors)}


def _sorted_ids(mask: Mask) -> frozenset[str]:
    from ..captured import is_monotone

    return frozenset(f"c{i}" for i in mask.segments if is_monotone(mask.tensors[i]))


def _plans(graph: Graph) -> tuple[Plan, ...]:
    [op] = graph.of_kind("attention")
    return _plans_of(op)


def _plans_of(op: Op) -> tuple[Plan, ...]:
    return tuple(zip(op.attr("groups"), op.attr("schedules"), op.attr("loops"), strict=True))


def _tile_shape(plans: tuple[Plan, ...]) -> tuple[int, int]:
    """The tile shape of the first kernel that tiles plain indices; else 64 by 64."""
    for group, schedule, _ in plans:
        if group.order.natural:
            return schedule.rows[0], schedule.cols[0]
    return 64, 64


def count_pairs(mask: Mask, size: Size, one: int | None = None) -> int:
    """Pairs that attend, over all batches and heads. one: of batch and head 0, where it is known."""
    used = {str(s) for s in mask.ir.predicate.free_symbols}
    batches, heads = (n if name in used else 1 for name, n in (("b", size.batch), ("h", size.heads)))
    total = 0
    for b in range(batches):
        for h in range(heads):
            known = one if b == h == 0 else None
            total += mask.analyze(size.q_len, size.kv_len, b, h).nnz if known is None else known
    return total * (size.batch // batches) * (size.heads // heads)


def device_for(target: str, name: str | None) -> Device | None:
    """The machine whose time is predicted; None where the target has no description."""
    from ...passes import devices

    return devices.device(name) if name else devices.device_of(target)


# ---- printing ----


def _print_schedule(plans: tuple[Plan, ...], size: Size) -> None:
    from ...ir.expr import integer, to_text
    from ...passes.cost import count_tiles
    from . import output as show

    table = show.table(
        "kernel", "row order", "tile", "keys start at", "row tiles", "key tiles", "full", "partial",
        right=(4, 5, 6, 7),
    )  # fmt: skip
    for i, plan in enumerate(plans):
        group, schedule, _ = plan
        counted = count_tiles(plan, size)
        shape = " by ".join("x".join(map(str, s)) for s in (schedule.rows, schedule.cols))
        anchors = [schedule.anchor(d) for d in range(len(group.order.dims))]
        start = ", ".join("the grid" if a is None else to_text(integer("row") + a) for a in anchors)
        near = "" if counted.exact else "~"
        counts = (counted.rows, counted.visited, counted.full, counted.partial)
        table.add_row(str(i), order_text(group.order), shape, start, *(f"{near}{n}" for n in counts))
    show.console().print(table)
    for _, schedule, _ in plans:
        show.text(str(schedule))
    notes = [f"{len(plans)} kernel{'s' * (len(plans) > 1)}"]
    if len(plans) > 1:
        notes.append("the online softmax is carried from each to the next")
    listed = [str(i) for i, (_, _, loops) in enumerate(plans) if loops.lists is not None]
    if listed:
        notes.append(f"key tiles of {', '.join(listed)} are listed ahead, by kernels of their own")
    show.text("; ".join(notes))


def order_text(order: Order) -> str:
    """An order in words."""
    if order.natural:
        return "natural"
    parts = []
    for d, dim in enumerate(order.dims):
        part = f"q{d}, k{d}" if len(order.dims) > 1 else ""
        part += f" mod {dim.width}" if dim.width is not None else ""
        if dim.col_stride > 1:
            shift = f" + {dim.shift}" if dim.shift else ""
            residue = {0: str(dim.shift), 1: f"q{shift}"}.get(dim.slope, f"{dim.slope}q{shift}")
            part = f"{part} k = {residue} (mod {dim.col_stride})"
        parts.append(part.strip())
    return ("boxes of " if len(order.dims) > 1 else "by residue: ") + "; ".join(parts)


def print_passes(graphs: list[tuple[str, Graph]]) -> None:
    """The operations that each pass has changed, with the attributes that it has added or changed."""
    from . import output as show

    ops: list[str] = []
    known: set[tuple[str, str]] = set()
    for name, graph in graphs:
        kinds = [_signature(op) for op in graph.ops]
        found = [_attributes(op) for op in graph.ops]
        lines = []
        for op, kind, texts in zip(graph.ops, kinds, found, strict=True):
            news = {a: value for a, value in texts.items() if (a, value) not in known}
            if news or kind not in ops:
                lines += _operation(op, kind, news)
        show.text("\n".join([f"[{name}]", *(lines or ["  changes nothing"]), ""]))
        ops, known = kinds, {item for texts in found for item in texts.items()}


def _attributes(op: Op) -> dict[str, str]:
    from ...ir.text import dump

    return {name: dump(value) for name, value in op.attrs}


def _signature(op: Op) -> str:
    results = ", ".join(f"%{v.name}" for v in op.outputs)
    operands = ", ".join(f"%{name}" for name in op.inputs)
    kinds = ", ".join(f"{v.dtype}[{', '.join(map(str, v.shape))}] {v.format}" for v in op.outputs)
    return f"{results} = {op.kind} {operands} : {kinds}"


def _operation(op: Op, signature: str, news: dict[str, str]) -> list[str]:
    from ...ir.text import dump

    lines = [f"  {signature}"]
    for name, value in news.items():
        items = op.attr(name)
        if isinstance(items, tuple) and len(value) > WIDTH - 20:
            lines += [f"    {name}:", *(f"      {dump(item)}" for item in items)]
        else:
            lines.append(f"    {name}: {value}")
    return lines


def _print_time(device: Device | None, size: Size, plans: tuple[Plan, ...], nnz: int, target: str) -> None:
    from ...passes.cost import estimate, floor
    from . import output as show

    if device is None:
        show.text(f"no description of a machine for {target}; name one with --device")
        return
    found, least = estimate(device, size, plans), floor(device, size, nnz)
    flops = nnz * size.pair_flops
    table = show.table("", "", "", right=(1,))
    table.add_row("arithmetic", show.seconds(found.compute), f"{found.pairs:,} pairs in visited tiles")
    table.add_row("memory", show.seconds(found.memory), f"{show.size(found.bytes)} moved")
    table.add_row("starting tiles, waiting", show.seconds(found.tiles), "")
    table.add_row("launching", show.seconds(found.launches), "")
    bound = {"compute": "arithmetic", "tiles": "starting tiles, waiting", "launches": "launching"}.get(
        found.limit, "memory"
    )
    table.add_row("[bold]predicted", f"[bold]{show.seconds(found.seconds)}", f"bound by {bound}")
    table.add_row("floor", show.seconds(least), f"{nnz:,} pairs, {flops / 1e9:.4g} GFLOP; predicted is "
                  f"{found.seconds / least:.2g} times that")  # fmt: skip
    rate, moved = device.peak(size.dtype) / 1e9, device.bandwidth / 1e9
    show.text(f"{device.name} ({device.source}): {rate:,.0f} GFLOP/s in {size.dtype}, {moved:,.0f} GB/s")
    show.console().print(table)

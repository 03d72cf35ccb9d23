"""The compiler's table of contents: the passes, in order.

Each is a pure function from graph to graph; `lower` turns the last graph into kernels. `run` calls a
watcher after every pass: printing, timing, verifying and bisecting are watchers, not passes. Anybody's
pass can be inserted by name with `inserted`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..ir.errors import InputError
from ..ir.expr import integer, to_text
from ..ir.graph import Graph, Op
from ..ir.graph_text import to_text as graph_text
from ..ir.kernel import Kernel, Program, Tensor
from .align import align_mask
from .build import build, spec_of
from .decompose import decompose as terms_of
from .delinearize import widths
from .differentiate import differentiate
from .fold_table import FOLDS
from .fuse import fuse as fuse_forward
from .fuse_gradients import fuse_gradients
from .lower import label_of, lower_operation
from .normalize import normalize_mask
from .programs import order_programs
from .reads import checks
from .schedule import check, choose
from .spec import AttentionSpec, Gradient
from .tile import plan
from .transpose import transpose
from .uniform import uniform as uniform_mask

Pass = Callable[[Graph], Graph]
Watcher = Callable[[str, Any], None]


def uniform(graph: Graph) -> Graph:
    """What masks read once a batch and head, as integers of their sets."""
    return _masked(graph, lambda op: op.with_attrs(mask=uniform_mask(op.attr("mask"))))


def normalize(graph: Graph) -> Graph:
    """Masks in their shortest affine form."""
    return _masked(graph, lambda op: op.with_attrs(mask=normalize_mask(op.attr("mask"))))


def delinearize(graph: Graph) -> Graph:
    """Widths of index spaces that masks divide by: q // W and q % W become coordinates."""
    return _masked(graph, lambda op: op.with_attrs(widths=widths(op.attr("mask"))))


def decompose(graph: Graph) -> Graph:
    """Masks as disjoint unions of ACSR terms, proven; scores are stored as such."""

    def rule(op: Op) -> Op:
        stored = tuple(replace(v, format="acsr") for v in op.outputs)
        return replace(op.with_attrs(terms=terms_of(op.attr("mask"))), outputs=stored)

    return _masked(graph, rule)


def align(graph: Graph) -> Graph:
    """Terms gathered into groups of one row order."""
    return _masked(graph, lambda op: op.with_attrs(groups=align_mask(op.attr("mask"), op.attr("terms"))))


def fuse(graph: Graph) -> Graph:
    """Chains of primitives as fused operations: those of an attention, or those of its gradients."""
    return fuse_gradients(fuse_forward(graph))


def schedule(graph: Graph) -> Graph:
    """Tile sizes and hints for every group that has none."""

    def rule(op: Op) -> Op:
        spec, given = spec_of(graph, op), op.attr("schedules", ())
        groups = op.attr("groups")
        if given and len(given) != len(groups):
            raise InputError("schedule", f"{len(groups)} schedules, one a group", len(given))
        for group, chosen in zip(groups, given, strict=False):
            check(spec, group, chosen)
        return op.with_attrs(schedules=given or tuple(choose(spec, group, op.kind) for group in groups))

    return _fused(graph, rule)


def tile(graph: Graph) -> Graph:
    """Loops over key tiles in closed form; groups for which that takes too long get coarser bounds."""

    def rule(op: Op) -> Op:
        chosen = zip(op.attr("groups"), op.attr("schedules"), strict=True)
        sorted_ids = frozenset(op.attr("monotone"))
        plans = [plan(group, schedule, sorted_ids) for group, schedule in chosen]
        groups, loops = zip(*plans, strict=True)
        spec = spec_of(graph, op)
        if spec.target_kind != "cpu" and not (spec.sequences.q_bounds or spec.few):
            loops = tuple(map(order_programs, groups, op.attr("schedules"), loops))
        return op.with_attrs(groups=groups, loops=loops)

    return _fused(graph, rule)


PIPELINE: tuple[tuple[str, Pass], ...] = (
    ("uniform", uniform),
    ("normalize", normalize),
    ("delinearize", delinearize),
    ("decompose", decompose),
    ("align", align),
    ("fuse", fuse),
    ("transpose", transpose),
    ("schedule", schedule),
    ("tile", tile),
)


def run(graph: Graph, passes: Sequence[tuple[str, Pass]] = PIPELINE, watch: Watcher | None = None) -> Graph:
    """Apply passes in order; `watch(name, graph)` sees each result."""
    for name, apply in passes:
        graph = apply(graph)
        if watch is not None:
            watch(name, graph)
    return graph


def inserted(
    name: str, apply: Pass, *, after: str | None = None, before: str | None = None
) -> tuple[tuple[str, Pass], ...]:
    """The pipeline with one more pass, before or after a named one.

    Raises InputError unless exactly one of the two names a pass."""
    names = [n for n, _ in PIPELINE]
    anchor = after if before is None else before
    if (after is None) == (before is None) or anchor not in names:
        raise InputError(
            "inserted", f"after= or before= one of {', '.join(names)}", f"after={after!r}, before={before!r}"
        )
    at = names.index(anchor) + (before is None)
    return (*PIPELINE[:at], (name, apply), *PIPELINE[at:])


def lower(graph: Graph) -> Program:
    """The kernels of a planned graph of one attention. Raises InputError for a graph that holds others."""
    labels = [label_of(op) for op in graph.ops]
    planned = all(op.kind in FOLDS and op.attr("loops") is not None for op in graph.ops)
    if not planned or len({*labels}) != len(labels) or labels == ["row_lse"]:
        raise InputError("lower", "a graph of one attention that has passed `tile`", graph_text(graph))
    kernels: list[Kernel] = []
    lists: list[Tensor] = []
    guards: dict[tuple[str, str], None] = {}
    for op in graph.ops:
        spec = spec_of(graph, op)
        plans = tuple(zip(op.attr("groups"), op.attr("schedules"), op.attr("loops"), strict=True))
        made, shared = lower_operation(op, spec, plans)
        kernels += made
        lists += shared
        guards |= dict.fromkeys(_guards(spec))
    return Program(
        tuple(kernels), (*_intermediates(graph, kernels, lists), *lists), graph_text(graph), tuple(guards)
    )


def _guards(spec: AttentionSpec) -> Iterator[tuple[str, str]]:
    """Calls that read outside a captured tensor, as checks of a program."""
    if spec.group > 1:
        yield f"Hq != {spec.group} * Hk", f"attention: expected Hq == {spec.group} * Hk"
    if spec.sequences.uneven:  # the host knows no lengths; kernels clamp what they read
        return
    found = [*checks(spec.mask, spec.mask.inlined.predicate, attending=False)]
    for mapped in spec.maps:
        found += checks(spec.mask, mapped.expr, attending=True)
    for c in found:
        yield to_text(c.fails), f"{c.text} reads outside its tensor: expected {to_text(c.holds)}"


def _intermediates(graph: Graph, kernels: list[Kernel], lists: list[Tensor]) -> tuple[Tensor, ...]:
    """What kernels pass on to each other beside lists, and the graph does not return."""
    known = {*graph.outputs, *(t.name for t in lists)}
    written: dict[str, Tensor] = {}
    for kernel in kernels:
        written |= {t.name: t for t in kernel.tensors if t.role != "in" and t.name not in written}
    groups = sum(any(s.name == "splits" for s in k.scalars) for k in kernels)
    slots = {"slots": groups * integer("splits") if groups > 1 else "splits"}  # see `split`
    return tuple(
        replace(t, shape=tuple(slots.get(n, n) if isinstance(n, str) else n for n in t.shape))
        for t in written.values()
        if t.name not in known
    )


def compile_spec(
    spec: AttentionSpec,
    schedules: Any = None,
    watch: Watcher | None = None,
    gradient: Gradient | None = None,
) -> Program:
    """From a spec to kernels. schedules: one Schedule, or one a group, in place of the defaults.

    gradient: which gradients the kernels give, in place of the attention itself."""
    if gradient is not None:
        graph = differentiate(build(spec.differentiable), gradient.wanted, gradient.given)
    else:
        graph = build(spec)
    if schedules is not None:
        given = schedules if isinstance(schedules, tuple) else (schedules,)
        graph = graph.map_ops(lambda op: op.with_attrs(schedules=given) if op.kind == "sddmm" else None)
    return lower(run(graph, watch=watch))


def _masked(graph: Graph, rule: Callable[[Op], Op]) -> Graph:
    """The rule applied to every mask; products that are sampled where scores are take over theirs."""
    return graph.map_ops(lambda op: rule(op) if op.attr("mask") and op.attr("outside") is None else None)


def _fused(graph: Graph, rule: Callable[[Op], Op]) -> Graph:
    return graph.map_ops(lambda op: rule(op) if op.kind in FOLDS else None)

"""states: the states that operations of linear attention read, to kernels.

Kernel `*_states` adds up what the rows of a segment give. Where rows sum over all keys, kernel `*_total` adds
up segments, else kernel `*_prefix` what earlier segments (later ones, where order is 'backward') have given
before each. Without segments one program walks over all rows of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy

from ...ir.expr import Expr, ceildiv, floordiv, integer, real
from ...ir.graph import Graph, Op
from ...ir.kernel import Axis, Compute, For, GridDim, Kernel, Let, Load, Span, Stmt, Store, Tensor
from .schedule import padded
from .spec import BYTES, LinearSpec
from .tiles import N0, NONE, SEGMENTS, ZERO, B, E, H, M, S, Tiles

CPU_WIDTH = 256
STATE = 32 * 1024  # bytes of a state that the registers of a program hold
ROWS = 16  # of a state, added up by a program
CHUNK = integer("u")


def state_names(tiles: Tiles) -> tuple[str, str | None]:
    """The tensors that hold what a program of linear_values or linear_features begins with."""
    source = tiles.source
    before = f"before_{source.name}_{source.order}"
    return before, f"{before}_sums" if source.sums else None


def prefix_kernels(
    graph: Graph, op: Op, spec: LinearSpec, final: tuple[str, ...]
) -> tuple[list[Kernel], list[Tensor]]:
    """The kernels of the states before each segment of an ordered operation's source, and what they leave.

    final: names for the state of all rows (and its sums), where that is a result."""
    build = Tiles(graph, op, spec)
    if not build.chunks.split:
        return [], []
    before, parts = state_names(build), _parts(build)
    total = (final[0], final[1] if build.source.sums else None) if final else None
    kernels = [
        _states(build, f"{build.source.name}_states", *parts, whole=False),
        _prefix(Tiles(graph, op, spec), f"{build.source.name}_prefix", parts, before, total),
    ]
    return kernels, [*_between(build, parts), *_between(build, before)]


def sum_kernels(graph: Graph, op: Op, spec: LinearSpec) -> tuple[list[Kernel], list[Tensor]]:
    """The kernels of a linear_states, and what they leave to one another."""
    build = Tiles(graph, op, spec)
    made = tuple(v.name for v in op.outputs)
    names = made[0], made[1] if build.source.sums else None
    if not build.chunks.split:
        return [_states(build, f"{build.source.name}_states", *names, whole=True)], []
    parts = _parts(build)
    kernels = [
        _states(build, f"{build.source.name}_states", *parts, whole=False),
        _prefix(Tiles(graph, op, spec), f"{build.source.name}_total", parts, None, names),
    ]
    return kernels, _between(build, parts)


def total_kernel(
    build: Tiles, names: tuple[str, str | None], parts: tuple[str, str | None], heads: str
) -> tuple[Kernel, list[Tensor]]:
    """The kernel that adds up the states of segments of rows with some heads, and the tensors of these."""
    kernel = _prefix(build, f"{build.source.name}_total", parts, None, names, heads)
    return kernel, _between(build, parts, heads)


def _parts(build: Tiles) -> tuple[str, str | None]:
    name = f"parts_{build.source.name}"
    return name, f"{name}_sums" if build.source.sums else None


def _between(build: Tiles, names: tuple[str, str | None], heads: str = "Hk") -> list[Tensor]:
    """Tensors of a state and its sums for every segment."""
    shape = ("B", heads, build.segments(), build.source.features, build.v_size)
    shapes = zip(names, (shape, shape[:4]), strict=True)
    return [Tensor(n, build.acc, shape, unit=len(shape) - 1) for n, shape in shapes if n is not None]


def _states(build: Tiles, name: str, state: str, sums: str | None, *, whole: bool) -> Kernel:
    """Programs that add up the rows of a segment, or of everything."""
    source, spec = build.source, build.spec
    size = BYTES[build.acc]
    most = STATE // (4 if spec.operand == spec.accumulator and spec.product_precision == "ieee" else 1)
    if spec.is_cpu:
        width = min(build.v_size, CPU_WIDTH)
    else:
        width = padded(build.v_size)
        while width > 16 and size * source.parts * padded(build.size) * width > most:
            width //= 2
    tiles_e = -(-build.v_size // width)
    if tiles_e > 1:
        build.e = N0 * width + E
    middle: tuple[str, ...] = () if whole else (SEGMENTS,)
    build.states(state, (*middle, source.features, build.v_size), "out")
    if sums is not None:
        build.states(sums, (*middle, source.features), "out")
    init: tuple[str | None, str | None] = (None, None)
    if whole and source.state is not None:
        init = initial(build)
    setup, head, several = build.heads("Hk")
    at = (head,) if whole else (head, S)
    walked = Span(ZERO, ceildiv(build.length, build.rows)) if whole else build.chunks_of(S)
    body: list[Stmt] = [
        build.row("j", CHUNK, "col"),
        *build.give(integer("giver"), integer("col")),
        *build.add(),
    ]
    walk = For("u", (walked,), tuple(build.members(several, head, body)))
    statements = [*setup, *build.begin(*init, (head,)), walk, *build.keep(state, sums, at)]
    grid = [GridDim("n0", sympy.Integer(tiles_e))] if tiles_e > 1 else []
    grid += [GridDim("h", integer("Hk"))]
    grid += [] if whole else [GridDim("s", build.segments())]
    grid += [GridDim("b", integer("B"))]
    axes = [
        build.axis("j", build.rows),
        build.axis("m", build.size),
        build.axis("e", min(width, build.v_size)),
    ]
    return build.kernel(name, grid, axes, statements)


def initial(build: Tiles) -> tuple[str | None, str | None]:
    """What sums begin with, as arguments."""
    source = build.source
    if source.state is None:
        return None, None
    build.states(source.state, (source.features, build.v_size))
    if source.totals is not None and source.sums:
        build.states(source.totals, (source.features,))
        return source.state, source.totals
    return source.state, None


def _prefix(
    build: Tiles,
    name: str,
    parts: tuple[str, str | None],
    before: tuple[str, str | None] | None,
    total: tuple[str, str | None] | None,
    heads: str = "Hk",
) -> Kernel:
    """Programs that walk over the segments' states, a few rows of them each; over those of all heads that
    share a state, where there are `heads` of them."""
    source = build.source
    sums = source.sums
    features, size = source.features, build.v_size
    rows = min(ROWS, features) if build.spec.is_cpu else ROWS
    place = integer("m0") * rows + M
    inside = sympy.true if features % rows == 0 else place < features
    given = initial(build)
    uses = (
        (parts, "in", (SEGMENTS,), heads), (before, "out", (SEGMENTS,), "Hk"), (total, "out", (), "Hk")
    )  # fmt: skip
    for names, role, middle, of in uses:
        if names is not None:
            build.states(names[0], (*middle, features, size), role, of)
            if names[1] is not None:
                build.states(names[1], (*middle, features), role, of)

    def both(make: Callable[[str, tuple[str, ...], int], list[Stmt]]) -> list[Stmt]:
        return [*make("S", ("m", "e"), 0), *(make("Z", ("m",), 1) if sums else [])]

    several = build.spec.grouped and heads == "Hq"
    giver = integer("giver") if several else H

    def at(axes: tuple[str, ...], *middle: sympy.Basic, head: Expr = H) -> tuple:
        return (B, head, *middle, place, *([E] if "e" in axes else []))

    def start(tile: str, axes: tuple[str, ...], n: int) -> list[Stmt]:
        tensor = given[n]
        if tensor is None:
            return [Compute(tile, build.acc, axes, NONE)]
        return [Load(tile, build.acc, axes, tensor, at(axes), inside, NONE)]

    segment = integer("segment")

    def step(tile: str, axes: tuple[str, ...], n: int) -> list[Stmt]:
        out: list[Stmt] = []
        if before is not None:
            out.append(Store(str(before[n]), at(axes, segment), real(tile), axes, inside))
        return [
            *out,
            Load(f"{tile}_part", build.acc, axes, str(parts[n]), at(axes, segment, head=giver), inside, NONE),
            build.set(tile, axes, real(tile) + real(f"{tile}_part")),
        ]

    def end(tile: str, axes: tuple[str, ...], n: int) -> list[Stmt]:
        return [Store(str(total[n]), at(axes), real(tile), axes, inside)] if total is not None else []

    count = integer(SEGMENTS)
    index = count - 1 - S if source.order == "backward" else S
    walk: Stmt = For("s", (Span(ZERO, count),), (Let("segment", index), *both(step)))
    walks = build.members(several, H, [walk]) if several else [walk]
    setup = [Let("group", floordiv(integer("Hq"), integer("Hk")))] if several else []
    grid = [
        GridDim("m0", sympy.Integer(-(-features // rows))),
        GridDim("h", integer("Hk")),
        GridDim("b", integer("B")),
    ]
    axes: list[Axis] = [build.axis("m", rows), build.axis("e", size)]
    return build.kernel(name, grid, axes, [*setup, *both(start), *walks, *both(end)])

"""linear_states: the states that operations of linear attention read, to kernels.

Kernel `*_states` adds up what the rows of a segment give, kernel `*_prefix` what earlier segments (later
ones, where order is 'backward') have given before each; where order is 'all', kernel `*_total` adds up
everything. Without segments one program walks over all rows of a head, and only 'all' needs a state
beforehand.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy

from ..ir.expr import ceildiv, integer, minimum, real
from ..ir.graph import Graph, Op
from ..ir.kernel import Axis, Compute, For, GridDim, Kernel, Let, Load, Span, Stmt, Store, Tensor
from .linear_schedule import padded
from .linear_spec import BYTES, LinearSpec
from .linear_tiles import N0, NONE, SEGMENTS, SPAN, ZERO, B, E, H, M, S, Tiles, segments

CPU_WIDTH = 256
STATE = 32 * 1024  # bytes of a state that the registers of a program hold
ROWS = 16  # of a state, added up by a program
CHUNK = integer("u")


def state_names(tiles: Tiles) -> tuple[str, str | None]:
    """The tensors that hold what a program of linear_values or linear_features begins with."""
    source = tiles.source
    before = f"before_{source.name}_{source.order}"
    return before, f"{before}_sums" if source.sums else None


def state_kernels(
    graph: Graph, op: Op, spec: LinearSpec, final: tuple[str, ...]
) -> tuple[list[Kernel], list[Tensor]]:
    """The kernels of the states of an operation's source, and the tensors that these leave to others.

    final: names for the state of all rows (and its sums), where that is a result."""
    build = Tiles(graph, op, spec)
    source, split = build.source, build.chunks.split
    whole = (source.features, build.v_size)
    before, sums = state_names(build)
    named = source.sums
    if source.order == "all":
        names = final or tuple(n for n in (before, sums) if n is not None)
        target: tuple[str, str | None] = (names[0], names[1] if named else None)
        kept = [] if final else _shaped(build, names, whole, ())
        if not split:
            return [_states(build, f"{source.name}_states", *target, whole=True)], kept
        parts = _parts(build)
        return [
            _states(build, f"{source.name}_states", *parts, whole=False),
            _prefix(graph, op, spec, f"{source.name}_total", parts, None, target),
        ], [*kept, *_between(build, parts, whole)]
    if not split:
        return [], []
    parts = _parts(build)
    total = (final[0], final[1] if named else None) if final else None
    kernels = [
        _states(build, f"{source.name}_states", *parts, whole=False),
        _prefix(graph, op, spec, f"{source.name}_prefix", parts, (before, sums), total),
    ]
    return kernels, [*_between(build, parts, whole), *_between(build, (before, sums), whole)]


def _parts(build: Tiles) -> tuple[str, str | None]:
    name = f"parts_{build.source.name}"
    return name, f"{name}_sums" if build.source.sums else None


def _shaped(build: Tiles, names: tuple[str, ...], whole: tuple[int, int], more: tuple) -> list[Tensor]:
    shapes = (("B", "Hk", *more, *whole), ("B", "Hk", *more, whole[0]))
    return [Tensor(n, build.acc, shape, unit=len(shape) - 1) for n, shape in zip(names, shapes, strict=False)]


def _between(build: Tiles, names: tuple[str, str | None], whole: tuple[int, int]) -> list[Tensor]:
    count = segments(build.length, build.rows)
    return _shaped(build, tuple(n for n in names if n is not None), whole, (count,))


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
        init = _initial(build)
    setup, head, several = build.heads("Hk")
    at = (head,) if whole else (head, S)
    first = ZERO if whole else S * SPAN
    last = ceildiv(build.length, build.rows)
    last = last if whole else minimum(first + SPAN, last)
    body: list[Stmt] = [
        build.row("j", CHUNK, "col"),
        *build.give(integer("giver"), integer("col")),
        *build.add(),
    ]
    walk = For("u", (Span(first, last),), tuple(build.members(several, head, body)))
    statements = [*setup, *build.begin(*init, (head,)), walk, *build.keep(state, sums, at)]
    grid = [GridDim("n0", sympy.Integer(tiles_e))] if tiles_e > 1 else []
    grid += [] if whole else [GridDim("s", segments(build.length, build.rows))]
    grid += [GridDim("h", integer("Hk")), GridDim("b", integer("B"))]
    axes = [
        build.axis("j", build.rows),
        build.axis("m", build.size),
        build.axis("e", min(width, build.v_size)),
    ]
    kernel = build.kernel(name, grid, axes, statements)
    build.e, build.used = E, {}
    return kernel


def _initial(build: Tiles) -> tuple[str | None, str | None]:
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
    graph: Graph,
    op: Op,
    spec: LinearSpec,
    name: str,
    parts: tuple[str, str | None],
    before: tuple[str, str | None] | None,
    total: tuple[str, str | None] | None,
) -> Kernel:
    """Programs that walk over the segments' states, a few rows of them each."""
    build = Tiles(graph, op, spec)
    source = build.source
    sums = source.sums
    features, size = source.features, build.v_size
    rows = min(ROWS, features) if spec.is_cpu else ROWS
    place = integer("m0") * rows + M
    inside = sympy.true if features % rows == 0 else place < features
    initial = _initial(build)
    for names, role, middle in ((parts, "in", (SEGMENTS,)), (before, "out", (SEGMENTS,)), (total, "out", ())):
        if names is not None:
            build.states(names[0], (*middle, features, size), role)
            if names[1] is not None:
                build.states(names[1], (*middle, features), role)

    def both(make: Callable[[str, tuple[str, ...], int], list[Stmt]]) -> list[Stmt]:
        return [*make("S", ("m", "e"), 0), *(make("Z", ("m",), 1) if sums else [])]

    def at(axes: tuple[str, ...], *middle: sympy.Basic) -> tuple:
        return (B, H, *middle, place, *([E] if "e" in axes else []))

    def start(tile: str, axes: tuple[str, ...], n: int) -> list[Stmt]:
        given = initial[n]
        if given is None:
            return [Compute(tile, build.acc, axes, NONE)]
        return [Load(tile, build.acc, axes, given, at(axes), inside, NONE)]

    segment = integer("segment")

    def step(tile: str, axes: tuple[str, ...], n: int) -> list[Stmt]:
        out: list[Stmt] = []
        if before is not None:
            out.append(Store(str(before[n]), at(axes, segment), real(tile), axes, inside))
        return [
            *out,
            Load(f"{tile}_part", build.acc, axes, str(parts[n]), at(axes, segment), inside, NONE),
            build.set(tile, axes, real(tile) + real(f"{tile}_part")),
        ]

    def end(tile: str, axes: tuple[str, ...], n: int) -> list[Stmt]:
        return [Store(str(total[n]), at(axes), real(tile), axes, inside)] if total is not None else []

    count = integer(SEGMENTS)
    index = count - 1 - S if source.order == "backward" else S
    walk = For("s", (Span(ZERO, count),), (Let("segment", index), *both(step)))
    grid = [
        GridDim("m0", sympy.Integer(-(-features // rows))),
        GridDim("h", integer("Hk")),
        GridDim("b", integer("B")),
    ]
    axes: list[Axis] = [build.axis("m", rows), build.axis("e", size)]
    return build.kernel(name, grid, axes, [*both(start), walk, *both(end)])

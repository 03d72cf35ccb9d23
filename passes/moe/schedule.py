"""schedule: tile sizes of products by groups, as a Tiling on each.

Before::  %h = grouped_gemm ...
After::   %h = grouped_gemm ... {tiling = Tiling(rows=128, cols=128, inner=64, wide=8, meta=(...))}

CPUs keep rows in the vector lanes and all of the summed axis of a row tile in the cache; each matrix is read
once a row tile. On GPUs tiles follow how many rows an expert gets: few rows are bound by reading matrices,
many by the tensor cores.

Leaves alone: operations that have a tiling; all others.
"""

from __future__ import annotations

from ...ir.graph import Graph, Op
from ...ir.quantized import Quantized
from ...ir.ragged import Tiling
from ..devices import device_of, has_copy_engine
from .codes import is_uniform, steps_of
from .entries import LANE
from .spec import BYTES, ExpertsSpec

CPU_ROWS = 32, 112  # at least and at most; 112: consecutive features lie in different sets of the cache
BLOCK = 16  # columns of a micro-kernel, as far as there are registers
SHARES = 16  # of the work, a thread: experts have different numbers of rows
CPU_FEW = 16  # where experts get no more on average
CPU_TILE = 256 * 1024  # bytes of a row tile, a part of the second-level cache
CPU_COLS = 32
CPU_INNER = 128  # summed one after another; sums of more are added up, which keeps rounding errors small
# (rows, columns of each half where there are two, summed extent of a step, warps, stages) by load
GPU = {
    "one": (16, 64, 128, 4, 4),
    "few": (32, 64, 128, 4, 4),
    "some": (64, 64, 64, 4, 4),
    "many": (128, 128, 64, 8, 4),
}
REST = 32  # rows of the last tile of an expert where no more are left: a quarter of a tile of many
CPU_STEPS = 16  # of a slice, each of which is spelled out
# Of quantised matrices: (rows, columns of each half, columns of a product without halves, bytes of a slice of
# each row a turn, warps, stages) by load, of a code a byte and of several.
GPU_BYTES = {
    "few": (16, 64, 128, 128, 4, 5),
    "some": (64, 64, 128, 128, 4, 4),
    "many": (128, 128, 128, 64, 8, 4),
}
GPU_FIELDS = {
    "few": (16, 64, 64, 128, 4, 3),
    "some": (64, 64, 128, 64, 4, 4),
    "many": (128, 128, 256, 32, 8, 3),
}
SCALE_BYTES = 4
PRODUCTS = 4  # of slices and steps a turn, at most: all have registers of their own
# Columns of a program of entries, and the loads of codes that a lane has under way: many where programs are
# many and short; where all of them run at once, their registers decide how many do.
ENTRY_COLS, ENTRIES = 4, {"entry_gemm": 16, "entry_combine": 4}
ENTRY_TURNS = 16  # of a program, one after another, before it takes twice the warps
SHARED = 64 * 1024  # bytes that a program has at least, on GPUs that are not described
GPU_PLAIN = {  # products without halves have half the columns to hold
    "one": (16, 64, 256, 4, 4),
    "few": (32, 128, 128, 4, 4),
    "some": (64, 128, 64, 4, 4),
    "many": (128, 256, 64, 8, 4),
}


def schedule_experts(graph: Graph, spec: ExpertsSpec) -> Graph:
    """A tiling for every grouped_gemm that has none."""
    given = iter(spec.tiling or ())

    def rule(op: Op) -> Op | None:
        if op.kind not in ("grouped_gemm", *ENTRIES) or op.attr("tiling") is not None:
            return None
        chosen = _of_entries(graph, op, spec) if op.kind in ENTRIES else choose(graph, op, spec)
        return op.with_attrs(tiling=(next(given, None) or chosen) if chosen else None)

    return graph.map_ops(rule)


def choose(graph: Graph, op: Op, spec: ExpertsSpec) -> Tiling:
    """The default tiling of one product."""
    columns = graph.values[op.output.name].shape[1]
    inner = graph.values[op.inputs[0]].shape[1]
    assert isinstance(inner, int) and isinstance(columns, int)
    if op.attr("quantized") is not None:
        return _of_codes(op, op.attr("quantized"), spec, inner, columns)
    if spec.is_cpu:
        step = _part(inner, CPU_INNER)
        cols, meta = min(CPU_COLS, columns), _cpu_meta(spec, prefetch=1)
        if op.attr("transpose_b") and op.attr("unit") == 2 and columns % cols == 0 and inner % step == 0:
            step, meta = inner, tuple(sorted([*meta, ("sums", step)]))  # matrices are read where they lie
        return Tiling(_cpu_rows(spec), cols, step, True, blocked=True, meta=meta)
    rows, cols, step, warps, stages = (GPU if op.attr("halves") else GPU_PLAIN)[spec.load]
    if op.attr("adds") and op.attr("chooses") and spec.load == "many" and not op.attr("halves"):
        cols //= 2  # what rows add of their choice has sums of its own
    size = {"f64": 4, "f32": 2}.get(spec.dtype, 1)
    cols = min(max(16, cols // size), max(16, 1 << (columns - 1).bit_length()))
    step = max(32, step // size)
    room = _room(spec)
    while True:
        held = (rows + cols * (2 if op.attr("halves") else 1)) * step * BYTES[spec.dtype]
        if held * stages <= room or stages == 2 == cols // 8:
            break
        stages, cols = (stages - 1, cols) if stages > 2 else (stages, max(16, cols // 2))
    tiles = -(-columns // cols)
    wide = min(8, tiles) if spec.load == "many" else tiles
    if tiles > wide:  # none hangs over where a number near 8 divides them
        wide = next((n for n in (8, 7, 6, 5) if tiles % n == 0), wide)
    boxes = spec.load == "many" and op.attr("chooses") != "w"
    meta = _hints(spec, warps, stages, boxes=boxes)
    rest = REST if spec.load == "many" and BYTES[spec.dtype] == 2 else 0
    return Tiling(rows, cols, step, wide=wide, meta=meta, rest=rest)


def _hints(spec: ExpertsSpec, warps: int, stages: int, *, boxes: bool) -> tuple[tuple[str, int], ...]:
    """The hints of a GPU schedule. boxes: tiles come through tensor descriptors, where there are any: they
    leave more instructions to those that compute."""
    described = boxes and spec.descriptors and spec.aligned and BYTES[spec.dtype] == 2
    engine = (("descriptors", 1),) if described and has_copy_engine(spec.target) else ()
    return (*engine, ("stages", stages), ("warps", warps))


def _of_codes(op: Op, q: Quantized, spec: ExpertsSpec, inner: int, columns: int) -> Tiling:
    """The default tiling of a product with quantised matrices."""
    by_rows = bool(op.attr("transpose_b"))
    if spec.is_cpu:
        step, _ = steps_of(q, CPU_INNER, cpu=True) if by_rows else (_part(inner, CPU_INNER), 1)
        if by_rows and q.stretch > CPU_STEPS * step:
            step = _part(q.stretch, CPU_INNER)
        cols = min(CPU_COLS, columns if by_rows else q.stretch)
        return Tiling(_cpu_rows(spec), cols, step, True, blocked=True, meta=_cpu_meta(spec))
    parts = (2 if op.attr("halves") else 1) if by_rows else q.slices
    table, size = GPU_FIELDS if q.slices > 1 else GPU_BYTES, BYTES[spec.dtype]
    rows, *widths, most, warps, stages = table["few" if spec.load == "one" else spec.load]
    cols = widths[not op.attr("halves")]
    if not by_rows:
        cols = max(16, 2 * widths[0] // q.slices)
    most = max(32, 2 * most // size)
    if not is_uniform(q, most):
        most = max(32, most // 2)
    crowded = len(q.read) > 1 if by_rows else not is_uniform(q, cols)
    if rows > 16 and crowded:  # registers
        cols = max(16, cols // 2)
    step, unroll = steps_of(q, most, cpu=False) if by_rows else (32, 1)
    unroll = max(1, min(unroll, PRODUCTS // q.slices))
    bytes_of_codes = sum(q.blocks(n) for n in range(len(q.read))) * (parts if by_rows else 1)
    if not is_uniform(q, step if by_rows else cols):  # every element has a scale loaded beside it
        bytes_of_codes += SCALE_BYTES * (parts * q.slices if by_rows else q.slices)
    room, slices = _room(spec), q.slices if by_rows else 1
    while stages > 2 or cols > 16:
        if (rows * slices * size + cols * bytes_of_codes) * step * unroll * stages <= room:
            break
        stages, cols = (stages - 1, cols) if stages > 2 else (stages, cols // 2)
    tiles = -(-(columns if by_rows else q.stretch) // cols)
    wide = min(8, tiles) if spec.load == "many" else tiles
    # To scale products takes as many registers again as sums: few where rows are few.
    scales = "sums" if q.groups == 1 and not q.zero else "products" if rows <= 16 else "codes"
    # Decoding several codes a byte leaves few instructions for addresses.
    meta = _hints(spec, warps, stages, boxes=spec.load == "many" or q.slices > 1)
    # Scales of less than 4 bytes are not copied asynchronously: their step would wait for them.
    ahead = scales == "products" or (scales == "codes" and by_rows and q.scale != "f32")
    return Tiling(
        rows, cols, step, wide=wide, meta=meta, unroll=unroll, scales=scales, turned=by_rows, ahead=ahead
    )


def _of_entries(graph: Graph, op: Op, spec: ExpertsSpec) -> Tiling | None:
    """The tiling of a product with quantised matrices for a few entries; None where the steps of its kernel
    are its own: other matrices, CPUs, groups that cut what a lane takes."""
    q = op.attr("quantized")
    lanes = LANE // BYTES[spec.dtype]
    if q is None or spec.is_cpu or q.stretch % lanes or (q.groups > 1 and q.group % lanes):
        return None
    columns = int(graph.values[op.output.name].shape[1])
    halves = 2 if op.attr("halves") else 1
    cols = min(ENTRY_COLS, 1 << (columns - 1).bit_length())
    chunks = q.stretch // lanes
    # A warp takes 32 chunks of a row: two warps where that leaves few of them idle, more for long rows.
    idle = {warps: -chunks % (32 * warps) for warps in (1, 2)}
    warps = max(w for w in idle if 8 * idle[w] <= 8 * min(idle.values()) + chunks)
    if -(-chunks // (32 * warps)) > ENTRY_TURNS:
        warps *= 2
    turns = -(-chunks // (32 * warps))
    unroll = min(turns, max(1, ENTRIES[op.kind] // (halves * cols)))
    step = 32 * warps * lanes
    return Tiling(1, cols, step, meta=(("stages", 1), ("warps", warps)), unroll=unroll, scales="products")


def _cpu_rows(spec: ExpertsSpec) -> int:
    """Rows of a tile, of which those that are there are computed: as many as the cache holds for both
    products, so that most experts have one tile and their matrices are read once."""
    if spec.load in ("one", "few"):
        return CPU_FEW
    least, most = CPU_ROWS
    held = CPU_TILE // (max(spec.hidden, spec.inner) * BYTES[spec.accumulator])
    return min(most, max(least, held // 16 * 16))


def _cpu_meta(spec: ExpertsSpec, **more: int) -> tuple[tuple[str, int], ...]:
    """Hints. prefetch: of matrices that are read where they lie. transpose: rows, in registers."""
    many = {} if _cpu_rows(spec) == CPU_FEW else {"shares": SHARES, "transpose": 1}
    return tuple(sorted({"block": BLOCK, "in_place": 1, **many, **more}.items()))


def _room(spec: ExpertsSpec) -> int:
    """Bytes of shared memory that a program may use."""
    chip = getattr(device_of(spec.target), "chip", None)
    return chip.shared_program if chip else SHARED


def _part(extent: int, least: int) -> int:
    """An extent cut into parts of this size, the last of which may be smaller: equal parts if that can be,
    of at least `least`, and no more than 16 of them.

    >>> _part(512, 128), _part(7168, 128), _part(300, 128), _part(257, 128), _part(100, 128)
    (128, 448, 150, 129, 100)
    """
    least = max(least, -(-extent // 16))
    even = [n for n in range(least, min(2 * least, extent) + 1) if extent % n == 0]
    parts = max(1, extent // least)
    return even[0] if even else -(-extent // parts)

"""Square blocks that are read along one axis and written along another, transposed in registers.

A block of w vectors of w elements takes log2(w) rounds. A round interleaves vector k with vector k + w/2 into
vectors 2k and 2k + 1, which rotates the bits of an element's number (vector, lane) by one: after log2(w)
rounds vectors and lanes have changed places.
"""

from __future__ import annotations

from collections.abc import Callable

from .tvm_context import Context
from .tvm_layout import BYTES, LINE, Piece

DTYPES = ("float32", "float64")  # of elements: TVM shuffles no others as they are


def block_width(ctx: Context, axes: tuple[str, str], dtype: str) -> int:
    """How many elements a block of two axes has in each direction; 0 where blocks do not cover both, or the
    kernel does not ask for them (`transpose`): they take long to compile."""
    if dtype not in DTYPES or not ctx.meta.get("transpose"):
        return 0
    width = LINE // BYTES[dtype]
    return 0 if any(ctx.extent(axis) % width for axis in axes) else width


def transpose(
    ctx: Context,
    axes: tuple[str, str],
    dtype: str,
    width: int,
    read: Callable[[str], None],
    write: Callable[[str], None],
    memory: str,
) -> None:
    """All blocks of two axes, of which `memory` walks through memory.

    read and write get the name of an element of the block, which runs along the first axis in read and along
    the second in write; coordinates are those of the element."""
    first, second = axes
    a, b = (ctx.register(f"t{half}", (width, width), dtype) for half in range(2))
    with ctx.blocks(second, width), ctx.blocks(first, width):
        _vectors(ctx, (second, first), width, lambda lane: read(f"{a}[{lane}]"), first == memory)
        pairs, odd = divmod(width.bit_length() - 1, 2)
        with ctx.out.block(f"for pair in T.unroll({pairs}):"):
            _interleave(ctx, a, b, width)
            _interleave(ctx, b, a, width)
        if odd:
            _interleave(ctx, a, b, width)
        last = b if odd else a
        _vectors(ctx, (first, second), width, lambda lane: write(f"{last}[{lane}]"), second == memory)


def _vectors(
    ctx: Context, axes: tuple[str, str], width: int, body: Callable[[str], None], address: bool
) -> None:
    """body for vectors along the second axis, one for each coordinate of the first."""
    k, lane = axes
    with (
        ctx.out.block(f"for i_{k} in T.unroll({width}):"),
        ctx.names.at(**{k: f"i_{k}0 * {width} + i_{k}"}),
        ctx.vector(lane, Piece(0, "blocks", width), address=address),
    ):
        body(f"i_{k}, i_{lane}")


def _interleave(ctx: Context, source: str, target: str, width: int) -> None:
    half, lanes = width // 2, f"T.Ramp(0, 1, {width})"
    order = [n + side * width for n in range(width) for side in range(2)]
    with ctx.out.block(f"for k in T.unroll({half}):"):
        two = f"[{source}[k, {lanes}], {source}[k + {half}, {lanes}]]"  # a name would make TVM allocate it
        for n in range(2):
            mixed = f"T.Shuffle({two}, {order[n * width : (n + 1) * width]})"
            ctx.out.line(f"{target}[2 * k{' + 1' if n else ''}, {lanes}] = {mixed}")

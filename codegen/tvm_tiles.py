"""Compute, Reduce, Scan and Dot on tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import sympy

from ..ir.expr import integer
from ..ir.kernel import Compute, Dot, Reduce, Scan
from .tvm_context import Context
from .tvm_layout import BYTES, REGISTER_BYTES, Piece, Tile
from .tvm_math import literal
from .tvm_names import safe
from .tvm_value import nan_aware

MOST_ROWS = 16  # of a micro-kernel
WAYS = 4  # independent accumulators of a reduction, to hide the latency of one


def shape_comment(tile: Tile) -> str:
    """What stands over the code that writes a tile."""
    axes = ", ".join(tile.axes)
    return f"# {tile.name}[{axes}]: {' x '.join(map(str, tile.shape))} {tile.dtype}"


def compute(ctx: Context, stmt: Compute) -> None:
    """Elementwise: loops over the outer axes, vectors along the innermost."""
    tile = ctx.tiles[stmt.dst]
    ctx.out.line(shape_comment(tile))

    def assign() -> None:
        printer = ctx.printer(stmt.expr, dtype=tile.storage)
        value = printer.text(stmt.expr, tile.storage)
        ctx.out.line(f"{ctx.names.element(tile)} = {printer.rounded(value, tile.dtype)}")

    with ctx.loops(*tile.axes[:-1]):
        ctx.each(tile.axes[-1] if tile.axes else None, tile.storage, assign, stmt.expr)
    if integer(stmt.dst) in ctx.definitions and ctx.names.natural(stmt.expr):
        ctx.names.never_negative.add(stmt.dst)


# reductions ---------------------------------------------------------------------------------------


def reduce(ctx: Context, stmt: Reduce) -> None:
    """Accumulates in registers, a vector along the axis that the operands have innermost."""
    tile = ctx.tiles[stmt.dst]
    axis = _vector_axis(ctx, stmt)
    ctx.out.line(f"{shape_comment(tile)} = {stmt.op} over {', '.join(stmt.over)}")
    with ctx.loops(*(a for a in tile.axes if a != axis)):
        if axis in tile.axes:
            _reduce_apart(ctx, stmt, tile, axis)
        else:
            _reduce_across(ctx, stmt, tile, axis)


def _vector_axis(ctx: Context, stmt: Reduce) -> str:
    axes = (*stmt.axes, *stmt.over)
    if ctx.kernel.lanes in axes:
        return str(ctx.kernel.lanes)
    names = sorted({str(s) for s in stmt.expr.free_symbols} & set(ctx.tiles))
    innermost = [ctx.tiles[n].axes[-1] for n in names if ctx.tiles[n].axes]
    return max(innermost, key=innermost.count) if innermost else axes[-1]


def _neutral(op: str, dtype: str) -> str:
    if op in ("sum", "any"):
        return _zero(dtype)
    if dtype[0] == "f":
        return literal("-inf" if op == "max" else "inf", dtype)
    return f'T.{"min" if op == "max" else "max"}_value("{dtype}")'


def _merge(ctx: Context, op: str, dtype: str, into: str, value: str) -> None:
    """into = op(into, value)."""
    if op in ("max", "min") and dtype[0] == "f":
        text = nan_aware(into, value, f"T.{op}", dtype)
    elif op in ("max", "min"):
        text = f"T.{op}({into}, {value})"
    else:
        text = f"{into} + {value}" if op == "sum" else f"T.bitwise_or({into}, {value})"
    ctx.out.line(f"{into} = {text}")


def _zero(dtype: str) -> str:
    return literal(0.0, dtype) if dtype[0] == "f" else f"T.{dtype}(0)"


def _accumulator(stmt: Reduce, tile: Tile) -> str:
    return "int32" if stmt.op == "any" else tile.storage


def _value(ctx: Context, stmt: Reduce, dtype: str) -> str:
    printer = ctx.printer(stmt.expr, dtype="" if stmt.op == "any" else dtype)
    if stmt.op == "any":
        return f'T.Cast("int32", {printer.text(stmt.expr, "bool")})'
    return printer.operand(stmt.expr, dtype)


def _finish(ctx: Context, stmt: Reduce, tile: Tile, value: str) -> None:
    if stmt.op == "any":
        value = f"{value} != 0"
    else:
        value = ctx.printer(dtype=tile.storage).rounded(value, tile.dtype)
    ctx.out.line(f"{ctx.names.element(tile)} = {value}")


def _reduce_apart(ctx: Context, stmt: Reduce, tile: Tile, axis: str) -> None:
    """The vector axis stays: one accumulator a lane, several ways along the last reduced axis."""
    dtype = _accumulator(stmt, tile)
    *outer, last = stmt.over
    ways = WAYS if ctx.extent(last) % WAYS == 0 else 1
    for piece in ctx.pieces(axis, dtype):
        r = ctx.register(stmt.dst, (ways, piece.width), dtype)
        lane = f"i_{axis}" if piece.width > 1 else "0"
        accumulators = [f"{r}[{way}, {lane}]" for way in range(ways)]
        with ctx.outer(axis, piece):
            with ctx.vector(axis, piece):
                for accumulator in accumulators:
                    ctx.out.line(f"{accumulator} = {_neutral(stmt.op, dtype)}")
            with ctx.loops(*outer), ctx.out.block(f"for i_{last} in range({ctx.extent(last) // ways}):"):
                for way, accumulator in enumerate(accumulators):
                    place = f"i_{last} * {ways} + {way}" if ways > 1 else f"i_{last}"
                    with ctx.names.at(**{last: place}), ctx.vector(axis, piece):
                        _merge(ctx, stmt.op, dtype, accumulator, _value(ctx, stmt, dtype))
            with ctx.vector(axis, piece):
                for accumulator in accumulators[1:]:
                    _merge(ctx, stmt.op, dtype, accumulators[0], accumulator)
                _finish(ctx, stmt, tile, accumulators[0])


def _reduce_across(ctx: Context, stmt: Reduce, tile: Tile, axis: str) -> None:
    """The vector axis goes too: a vector of partial results, folded in halves at the end."""
    dtype = _accumulator(stmt, tile)
    parts = ctx.pieces(axis, dtype)
    total = ctx.register(f"{stmt.dst}_all", (1,), dtype) if len(parts) > 1 else ""
    if total:
        ctx.out.line(f"{total}[0] = {_neutral(stmt.op, dtype)}")
    for piece in parts:
        r = ctx.register(stmt.dst, (piece.width,), dtype)
        _fold_piece(ctx, stmt, axis, piece, r, dtype)
        if total:
            _merge(ctx, stmt.op, dtype, f"{total}[0]", f"{r}[0]")
        else:
            total = r
    _finish(ctx, stmt, tile, f"{total}[0]")


def _fold_piece(ctx: Context, stmt: Reduce, axis: str, piece: Piece, r: str, dtype: str) -> None:
    lane = f"i_{axis}" if piece.width > 1 else "0"
    with ctx.vector(axis, Piece(0, 1, piece.width)):
        ctx.out.line(f"{r}[{lane}] = {_neutral(stmt.op, dtype)}")
    with ctx.loops(*(a for a in stmt.over if a != axis)), ctx.outer(axis, piece), ctx.vector(axis, piece):
        value = _value(ctx, stmt, dtype)
        _merge(ctx, stmt.op, dtype, f"{r}[{lane}]", value)
    half = piece.width // 2
    while half:
        with ctx.vector(axis, Piece(0, 1, half)):
            into = f"{r}[i_{axis}]" if half > 1 else f"{r}[0]"
            _merge(ctx, stmt.op, dtype, into, f"{r}[i_{axis} + {half}]" if half > 1 else f"{r}[1]")
        half //= 2


def scan(ctx: Context, stmt: Scan) -> None:
    """Prefix sums, one element after another along the summed axis."""
    tile = ctx.tiles[stmt.dst]
    ctx.out.line(f"{shape_comment(tile)} = cumsum over {stmt.over}")
    total = f"{ctx.register(f'{stmt.dst}_sum', (1,), tile.storage)}[0]"
    with ctx.loops(*(a for a in tile.axes if a != stmt.over)):
        ctx.out.line(f"{total} = {_zero(tile.storage)}")
        with ctx.loops(stmt.over):
            printer = ctx.printer(stmt.expr, dtype=tile.storage)
            ctx.out.line(f"{total} = {total} + {printer.operand(stmt.expr, tile.storage)}")
            ctx.out.line(f"{ctx.names.element(tile)} = {printer.rounded(total, tile.dtype)}")


# products -----------------------------------------------------------------------------------------


def dot(ctx: Context, stmt: Dot) -> None:
    """A register-blocked product: rows of one operand as scalars, vectors of the other.

    The accumulators of a few rows by one vector stay in registers for the whole `over` loop, and then meet
    what the tile holds: a sum of thousands has the rounding of a sum of sums."""
    tile = ctx.tiles[stmt.dst]
    axis = tile.axes[-1]
    (rows,) = (a for a in stmt.axes if a != axis)
    first, second = ctx.tiles[stmt.a], ctx.tiles[stmt.b]
    wide, narrow = (first, second) if stmt.axes[0] == axis else (second, first)
    more = "+= " if stmt.accumulate else "= "
    ctx.out.line(f"{shape_comment(tile)} {more}dot({stmt.a}, {stmt.b}) over {stmt.over}")
    if wide.axes[-1] != axis:
        wide = _packed(ctx, wide, (stmt.over, axis))
    with _parts(ctx, stmt) as stmt:
        for piece in ctx.pieces(axis, tile.storage, blocked=True):
            with ctx.outer(axis, piece):
                for start, count, size in _row_blocks(ctx, rows, piece.width * BYTES[tile.storage]):
                    head = f"for i_{rows}0 in range({count}):"
                    if count == 1:
                        _micro_kernel(ctx, stmt, tile, (wide, narrow), piece, (rows, str(start), size))
                        continue
                    with ctx.out.block(head):
                        place = f"i_{rows}0 * {size}" + (f" + {start}" if start else "")
                        _micro_kernel(ctx, stmt, tile, (wide, narrow), piece, (rows, place, size))


@contextmanager
def _parts(ctx: Context, stmt: Dot) -> Iterator[Dot]:
    """The loop over the parts of a sum, of `sums` products each: operands of a part stay in the cache."""
    if _part(ctx, stmt.over) == ctx.extent(stmt.over):
        yield stmt
        return
    if not stmt.accumulate:
        compute(ctx, Compute(stmt.dst, stmt.dtype, stmt.axes, sympy.Float(0.0), declares=False))
    with ctx.out.block(f"for {stmt.over}_part in range({ctx.extent(stmt.over) // _part(ctx, stmt.over)}):"):
        yield replace(stmt, accumulate=True)


def _part(ctx: Context, over: str) -> int:
    """How many products are summed in registers."""
    part, extent = ctx.meta.get("sums", 0), ctx.extent(over)
    return part if part and extent % part == 0 else extent


def _packed(ctx: Context, tile: Tile, axes: tuple[str, str]) -> Tile:
    """A copy of a tile with other axes innermost."""
    copy = ctx.workspace.temporary(f"{tile.name}_by_{axes[-1]}", tile.dtype, tile.storage, axes)
    ctx.out.line(shape_comment(copy))
    with ctx.loops(*tile.axes):
        ctx.out.line(f"{ctx.names.element(copy)} = {ctx.names.element(tile)}")
    return copy


def _row_blocks(ctx: Context, rows: str, row_bytes: int) -> list[tuple[int, int, int]]:
    """(start, count, size) of equal blocks of rows, and of what is left."""
    extent = ctx.extent(rows)
    most = ctx.meta.get("block") or min(MOST_ROWS, REGISTER_BYTES // row_bytes)
    most = max(1, min(most, REGISTER_BYTES // row_bytes))
    size = -(-extent // -(-extent // most))
    count, left = divmod(extent, size)
    return [(0, count, size)] + ([(count * size, 1, left)] if left else [])


def _micro_kernel(
    ctx: Context,
    stmt: Dot,
    tile: Tile,
    operands: tuple[Tile, Tile],
    piece: Piece,
    block: tuple[str, str, int],
) -> None:
    rows, start, size = block
    axis, dtype = tile.axes[-1], tile.storage
    r = ctx.register(stmt.dst, (size, piece.width), dtype)
    accumulator = f"{r}[i_{rows}, {ctx.lane(axis, piece)}]"
    narrow_tile = operands[1]
    place = f"i_{rows}" if start == "0" else f"{start} + i_{rows}"

    def each_row() -> _Rows:
        return _Rows(ctx, f"for i_{rows} in T.unroll({size}):", rows, place, axis, piece)

    with each_row():
        ctx.out.line(f"{accumulator} = {_zero(dtype)}")
    part = _part(ctx, stmt.over)
    along = (
        f"i_{stmt.over}" if part == ctx.extent(stmt.over) else f"({stmt.over}_part * {part} + i_{stmt.over})"
    )
    with ctx.out.block(f"for i_{stmt.over} in range({part}):"), ctx.names.at(**{stmt.over: along}):
        if narrow_tile.name in ctx.in_place and ctx.meta.get("prefetch"):
            _prefetch(ctx, stmt.over, part, narrow_tile, rows, start, size)
        with each_row():
            narrow, wide = (_element_as(ctx, t, dtype) for t in reversed(operands))
            ctx.out.line(f"{accumulator} = {accumulator} + {narrow} * {wide}")
    with each_row():
        element = ctx.names.element(tile)
        total = f"{element} + {accumulator}" if stmt.accumulate else accumulator
        ctx.out.line(f"{element} = {ctx.printer(dtype=dtype).rounded(total, tile.dtype)}")


def _prefetch(ctx: Context, over: str, part: int, tile: Tile, rows: str, start: str, size: int) -> None:
    """Rows behind those of a block, of which a turn of its loop fetches as much as it reads."""
    at = f"(i_{over} * {size})"
    row, column = f"{start} + {size} + {at} // {part}", f"{at} % {part}"
    if part < ctx.extent(over):
        column = f"{over}_part * {part} + {column}"
    with ctx.names.at(**{rows: row, over: column}):
        element = _element_as(ctx, tile, tile.storage)
    hint = "T.int32(0), T.int32(3), T.int32(1)"  # to read, into all levels, data
    ctx.out.line(f'T.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of({element}), {hint})')


class _Rows:
    """The unrolled loop over the rows of a micro-kernel and, inside, its vector."""

    def __init__(self, ctx: Context, head: str, rows: str, place: str, axis: str, piece: Piece) -> None:
        self._parts = (ctx.out.block(head), ctx.names.at(**{rows: place}), ctx.vector(axis, piece))

    def __enter__(self) -> None:
        for part in self._parts:
            part.__enter__()

    def __exit__(self, *error: object) -> None:
        for part in reversed(self._parts):
            part.__exit__(None, None, None)


def _element_as(ctx: Context, tile: Tile, dtype: str) -> str:
    if tile.name in ctx.in_place:
        tensor, index = ctx.in_place[tile.name]
        printer = ctx.printer(address=True)
        return f"{safe(tensor)}[{', '.join(printer.print(i).text for i in index)}]"
    element = ctx.names.element(tile)
    return element if tile.storage == dtype else f'T.Cast("{dtype}", {element})'

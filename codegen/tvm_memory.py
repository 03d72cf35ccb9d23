"""Load and Store: tiles from and to tensors.

A tensor is read or written in vectors when its unit-stride dimension runs along the tile's innermost
axis; otherwise element by element, the unit-stride axis in the inner loop (a transposition).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import sympy

from ..ir.expr import Expr
from ..ir.kernel import Load, Store, Tensor
from .tvm_context import Context
from .tvm_layout import TENSOR_DTYPES, TILE_DTYPES, Tile, storage_order
from .tvm_names import safe
from .tvm_tiles import shape_comment
from .tvm_transpose import block_width, transpose

_INEQUALITIES = (sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan, sympy.GreaterThan)


def load(ctx: Context, stmt: Load) -> None:
    """A tile from a tensor; where the guard is false, `other`."""
    tile, tensor = ctx.tiles[stmt.dst], _tensor(ctx, stmt.tensor)
    ctx.out.line(f"{shape_comment(tile)} = {tensor.name}[...]")
    index, along = _walk_along(ctx, tensor, stmt.index, tile.axes)

    def read(guard: Expr, into: str = "") -> None:
        value = _load_text(ctx, tensor, index, tile)
        if guard != sympy.true:
            condition = ctx.printer(guard, address=True).text(guard, "bool")
            value = f"T.if_then_else({condition}, {value}, {_fill_text(ctx, stmt, tile)})"
        ctx.out.line(f"{into or ctx.names.element(tile)} = {value}")

    def fill(into: str = "") -> None:
        ctx.out.line(f"{into or ctx.names.element(tile)} = {_fill_text(ctx, stmt, tile)}")

    if (width := _blocks(ctx, tile.axes, along, stmt.guard, tile.storage)) and along:

        def read_block(into: str) -> None:
            with _where(ctx, stmt.guard):
                read(sympy.true, into)
            if stmt.guard != sympy.true:
                with ctx.out.block("else:"):
                    fill(into)

        def write_block(value: str) -> None:
            ctx.out.line(f"{ctx.names.element(tile)} = {value}")

        with ctx.loops(*(a for a in tile.axes[:-1] if a != along)):
            transpose(ctx, (along, tile.axes[-1]), tile.storage, width, read_block, write_block, along)
        return
    _guarded(ctx, tile.axes, along, stmt.guard, tile.storage, read, fill)


def store(ctx: Context, stmt: Store) -> None:
    """Elements of an expression to a tensor, where the guard holds."""
    tensor = _tensor(ctx, stmt.tensor)
    axes = storage_order(stmt.axes, ctx.kernel.lanes)
    index, along = _walk_along(ctx, tensor, stmt.index, axes)
    if stmt.adds and along is not None and not _unit_step(ctx, tensor, index, along):
        along = None  # one element for every lane: vectors would keep one lane's sum
    narrow = TENSOR_DTYPES[tensor.dtype]
    value = stmt.value
    source: Tile | None = None
    coordinates = axes and sympy.Symbol(axes[-1], integer=True) in value.free_symbols
    if axes and (along != axes[-1] or coordinates):
        source = _staged(ctx, stmt, axes, narrow)
    ctx.out.line(f"# {tensor.name}[...] = {'x'.join(str(ctx.extent(a)) for a in axes)} {tensor.dtype}")

    if source and along and (width := _blocks(ctx, axes, along, stmt.guard, narrow)):
        block = source

        def write_block(value: str) -> None:
            with _where(ctx, stmt.guard):
                place = _place(ctx, tensor, index)
                ctx.out.line(f"{place} = {f'{place} + {value}' if stmt.adds else value}")

        def read_block(into: str) -> None:
            ctx.out.line(f"{into} = {ctx.names.element(block)}")

        with ctx.loops(*(a for a in axes[:-1] if a != along)):
            transpose(ctx, (axes[-1], along), narrow, width, read_block, write_block, along)
        return

    def write(guard: Expr) -> None:
        with _where(ctx, guard):
            place = _place(ctx, tensor, index)
            text = (
                ctx.names.element(source)
                if source
                else ctx.printer(value, dtype=_wide(tensor)).text(value, _wide(tensor))
            )
            text = _cast(text, source.storage if source else _wide(tensor), narrow)
            ctx.out.line(f"{place} = {f'{place} + {text}' if stmt.adds else text}")

    _guarded(ctx, axes, along, stmt.guard, _wide(tensor), write, None)


def _where(ctx: Context, guard: Expr) -> AbstractContextManager[None]:
    """A branch, where there is a condition."""
    if guard == sympy.true:
        return nullcontext()
    return ctx.out.block(f"if {ctx.printer(guard, address=True).text(guard, 'bool')}:")


def _blocks(ctx: Context, axes: tuple[str, ...], along: str | None, guard: Expr, dtype: str) -> int:
    """The width of blocks that are transposed between the axis that walks memory and the innermost; 0 where
    that is one, or a vector along memory is there in part."""
    if along is None or along == axes[-1] or ctx.depends(guard, along):
        return 0
    return block_width(ctx, (along, axes[-1]), dtype)


def _tensor(ctx: Context, name: str) -> Tensor:
    return ctx.names.tensors[name]


def _wide(tensor: Tensor) -> str:
    return TILE_DTYPES[tensor.dtype]


def _cast(text: str, dtype: str, wanted: str) -> str:
    return text if dtype == wanted else f'T.Cast("{wanted}", {text})'


def _staged(ctx: Context, stmt: Store, axes: tuple[str, ...], narrow: str) -> Tile:
    """The values to store as a tile in the tensor's dtype, converted in vectors."""
    plain = ctx.tiles.get(str(stmt.value)) if stmt.value.is_Symbol else None
    if plain is not None and plain.storage == narrow and plain.axes == axes:
        return plain
    tensor = _tensor(ctx, stmt.tensor)
    tile = ctx.workspace.temporary(f"{stmt.tensor}_out", tensor.dtype, narrow, axes)
    ctx.out.line(shape_comment(tile))

    def assign() -> None:
        text = ctx.printer(stmt.value, dtype=_wide(tensor)).text(stmt.value, _wide(tensor))
        ctx.out.line(f"{ctx.names.element(tile)} = {_cast(text, _wide(tensor), narrow)}")

    with ctx.loops(*axes[:-1]):
        ctx.each(axes[-1], _wide(tensor), assign, stmt.value)
    return tile


# where elements are -------------------------------------------------------------------------------


def _walk_along(
    ctx: Context, tensor: Tensor, index: tuple[Expr, ...], axes: tuple[str, ...]
) -> tuple[tuple[Expr, ...], str | None]:
    """The axis that walks through memory one element a step, best the innermost; None if there is none.

    Integer tiles in the index are replaced by what they stand for if that is what shows it."""
    for axis in reversed(axes):
        for spelled in (index, tuple(i.xreplace(ctx.definitions) for i in index)):
            if _unit_step(ctx, tensor, spelled, axis):
                return spelled, axis
    if axes and not any(ctx.depends(i, axes[-1]) for i in index):
        return index, axes[-1]  # the same element for every lane
    return index, None


def _unit_step(ctx: Context, tensor: Tensor, index: tuple[Expr, ...], axis: str) -> bool:
    symbol = sympy.Symbol(axis, integer=True)
    for d, i in enumerate(index):
        if d != tensor.unit and ctx.depends(i, axis):
            return False
    return tensor.unit is not None and not ctx.depends(index[tensor.unit] - symbol, axis)


def _place(ctx: Context, tensor: Tensor, index: tuple[Expr, ...]) -> str:
    printer = ctx.printer(address=True)
    return f"{safe(tensor.name)}[{', '.join(printer.print(i).text for i in index)}]"


def _load_text(ctx: Context, tensor: Tensor, index: tuple[Expr, ...], tile: Tile) -> str:
    text = _cast(_place(ctx, tensor, index), TENSOR_DTYPES[tensor.dtype], tile.storage)
    if tensor.dtype == tile.dtype:
        return text
    return ctx.printer(dtype=tile.storage).rounded(text, tile.dtype)


def _fill_text(ctx: Context, stmt: Load, tile: Tile) -> str:
    return ctx.printer(stmt.other, dtype=tile.storage).text(stmt.other, tile.storage)


# guards -------------------------------------------------------------------------------------------


def _guarded(
    ctx: Context,
    axes: tuple[str, ...],
    along: str | None,
    guard: Expr,
    dtype: str,
    body: Callable[[Expr], None],
    fill: Callable[[], None] | None,
) -> None:
    """Loops over axes with the one that walks memory inside; the part of the guard that it does not
    change becomes a branch around it."""
    if not axes:
        body(guard)
        return
    vector = along == axes[-1]
    inner = along or axes[-1]
    # A transposed tile is walked lanes first, so that memory is read or written in order.
    outer = [a for a in axes if a != inner] if vector else [a for a in reversed(axes) if a != inner]
    parts = sympy.And.make_args(guard)
    around = sympy.And(*(p for p in parts if not ctx.depends(p, inner)))
    within = sympy.And(*(p for p in parts if ctx.depends(p, inner)))

    def run() -> None:
        _inner(ctx, inner, within, dtype, vector, body)

    with ctx.loops(*outer):
        if around == sympy.true:
            run()
            return
        with ctx.out.block(f"if {ctx.printer(around, address=True).text(around, 'bool')}:"):
            run()
        if fill is not None:
            with ctx.out.block("else:"):
                ctx.each(inner, dtype, fill) if vector else _scalar(ctx, inner, fill)


def _scalar(ctx: Context, axis: str, body: Callable[[], None]) -> None:
    with ctx.loops(axis):
        body()


def _inner(
    ctx: Context, axis: str, guard: Expr, dtype: str, vector: bool, body: Callable[[Expr], None]
) -> None:
    if vector and guard == sympy.true:
        ctx.each(axis, dtype, lambda: body(sympy.true), address=True)
        return
    resolved = guard.xreplace(ctx.definitions)
    if vector and _convex(ctx, resolved, axis):
        # It holds for all lanes if it holds for the first and the last.
        symbol = sympy.Symbol(axis, integer=True)
        ends = sympy.And(*(resolved.xreplace({symbol: sympy.Integer(x)}) for x in (0, ctx.extent(axis) - 1)))
        with ctx.out.block(f"if {ctx.printer(ends, address=True).text(ends, 'bool')}:"):
            ctx.each(axis, dtype, lambda: body(sympy.true), address=True)
        with ctx.out.block("else:"):
            _scalar(ctx, axis, lambda: body(guard))
        return
    _scalar(ctx, axis, lambda: body(guard))


def _convex(ctx: Context, guard: Expr, axis: str) -> bool:
    """Whether the coordinates of an axis that satisfy a guard form an interval."""
    symbol = sympy.Symbol(axis, integer=True)
    for part in sympy.And.make_args(guard):
        if not isinstance(part, _INEQUALITIES):
            return False
        low: Any = part.lhs
        difference = (low - part.rhs).expand()
        slope = difference.coeff(symbol)
        rest = (difference - slope * symbol).expand()
        if not slope.is_Integer or ctx.depends(rest, axis):
            return False
    return True

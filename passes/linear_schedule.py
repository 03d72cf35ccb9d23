"""linear_schedule: rows and widths of operations of linear attention, as Chunks on each.

Before::  %o = linear_values ...
After::   %o = linear_values ... {chunks = Chunks(rows=64, width=64, meta=(('stages', 2), ('warps', 4)))}

A program holds the state of a head, [features, values], and tiles of the rows of a chunk. Within a chunk,
products of rows with rows take rows * (features + values) operations a row, half of them for nothing, and the
state 2 * features * values: chunks of at most as many rows as a head has features. States that registers do
not hold are cut into columns. Features that a softmax normalises stay together.

Leaves alone: operations that have chunks; all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..ir.graph import Graph, Op
from ..ir.linear import Chunks
from .linear_fuse import PRODUCTS
from .linear_spec import BYTES, LinearSpec

CPU_ROWS = 32
CPU_WIDTH = 256
TILES = 96 * 1024  # bytes of rows that the shared memory of a program holds
# By warps: what the tiles of a thread may take by `_registers`, so that few of them spill.
REGISTERS = {4: 200, 8: 140}
SCALAR = 48  # the same where products run on no tensor core, which reads whole operands into registers
LEAST = 16


def schedule_linear(graph: Graph, spec: LinearSpec) -> Graph:
    """Chunks for every operation that has none."""

    chosen = {op: choose(op, spec) for op in graph.ops if op.kind in PRODUCTS and op.attr("chunks") is None}
    rows: dict[tuple[str, ...], int] = {}
    for op, chunks in chosen.items():
        rows[_source(op)] = min(chunks.rows, rows.get(_source(op), chunks.rows))

    def rule(op: Op) -> Op | None:
        return op.with_attrs(chunks=replace(chosen[op], rows=rows[_source(op)])) if op in chosen else None

    return graph.map_ops(rule)


def _source(op: Op) -> tuple[str, ...]:
    """What an operation sums over: those with the same share the states of segments, and so their length."""
    return tuple(name for role, name in zip(op.attr("operands"), op.inputs, strict=True) if role in "fg")


def choose(op: Op, spec: LinearSpec) -> Chunks:
    """The default chunks of one operation."""
    values = op.kind == "linear_values"
    if spec.is_cpu:
        across = spec.v_size if values else spec.qk_size
        whole = not values and _normalises(op)
        return Chunks(CPU_ROWS, spec.split, across if whole else min(across, CPU_WIDTH))
    tile = _Tile(op, spec)
    for warps, rows, width in tile.candidates():
        if tile.fits(warps, rows, width):
            break
    return Chunks(rows, spec.split, width, (("stages", 2), ("warps", warps)))


class _Tile:
    """What the tiles of a program on a GPU take."""

    def __init__(self, op: Op, spec: LinearSpec) -> None:
        self.values, self.whole = op.kind == "linear_values", _normalises(op)
        self.parts = len(spec.q_map.parts)
        self.size, self.v_size = padded(spec.qk_size), padded(spec.v_size)
        self.bytes = BYTES[spec.operand]
        self.scalar = spec.operand == "f64" or (spec.operand == "f32" and spec.product_precision == "ieee")
        self.narrow = spec.operand == "bf16"
        self.within = op.attr("order") != "all"

    def candidates(self) -> Iterator[tuple[int, int, int]]:
        """(warps, rows, width), the best first: long chunks, few columns' sums done twice."""
        across = self.v_size if self.values else self.size
        widths = [across]
        while widths[-1] > LEAST and (self.values or not self.whole):
            widths.append(widths[-1] // 2)
        for width in widths:
            longest = () if self.within else (128,)  # where a program reads a state for one chunk
            yield from ((warps, rows, width) for rows in (*longest, 64, 32) for warps in (4, 8))
        yield from ((warps, LEAST, widths[-1]) for warps in (4, 8))

    def fits(self, warps: int, rows: int, width: int) -> bool:
        features = self.parts * (self.size if self.values else width)
        values = width if self.values else self.v_size
        held = self.bytes * rows * (features + values)
        most = SCALAR if self.scalar else REGISTERS[warps]
        return 3 * held <= TILES and self._registers(warps, rows, features, values) <= most

    def _registers(self, warps: int, rows: int, features: int, values: int) -> float:
        word = self.bytes / 4
        state = features * values * ((1.5 if self.narrow else 1) if self.within else 0.75)
        sides = rows * (features + values) * word * (2 if self.within else 1)
        pairs = rows * rows * (1.5 if self.narrow else 1) if self.within else 0
        got = rows * (values if self.values else features)
        return (state + sides + pairs + got) * max(1, word) ** self.scalar / (32 * warps)


def _normalises(op: Op) -> bool:
    """Whether all features of a row have to be at hand."""
    return any(by is not None and by.softmax for by in (op.attr("f_map"), op.attr("out_map")))


def padded(extent: int) -> int:
    return max(16, 1 << (extent - 1).bit_length())

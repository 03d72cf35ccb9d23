"""schedule: rows and widths of operations of linear attention, as Chunks on each.

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

from ...ir.graph import Graph, Op
from ...ir.linear import Chunks
from .fuse import PRODUCTS
from .spec import BYTES, LinearSpec

CPU_ROWS = 32
CPU_WIDTH = 256
CPU_STATE = 1 << 16  # numbers of a state that a joined operation holds
JOINED = ("read_gradients", "give_gradients")
TILES = 96 * 1024  # bytes of rows that the shared memory of a program holds
# By warps: what the tiles of a thread may take by `_registers`, so that few of them spill.
REGISTERS = {4: 200, 8: 140}
SCALAR = 48  # the same where products run on no tensor core, which reads whole operands into registers
LEAST = 16


def schedule_linear(graph: Graph, spec: LinearSpec) -> Graph:
    """Chunks for every operation that has none."""

    kinds = (*PRODUCTS, *JOINED)
    chosen = {op: choose(graph, op, spec) for op in graph.ops if op.kind in kinds and not op.attr("chunks")}
    rows: dict[tuple[str, ...], int] = {}
    for op, chunks in chosen.items():
        rows[_source(op)] = min(chunks.rows, rows.get(_source(op), chunks.rows))

    def rule(op: Op) -> Op | None:
        return op.with_attrs(chunks=replace(chosen[op], rows=rows[_source(op)])) if op in chosen else None

    return graph.map_ops(rule)


def _source(op: Op) -> tuple[str, ...]:
    """Operations with the same share the states of segments, and so their length: those of an order that sum
    over the same rows."""
    if op.attr("order") is None:
        return (op.output.name,)
    return tuple(name for role, name in zip(op.attr("operands"), op.inputs, strict=True) if role in "fg")


def choose(graph: Graph, op: Op, spec: LinearSpec) -> Chunks:
    """The default chunks of one operation."""
    tile = Tile(op, spec)
    chunks = tile.chunks() or tile.least()
    # Of states over all rows, spec.split speaks of keys; there is no telling how many queries are too many.
    rows = graph.values[op.inputs[0]].shape[2]
    return replace(chunks, split=True) if op.kind == "linear_states" and rows == "L" else chunks


class Tile:
    """What the tiles of a program take."""

    def __init__(self, op: Op, spec: LinearSpec) -> None:
        self.kind, self.spec = op.kind, spec
        self.by_features, self.whole = op.kind.endswith("_features"), _normalises(op)
        self.joined = op.kind in JOINED
        self.parts = len(spec.q_map.parts)
        self.size, self.v_size = padded(spec.qk_size), padded(spec.v_size)
        self.bytes = BYTES[spec.operand]
        self.scalar = spec.operand == "f64" or (spec.operand == "f32" and spec.product_precision == "ieee")
        self.narrow = spec.operand == "bf16"
        self.within = op.attr("order") is not None

    def chunks(self) -> Chunks | None:
        """The best that fits; None if nothing does."""
        if self.spec.is_cpu:
            across = self.spec.qk_size if self.by_features else self.spec.v_size
            if self.joined:
                held = self.parts * self.spec.qk_size * self.spec.v_size
                return Chunks(CPU_ROWS, self.spec.split, across) if held <= CPU_STATE else None
            whole = self.by_features and self.whole
            return Chunks(CPU_ROWS, self.spec.split, across if whole else min(across, CPU_WIDTH))
        for warps, rows, width in self.candidates():
            if self.fits(warps, rows, width):
                return Chunks(rows, self.spec.split, width, (("stages", self.stages), ("warps", warps)))
        return None

    @property
    def streams(self) -> bool:
        """Whether rows are read, multiplied by a state and written: what waits for memory, not for products.

        On an H100 (64 features and values, bfloat16) 64 rows, 8 warps and 4 stages took 0.070 ms for what
        128 rows, 4 warps and 2 stages took 0.101 for (benchmarks/linear_sweep.py)."""
        return self.kind == "read_values" and not self.spec.is_cpu

    @property
    def stages(self) -> int:
        return 4 if self.streams else 2

    def least(self) -> Chunks:
        """What takes least."""
        width = self.widths()[-1]
        return Chunks(LEAST, self.spec.split, width, (("stages", 2), ("warps", 8)))

    def widths(self) -> list[int]:
        widths = [self.size if self.by_features else self.v_size]
        while widths[-1] > LEAST and not self.joined and not (self.by_features and self.whole):
            widths.append(widths[-1] // 2)
        return widths

    def candidates(self) -> Iterator[tuple[int, int, int]]:
        """(warps, rows, width), the best first: long chunks, few columns' sums done twice."""
        if self.streams:
            yield from ((8, 64, width) for width in self.widths()[:1])
        for width in self.widths():
            longest = () if self.within else (128,)
            yield from ((warps, rows, width) for rows in (*longest, 64, 32) for warps in (4, 8))
        yield (4, LEAST, self.widths()[-1])

    def fits(self, warps: int, rows: int, width: int) -> bool:
        features = self.parts * (width if self.by_features else self.size)
        values = self.v_size if self.by_features else width
        held = self.bytes * rows * (features if self.streams else features + values)
        most = SCALAR if self.scalar else REGISTERS[warps]
        return (self.stages + 1) * held <= TILES and self._registers(warps, rows, features, values) <= most

    def _registers(self, warps: int, rows: int, features: int, values: int) -> float:
        word = self.bytes / 4
        sides = rows * (features + values) * word * (2 if self.within else 1)
        pairs = rows * rows * (1.5 if self.narrow else 1) if self.within else 0
        match self.kind:
            case "linear_states":
                state, got = features * values, 0
            case "read_gradients":
                state, got = features * values * 1.25, rows * (3 * features + values)
            case "give_gradients":
                state, got = features * values * 0.75, rows * (2 * features + values)
            case _:
                state = features * values * ((1.5 if self.narrow else 1) if self.within else 0.75)
                got = rows * (features if self.by_features else values)
        return (state + sides + pairs + got) * max(1, word) ** self.scalar / (32 * warps)


def _normalises(op: Op) -> bool:
    """Whether all features of a row have to be at hand."""
    return any(by is not None and by.softmax for by in (op.attr("f_map"), op.attr("out_map")))


def padded(extent: int) -> int:
    return max(16, 1 << (extent - 1).bit_length())

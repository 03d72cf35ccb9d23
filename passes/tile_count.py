"""tile_count: the tiles that a planned kernel visits on one problem, by evaluating its loops.

On very long sequences, those of a sample of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy

from ..ir.evaluate import evaluate
from ..ir.expr import integer
from ..ir.plan import Group, Loops, Schedule
from .tilesets import column_index, coordinates, linear, row_index

BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "f32": 4, "f64": 8}  # tf32: f32 whose products are rounded to it
MAX_COUNTED = 1 << 20  # key tiles evaluated one by one; beyond it, row tiles are sampled evenly
FEW = 16  # row tiles that are always looked at
TILE = "row tile"  # beside the names of coordinates: which of the counted row tiles a key tile belongs to

Plan = tuple[Group, Schedule, Loops]


@dataclass(frozen=True)
class Size:
    """One problem. kv_heads: 0 stands for as many as heads.

    params: the mask's integers and captured tensors (arrays), by name."""

    q_len: int
    kv_len: int
    batch: int = 1
    heads: int = 1
    kv_heads: int = 0
    qk_size: int = 64
    v_size: int = 64
    dtype: str = "f32"
    params: Mapping[str, Any] | None = None

    @property
    def io_bytes(self) -> int:
        """Bytes of q, k, v and o."""
        per_query, per_key = self.heads * self.q_len, (self.kv_heads or self.heads) * self.kv_len
        return self.batch * (per_query + per_key) * (self.qk_size + self.v_size) * BYTES[self.dtype]

    @property
    def state_bytes(self) -> int:
        """Bytes that a kernel after the first moves more: the output read, a sum a row written and read."""
        row = self.v_size * BYTES[self.dtype] + 2 * max(4, BYTES[self.dtype])
        return self.batch * self.heads * self.q_len * row

    @property
    def pair_flops(self) -> int:
        """Floating-point operations of one pair: its score, and its share of the output."""
        return 2 * (self.qk_size + self.v_size)


@dataclass(frozen=True)
class Tiles:
    """How many row tiles one kernel has, and how many key tiles they visit, partly and wholly attended.

    Counts are over all batches and heads; exact is False when they come from a sample. heaviest: the
    most key tiles that one row tile visits."""

    rows: int
    partial: int
    full: int
    exact: bool = True
    heaviest: int = field(default=0, compare=False)

    @property
    def visited(self) -> int:
        return self.partial + self.full


def count_tiles(plan: Plan, size: Size) -> Tiles:
    """The tiles that one kernel visits, by evaluating its loops."""
    group, schedule, loops = plan
    names, extents = _grid(group, schedule, loops, size)
    total = math.prod(extents)
    if total == 0:
        return Tiles(0, 0, 0)
    values, loop_names = _values(size), coordinates(group.order)[2]
    used = _symbols(loops)
    lets = [(name, term) for name, term in group.lets if integer(name) in used]

    def sample(count: int) -> tuple[int, int, int]:
        """(visited, full) key tiles of `count` row tiles, evenly spread, and the most that one visits."""
        flat = (2 * np.arange(count) + 1) * total // (2 * count)
        cells: dict[str, Any] = dict(zip(names, np.unravel_index(flat, extents), strict=True))
        cells |= {n: np.broadcast_to(evaluate(e, values | cells), count) for n, e in lets}
        cells[TILE] = np.arange(count)
        here = _expand(cells, values, loops, loop_names)
        touched, full = _judged(plan, values | here, _length(here))
        return int(touched.sum()), int(full.sum()), int(np.bincount(here[TILE][touched], minlength=1).max())

    taken = total
    if total * (size.kv_len // math.prod(schedule.cols) + 1) > MAX_COUNTED:
        first = min(total, FEW)
        each = max(1, sample(first)[0] // first)
        taken = min(total, max(FEW, MAX_COUNTED // each))
    visited, full, heaviest = sample(taken)
    shared = _repeated(names, size)
    visited, full = (n * total * shared // taken for n in (visited, full))
    return Tiles(total * shared, visited - full, full, taken == total, heaviest)


def _judged(plan: Plan, values: dict[str, Any], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of these key tiles are touched, and which of those are full; of tiles left open: touched."""
    group, schedule, loops = plan
    lists, rows = loops.lists, 1
    if lists is not None:
        values = {
            n: v[:, None] if isinstance(v, np.ndarray) and v.shape == (count,) else v
            for n, v in values.items()
        }
        inner = values | {"at": np.arange(schedule.cols[0])}
        key = linear(group.order, column_index(group.order, schedule, [integer("at")]))
        inner["k"] = np.minimum(evaluate(key, inner), values["kv_len"] - 1)
        reduce = {"min": np.min, "max": np.max, "any": np.any, "all": np.all}
        for s in lists.summaries:
            found = np.broadcast_to(evaluate(s.expr, inner), (count, schedule.cols[0]))
            values[s.name] = reduce[s.op](found, axis=1, keepdims=True)
        rows = schedule.rows[0] if lists.by_row else 1
        row = linear(group.order, row_index(group.order, schedule, [integer("at")]))
        values["q"] = np.minimum(evaluate(row, values | {"at": np.arange(rows)}), values["q_len"] - 1)
    shape = (count,) if lists is None else (count, rows)
    touched, full = (
        np.broadcast_to(evaluate(e, values), shape).reshape(count, rows) for e in (loops.touched, loops.full)
    )
    some = np.any(touched, axis=1)
    return some, np.all(full, axis=1) & some


def _values(size: Size) -> dict[str, Any]:
    lengths = {"q_len": size.q_len, "kv_len": size.kv_len, "b": 0, "h": 0}
    given = dict(size.params or {})
    extents = {f"{name}_{d}": n for name, a in given.items() for d, n in enumerate(np.shape(a))}
    return {**lengths, "B": size.batch, "Hq": size.heads, **given, **extents}


def _grid(group: Group, schedule: Schedule, loops: Loops, size: Size) -> tuple[list[str], tuple[int, ...]]:
    """Names and extents of the coordinates that row tiles differ in; batch and head only where loops do."""
    grid = {}
    used = _symbols(loops)
    used |= {s for name, term in group.lets if integer(name) in used for s in term.free_symbols}
    for name, count in (("b", size.batch), ("h", size.heads)):
        if integer(name) in used:
            grid[name] = count
    inner = math.prod(dim.width or 1 for dim in group.order.dims[1:])
    for d, dim in enumerate(group.order.dims):
        extent = dim.width if dim.width is not None else -(-size.q_len // inner)
        grid[f"m{d}"] = -(-extent // (dim.row_stride * schedule.rows[d]))
        if dim.row_stride > 1:
            grid[f"r{d}"] = dim.row_stride
    return list(grid), tuple(grid.values())


def _symbols(loops: Loops) -> set[sympy.Basic]:
    bounds = [e for spans in loops.spans for span in spans for e in (span.lo, span.hi)]
    named = [s.expr for s in loops.lists.summaries] if loops.lists else []
    return set().union(*(e.free_symbols for e in (*bounds, loops.touched, loops.full, *named)))


def _repeated(names: list[str], size: Size) -> int:
    """How many batches and heads share each counted row tile."""
    return (1 if "b" in names else size.batch) * (1 if "h" in names else size.heads)


def _expand(cells: dict[str, Any], values: dict[str, Any], loops: Loops, names: list[str]) -> dict[str, Any]:
    """Coordinates of every key tile in the spans of these row tiles, as arrays of one length."""
    for name, spans in zip(names, loops.spans, strict=True):
        count = _length(cells)
        found = [{**{n: a[:0] for n, a in cells.items()}, name: np.arange(0)}]
        for span in spans:
            low, high = (np.broadcast_to(evaluate(e, values | cells), count) for e in (span.lo, span.hi))
            lengths = np.maximum(high - low, 0)
            owner = np.repeat(np.arange(count), lengths)
            first = np.cumsum(lengths) - lengths
            tiles = low[owner] + np.arange(owner.size) - first[owner]
            found.append({**{n: a[owner] for n, a in cells.items()}, name: tiles})
        cells = {n: np.concatenate([f[n] for f in found]) for n in found[0]}
    return cells


def _length(cells: dict[str, Any]) -> int:
    return len(next(iter(cells.values())))

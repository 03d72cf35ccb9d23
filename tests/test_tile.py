"""tile: spans cover every tile with a point exactly once, and full tiles are full."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import sympy

from gossamer.ir.evaluate import evaluate
from gossamer.ir.mask import Mask
from gossamer.ir.order import Order, OrderDim
from gossamer.ir.plan import Group, Schedule
from gossamer.passes.distance import anchor
from gossamer.passes.tile import plan_loops
from gossamer.passes.tilesets import column_index, linear, row_index

GRID = Order((OrderDim(), OrderDim(20)))


def residue(stride):
    return Order((OrderDim(None, stride, stride, 1, 0),))


CASES = [
    ("mask() { true }", Order(), ()),
    ("mask() { k <= q }", Order(), ()),
    ("mask(p0, p1) { q - p0 <= k and k <= q + p1 }", Order(), (5, 0)),
    ("mask(p0, p1) { q - p0 <= k and k <= q + p1 }", Order(), (-3, 20)),
    ("mask(p0, p1) { q - p0 <= k and k <= q + p1 }", Order(), (-3, 2)),
    ("mask(p0, p1) { abs(q - k) <= p0 or q < p1 or k < p1 }", Order(), (7, 3)),
    ("mask(p0, p1) { abs(q - k) <= p0 or q < p1 or k < p1 }", Order(), (0, 40)),
    ("mask(p0) { k <= q or k < p0 }", Order(), (33,)),
    ("mask() { k <= q and q // 24 == k // 24 }", Order(), ()),
    ("mask() { q // 10 == k // 10 }", Order(), ()),
    ("mask() { k <= q and (q // 16 == k // 16 or k % 16 >= 12) }", Order(), ()),
    ("mask(p0) { (q - k) % 4 == 0 and abs(q - k) <= 4 * p0 }", residue(4), (3,)),
    ("mask() { (q - k) % 16 == 0 }", residue(16), ()),
    ("mask(p0) { (q - k) % 8 == 0 and (q - k >= p0 or k - q >= p0) }", residue(8), (20,)),
    ("mask() { (q + k) % 3 == 1 }", Order((OrderDim(None, 3, 3, 2, 1),)), ()),
    ("mask() { k % 5 == 2 and k <= q }", Order((OrderDim(None, 1, 5, 0, 2),)), ()),
    ("mask() { abs(q // 20 - k // 20) <= 2 and abs(q % 20 - k % 20) <= 3 }", GRID, ()),
    ("mask() { k // 20 <= q // 20 and q % 20 == k % 20 }", GRID, ()),
    ("mask() { (q - k) % 3 == 0 and k > q }", Order(), ()),
    ("mask() { false }", Order(), ()),
]


def holds(expr, names):
    return bool(evaluate(expr, names))


@pytest.mark.parametrize("text, order, params", CASES)
@pytest.mark.parametrize("sizes", [(8, 4), (16, 16), (5, 7)], ids=str)
@pytest.mark.parametrize("anchored", [False, True])
def test_spans_cover_each_touched_tile_once(text, order, params, sizes, anchored):
    mask = Mask.parse(text)
    rank = len(order.dims)
    rows = (sizes[0],) if rank == 1 else (2, sizes[0] // 2)
    cols = (sizes[1],) if rank == 1 else (2, max(1, sizes[1] // 2))
    schedule = Schedule(rows, cols)
    group = Group(order, str(mask.may), str(mask.must), mask.predicate)
    if anchored:
        schedule = replace(schedule, anchors=tuple(anchor(group, d) for d in range(rank)))
    loops = plan_loops(group, schedule)
    for q_len, kv_len in ((61, 47), (40, 83)):
        check(mask, order, schedule, loops, params, q_len, kv_len)


def check(mask, order, schedule, loops, params, q_len, kv_len):
    dense = mask.evaluate(0, 0, np.arange(q_len)[:, None], np.arange(kv_len), params, (), q_len, kv_len)
    values = dict(zip(mask.params, params, strict=True)) | {"q_len": q_len, "kv_len": kv_len, "b": 0, "h": 0}
    for at in row_tiles(order, schedule, q_len):
        here = values | at
        rows = points(order, schedule, schedule.rows, row_index, here, q_len)
        visited = []
        for tile in key_tiles(loops, here, 0):
            assert tile not in visited, f"{at}: key tile {tile} is visited twice"
            visited.append(tile)
        covered = np.zeros(kv_len, bool)
        for tile in visited:
            there = here | {f"n{d}": n for d, n in enumerate(tile)}
            if not holds(loops.touched, there):
                continue
            columns = points(order, schedule, schedule.cols, column_index, there, kv_len)
            if holds(loops.full, there):
                assert dense[np.ix_(rows, columns)].all(), f"{at}, {tile}: not full"
                assert len(columns) == np.prod(schedule.cols)
            assert not covered[columns].any()
            covered[columns] = True
        assert covered[dense[rows].any(0)].all(), f"{at}: points are missed"


def row_tiles(order, schedule, q_len):
    inner = np.prod([d.width for d in order.dims[1:]], dtype=int)
    ranges = []
    for d, dim in enumerate(order.dims):
        extent = -(-q_len // inner) if d == 0 else dim.width
        ranges.append([(f"m{d}", m) for m in range(-(-extent // (dim.row_stride * schedule.rows[d])))])
        if dim.row_stride > 1:
            ranges.append([(f"r{d}", r) for r in range(dim.row_stride)])
    return [dict(choice) for choice in itertools.product(*ranges)]


def key_tiles(loops, values, depth):
    if depth == len(loops.spans):
        yield ()
        return
    for span in loops.spans[depth]:
        low, high = (int(evaluate(e, values)) for e in (span.lo, span.hi))
        assert low >= 0 or high <= low
        for n in range(low, high):
            for rest in key_tiles(loops, values | {f"n{depth}": n}, depth + 1):
                yield (n, *rest)


def points(order, schedule, tile, index, values, limit):
    """Linear indices of a tile that lie inside the widths and below the limit."""
    found = []
    for inner in itertools.product(*(range(t) for t in tile)):
        parts = [int(evaluate(e, values)) for e in index(order, schedule, [sympy.Integer(i) for i in inner])]
        if all(0 <= p < d.width for p, d in zip(parts[1:], order.dims[1:], strict=True)):
            at = int(evaluate(linear(order, [sympy.Integer(p) for p in parts]), values))
            if 0 <= at < limit:
                found.append(at)
    return np.array(found, int)

"""The cost model: tiles are counted as the loops run them, predictions order as they must."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from gossamer.ir.errors import InputError
from gossamer.ir.expr import integer
from gossamer.ir.mask import Mask
from gossamer.ir.order import Order, OrderDim
from gossamer.ir.plan import Group, Lists, Schedule
from gossamer.passes import tile_count
from gossamer.passes.cost import Device, Estimate, Size, Tiles, count_tiles, estimate, floor
from gossamer.passes.devices import GPUS, cpu, device, device_of
from gossamer.passes.tile import plan_loops

# Round numbers: 1 TFLOP/s, 100 GB/s, 4 workers.
TOY = Device("toy", (("f32", 1e12), ("bf16", 4e12)), 1e11, 1e11, 4, 1e-6, 1e-5)
GRID = Order((OrderDim(), OrderDim(20)))
RESIDUE = Order((OrderDim(None, 4, 4, 1, 0),))


def plan(text, order=None, rows=(16,), cols=(8,)):
    mask = Mask.parse(text)
    group = Group(order or Order(), str(mask.may), str(mask.must), mask.predicate)
    schedule = Schedule(rows, cols)
    return group, schedule, plan_loops(group, schedule)


def counted_densely(dense, rows, cols):
    """Tiles of a 0/1 matrix in the natural order; a tile cut short by the number of keys is not full."""
    partial = full = 0
    for top, left in itertools.product(range(0, dense.shape[0], rows), range(0, dense.shape[1], cols)):
        tile = dense[top : top + rows, left : left + cols]
        whole = tile.all() and tile.shape[1] == cols
        full, partial = full + whole, partial + (tile.any() and not whole)
    return -(-dense.shape[0] // rows), partial, full


# ---- counting tiles ----


@pytest.mark.parametrize("q_len, kv_len", [(64, 64), (61, 47), (40, 83), (1, 1)])
@pytest.mark.parametrize(
    "text, params",
    [
        ("mask() { true }", {}),
        ("mask() { k <= q }", {}),
        ("mask(p0) { abs(q - k) <= p0 }", {"p0": 9}),
        ("mask(p0) { abs(q - k) <= p0 or q < 3 or k < 3 }", {"p0": 5}),
    ],
)
def test_natural_tiles_are_those_of_the_matrix(text, params, q_len, kv_len):
    mask = Mask.parse(text)
    # Loops are not clipped to q_len: the last row tile runs as if all its rows were there.
    q = np.arange(-(-q_len // 16) * 16)[:, None]
    dense = mask.evaluate(0, 0, q, np.arange(kv_len), list(params.values()), (), q_len, kv_len)
    found = count_tiles(plan(text), Size(q_len, kv_len, params=params))
    assert found == Tiles(*counted_densely(dense, 16, 8))


def test_residue_order_counts_every_class():
    found = count_tiles(plan("mask() { (q - k) % 4 == 0 }", RESIDUE), Size(128, 128))
    assert found == Tiles(rows=8, partial=0, full=8 * 4)


def test_box_order_counts_both_dimensions():
    text = "mask() { abs(q // 20 - k // 20) <= 1 and abs(q % 20 - k % 20) <= 20 }"
    found = count_tiles(plan(text, GRID, (2, 20), (2, 20)), Size(200, 200))
    assert found.rows == 5 and found.visited == 2 + 3 * 3 + 2


def test_batches_and_heads_multiply():
    one = count_tiles(plan("mask() { k <= q }"), Size(64, 64))
    many = count_tiles(plan("mask() { k <= q }"), Size(64, 64, batch=2, heads=3))
    assert (many.rows, many.partial, many.full) == (6 * one.rows, 6 * one.partial, 6 * one.full)


def test_heads_that_differ_are_counted_apart():
    found = count_tiles(plan("mask() { abs(q - k) <= 16 * h }"), Size(64, 64, batch=2, heads=2))
    head = [count_tiles(plan(f"mask() {{ abs(q - k) <= {w} }}"), Size(64, 64)).visited for w in (0, 16)]
    assert found.visited == 2 * sum(head)


@pytest.mark.parametrize("text", ["mask() { k <= q }", "mask() { abs(q - k) <= 300 }"])
def test_long_sequences_are_sampled(text, monkeypatch):
    exact = count_tiles(plan(text), Size(4096, 4096))
    monkeypatch.setattr(tile_count, "MAX_COUNTED", 1 << 12)
    sampled = count_tiles(plan(text), Size(4096, 4096))
    assert exact.exact and not sampled.exact
    assert sampled.visited == pytest.approx(exact.visited, rel=0.05)
    assert sampled.full == pytest.approx(exact.full, rel=0.05)


def test_what_is_counted_does_not_grow_with_the_lengths():
    length = 1 << 24
    found = count_tiles(plan("mask() { q - k <= 4096 and k <= q }"), Size(length, length))
    assert not found.exact
    assert found.visited == pytest.approx(length / 16 * (4096 + 16) / 8, rel=0.01)


def test_no_rows_no_tiles():
    assert count_tiles(plan("mask() { true }"), Size(0, 64)) == Tiles(0, 0, 0)
    assert count_tiles(plan("mask() { false }"), Size(64, 64)).visited == 0


# ---- time ----


def test_floor_is_the_slower_of_arithmetic_and_memory():
    size = Size(1024, 1024, heads=2)
    assert floor(TOY, size, nnz=2 * 1024 * 1024) == pytest.approx(2 * 1024 * 1024 * 4 * 64 / 1e12)
    assert floor(TOY, size, nnz=0) == pytest.approx(4 * 2 * 1024 * 64 * 4 / 1e11)


def test_shared_key_heads_are_read_once():
    assert Size(8, 8, heads=4, kv_heads=1).io_bytes == (4 + 1) * 8 * 128 * 4


def test_prediction_is_above_the_floor_and_grows():
    size, causal, full = Size(512, 512, heads=4), plan("mask() { k <= q }"), plan("mask() { true }")
    nnz = 4 * 512 * 513 // 2
    predicted = estimate(TOY, size, [causal])
    assert predicted.seconds > floor(TOY, size, nnz)
    assert predicted.pairs >= nnz
    assert estimate(TOY, size, [full]).seconds > predicted.seconds
    assert estimate(TOY, size, [causal, full]).launches == 2 * TOY.launch


def test_listing_tiles_is_a_launch():
    group, schedule, loops = plan("mask() { k <= q }")
    listed = replace(loops, lists=Lists(integer("kv_len")))
    plain, more = (estimate(TOY, Size(64, 64), [(group, schedule, found)]) for found in (loops, listed))
    assert more.seconds == pytest.approx(plain.seconds + TOY.launch)


def test_second_kernel_moves_the_state():
    one, two = (estimate(TOY, Size(512, 512), [plan("mask() { k <= q }")] * n) for n in (1, 2))
    assert two.bytes - 2 * one.bytes == 512 * (64 + 2) * 4


def test_waves_cost_idle_workers():
    # 5 row tiles on 4 workers take as long as 8.
    lone = estimate(TOY, Size(80, 64), [plan("mask() { true }")])
    assert lone.compute == pytest.approx(8 / 5 * lone.pairs * (256 / 1e12 + 1 / 1e11))


def test_limit_names_the_largest_part():
    assert Estimate(4.0, 1.0, 1.0, 1.0, 1, 1).limit == "compute"
    assert Estimate(1.0, 1.0, 2.0, 1.0, 1, 1).limit == "tiles"


# ---- devices ----


def test_devices_by_name_and_by_target():
    assert device("RTX 4090") is GPUS["rtx4090"]
    assert device_of("cuda:sm_90a") is device("h100")
    assert device_of("cuda:sm_100") is None
    with pytest.raises(InputError, match=r"expected one of cpu, h100, .*; got 'h900'"):
        device("h900")


def test_unknown_dtype_is_named():
    with pytest.raises(InputError, match="one of f32, f64, f16, bf16 for CPU; got 'i8'"):
        cpu(1e11, 5e10, 1e10, 2).peak("i8")


def test_this_machine_is_measured_once():
    found = device("cpu")
    assert found is device_of("cpu:znver4")
    assert found.peak("f32") > 1e9 and found.bandwidth > 1e8 and found.workers >= 1

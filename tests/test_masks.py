"""The pattern library against its formulas, and the algebra of masks."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer
from gossamer import masks
from gossamer.frontend.captured import is_monotone
from gossamer.frontend.mask import Mask
from gossamer.ir.errors import GossamerError, InputError
from gossamer.ir.mask import Mask as IRMask

SIZES = [(1, 1), (13, 13), (29, 17), (7, 40)]


def grid(q_len, kv_len):
    return np.arange(q_len)[:, None], np.arange(kv_len)[None, :]


# pattern, formula on (q, k), whether isl holds it exactly
FORMULAS = {
    "full": (masks.full(), lambda q, k: (q >= 0) & (k >= 0)),
    "causal": (masks.causal(), lambda q, k: k <= q),
    "sliding_window": (masks.sliding_window(3), lambda q, k: (q - 3 <= k) & (k <= q + 3)),
    "sliding_window_sides": (masks.sliding_window(5, 0), lambda q, k: (q - 5 <= k) & (k <= q)),
    "dilated_window": (masks.dilated_window(5, 3), lambda q, k: ((q - k) % 3 == 0) & (abs(q - k) <= 6)),
    "dilated_window_even": (masks.dilated_window(4, 2), lambda q, k: ((q - k) % 2 == 0) & (abs(q - k) <= 4)),
    "strided": (masks.strided(6, 2), lambda q, k: (abs(q - k) < 2) | ((q - k) % 6 == 0)),
    "fixed": (masks.fixed(5, 2), lambda q, k: (q // 5 == k // 5) | (k % 5 >= 3)),
    "blocked": (masks.blocked(4), lambda q, k: q // 4 == k // 4),
    "chunked_causal": (masks.chunked_causal(7), lambda q, k: (k <= q) & (q // 7 == k // 7)),
    "global_tokens": (masks.global_tokens(3), lambda q, k: (q < 3) | (k < 3)),
    "global_rows": (masks.global_tokens(3, columns=False), lambda q, k: (q < 3) & (k >= 0)),
    "global_columns": (masks.global_tokens(3, rows=False), lambda q, k: (k < 3) & (q >= 0)),
    "longformer": (masks.longformer(2, 4), lambda q, k: (abs(q - k) <= 2) | (q < 4) | (k < 4)),
    "prefix_lm": (masks.prefix_lm(5), lambda q, k: (k <= q) | (k < 5)),
    "axial_rows": (masks.axial((4, 5), 1), lambda q, k: q // 5 == k // 5),
    "axial_columns": (masks.axial((4, 5), 0), lambda q, k: q % 5 == k % 5),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("size", SIZES)
def test_pattern_is_its_formula(name, size):
    mask, formula = FORMULAS[name]
    np.testing.assert_array_equal(mask.to_dense(*size), formula(*grid(*size)))


@pytest.mark.parametrize("name", FORMULAS)
def test_pattern_is_exact_and_round_trips(name):
    mask, _ = FORMULAS[name]
    assert mask.ir.exact
    assert IRMask.parse(mask.text) == mask.ir
    assert Mask.from_ir(mask.ir, mask.values) == mask


def box(shape, kernel, dilation, causal, edges):
    """Neighbourhood attention, point by point."""
    points = list(np.ndindex(*shape))

    def sees(x, y, n, width, step, ahead):
        if (x - y) % step:
            return False
        group = range(x % step, n, step)  # the positions that x may see, in order
        at, length = x // step, len(group)
        start = at - width + 1 if ahead else at - width // 2
        if edges == "shift" and not ahead:
            start = max(min(start, length - width), 0)
        return start <= y // step < start + width

    return np.array(
        [
            [
                all(sees(*args) for args in zip(p, r, shape, kernel, dilation, causal, strict=True))
                for r in points
            ]
            for p in points
        ]
    )


@pytest.mark.parametrize("edges", ["shift", "clip"])
@pytest.mark.parametrize(
    ("shape", "kernel", "dilation", "causal"),
    [
        ((13,), (5,), (1,), (False,)),
        ((13,), (4,), (1,), (True,)),
        ((14,), (3,), (4,), (False,)),
        ((5, 7), (3, 5), (1, 1), (False, False)),
        ((6, 9), (3, 3), (2, 2), (True, False)),
        ((3, 4, 5), (3, 3, 2), (1, 1, 2), (False, True, False)),
    ],
)
def test_neighborhood(shape, kernel, dilation, causal, edges):
    mask = masks.neighborhood(shape, kernel, dilation, causal, edges)
    n = int(np.prod(shape))
    np.testing.assert_array_equal(mask.to_dense(n, n), box(shape, kernel, dilation, causal, edges))
    assert mask.ir.exact
    assert not mask.values


def test_neighborhood_shifts_at_the_borders():
    seen = masks.neighborhood((8, 8), 5).to_dense(64, 64).sum(1)
    assert (seen == 25).all()
    assert masks.neighborhood((8, 8), 5, edges="clip").to_dense(64, 64).sum(1).min() == 9


def test_axial_in_three_dimensions():
    q, k = np.unravel_index(np.arange(60)[:, None], (3, 4, 5)), np.unravel_index(np.arange(60), (3, 4, 5))
    np.testing.assert_array_equal(
        masks.axial((3, 4, 5), -2).to_dense(60, 60), (q[0] == k[0]) & (q[2] == k[2])
    )


def test_random_blocks():
    mask = masks.random_blocks(3, 8, seed=5)
    dense = mask.to_dense(128, 256)
    blocks = dense.reshape(16, 8, 32, 8)
    assert (blocks.all((1, 3)) == blocks.any((1, 3))).all()
    count = blocks.any((1, 3)).sum(1)
    assert count.max() <= 3
    assert count.mean() > 2
    assert (dense != masks.random_blocks(3, 8, seed=6).to_dense(128, 256)).any()
    np.testing.assert_array_equal(dense, mask.to_dense(128, 256, b=1, h=3))
    heads = masks.random_blocks(3, 8, seed=5, per_head=True)
    assert (heads.to_dense(128, 256, h=0) != heads.to_dense(128, 256, h=1)).any()


def test_random_blocks_are_uniform():
    rows = masks.random_blocks(2, 1).to_dense(4000, 50)
    assert abs(rows.mean(0) - rows.mean()).max() < 0.015


def selection(indices, b, h, q_len, kv_len, rows, keys):
    """What `masks.selected` means, pair by pair."""
    indices = np.asarray(indices)
    listed = indices[b % indices.shape[0], h % indices.shape[1], np.arange(q_len) // rows]
    return (listed[:, None, :] == (np.arange(kv_len) // keys)[None, :, None]).any(-1)


@pytest.mark.parametrize("rows, keys", [(1, 16), (4, 5), (16, 1), (32, 64)])
@pytest.mark.parametrize("batches, heads", [(1, 1), (2, 3)])
def test_selected_blocks(rows, keys, batches, heads):
    rng = np.random.default_rng(np.random.randint(2**31))
    blocks = -(-100 // keys)
    indices = rng.integers(-1, blocks, (batches, heads, -(-70 // rows), 3))
    for tensor in (indices, torch.from_numpy(indices).int()):
        mask = masks.selected(tensor, 100, rows=rows, keys=keys)
        for b, h in ((0, 0), (batches - 1, heads - 1)):
            expected = selection(indices, b, h, 70, 100, rows, keys)
            np.testing.assert_array_equal(mask.to_dense(70, 100, b, h), expected)


def test_selected_blocks_are_read_at_each_call_and_shared_by_a_group_of_heads():
    indices = torch.tensor([[[[0], [1]], [[1], [-1]]]])
    mask = masks.selected(indices, 8, rows=4, keys=4, group=2)
    np.testing.assert_array_equal(mask.to_dense(8, 8, h=1), mask.to_dense(8, 8, h=0))
    assert mask.to_dense(8, 8, h=2)[:4, 4:].all() and mask.to_dense(8, 8, h=3).sum() == 16
    indices[:] = 1
    assert mask.to_dense(8, 8)[:, 4:].all() and not mask.to_dense(8, 8)[:, :4].any()
    indices.numpy()[:] = 0  # a write that torch does not count
    assert mask.to_dense(8, 8)[:, :4].all() and not mask.to_dense(8, 8)[:, 4:].any()


def test_selections_that_are_wrong():
    indices = torch.zeros(1, 1, 4, 2, dtype=torch.int32)
    with pytest.raises(InputError, match=r"blocks of 16 pairs at least, rows \* keys; got 1"):
        masks.selected(indices, 8, keys=1)
    with pytest.raises(InputError, match="rank 4"):
        masks.selected(indices[0], 8)
    with pytest.raises(InputError, match=r"below 2, or -1; got 2"):
        masks.selected(indices + 2, 128).to_dense(4, 8)


def test_bigbird_is_its_parts():
    whole = masks.bigbird(2, 3, 2, block=4, seed=1).to_dense(30, 30)
    parts = masks.longformer(2, 3) | masks.random_blocks(2, 4, 1)
    np.testing.assert_array_equal(whole, parts.to_dense(30, 30))
    assert masks.bigbird(2, 3, 2, 4, 1).key == masks.bigbird(9, 8, 2, 4, 77).key


def test_prefix_of_each_batch():
    mask = masks.prefix_lm(torch.tensor([2, 7]))
    q, k = grid(9, 9)
    for b, n in enumerate((2, 7)):
        np.testing.assert_array_equal(mask.to_dense(9, 9, b=b), (k <= q) | (k < n))


# ---- documents ----


def test_document_by_ids_and_by_offsets():
    ids = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3])
    by_ids, by_offsets = masks.document(ids), masks.document(offsets=torch.tensor([0, 3, 5, 8]))
    expected = (ids[:, None] == ids[None]).numpy()
    np.testing.assert_array_equal(by_ids.to_dense(8, 8), expected)
    np.testing.assert_array_equal(by_offsets.to_dense(8, 8), expected)
    assert by_ids.segments == by_offsets.segments == (0,)


def test_document_tensors_are_read_at_each_call():
    ids, offsets = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 4])
    cases = [(masks.document(ids), ids, 1, 1), (masks.document(offsets=offsets), offsets, 1, 3)]
    arrays = np.array([0, 2, 4])
    cases.append((masks.document(offsets=arrays), arrays, 1, 3))
    for mask, tensor, at, value in cases:
        before = mask.to_dense(4, 4)
        tensor[at] = value
        assert (mask.to_dense(4, 4) != before).any()


def test_document_per_batch():
    ids = np.array([[0, 0, 1], [0, 1, 1]])
    mask = masks.document(ids)
    for b in (0, 1):
        np.testing.assert_array_equal(mask.to_dense(3, 3, b=b), ids[b][:, None] == ids[b])
    assert mask.segments == (0,)


def test_tensors_are_moved_to_a_device():
    ids = np.repeat(np.arange(4), 5)
    mask = masks.document(ids) & masks.causal()
    moved = mask.to("cpu")
    assert moved.key == mask.key and moved.values == mask.values
    assert all(isinstance(t, torch.Tensor) for t in moved.tensors)
    assert (moved.to_dense(20, 20) == mask.to_dense(20, 20)).all()
    assert moved.to("cpu").tensors[0] is moved.tensors[0]
    assert moved.to("meta").tensors[0].device.type == "meta"


def test_segments_are_what_is_only_compared():
    ids, other = torch.arange(4), torch.arange(4)
    assert (masks.document(ids) & masks.causal()).segments == (0,)
    assert Mask.trace(lambda b, h, q, k: (ids[q] == ids[k]) & (ids[q] > 2)).segments == ()
    assert Mask.trace(lambda b, h, q, k: ids[q] == other[k]).segments == ()
    assert Mask.trace(lambda b, h, q, k: ids[q] == ids[k + 1]).segments == ()
    assert is_monotone(torch.tensor([0, 0, 2]))
    assert is_monotone(np.zeros(1))
    assert not is_monotone(np.array([[0, 1], [1, 0]]))


# ---- from other libraries ----


def flashmask_reference(bounds, causal):
    """The dense mask that FlashMask's definition gives, column by column."""
    length, n = bounds.shape
    hidden = np.zeros((length, length), bool)
    for k, r in enumerate(bounds):
        if causal:
            hidden[:k, k] = True
            hidden[r[0] : (r[1] if n == 2 else None), k] = True
        elif n == 2:
            hidden[r[0] :, k] = hidden[: r[1], k] = True
        else:
            hidden[r[0] : r[1], k] = hidden[r[2] : r[3], k] = True
    return ~hidden


@pytest.mark.parametrize(("causal", "n"), [(True, 1), (True, 2), (False, 2), (False, 4)])
def test_from_flashmask(causal, n):
    bounds = torch.sort(torch.randint(0, 12, (2, 3, 11, n), dtype=torch.int32), -1).values
    mask = masks.from_flashmask(bounds, causal)
    for b in range(2):
        for h in range(3):
            expected = flashmask_reference(bounds[b, h].numpy(), causal)
            np.testing.assert_array_equal(mask.to_dense(11, 11, b, h), expected)
    shared = Mask.from_flashmask(bounds[:1, :1], causal)
    np.testing.assert_array_equal(shared.to_dense(11, 11, 1, 2), shared.to_dense(11, 11))


@pytest.mark.parametrize("shape", [(5, 7), (1, 1, 5, 7), (2, 1, 5, 7), (2, 3, 1, 7), (3, 5, 1), (2, 3, 5, 7)])
@pytest.mark.parametrize("library", [torch.from_numpy, np.asarray])
def test_boolean_tensor_is_a_table(shape, library):
    table = np.random.default_rng(0).random(shape) < 0.5
    mask = Mask.of(library(table))
    whole = np.broadcast_to(table, (2, 3, 5, 7))
    for b in range(2):
        for h in range(3):
            np.testing.assert_array_equal(mask.to_dense(5, 7, b, h), whole[b, h])


@pytest.mark.parametrize("name", FORMULAS)
def test_from_dense_finds_the_closed_form(name):
    mask, _ = FORMULAS[name]
    dense = mask.to_dense(60, 60)
    found = Mask.from_dense(torch.from_numpy(dense))
    assert found.tensors == ()
    np.testing.assert_array_equal(found.to_dense(60, 60), dense)


def test_from_dense_stores_what_has_no_form():
    dense = np.random.default_rng(0).random((21, 33)) < 0.3
    found = Mask.from_dense(dense.astype(int))
    assert found.tensors
    np.testing.assert_array_equal(
        (found | masks.causal()).to_dense(21, 33), dense | np.tri(21, 33, dtype=bool)
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_analyze_counts_pairs(name):
    mask, formula = FORMULAS[name]
    assert mask.analyze(29, 17).nnz == formula(*grid(29, 17)).sum()


def test_analyze_of_a_batch():
    ids = np.array([[0, 0, 1], [0, 0, 0]])
    assert masks.document(ids).analyze(3, 3, b=0).nnz == 5
    assert masks.document(ids).analyze(3, 3, b=1).nnz == 9


def test_mask_of_everything_else():
    assert Mask.of(None) == masks.full()
    window = masks.sliding_window(2)
    assert Mask.of(window) is window
    assert Mask.of(lambda b, h, q, k: q >= k) == masks.causal()
    with pytest.raises(InputError, match=r"boolean tensor.*float32.*score_mod"):
        Mask.of(torch.zeros(3, 3))
    with pytest.raises(InputError, match=r"broadcastable to \(B, Hq, q_len, kv_len\)"):
        Mask.of(torch.zeros(1, 1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="got str"):
        Mask.of("causal")


def test_mask_of_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    made = create_block_mask(lambda b, h, q, k: (q - k <= 5) & (q >= k), None, None, 64, 64, "cpu", 16)
    np.testing.assert_array_equal(
        Mask.of(made).to_dense(64, 64), (masks.causal() & masks.sliding_window(5)).to_dense(64, 64)
    )


# ---- algebra, equality, keys ----

PATTERNS = st.one_of(
    st.builds(masks.sliding_window, st.integers(0, 6), st.integers(0, 6)),
    st.builds(masks.global_tokens, st.integers(0, 5)),
    st.builds(masks.strided, st.integers(1, 6), st.integers(0, 4)),
    st.builds(masks.dilated_window, st.integers(0, 6), st.integers(1, 4)),
    st.builds(masks.blocked, st.integers(1, 7)),
    st.builds(masks.causal),
)


@settings(max_examples=40, deadline=None)
@given(PATTERNS, PATTERNS, PATTERNS)
def test_algebra_is_that_of_sets(a, b, c):
    x, y, z = (m.to_dense(19, 23) for m in (a, b, c))
    np.testing.assert_array_equal(((a & ~b) | c).to_dense(19, 23), (x & ~y) | z)
    assert (a & b) | (a & c) == a & (b | c)
    assert hash((a & b) | (a & c)) == hash(a & (b | c))
    assert ~(a | b) == ~a & ~b
    assert (a == b) <= bool((x == y).all())


def test_equality_is_of_sets_at_their_values():
    assert masks.sliding_window(4) | masks.sliding_window(2) == masks.sliding_window(4)
    assert masks.sliding_window(4) != masks.sliding_window(5)
    assert masks.longformer(3, 2) == masks.sliding_window(3) | masks.global_tokens(2)
    assert masks.causal() != "causal"
    ids = torch.arange(4)
    assert masks.document(ids) == masks.document(ids)
    assert masks.document(ids) != masks.document(ids.clone())
    assert hash(masks.document(ids)) == hash(masks.document(ids.clone()))
    bits = Mask.trace(lambda b, h, q, k: (q & k) == 0)
    assert bits == Mask.trace(lambda b, h, q, k: (q & k) == 0)
    assert bits != masks.full()


def test_key_leaves_out_what_may_change():
    assert masks.sliding_window(4).key == masks.sliding_window(500).key
    assert masks.sliding_window(4).values == (4, 4)
    assert masks.strided(4, 2).key == masks.strided(4, 9).key != masks.strided(5, 2).key
    assert masks.document(torch.arange(4)).key == masks.document(torch.arange(9)).key
    assert masks.document(torch.arange(4)).key != masks.document(torch.arange(4).int()).key
    either = masks.sliding_window(4) | masks.global_tokens(7)
    assert either.values == (4, 4, 7)
    assert either.ir.params == ("p0", "p1", "p2")


def test_joining_shares_tensors_and_drops_what_is_not_read():
    ids = torch.arange(5)
    twice = masks.document(ids) & (masks.document(ids) | masks.causal())
    assert len(twice.tensors) == 1
    assert (masks.full() | masks.document(ids)).tensors == ()
    assert (masks.full() & masks.sliding_window(3)).key == masks.sliding_window(1).key


def test_operators_take_what_mask_of_takes():
    def early(b, h, q_idx, kv_idx):
        return kv_idx < 3

    assert (early | masks.causal()) == masks.prefix_lm(3)
    assert (masks.causal() | early) == masks.prefix_lm(3)


def test_mask_has_no_truth_value():
    with pytest.raises(GossamerError, match=r"use & \| ~"):
        _ = masks.causal() and masks.full()


def test_repr_shows_values():
    assert repr(masks.longformer(2, 4)) == "Mask(((abs(q - k) <= p0) or (q < p1)) or (k < p1), p0=2, p1=4)"
    assert repr(masks.document(np.arange(3))) == "Mask(c0[q] == c0[k], c0: i64[1])"


# ---- bad input ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.sliding_window(-1), r"sliding_window.left: expected an integer of at least 0; got -1"),
        (lambda: masks.sliding_window(2.5), "an integer of at least 0; got 2.5"),
        (lambda: masks.dilated_window(4, 0), "dilated_window.dilation: expected an integer of at least 1"),
        (lambda: masks.blocked(0), "blocked.size"),
        (lambda: masks.global_tokens(2, False, False), "rows, columns or both; got neither"),
        (lambda: masks.document(), "ids or offsets; got neither"),
        (
            lambda: masks.document([1.5]),
            "document.ids: expected an integer tensor of rank 1 or 2; got float64",
        ),
        (lambda: masks.document(offsets=[0, 5, 3]).to_dense(3, 3), "do not decrease"),
        (lambda: masks.document(np.arange(3)).to_dense(4, 4), "c0"),
        (lambda: masks.axial((3, 4), 2), "an axis of the grid"),
        (lambda: masks.neighborhood((3, 4), (3, 3, 3)), "one for each dimension"),
        (lambda: masks.neighborhood((3, 4), 5), r'kernel \* dilation <= 3.*got 5.*edges="clip"'),
        (lambda: masks.neighborhood((3, 3), 3, edges="wrap"), "'shift' or 'clip'; got 'wrap'"),
        (lambda: masks.neighborhood((2, 2, 2, 2), 1), "1 to 3 dimensions"),
        (lambda: masks.from_flashmask(np.zeros((1, 1, 4, 4), int)), "1 or 2 bounds a key when causal"),
        (lambda: masks.from_flashmask(np.zeros((4, 4), int)), "rank 4"),
        (lambda: Mask.from_dense(np.zeros(4)), r"a matrix of shape \(q_len, kv_len\); got shape \(4,\)"),
        (lambda: Mask.from_dense(np.full((2, 2), 3)), "truth values, or of 0 and 1"),
        (lambda: Mask.from_ir(masks.sliding_window(3).ir, (1,)), "Mask.from_ir.values: expected 2"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ---- what is imported when ----


def test_key_needs_no_compiler(tmp_path):
    code = """
import sys
from gossamer import masks
from gossamer.frontend.mask import Mask
width = 8
mask = masks.longformer(3, 4) & Mask.trace(lambda b, h, q, k: (q - k < width) & ((q - k) % 2 == 0))
assert mask.values == (3, 4, 8), mask.values
heavy = {"torch", "sympy", "islpy", "tvm", "numpy", "jax"} & set(sys.modules)
assert not heavy, heavy
print(hash(mask.key) and mask.key)
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        for _ in range(2)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert runs[0].stdout == runs[1].stdout


def test_masks_is_public():
    assert gossamer.masks is masks

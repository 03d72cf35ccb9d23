"""From 0/1 matrices back to masks: closed forms for every affine pattern, exactness for everything."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.ir.errors import InputError
from gossamer.ir.mask import Mask
from gossamer.passes.cover import cover
from gossamer.passes.decompose import Remainder, decompose
from gossamer.passes.fit import Matrix, Q, fit_rows, fit_set
from gossamer.passes.recover import recover, stored_rows

SIZES = [(131, 200), (200, 97)]


def clamped(x: str, n: int, kernel: int, dilation: int = 1) -> str:
    """NATTEN's shifted window of one coordinate, e.g. of `// 12`."""
    q, k, d = f"(q {x})", f"(k {x})", dilation
    length = f"(({n} - {q} % {d} + {d - 1}) // {d})"
    start = f"min(max({q} // {d} - {kernel // 2}, 0), {length} - {kernel})"
    return f"({k} - {q}) % {d} == 0 and {k} // {d} >= {start} and {k} // {d} < {start} + {kernel}"


# name: predicate, how many terms the recovered mask may take
LIBRARY = {
    "full": ("true", 1),
    "causal": ("k <= q", 1),
    "sliding_window": ("abs(q - k) <= 9", 1),
    "sliding_window, asymmetric": ("q - k <= 17 and k - q <= 3", 1),
    "sliding_window, causal": ("q - k <= 17 and k <= q", 1),
    "dilated_window": ("(q - k) % 4 == 0 and abs(q - k) <= 24", 1),
    "dilated_window, wide": ("(q - k) % 16 == 0", 1),
    "strided": ("abs(q - k) < 8 or (q - k) % 16 == 0", 3),
    "strided(64)": ("abs(q - k) < 64 or (q - k) % 64 == 0", 3),
    "fixed": ("k <= q and (q // 16 == k // 16 or k % 16 >= 14)", 2),
    "fixed(64)": ("k <= q and (q // 64 == k // 64 or k % 64 >= 56)", 2),
    "blocked": ("q // 25 == k // 25", 1),
    "chunked_causal": ("k <= q and q // 30 == k // 30", 1),
    "global_tokens": ("q < 5 or k < 5", 2),
    "global_tokens, columns": ("k < 5", 1),
    "global_tokens, rows": ("q < 5", 1),
    "longformer": ("abs(q - k) <= 9 or q < 5 or k < 5", 3),
    "prefix_lm": ("k <= q or k < 20", 1),
    "neighborhood, clip": ("abs(q // 12 - k // 12) <= 2 and abs(q % 12 - k % 12) <= 2", 1),
    "neighborhood(64)": ("abs(q // 64 - k // 64) <= 6 and abs(q % 64 - k % 64) <= 6", 1),
    "neighborhood, shift": (f"{clamped('// 12', 16, 5)} and {clamped('% 12', 12, 5)}", 1),
    "neighborhood, shift, dilated": (f"{clamped('// 12', 16, 3, 2)} and {clamped('% 12', 12, 3, 2)}", 1),
    "neighborhood, one dimension": (clamped("// 1", 128, 7, 3), 1),
    "neighborhood, three dimensions": (
        "abs(q // 24 - k // 24) <= 1 and abs(q // 6 % 4 - k // 6 % 4) <= 1 and abs(q % 6 - k % 6) <= 1",
        1,
    ),
    "axial, rows": ("q // 12 == k // 12", 1),
    "axial, columns": ("q % 12 == k % 12", 1),
    "causal window and sink": ("k <= q and (q - k <= 9 or k < 4)", 2),
    "box and global": ("abs(q // 12 - k // 12) <= 2 and abs(q % 12 - k % 12) <= 2 or k < 3", None),
}


def dense(mask: Mask, q_len: int, kv_len: int, tables=()) -> np.ndarray:
    return mask.evaluate(0, 0, np.arange(q_len)[:, None], np.arange(kv_len), (), tables, q_len, kv_len)


@pytest.mark.parametrize("name", LIBRARY)
def test_library_masks_come_back_in_closed_form(name):
    predicate, terms = LIBRARY[name]
    for size in SIZES:
        array = dense(Mask.parse(f"mask() {{ {predicate} }}"), *size)
        mask, tables = recover(array)
        assert tables == () and mask.exact, f"{size}: {mask}"
        assert (dense(mask, *size) == array).all()
        found = decompose(mask)
        assert terms is None or len(found) <= terms
        assert terms is None or not any(isinstance(t, Remainder) for t in found)


def test_the_form_found_is_the_pattern_itself():
    n = 256
    for name in ("strided", "longformer", "neighborhood, clip", "fixed", "causal window and sink"):
        original = Mask.parse(f"mask() {{ {LIBRARY[name][0]} }}")
        mask, _ = recover(dense(original, n, n))
        assert mask.equal(original), f"{name}: {mask}"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.5, 0.95]))
def test_any_matrix_comes_back_bit_for_bit(rows, cols, seed, density):
    array = np.random.default_rng(seed).random((rows, cols)) < density
    mask, tables = recover(array)
    assert (dense(mask, rows, cols, tables) == array).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_stored_rows_are_disjoint_and_whole(rows, cols, seed):
    array = np.random.default_rng(seed).random((rows, cols)) < 0.4
    found = np.zeros((rows, cols), int)
    for t in stored_rows(array):
        for q in range(rows):
            np.add.at(found[q], t.columns(q), 1)
    assert (found == array).all()


def test_rows_without_a_form_are_stored_as_progressions():
    rng = np.random.default_rng(3)
    first, stride = rng.integers(0, 40, 64), rng.integers(1, 5, 64)
    k = np.arange(64)
    array = (k >= first[:, None]) & ((k - first[:, None]) % stride[:, None] == 0)
    mask, tables = recover(array)
    assert {c.dtype for c in mask.captures} == {"i32"} and all(t.ndim == 1 for t in tables)
    assert (dense(mask, 64, 64, tables) == array).all()


def test_noise_is_stored_beside_the_closed_form():
    array = dense(Mask.parse("mask() { k <= q }"), 80, 80).copy()
    rng = np.random.default_rng(5)
    array[rng.integers(0, 40, 9), rng.integers(41, 80, 9)] = True
    mask, tables = recover(array)
    assert (dense(mask, 80, 80, tables) == array).all()
    assert Mask.parse("mask() { k <= q }").may.is_subset(mask.must)
    assert 0 < sum(t.nbytes for t in tables) < array.nbytes


def test_random_noise_is_a_table():
    array = np.random.default_rng(0).random((70, 90)) < 0.5
    mask, tables = recover(array)
    assert [str(c) for c in mask.captures] == ["c0: bool[2]"] and tables[0].shape == (70, 90)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0), (1, 1), (1, 9), (9, 1)])
def test_thin_matrices(shape):
    for array in (np.zeros(shape, bool), np.ones(shape, bool)):
        mask, tables = recover(array)
        assert tables == () and (dense(mask, *shape) == array).all()


def test_numbers_are_accepted_when_they_are_0_or_1():
    eye = np.eye(40, dtype=np.float32)
    assert recover(eye)[0].equal(recover(eye.astype(bool))[0])
    assert recover(eye.astype(int))[0].equal(Mask.parse("mask() { q == k }"))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), r"matrix of shape \(q_len, kv_len\); got shape \(4,\)"),
        (np.zeros((1, 2, 3)), r"got shape \(1, 2, 3\)"),
        (np.full((2, 2), 3), "of 0 and 1"),
        (np.full((2, 2), 0.5), "of 0 and 1"),
        (np.array([["a"]]), "of truth values"),
        (np.full((2, 2), np.nan), "of 0 and 1"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises(InputError, match=message):
        recover(array)


# The parts.


def test_entries_nobody_cares_about_may_come_out_either_way():
    found = dense(Mask.parse("mask() { abs(q - k) <= 5 }"), 50, 50)
    care = np.random.default_rng(1).random((50, 50)) < 0.7
    noisy = np.where(care, found, ~found)
    predicate = fit_rows(Matrix(noisy, care))
    assert predicate is not None and Matrix(noisy, care).holds(predicate)


def test_irregular_rows_fit_no_form():
    assert fit_rows(Matrix(np.random.default_rng(0).random((9, 9)) < 0.5, np.ones((9, 9), bool))) is None


def test_sets_are_intervals_or_residues():
    x = np.arange(30)
    assert str(fit_set(x < 9, x >= 9, Q)) == "q <= 8"
    assert str(fit_set((x > 3) & (x < 9), (x <= 3) | (x >= 9), Q)) == "(q >= 4) & (q <= 8)"
    assert str(fit_set(x % 5 == 2, x % 5 != 2, Q)) == "Eq(floormod(q, 5), 2)"
    assert fit_set(np.isin(x, [1, 2, 4, 8, 16]), ~np.isin(x, [1, 2, 4, 8, 16]), Q) is None


def test_covers_prefer_simple_shapes():
    found = cover(Matrix(dense(Mask.parse("mask() { q != k }"), 90, 90), np.ones((90, 90), bool)))
    assert not found.rest.any() and len(found.shapes) == 2
    assert Mask(found.predicate).equal(Mask.parse("mask() { q != k }"))

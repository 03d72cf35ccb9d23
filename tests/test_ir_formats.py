"""Formats: index and inverse undo each other, every non-zero is visited once, values compare by content."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.ir import expr as E
from gossamer.ir.errors import InputError
from gossamer.ir.formats import ACSR, Blocks, Dense, Progression, StoredACSR

Q, P0, Q0, Q1 = (E.integer(n) for n in ("q", "p0", "q0", "q1"))


def progression(stride: int, first: E.Expr, last: E.Expr) -> Progression:
    """first, first + stride, ... up to last, which is included."""
    return Progression(stride, E.floormod(first, stride), first, E.floordiv(last - first, stride) + 1)


def dilated(stride: int) -> ACSR:
    """(q - k) % stride == 0 and q - stride * p0 <= k <= q."""
    first = E.maximum(E.floormod(Q, stride), Q - stride * P0)
    return ACSR((), (Progression(stride, E.floormod(Q, stride), first, E.floordiv(Q - first, stride) + 1),))


def box(width: int, reach: int) -> ACSR:
    """abs(q0 - k0) <= p0 and abs(q1 - k1) <= reach, clipped at the left and right of rows of `width`."""
    low, high = E.maximum(Q1 - reach, 0), E.minimum(Q1 + reach, width - 1)
    return ACSR((width,), (progression(1, E.maximum(Q0 - P0, 0), Q0 + P0), progression(1, low, high)))


def assert_bijective(form, q: int, size: int, columns: set[int], reach: int, **params: int) -> None:
    """Entries of row q are exactly `columns`, each once, and index and inverse undo each other."""
    found = [form.index(q, s, **params) for s in range(size)]
    assert len(set(found)) == size and set(found) == columns
    assert [form.inverse(q, k, **params) for k in found] == list(range(size))
    for k in set(range(-2, reach)) - columns:
        assert form.inverse(q, k, **params) is None
    with pytest.raises(InputError, match=f"expected an entry below {size} for row {q}; got {size}"):
        form.index(q, size, **params)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 60), st.integers(0, 12))
def test_acsr_of_one_dimension(stride: int, q: int, p0: int) -> None:
    form = dilated(stride)
    columns = {k for k in range(80) if (q - k) % stride == 0 and q - stride * p0 <= k <= q}
    assert_bijective(form, q, form.size(q, p0=p0), columns, 80, p0=p0)
    assert form.columns(q, 80, p0=p0).tolist() == sorted(columns)
    assert form.columns(q, q, p0=p0).tolist() == sorted(columns - {q})
    assert form.params == ("p0",)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(0, 4), st.integers(0, 50), st.integers(0, 3))
def test_acsr_of_two_dimensions(width: int, reach: int, q: int, p0: int) -> None:
    form = box(width, reach)
    q0, q1 = divmod(q, width)
    columns = {k for k in range(200) if abs(k // width - q0) <= p0 and abs(k % width - q1) <= reach}
    assert_bijective(form, q, form.size(q, p0=p0), columns, 200, p0=p0)
    assert set(form.columns(q, 30, p0=p0).tolist()) == {k for k in columns if k < 30}


def test_rows_without_the_term_and_unbounded_ones() -> None:
    right = ACSR((), (Progression(3, E.floormod(Q, 3), Q, E.INF),), rows=Q >= 2)
    assert right.size(1) == 0 and right.columns(1, 20).size == 0 and right.inverse(1, 4) is None
    assert right.size(2) == float("inf")
    assert right.columns(2, 10).tolist() == [2, 5, 8]
    assert (right.index(2, 10**9), right.inverse(2, 2 + 3 * 10**9)) == (2 + 3 * 10**9, 10**9)


def test_acsr_checks() -> None:
    with pytest.raises(InputError, match="expected 2 progressions for widths \\(8,\\); got 1"):
        ACSR((8,), (Progression(1, 0, 0, 4),))
    with pytest.raises(InputError, match="expected a stride of at least 1; got 0"):
        Progression(0, 0, 0, 4)
    with pytest.raises(InputError, match="expected values for p0; got none"):
        dilated(2).size(3)


rows = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(rows)
def test_stored_acsr(entries: list[tuple[int, int, int]]) -> None:
    form = StoredACSR(*zip(*entries, strict=True))
    for q, (offset, stride, count) in enumerate(entries):
        columns = {offset + stride * s for s in range(count)}
        assert_bijective(form, q, form.size(q), columns, 50)
        assert form.columns(q).tolist() == sorted(columns)
    assert form.size(len(entries)) == 0 and form.inverse(-1, 0) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.lists(st.sets(st.integers(0, 6)), min_size=1, max_size=4))
def test_blocks(rows: int, width: int, kept: list[set[int]]) -> None:
    columns = [c for row in kept for c in sorted(row)]
    form = Blocks((rows, width), np.cumsum([0, *map(len, kept)]), columns)
    for q in range(rows * len(kept)):
        seen = {c * width + x for c in kept[q // rows] for x in range(width)}
        assert_bijective(form, q, form.size(q), seen, 40)
        assert form.columns(q).tolist() == sorted(seen)


def test_dense() -> None:
    form = Dense((3, 5))
    assert_bijective(form, 2, form.size(2), set(range(5)), 9)
    assert form.size(3) == 0 and form.columns(1).tolist() == [0, 1, 2, 3, 4]


def test_stored_formats_are_values() -> None:
    one, two = StoredACSR([0, 1], [1, 1], [2, 0]), StoredACSR(np.array([0, 1]), (1, 1), [2, 0])
    assert one == two and hash(one) == hash(two) and one != StoredACSR([0, 2], [1, 1], [2, 0])
    assert Blocks((1, 1), [0, 1], [3]) == Blocks((1, 1), (0, 1), (3,)) != Blocks((1, 1), [0, 1], [4])
    with pytest.raises(ValueError, match="read-only"):
        one.offset[0] = 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StoredACSR([0], [1], [1, 2]), "offset, stride and count of one length"),
        (lambda: StoredACSR([0], [0], [1]), "strides of at least 1"),
        (lambda: StoredACSR([0], [1], [-1]), "counts of at least 0"),
        (lambda: StoredACSR([-1], [1], [1]), "offsets of at least 0"),
        (lambda: Blocks((0, 1), [0], []), "block sizes of at least 1"),
        (lambda: Blocks((1, 1), [0, 2], [1]), "rising from 0 to the number of blocks"),
        (lambda: Blocks((1, 1), [0, 2, 3], [2, 1, 0]), "columns increasing within each block row"),
    ],
)
def test_stored_formats_check(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()

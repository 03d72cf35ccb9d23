"""Terms, counts and tiles: the required results, exactness against dense matrices, proofs that fail."""

import random
import time

import islpy as isl
import numpy as np
import pytest

from gossamer.ir.affine import to_sets
from gossamer.ir.errors import InputError, VerifyError
from gossamer.ir.expr import to_text
from gossamer.ir.formats import ACSR
from gossamer.ir.mask import Mask
from gossamer.passes.classify import Shape, classify, classify_points
from gossamer.passes.count import Steps, TooIrregular
from gossamer.passes.decompose import Remainder, decompose, describe, prove
from gossamer.passes.delinearize import factors, widths
from gossamer.passes.geometry import analyze
from gossamer.passes.normalize import disjuncts, normalize_mask, split
from gossamer.passes.progression import as_set, term


def clamp(x: str, n: int, kernel: int) -> str:
    return f"min(max({x} - {kernel // 2}, 0), {n - kernel})"


def shifted(height: int, width: int, kernel: int) -> str:
    """A neighbourhood that moves inwards at the borders, as NATTEN's does."""
    rules = []
    for x, n in ((f"// {width}", height), (f"% {width}", width)):
        start = clamp(f"q {x}", n, kernel)
        rules.append(f"k {x} >= {start} and k {x} < {start} + {kernel}")
    return " and ".join(rules)


BOX = "abs(q // 64 - k // 64) <= 6 and abs(q % 64 - k % 64) <= 6"
# name: text, values, how many terms
LIBRARY = {
    "full": ("mask() { true }", (), 1),
    "causal": ("mask() { k <= q }", (), 1),
    "window": ("mask(p0, p1) { q - k <= p0 and k - q <= p1 }", (7, 3), 1),
    "dilated": ("mask() { (q - k) % 4 == 0 and abs(q - k) <= 128 }", (), 1),
    "dilated, any width": ("mask(p0) { (q - k) % 4 == 0 and abs(q - k) <= p0 }", (13,), 1),
    "strided": ("mask() { abs(q - k) < 64 or (q - k) % 64 == 0 }", (), 3),
    "strided, any width": ("mask(p0) { abs(q - k) < p0 or (q - k) % 64 == 0 }", (5,), 3),
    "fixed": ("mask() { k <= q and (q // 64 == k // 64 or k % 64 >= 56) }", (), 2),
    "blocked": ("mask() { q // 100 == k // 100 }", (), 1),
    "chunked_causal": ("mask() { k <= q and q // 100 == k // 100 }", (), 1),
    "global": ("mask(p0) { q < p0 or k < p0 }", (5,), 2),
    "longformer": ("mask(p0, p1) { abs(q - k) <= p0 or q < p1 or k < p1 }", (9, 5), 3),
    "prefix_lm": ("mask(p0) { k <= q or k < p0 }", (20,), 1),
    "axial rows": ("mask() { q // 64 == k // 64 }", (), 1),
    "axial columns": ("mask() { q % 64 == k % 64 }", (), 1),
    "neighborhood": (f"mask() {{ {BOX} }}", (), 1),
    "neighborhood, shifted": (f"mask() {{ {shifted(64, 64, 13)} }}", (), 1),
    "neighborhood, dilated": (
        f"mask() {{ {BOX} and (q // 64 - k // 64) % 2 == 0 and (q - k) % 2 == 0 }}",
        (),
        1,
    ),
    "neighborhood, one dimension": (
        f"mask() {{ k >= {clamp('q', 64, 13)} and k < {clamp('q', 64, 13)} + 13 }}",
        (),
        1,
    ),
    "causal window and sink": ("mask(p0, p1) { k <= q and (q - k <= p0 or k < p1) }", (9, 4), 2),
    "off the diagonal": ("mask() { q != k }", (), 2),
}


@pytest.fixture(params=LIBRARY, ids=str)
def known(request):
    text, values, terms = LIBRARY[request.param]
    return Mask.parse(text), values, terms


def dense(mask, q_len, kv_len, values=(), captures=()):
    return mask.evaluate(0, 0, np.arange(q_len)[:, None], np.arange(kv_len), values, captures)


def lines(mask: str) -> list[tuple[str, ...]]:
    """(stride, offset, first, count) of one-dimensional terms, as text."""
    found = []
    for t in decompose(Mask.parse(mask)):
        [p] = t.progressions
        found.append((p.stride, to_text(p.offset), to_text(p.first), to_text(p.count)))
    return found


# Decomposition.


def test_the_library_takes_few_terms(known):
    mask, _, terms = known
    assert len(decompose(mask)) == terms
    assert all(isinstance(t, ACSR) for t in decompose(mask))


def test_terms_visit_every_pair_once(known):
    mask, values, _ = known
    given = dict(zip(mask.params, values, strict=True))
    q_len, kv_len = 71, 150
    found = np.zeros((q_len, kv_len), int)
    for t in decompose(mask):
        own = {n: v for n, v in given.items() if n in t.params}
        for q in range(q_len):
            np.add.at(found[q], t.columns(q, kv_len, **own), 1)
    assert (found == dense(mask, q_len, kv_len, values)).all()


def test_strided_is_a_window_and_columns_left_and_right_of_it():
    assert lines("mask() { abs(q - k) < 64 or (q - k) % 64 == 0 }") == [
        (1, "0", "max(0, q - 63)", "min(126, q + 63) + 1"),
        (64, "q % 64", "q + 64", "inf"),
        (64, "q % 64", "q % 64", "q // 64"),
    ]


def test_dilated_window_is_one_term_whose_offset_follows_the_row():
    [(stride, offset, first, _)] = lines("mask() { (q - k) % 4 == 0 and abs(q - k) <= 128 }")
    assert (stride, offset, first) == (4, "q % 4", "max(q - 128, q % 4)")


def test_longformer_is_rows_columns_and_a_window():
    rows, columns, window = lines("mask(p0, p1) { abs(q - k) <= p0 or q < p1 or k < p1 }")
    assert rows == (1, "0", "0", "inf")
    assert columns == (1, "0", "0", "p1")
    assert window[2] == "max(max(0, p1), q - p0)"


@pytest.mark.parametrize("name", ["neighborhood", "neighborhood, shifted", "neighborhood, dilated"])
def test_neighbourhoods_are_boxes(name):
    [box] = decompose(Mask.parse(LIBRARY[name][0]))
    assert box.widths == (64,)
    assert [p.stride for p in box.progressions] == ([2, 2] if "dilated" in name else [1, 1])


def test_shifted_windows_are_clamps():
    [box] = decompose(Mask.parse(LIBRARY["neighborhood, shifted"][0]))
    assert [to_text(p.first) for p in box.progressions] == [f"min(max(0, q{d} - 6), 51)" for d in (0, 1)]
    assert [to_text(p.count) for p in box.progressions] == ["13", "13"]


def test_boxes_of_three_dimensions_and_of_residues():
    """Shifted, dilated windows in 3-d: 27 pieces on plain indices, one box on coordinates."""
    rules = []
    for q, n in (("q // 48", 8), ("q // 8 % 6", 6), ("q % 8", 8)):
        k, start = q.replace("q", "k"), clamp(f"({q}) // 2", n // 2, 3)
        rules.append(f"({q} - {k}) % 2 == 0 and ({k}) // 2 >= {start} and ({k}) // 2 < {start} + 3")
    mask = Mask.parse(f"mask() {{ {' and '.join(rules)} }}")
    [box] = decompose(mask)
    assert box.widths == (6, 8) and [p.stride for p in box.progressions] == [2, 2, 2]
    assert analyze(mask, 200, 150).nnz == dense(mask, 200, 150).sum()


def test_boxes_hold_some_rows_only():
    mask = Mask.parse("mask(p0) { q // 8 <= p0 and k // 8 <= q // 8 and q % 8 > 2 and k % 8 <= q % 8 }")
    [box] = decompose(mask)
    assert to_text(box.rows) == "p0 >= q // 8 and q % 8 >= 3"
    assert analyze(mask, 80, 90, (6,)).nnz == dense(mask, 80, 90, (6,)).sum()


def test_windows_of_residues_are_split_by_residue():
    found = decompose(Mask.parse("mask() { (q - k) % 8 < 3 }"))
    assert sorted(to_text(t.progressions[0].offset) for t in found) == ["(q + 6) % 8", "(q + 7) % 8", "q % 8"]


def test_opaque_masks_give_terms_of_their_bound():
    mask = Mask.parse("mask(p0; c0: i32[1]) { c0[q] == c0[k] and q - k <= p0 and k <= q }")
    [found], [wanted] = decompose(mask), decompose(Mask.parse("mask(p0) { q - k <= p0 and k <= q }"))
    assert (found.progressions, found.rows) == (wanted.progressions, wanted.rows)
    assert isl.Map(found.region).is_equal(isl.Map(wanted.region))


def test_what_takes_too_many_terms_is_a_remainder():
    mask = Mask.parse("mask() { k <= q and (q * 3 + k * 5) % 101 < 40 }")
    [found] = decompose(mask)
    assert isinstance(found, Remainder) and describe(found).startswith("remainder {")
    assert isl.Map(found.region).is_equal(mask.may)


def test_an_empty_mask_has_no_terms():
    mask = Mask.parse("mask() { k <= q and k > q }")
    assert decompose(mask) == () and analyze(mask, 9, 9).nnz == 0


def test_proofs_fail_where_they_should():
    region = isl.Set("{ [q, k] : 0 <= k <= q }")
    low, high = isl.Set("{ [q, k] : 0 <= k <= q and k < 5 }"), isl.Set("{ [q, k] : 5 <= k <= q }")
    prove(region, [low, high])
    with pytest.raises(VerifyError, match="overlap"):
        prove(region, [region, low])
    with pytest.raises(VerifyError, match="are not the mask"):
        prove(region, [low])


def test_irregular_rows_are_no_term():
    assert term(isl.Set("{ [q, k] : 0 <= k <= q and k mod 5 <= 1 }")) is None
    assert term(isl.Set("{ [q, k] : q >= 0 and k >= 0 and (k <= q or q < 3) }")) is None  # unbounded in parts


# Delinearize and normalize.


def test_factors():
    predicate = Mask.parse("mask(p0) { q // 8 <= p0 and q % 32 // 8 == k % 32 // 8 }").predicate
    assert factors(predicate, (8,)) is None  # q % 32 // 8 is no coordinate of this space
    predicate = Mask.parse("mask(p0) { q // 8 - k // 8 <= p0 and q % 8 == k % 8 }").predicate
    assert [to_text(f) for f in factors(predicate, (8,))] == ["q0 - k0 <= p0", "q1 == k1"]
    assert factors(Mask.parse("mask() { k <= q and q // 8 == k // 8 }").predicate, (8,)) is None


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        ("k <= q", ()),
        ("(q - k) % 64 == 0", ()),
        ("q // 8 <= k", ()),
        ("q // 8 == k // 8 and k % 8 < 2", (8,)),
        ("q // 6 == k // 6 and q // 8 == k // 8", ()),
        ("q % 32 // 8 == k % 32 // 8 and q // 32 == k // 32", (4, 8)),
    ],
)
def test_widths(predicate, expected):
    assert widths(Mask.parse(f"mask() {{ {predicate} }}")) == expected


def test_normalize_keeps_opaque_atoms():
    mask = Mask.parse("mask(; c0: i32[1]) { c0[q] == 1 and k <= q + 1 and not (k > q) }")
    short = normalize_mask(mask)
    affine, opaque = split(short.predicate)
    assert (to_text(affine), to_text(opaque)) == ("q >= k", "c0[q] == 1")
    assert short.may.is_equal(mask.may)


def test_normalize_leaves_short_predicates_alone():
    mask = Mask.parse("mask() { k <= q }")
    assert normalize_mask(mask) == mask


def test_disjuncts_pull_disjunctions_outwards():
    predicate = Mask.parse("mask() { k <= q and not (q > 4 and k > 4) }").predicate
    assert [to_text(d) for d in disjuncts(predicate)] in (
        ["k <= q and k <= 4", "k <= q and q <= 4"],
        ["k <= 4 and k <= q", "k <= q and q <= 4"],
    )


# Counting.


def test_counts_are_exact(known):
    mask, values, _ = known
    for q_len, kv_len in ((1, 1), (300, 201), (129, 700), (0, 5), (5, 0)):
        assert analyze(mask, q_len, kv_len, values).nnz == dense(mask, q_len, kv_len, values).sum()


def test_counts_do_not_walk_rows(known):
    mask, values, _ = known
    small = analyze(mask, 1 << 12, 1 << 12, values)
    assert small.nnz == sum(int(dense(mask, 1 << 12, 1 << 12, values).sum()) for _ in (0,))
    start = time.perf_counter()
    assert analyze(mask, 1 << 24, 1 << 24, values).nnz >= small.nnz
    assert time.perf_counter() - start < 1  # 0.2 to 5 ms; a walk would take minutes


def test_counts_of_large_blocks():
    n = 1 << 22
    assert analyze(Mask.parse("mask() { q // 20000 == k // 20000 }"), n, n).nnz == sum(
        min(20000, n - s) ** 2 for s in range(0, n, 20000)
    )


def test_opaque_masks_are_counted_point_by_point():
    ids = np.sort(np.random.default_rng(0).integers(0, 9, 500))
    mask = Mask.parse("mask(p0; c0: i32[1]) { c0[q] == c0[k] and abs(q - k) <= p0 }")
    g = analyze(mask, 400, 450, (17,), (ids,))
    assert g.nnz == dense(mask, 400, 450, (17,), (ids,)).sum()
    assert g.density == g.nnz / (400 * 450)
    heads = Mask.parse("mask(; c0: i32[2]) { q - k <= c0[b, h] and k <= q }")
    table = np.arange(6).reshape(2, 3)
    assert analyze(heads, 20, 20, (), (table,), b=1, h=2).nnz == sum(min(q, 5) + 1 for q in range(20))


def test_steps_follow_numpy():
    rng = random.Random(0)
    x = np.arange(77)
    for _ in range(150):
        f, want = Steps.identity(77), x.copy()
        for _ in range(rng.randint(1, 6)):
            c = rng.choice([-5, -3, -2, 2, 3, 7])
            op = rng.choice("+*/%<m")
            if op == "+":
                f, want = f + Steps.constant(c, 77), want + c
            elif op == "*":
                f, want = f * c, want * c
            elif op == "/":
                f, want = f // c, want // c
            elif op == "%":
                f, want = f % c, want % c
            elif op == "<":
                other = Steps.identity(77) * 2 + Steps.constant(c, 77)
                f, want = f.minimum(other), np.minimum(want, 2 * x + c)
            else:
                f, want = f.maximum(Steps.identity(77) // 3), np.maximum(want, x // 3)
        assert f.total() == want.sum()
        assert f.total(Steps.identity(77), f) == (want * x * want).sum()


def test_periods_have_a_limit():
    with pytest.raises(TooIrregular):
        Steps.identity(1 << 24) % 9973 // 31 % 10007 // 7 % 11


# Tiles.


def brute_force(found: np.ndarray, rows: int, cols: int) -> tuple[int, ...]:
    empty = partial = full = read = needed = 0
    for t in range(0, found.shape[0], rows):
        needed += int(found[t : t + rows].any(0).sum())
        for u in range(0, found.shape[1], cols):
            tile = found[t : t + rows, u : u + cols]
            empty, full = empty + (not tile.any()), full + tile.all()
            partial += tile.any() and not tile.all()
            read += tile.shape[1] if tile.any() else 0
    return empty, partial, full, read, needed


def summary(tiles):
    return tiles.empty, tiles.partial, tiles.full, tiles.keys_read, tiles.keys_needed


@pytest.mark.parametrize(("q_len", "kv_len", "rows", "cols"), [(200, 201, 32, 16), (97, 129, 16, 33)])
def test_every_tile_has_its_class(known, q_len, kv_len, rows, cols):
    mask, values, _ = known
    want = brute_force(dense(mask, q_len, kv_len, values), rows, cols)
    tiles = analyze(mask, q_len, kv_len, values).tiles(rows, cols)
    assert summary(tiles) == want
    points = classify_points(lambda q, k: mask.evaluate(0, 0, q, k, values), q_len, kv_len, tiles.shape)
    assert summary(points) == want


def test_tiles_of_large_masks_are_counted_in_closed_form():
    tiles = analyze(Mask.parse("mask() { k <= q }"), 1 << 24, 1 << 24).tiles(128, 64)
    n = 1 << 17
    assert (tiles.full, tiles.partial, tiles.empty) == (n * (n - 1), 2 * n, n * (n - 1))
    assert (
        tiles.kind((5,), (9,)) == "full"
        and tiles.kind((5,), (10,)) == "partial"
        and tiles.kind((5,), (12,)) == "empty"
    )


@pytest.mark.parametrize("name", ["neighborhood", "neighborhood, shifted"])
def test_boxes_of_keys_read_little_more_than_needed(name):
    g = analyze(Mask.parse(LIBRARY[name][0]), 4096, 4096)
    assert g.tiles((8, 8), (2, 8)).overread < 1.3
    assert g.tiles(16, 64).overread > 2
    points = classify_points(g.attends, 4096, 4096, Shape((8, 8), (2, 8), (64,)))
    assert summary(points) == summary(g.tiles((8, 8), (2, 8)))


def test_tiles_of_opaque_masks():
    ids = np.arange(60) // 13
    mask = Mask.parse("mask(; c0: i32[1]) { c0[q] == c0[k] }")
    tiles = analyze(mask, 60, 60, (), (ids,)).tiles(8, 8)
    assert summary(tiles) == brute_force(ids[:, None] == ids, 8, 8)
    assert tiles.touched is None


def test_tile_shapes_are_checked():
    g = analyze(Mask.parse("mask() { k <= q }"), 64, 64)
    with pytest.raises(InputError, match="two shapes of one rank"):
        g.tiles(0, 8)
    with pytest.raises(InputError, match="rank 1 or 1"):
        g.tiles((8, 8), (8, 8))


def test_false_classes_are_caught(monkeypatch):
    monkeypatch.setattr(isl.Set, "subtract", lambda a, b: a)
    with pytest.raises(VerifyError, match="partition"):
        classify(Mask.parse("mask() { k <= q }"), 64, 64, {}, Shape((8,), (8,)))


# The face.


def test_explain():
    g = analyze(Mask.parse("mask(p0) { abs(q - k) <= p0 }"), 1000, 900, (64,))
    text = g.explain(128, 64)
    for part in (
        g.mask.to_text(),
        "q_len 1000, kv_len 900, p0 = 64",
        f"pairs {g.nnz}, density",
        "first max(0, q - p0), count",
        "proven for all lengths and all p0: disjoint terms",
        "tiles 128 by 64: 0 full, ",
        "proven: every tile is in exactly one class",
    ):
        assert part in text


def test_lengths_and_values_are_checked():
    mask = Mask.parse("mask(p0) { q - k <= p0 }")
    with pytest.raises(InputError, match="q_len as an integer of at least 0; got -1"):
        analyze(mask, -1, 5, (1,))
    with pytest.raises(InputError, match="1 integers for p0"):
        analyze(mask, 5, 5)


def test_random_masks_are_decomposed_exactly():
    rng = random.Random(7)
    for _ in range(25):
        mask = Mask.parse(_random_mask(rng))
        values = tuple(rng.randint(-2, 30) for _ in mask.params)
        found = dense(mask, 61, 80, values)
        assert analyze(mask, 61, 80, values).nnz == found.sum()
        region = isl.Set("{ [q, k] : false }")
        for t in decompose(mask):
            region = region.union(as_set(isl.Map(t.region)))
        assert region.is_equal(
            to_sets(mask.predicate)[0].intersect(isl.Set("{ [q, k] : q >= 0 and k >= 0 }"))
        )


PATTERNS = [
    "k <= q",
    "abs(q - k) <= P",
    "k < P",
    "q < P",
    "(q - k) % D == 0",
    "q // D == k // D",
    "k % D >= 3",
]
PATTERNS += ["q + k < 30", "q - k <= P and k - q <= 4", "q % D == k % D", "k <= q or k < P"]


def _random_mask(rng: random.Random) -> str:
    params = 0
    text = ""
    for i in range(rng.randint(1, 3)):
        pattern = rng.choice(PATTERNS).replace("D", str(rng.choice([4, 7, 16])))
        while "P" in pattern:
            pattern, params = pattern.replace("P", f"p{params}", 1), params + 1
        pattern = f"not ({pattern})" if rng.random() < 0.2 else f"({pattern})"
        text = f"({text}) {rng.choice(['and', 'or'])} {pattern}" if i else pattern
    return f"mask({', '.join(f'p{i}' for i in range(params))}) {{ {text} }}"

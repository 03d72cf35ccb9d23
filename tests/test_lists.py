"""Lists of key tiles: each row tile gets the tiles that hold points, once; those called full are full."""

import math

import numpy as np
import pytest

from gossamer.ir.kernel import Program
from gossamer.ir.kernel_interpret import intermediates, interpret
from gossamer.ir.kernel_parse import parse_program
from gossamer.ir.kernel_text import to_text
from gossamer.ir.kernel_verify import verify
from gossamer.ir.mask import Mask
from gossamer.ir.plan import Schedule
from gossamer.passes.pipeline import compile_spec
from gossamer.passes.spec import AttentionSpec

B, HQ, HK, QK, V = 2, 2, 1, 16, 16
ROWS, COLS = 16, 8
IDS = "c0: i32[1]"


def ids(rng, n, docs=4):
    return rng.integers(0, docs, n).astype(np.int32)


def table(rng, *shape):
    return rng.integers(0, 2, shape).astype(np.uint8)


def bounds(rng, n):
    return rng.integers(0, n + 20, (B, 1, n, 2)).astype(np.int32)


# name: (mask, params, tensors from a generator and the longer length, whether points are looked at)
SAME = f"mask(; {IDS}) {{ c0[q] == c0[k] }}"
CASES = {
    "sorted documents": (SAME, (), lambda r, n: [np.sort(ids(r, n))], False),
    "documents in any order": (SAME, (), lambda r, n: [ids(r, n, 40)], False),
    "one document": (SAME, (), lambda r, n: [ids(r, n, 1)], False),
    "no document": (f"mask(; {IDS}) {{ c0[q] == c0[k] + 9 }}", (), lambda r, n: [ids(r, n)], False),
    "causal documents": (
        f"mask(; {IDS}) {{ c0[q] == c0[k] and k <= q }}",
        (),
        lambda r, n: [np.sort(ids(r, n))],
        False,
    ),
    "documents or a window": (
        f"mask(p0; {IDS}) {{ c0[q] == c0[k] or abs(q - k) <= p0 }}",
        (3,),
        lambda r, n: [np.sort(ids(r, n))],
        False,
    ),
    "documents in a window": (
        f"mask(p0; {IDS}) {{ c0[q] == c0[k] and abs(q - k) <= p0 }}",
        (20,),
        lambda r, n: [np.sort(ids(r, n))],
        False,
    ),
    "documents of a batch": (
        "mask(; c0: i64[2]) { c0[b, q] == c0[b, k] }",
        (),
        lambda r, n: [r.integers(0, 5, (B, n))],
        False,
    ),
    "residues of documents": (
        f"mask(; {IDS}) {{ (q - k) % 4 == 0 and c0[q] == c0[k] }}",
        (),
        lambda r, n: [np.sort(ids(r, n))],
        False,
    ),
    "rows of a key": (
        "mask(; c0: i32[4]) { k <= q and (q < c0[b, 0, k, 0] or q >= c0[b, 0, k, 1]) }",
        (),
        lambda r, n: [bounds(r, n)],
        False,
    ),
    "keys of a set": (
        "mask(; c0: u8[1]) { c0[k] != 0 and k <= q }",
        (),
        lambda r, n: [table(r, n // 9 + 1).repeat(20)],
        False,
    ),
    "floats of a key": (
        "mask(; c0: f32[1]) { c0[k] > 0.5 and k <= q }",
        (),
        lambda r, n: [r.random(n, np.float32)],
        False,
    ),
    "a length of a batch": (
        f"mask(; {IDS}, c1: i32[1]) {{ k < c1[b] and c0[k] <= c0[q] }}",
        (),
        lambda r, n: [np.sort(ids(r, n)), np.array([0, 50], np.int32)],
        False,
    ),
    "aligned blocks of a head": (
        "mask(; c0: u8[3]) { c0[h, q // 32, k // 16] != 0 }",
        (),
        lambda r, n: [table(r, HQ, 8, 16)],
        False,
    ),
    "products beyond 32 bits": (
        f"mask(; {IDS}) {{ k // 8 * 900000011 % 97 % 4 == c0[q] }}",
        (),
        lambda r, n: [np.sort(ids(r, n))],
        False,
    ),
    "products of a key beyond 32 bits": (
        f"mask(; {IDS}) {{ k * 900000011 % 97 % 40 == c0[q] }}",
        (),
        lambda r, n: [np.sort(ids(r, n, 2))],
        False,
    ),
    "holes in closed form": ("mask() { (q // 16 + k // 8) % 5 < 2 and k <= q }", (), lambda r, n: [], False),
    "blocks of a row": (
        "mask(; c0: u8[2]) { c0[q, k // 16] != 0 and k <= q }",
        (),
        lambda r, n: [table(r, n, n // 16 + 1)],
        False,
    ),
    "hashed blocks": (
        "mask() { k // 8 == (q // 8 * 22987 + 17) % 65521 % ((kv_len + 7) // 8) or abs(q - k) <= 4 }",
        (),
        lambda r, n: [],
        False,
    ),
    "blocks across tiles": (
        "mask(; c0: u8[2]) { c0[q // 20, k // 13] != 0 }",
        (),
        lambda r, n: [table(r, 16, 20)],
        True,
    ),
    "bits": ("mask() { bitand(q, k) == 0 and k <= q }", (), lambda r, n: [], True),
    "bits of heads": ("mask() { bitand(q + 3 * h, k + b) % 8 == 0 }", (), lambda r, n: [], True),
    "a distance's own": (
        "mask(; c0: u8[1]) { c0[abs(q - k)] != 0 }",
        (),
        lambda r, n: [table(r, n) & table(r, n)],
        True,
    ),
    "products": ("mask() { q * k % 7 == 0 }", (), lambda r, n: [], True),
    "nowhere": ("mask(; c0: u8[1]) { c0[k] != 0 }", (), lambda r, n: [np.zeros(n, np.uint8)], False),
}


def plan_of(text, monotone=(), **sizes):
    schedule = Schedule((sizes.get("rows", ROWS),), (sizes.get("cols", COLS),), lists="all")
    spec = AttentionSpec(
        Mask.parse(text), qk_size=QK, v_size=V, return_lse=True, monotone=frozenset(monotone)
    )
    return compile_spec(spec, schedule)


def arguments(mask, params, tensors, q_len, kv_len, rng):
    """What an attention over random operands is called with, outputs included."""
    q, k, v = (
        rng.standard_normal((B, h, s, d), np.float32)
        for h, s, d in ((HQ, q_len, QK), (HK, kv_len, QK), (HK, kv_len, V))
    )
    values = {"q": q, "k": k, "v": v, "scale": 1 / math.sqrt(QK)}
    values |= {c.name: t for c, t in zip(mask.captures, tensors, strict=True)}
    values |= {f"p{i}": p for i, p in enumerate(params)}
    values |= {
        "o": np.full((B, HQ, q_len, V), np.nan, np.float32),
        "lse": np.full((B, HQ, q_len), np.nan, np.float32),
    }
    return values


def reference(q, k, v, attends):
    scores = np.where(
        attends, np.einsum("bhqd,bhkd->bhqk", q.astype(float), k.repeat(HQ // HK, 1)) / 4, -np.inf
    )
    peak = scores.max(-1, keepdims=True, initial=-1e300)
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    out = weights / np.where(total == 0, 1, total) @ v.repeat(HQ // HK, 1)
    return out, np.where(total == 0, -np.inf, peak + np.log(np.where(total == 0, 1, total)))[..., 0]


@pytest.mark.parametrize("name", CASES)
def test_attention_over_lists_is_attention(name):
    text, params, make, looks = CASES[name]
    mask, rng = Mask.parse(text), np.random.default_rng(np.random.randint(2**31))
    program = plan_of(text)
    verify(program)
    assert parse_program(to_text(program)) == program
    names = [k.name for k in program.kernels]
    assert any(n.endswith("_tiles") for n in names), names
    assert any(n.endswith("_flags") for n in names) == looks
    for q_len, kv_len in ((61, 83), (40, 37), (1, 100), (70, 1)):
        tensors = make(rng, max(q_len, kv_len))
        given = arguments(mask, params, tensors, q_len, kv_len, rng)
        written = interpret(program, given)
        grid = np.ogrid[:B, :HQ, :q_len, :kv_len]
        attends = mask.evaluate(*grid, params, tensors, q_len, kv_len)
        out, lse = reference(given["q"], given["k"], given["v"], attends)
        np.testing.assert_allclose(written["o"], out, atol=2e-6)
        np.testing.assert_allclose(written["lse"], lse, atol=2e-6)


# Ranges of ids overlap without an id in common; what any key of a tile has says nothing of where the key is.
LOOSE = {"documents in any order", "documents of a batch", "rows of a key", "floats of a key"} | {
    "products of a key beyond 32 bits"
}


@pytest.mark.parametrize("name", CASES)
def test_lists_hold_the_tiles_with_points_and_know_which_are_full(name):
    text, params, make, _ = CASES[name]
    mask, rng = Mask.parse(text), np.random.default_rng(np.random.randint(2**31))
    program, stride = plan_of(text), 4 if name.startswith("residues") else 1
    q_len, kv_len = 75, 93
    tensors = make(rng, kv_len)
    given = arguments(mask, params, tensors, q_len, kv_len, rng)
    tiles, counts = lists_of(program, given)
    attends = mask.evaluate(*np.ogrid[:B, :HQ, :q_len, :kv_len], params, tensors, q_len, kv_len)
    for at in np.ndindex(tiles.shape[:-1]):
        full, part = counts[at]
        found = [*tiles[at][:full], *tiles[at][tiles.shape[-1] - part :]]
        assert len({*found}) == len(found)
        # Leading dimensions: batch, head, residue, as far as the lists have them.
        *outer, m = at
        r = outer.pop() if stride > 1 else 0
        chosen = {2: (0, 1), 1: (0,) if "c0[b" in text or "c1[b" in text else (1,), 0: ()}[len(outer)]
        index = tuple(outer[chosen.index(d)] if d in chosen else 0 for d in (0, 1))
        rows = np.arange(stride * ROWS * m + r, min(stride * ROWS * (m + 1), q_len), stride)
        for n in range(-(-kv_len // (stride * COLS))):
            cols = np.arange(stride * COLS * n + r, stride * COLS * (n + 1), stride)
            points = attends[index][np.ix_(rows, cols[cols < kv_len])]
            assert (n in found) >= points.any(), f"{at}: tile {n} is missing"
            if name not in LOOSE:
                assert (n in found) == points.any(), f"{at}: tile {n} is empty"
            if n in found[:full]:
                assert points.all() and cols[-1] < kv_len, f"{at}: tile {n} is not full"
            elif name not in LOOSE:
                assert not (points.size and points.all() and cols[-1] < kv_len), f"{at}: tile {n} is full"


def lists_of(program, given):
    """(tiles, counts) that the kernels before the attention write."""
    kernels = tuple(k for k in program.kernels if k.name.endswith(("_tiles", "_flags")))
    made = intermediates(program, given)
    between = tuple(t for t in program.intermediates if t.name.endswith("_flags"))
    names = {a.name for k in kernels for a in k.args} - {t.name for t in between}
    written = interpret(Program(kernels, between), {n: v for n, v in (given | made).items() if n in names})
    return written["tiles"], written["tiles_counts"]


@pytest.mark.parametrize(
    "name",
    [
        "causal documents",
        "rows of a key",
        "blocks across tiles",
        "bits of heads",
        "residues of documents",
        "products beyond 32 bits",
        "products of a key beyond 32 bits",
    ],
)
def test_triton(name):
    torch, pytest_triton = pytest.importorskip("torch"), pytest.importorskip("triton")
    assert pytest_triton
    from gossamer.codegen.triton import emit
    from gossamer.runtime.triton_interpreter import run_interpreted

    text, params, make, _ = CASES[name]
    mask, rng = Mask.parse(text), np.random.default_rng(np.random.randint(2**31))
    spec = AttentionSpec(mask, qk_size=QK, v_size=V, return_lse=True, target="cuda:sm_90")
    program = compile_spec(spec, Schedule((16,), (16,), lazy_rescale=False))
    q_len, kv_len = 45, 83
    given = arguments(mask, params, make(rng, kv_len), q_len, kv_len, rng)
    given |= intermediates(program, given)
    tensors = {n: torch.from_numpy(np.ascontiguousarray(x)) if np.ndim(x) else x for n, x in given.items()}
    for kernel in program.kernels:
        run_interpreted(emit(kernel), {a.name: tensors[a.name] for a in kernel.args})
    captures = [given[c.name] for c in mask.captures]
    attends = mask.evaluate(*np.ogrid[:B, :HQ, :q_len, :kv_len], params, captures, q_len, kv_len)
    out, lse = reference(given["q"], given["k"], given["v"], attends)
    np.testing.assert_allclose(tensors["o"].numpy(), out, atol=2e-6)
    np.testing.assert_allclose(tensors["lse"].numpy(), lse, atol=2e-6)


def torch_masks():
    """Masks as users write them, whose key tiles a CPU lists."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    from gossamer import masks

    rng = torch.Generator().manual_seed(np.random.randint(2**31))
    unsorted = torch.randint(0, 6, (300,), generator=rng)
    rows = torch.randint(0, 300, (2, 1, 300, 2), generator=rng).sort(-1).values.int()
    listed = torch.rand(2, 3, 5, 5, generator=rng) < 0.4
    order = torch.argsort(listed.int(), dim=-1, descending=True, stable=True).int()
    blocks = BlockMask.from_kv_blocks(listed.sum(-1).int(), order, BLOCK_SIZE=64, seq_lengths=(300, 300))
    return {
        "documents": lambda b, h, q, k: unsorted[q] == unsorted[k],
        "flashmask": masks.from_flashmask(rows, causal=True),
        "flashmask, both sides": masks.from_flashmask(rows.repeat(1, 1, 1, 2), causal=False),
        "bigbird": masks.bigbird(5, 3, 2, 16, 7),
        "bits of a head": lambda b, h, q, k: ((q ^ (k + h)) & 37) == 0,
        "random blocks": blocks,
        "selected blocks": masks.selected(
            torch.randint(-1, 10, (2, 1, 19, 3), generator=rng), 300, rows=16, keys=32
        ),
        "selected by row": masks.selected(torch.randint(-1, 5, (1, 3, 300, 2), generator=rng), 300)
        & masks.causal(),
    }


@pytest.mark.parametrize(
    "name",
    [
        "documents",
        "flashmask",
        "flashmask, both sides",
        "bigbird",
        "bits of a head",
        "random blocks",
        "selected blocks",
        "selected by row",
    ],
)
def test_cpu(name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("tvm")
    from gossamer.frontend.checking import check_attention

    mask = torch_masks()[name]
    schedule = Schedule((32,), (32,), lists="all")
    for q_len, kv_len in ((300, 300), (77, 130))[: 1 if name == "random blocks" else 2]:
        q = torch.randn(2, 3, q_len, 32)
        k, v = torch.randn(2, 2, 3, kv_len, 32)
        check_attention(q, k, v, mask=mask, schedule=schedule)


@pytest.mark.parametrize(
    "name", ["documents in any order", "bits of heads", "blocks across tiles", "residues of documents"]
)
def test_column_sums_have_lists_of_their_own(name):
    """Rows of their tiles are keys: the lists are of the mask with queries and keys exchanged."""
    text, params, make, _ = CASES[name]
    mask, rng = Mask.parse(text), np.random.default_rng(np.random.randint(2**31))
    schedule = Schedule((ROWS,), (COLS,), lists="all")
    program = compile_spec(
        AttentionSpec(mask, qk_size=QK, v_size=V, return_lse=True, return_column_sums=True), schedule
    )
    assert any(k.name.startswith("column_sums") and k.name.endswith("_tiles") for k in program.kernels)
    q_len, kv_len = 61, 83
    tensors = make(rng, kv_len)
    given = arguments(mask, params, tensors, q_len, kv_len, rng)
    given["column_sums"] = np.full((B, HQ, kv_len), np.nan, np.float32)
    found = interpret(program, given)["column_sums"]
    attends = mask.evaluate(*np.ogrid[:B, :HQ, :q_len, :kv_len], params, tensors, q_len, kv_len)
    scores = np.einsum("bhqd,bhkd->bhqk", given["q"].astype(float), given["k"].repeat(HQ // HK, 1)) / 4
    weights = np.where(attends, np.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    expected = (weights / np.where(total == 0, 1, total)).sum(2)
    np.testing.assert_allclose(found, expected, atol=2e-5)

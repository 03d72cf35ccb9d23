"""Lists of key tiles: each row tile gets the tiles that hold points, once; those called full are full."""

import math

import numpy as np
import pytest

from gossamer.ir.kernel_interpret import interpret
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


def run(program, mask, params, tensors, q_len, kv_len, rng):
    """(values, dense attention) of one call on the interpreter of the Kernel IR."""
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
    return interpret(program, values), (q, k, v)


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
    mask, rng = Mask.parse(text), np.random.default_rng()
    program = plan_of(text)
    verify(program)
    assert parse_program(to_text(program)) == program
    names = [k.name for k in program.kernels]
    assert any(n.endswith("_tiles") for n in names), names
    assert any(n.endswith("_flags") for n in names) == looks
    for q_len, kv_len in ((61, 83), (40, 37), (1, 100), (70, 1)):
        tensors = make(rng, max(q_len, kv_len))
        written, operands = run(program, mask, params, tensors, q_len, kv_len, rng)
        grid = np.ogrid[:B, :HQ, :q_len, :kv_len]
        attends = mask.evaluate(*grid, params, tensors, q_len, kv_len)
        out, lse = reference(*operands, attends)
        np.testing.assert_allclose(written["o"], out, atol=2e-6)
        np.testing.assert_allclose(written["lse"], lse, atol=2e-6)

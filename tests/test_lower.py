"""The pipeline on the interpreter: kernels verify, print, parse back, and agree with dense attention."""

import math

import numpy as np
import pytest

from gossamer.ir.kernel_interpret import interpret
from gossamer.ir.kernel_parse import parse_program
from gossamer.ir.kernel_text import to_text
from gossamer.ir.kernel_verify import verify
from gossamer.ir.mask import Mask
from gossamer.passes.pipeline import compile_spec
from gossamer.passes.spec import AttentionSpec

B, HQ, HK, QK, V = 2, 4, 2, 16, 24

CASES = {
    "full": ("mask() { true }", ()),
    "causal": ("mask() { k <= q }", ()),
    "window": ("mask(p0) { abs(q - k) <= p0 }", (12,)),
    "longformer": ("mask(p0, p1) { abs(q - k) <= p0 or k < p1 or q < p1 }", (7, 3)),
    "strided, two groups": ("mask(p0) { abs(q - k) < p0 or (q - k) % 8 == 0 }", (5,)),
    "residues": ("mask() { (q - k) % 16 == 0 }", ()),
    "dilated": ("mask(p0) { (q - k) % 4 == 0 and abs(q - k) <= 4 * p0 }", (3,)),
    "blocked": ("mask() { q // 25 == k // 25 }", ()),
    "box": ("mask() { abs(q // 10 - k // 10) <= 2 and abs(q % 10 - k % 10) <= 2 }", ()),
    "box, dilated": (
        "mask() { (q // 9 - k // 9) % 2 == 0 and abs(q // 9 - k // 9) <= 2 and abs(q % 9 - k % 9) <= 2 }",
        (),
    ),
    "documents": ("mask(; c0: i32[1]) { c0[q] == c0[k] and k <= q }", ()),
    "table": ("mask(; c0: u8[2]) { c0[q // 64, k // 64] != 0 or abs(q - k) <= 6 }", ()),
    "bits": ("mask() { bitand(q, k) == 0 and k <= q }", ()),
    "product": ("mask() { q * k % 7 == 0 }", ()),
    "heads and batch": ("mask() { h * 10 >= q - k and b + k <= q }", ()),
    "columns of a class": ("mask() { k % 5 == 2 and k <= q and q > 30 }", ()),
    "empty rows": ("mask(p0) { k >= q + p0 }", (20,)),
    "nothing": ("mask() { false }", ()),
}


def captured(mask, rng):
    """Sorted ids for integers, random bits for bytes."""
    make = {
        "i32": lambda: np.sort(rng.integers(0, 4, 200)).astype(np.int32),
        "u8": lambda: rng.integers(0, 2, (4, 4)).astype(np.uint8),
    }
    return {c.name: make[c.dtype]() for c in mask.captures}


def dense(q, k, v, attends):
    scores = np.einsum("bhqd,bhkd->bhqk", q.astype(float), np.repeat(k, HQ // HK, 1)) / math.sqrt(QK)
    scores = np.where(attends, scores, -np.inf)
    peak = scores.max(-1, keepdims=True, initial=-1e300)
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    out = weights / np.where(empty, 1, total) @ np.repeat(v, HQ // HK, 1)
    return out, np.where(empty, -np.inf, peak + np.log(np.where(empty, 1, total)))[..., 0]


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
@pytest.mark.parametrize("name, sorted_ids", [*((name, False) for name in CASES), ("documents", True)])
def test_lowered_kernels_compute_attention(name, sorted_ids, target):
    text, params = CASES[name]
    mask = Mask.parse(text)
    rng = np.random.default_rng(np.random.randint(2**31))
    tensors = captured(mask, rng)
    monotone = frozenset(c.name for c in mask.captures if c.dtype == "i32") if sorted_ids else frozenset()
    facts = {"target": target, "monotone": monotone, "positive": target != "cpu"}
    program = compile_spec(AttentionSpec(mask, qk_size=QK, v_size=V, return_lse=True, **facts))
    for q_len, kv_len in ((61, 83), (40, 37)):
        q, k, v = (
            rng.standard_normal((B, h, s, d), np.float32)
            for h, s, d in ((HQ, q_len, QK), (HK, kv_len, QK), (HK, kv_len, V))
        )
        values = {"q": q, "k": k, "v": v, "scale": 1 / math.sqrt(QK), **tensors}
        values |= {f"p{i}": p for i, p in enumerate(params)}
        verify(program)
        assert parse_program(to_text(program)) == program
        values |= {"o": np.full((B, HQ, q_len, V), np.nan), "lse": np.full((B, HQ, q_len), np.nan)}
        values |= interpret(program, values)
        grid = np.ogrid[:B, :HQ, :q_len, :kv_len]
        attends = mask.evaluate(*grid, params, tuple(tensors.values()), q_len, kv_len)
        out, lse = dense(q, k, v, attends)
        np.testing.assert_allclose(values["o"], out, atol=2e-6)
        np.testing.assert_allclose(values["lse"], lse, atol=2e-6)

"""What a mask reads once a batch and head: closed forms, the same pairs, and what is left alone."""

import numpy as np
import pytest
import sympy
import torch

import gossamer
from gossamer.ir.errors import ParseError, VerifyError
from gossamer.ir.mask import Mask
from gossamer.passes.build import build
from gossamer.passes.cost import Size, count_tiles
from gossamer.passes.pipeline import run
from gossamer.passes.spec import AttentionSpec
from gossamer.passes.uniform import uniform

WINDOWS = "mask(p0; c0: i32[1], c1: i64[2]) { q >= k and q - k <= c0[h] and k >= c1[b, h] * p0 }"


def test_terms_without_q_and_k_are_named_and_the_mask_is_exact():
    mask = uniform(Mask.parse(WINDOWS))
    assert mask.exact and not Mask.parse(WINDOWS).exact
    assert [name for name, _ in mask.lets] == ["u0", "u1"]
    assert Mask.parse(mask.to_text()) == mask


@pytest.mark.parametrize(
    "text", [WINDOWS, "mask(; c0: f32[1], c1: i32[1]) { c0[h] > 0.5 or abs(q - c1[b]) <= 3 }"]
)
def test_the_pairs_stay_the_same(text):
    rng = np.random.default_rng(0)
    mask = Mask.parse(text)
    ranks = {c.rank: (2, 3)[: c.rank] for c in mask.captures}
    b, h, q, k = np.ogrid[:2, :2, :19, :23]
    for _ in range(5):
        captures = [
            rng.random(ranks[c.rank], np.float32) if c.dtype[0] == "f" else rng.integers(-3, 9, ranks[c.rank])
            for c in mask.captures
        ]
        params = [3] * len(mask.params)
        want = mask.evaluate(b, h, q, k, params, captures)
        assert (uniform(mask).evaluate(b, h, q, k, params, captures) == want).all()


@pytest.mark.parametrize(
    "text",
    [
        "mask(p0) { q - k <= p0 }",
        "mask(p0) { q - k <= max(p0, 3) }",
        "mask(; c0: i32[1]) { c0[q] == c0[k] }",
        "mask(; c0: i32[1]) { (q - c0[b]) % 4 == 0 }",
        "mask(; c0: i32[2]) { c0[q // 16, k // 16] > 0 }",
    ],
)
def test_leaves_alone(text):
    mask = Mask.parse(text)
    assert uniform(mask) is mask


def test_a_sum_is_one_term_so_that_large_parts_may_cancel():
    mask = uniform(Mask.parse("mask(; c0: i64[1], c1: i64[1]) { q + c0[b] <= k + c1[b] }"))
    assert len(mask.lets) == 1
    large = np.array([2**40]), np.array([2**40 + 1])
    assert mask.evaluate(0, 0, 1, 0, (), large) and not mask.evaluate(0, 0, 2, 0, (), large)


def test_loops_are_closed_forms_and_are_counted_by_batch_and_head():
    mask = Mask.parse("mask(; c0: i32[1]) { q >= k and q - k < c0[h] }")
    op = run(build(AttentionSpec(mask))).of_kind("attention")[0]
    [plan] = zip(op.attr("groups"), op.attr("schedules"), op.attr("loops"), strict=True)
    assert plan[2].touched == sympy.true and plan[2].full != sympy.false

    def visited(*windows: int) -> int:
        size = Size(512, 512, batch=2, heads=len(windows), params={"c0": np.array(windows)})
        return count_tiles(plan, size).visited

    assert visited(32, 512) == visited(32) + visited(512)
    assert visited(32) < visited(512)


def test_windows_by_head_and_batch_compute_what_the_reference_does():
    windows, starts = torch.tensor([0, 5, 70]), torch.tensor([[0, 3, 40], [64, -(2**40), 2**40]])
    query, key, value = torch.randn(2, 3, 90, 16), torch.randn(2, 3, 101, 16), torch.randn(2, 3, 101, 16)

    def mask(b, h, q, k):
        return (abs(q - k) <= windows[h]) & (k >= starts[b, h])

    got, wanted = (
        gossamer.attention(query, key, value, mask=mask, backend=backend) for backend in ("auto", "reference")
    )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_let_is_an_integer_without_q_and_k():
    for body in ("let u0 = q + 1; k <= u0", "let u0 = c9[b]; k <= u0", "let q = 1; k <= q"):
        with pytest.raises((VerifyError, ParseError)):
            Mask.parse(f"mask() {{ {body} }}")
    with pytest.raises(ParseError, match="expected a let like"):
        Mask.parse("mask() { u0 = 3; k <= u0 }")

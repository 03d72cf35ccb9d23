"""Captured tensors read out of range at indices beyond closed forms: an error, never a number."""

import pytest
import torch

import gossamer
from gossamer.frontend.checking import check_attention
from gossamer.ir.errors import InputError

Q = torch.randn(1, 2, 60, 16)
IDS = torch.randint(0, 3, (60,))


def test_a_nested_read_out_of_range():
    pages = torch.arange(60)
    mask = gossamer.Mask.trace(lambda b, h, q, k: IDS[pages[q]] == IDS[k])
    check_attention(Q, Q, Q, mask=mask)
    pages[7] = 99
    with pytest.raises(InputError, match=r"expected an index from 0 to 59; got 99"):
        gossamer.attention(Q, Q, Q, mask=mask)


def test_a_product_out_of_range():
    squares = torch.zeros(59 * 59 + 1, dtype=torch.int64)
    check_attention(Q, Q, Q, mask=lambda b, h, q, k: squares[q * q] <= k)
    with pytest.raises(InputError, match="an index from 0 to 59"):
        gossamer.attention(Q, Q, Q, mask=lambda b, h, q, k: IDS[q * q] <= k)


def test_scores_are_judged_on_the_pairs_that_attend():
    bias = torch.randn(100)
    near = gossamer.masks.sliding_window(1)
    out = gossamer.attention(
        Q, Q, Q, mask=near, score_mod=lambda s, b, h, q, k: s + bias[(q - k) * (q - k) * 99]
    )
    assert torch.isfinite(out).all()
    with pytest.raises(InputError, match="an index from 0 to 99"):
        gossamer.attention(Q, Q, Q, score_mod=lambda s, b, h, q, k: s + bias[(q - k) * (q - k) * 99])


def test_a_bias_of_keys_under_a_mask_with_a_bound_by_batch():
    """The bound is known to the kernel alone: the bias has to cover every key."""
    q, bound, bias = torch.randn(2, 2, 60, 16), torch.tensor([5, 40], dtype=torch.int32), torch.randn(60)

    def biased(score, b, h, q_idx, kv_idx):
        return score + bias[kv_idx]

    check_attention(q, q, q, mask=lambda b, h, q, k: k <= q + bound[b], score_mod=biased)
    bias = bias[:50]
    with pytest.raises(InputError, match=r"t0\[k\] reads outside its tensor"):
        gossamer.attention(q, q, q, mask=lambda b, h, q, k: k <= q + bound[b], score_mod=biased)


def test_bounds_of_32_bits_beside_a_divided_batch():
    q, first, last = torch.randn(6, 2, 40, 16), torch.arange(3).int(), torch.arange(6).int()
    check_attention(q, q, q, mask=lambda b, h, q, k: (k >= first[b % 3]) & (k - q <= last[b]) & (k >= b % 3))

"""Numbers that 32 bits do not hold: windows without end, sentinels in tensors, strides beyond any length."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.ir.errors import InputError
from gossamer.runtime.driver import compilations


def compare(mask: Any, expected: Callable[..., Any], q_len: int, kv_len: int, batch: int = 1) -> None:
    """Our attention is PyTorch's with the dense mask that NumPy computes in 64 bits."""
    generator = torch.Generator().manual_seed(q_len)
    query, key, value = (torch.randn(batch, 1, n, 16, generator=generator) for n in (q_len, kv_len, kv_len))
    b, q, k = np.ogrid[:batch, :q_len, :kv_len]
    dense = np.broadcast_to(expected(b, q, k), (batch, q_len, kv_len))[:, None]
    got = gossamer.attention(query, key, value, mask=mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.from_numpy(dense.copy())
    )
    torch.testing.assert_close(got, wanted.nan_to_num(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**40, 2**61])
def test_windows_of_any_size(size: int) -> None:
    for lengths in ((1, 1), (65, 130)):
        compare(masks.sliding_window(size, 3), lambda b, q, k: k - q <= 3, *lengths)
        compare(masks.global_tokens(size), lambda b, q, k: q >= 0, *lengths)


def test_large_numbers_in_remainders() -> None:
    shift = 2**40 + 1
    mask = gossamer.Mask.trace(lambda b, h, q, k: (q - k + shift) % 3 == 0)
    compare(mask, lambda b, q, k: (q - k + shift) % 3 == 0, 65, 130)


def test_large_numbers_are_part_of_the_kernel_and_others_stay_arguments() -> None:
    mask = masks.sliding_window(2**40, 3)
    assert mask.values == (3,)
    assert mask.key == masks.sliding_window(2**40, 7).key != masks.sliding_window(5, 3).key
    assert masks.sliding_window(2**40, 3) == gossamer.Mask.trace(
        lambda b, h, q, k: (q - k <= 2**40) & (k - q <= 3)
    )
    compare(mask, lambda b, q, k: k - q <= 3, 9, 9)
    before = compilations()
    compare(masks.sliding_window(2**40, 7), lambda b, q, k: k - q <= 7, 20, 30)
    assert compilations() == before


def test_large_numbers_in_scores() -> None:
    reach = 2**40
    query, key, value = (torch.randn(1, 1, 40, 16) for _ in range(3))

    def near(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return torch.where(q - k < reach, score, -100.0)

    got = gossamer.attention(query, key, value, score_mod=near)
    torch.testing.assert_close(got, gossamer.attention(query, key, value))


def test_numbers_beyond_64_bits_are_refused() -> None:
    with pytest.raises(InputError, match=r"captured integer: expected at most 2\*\*61 either way; got"):
        masks.sliding_window(2**70)


def test_captured_tensors_keep_64_bits() -> None:
    limits = torch.tensor([2**31 + 5, 2**40, -(2**40), 7])
    n = limits.numpy()[:, None, None]
    for q_len, kv_len in ((1, 1), (65, 130)):
        compare(lambda b, h, q, k: k < limits[b], lambda b, q, k: k < n, q_len, kv_len, 4)
        compare(lambda b, h, q, k: k >= q - limits[b], lambda b, q, k: k >= q - n, q_len, kv_len, 4)


@pytest.mark.parametrize("stride", [5000, 2**33])
def test_strides_beyond_the_length_take_the_natural_order(stride: int) -> None:
    compare(masks.strided(stride, 3), lambda b, q, k: abs(q - k) < 3, 65, 130)


def test_index_without_a_check_in_good_time_compiles() -> None:
    """A bias by the distance in a grid, under a dilated neighbourhood: isl stops at its budget."""
    bias = torch.randn(500)

    def relative(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score + bias[(q // 11 - k // 11) + 10 + 21 * (q % 11 - k % 11 + 10)]

    query, key, value = (torch.randn(1, 1, 77, 16) for _ in range(3))
    mask = masks.neighborhood((7, 11), (3, 5), (1, 2))
    got, wanted = (
        gossamer.attention(query, key, value, mask=mask, score_mod=relative, backend=backend)
        for backend in ("auto", "reference")
    )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

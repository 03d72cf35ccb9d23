"""Decoding, packed sequences and paged caches through `gossamer.attention`, against the dense reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.frontend.placement import even_splits
from gossamer.ir.errors import InputError, UnsupportedError
from gossamer.runtime.driver import compilations

POLICIES = torch.tensor([3, 10, 33, 100, 5, 300, 1200, 60])
PREFIXES = torch.tensor([4, 0, 700])
MASKS: dict[str, Any] = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(100, 0),
    "sink and window": masks.causal() & (masks.sliding_window(40, 0) | masks.global_tokens(4, rows=False)),
    "prefix": masks.prefix_lm(PREFIXES),
    "window by head": lambda b, h, q, k: (q >= k) & (q - k <= POLICIES[h]),
    "strided": masks.causal() & masks.strided(16, 8),
}


def tensors(
    *shape_q: int, kv: int, heads: int, batch: int | None = None, dtype: Any = torch.float32
) -> list[Any]:
    generator = torch.Generator().manual_seed(sum(shape_q) + kv)
    size = shape_q[3]
    shapes = (shape_q, *2 * ((batch or shape_q[0], heads, kv, size),))
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def paged(k: torch.Tensor, v: torch.Tensor, lens: torch.Tensor, page: int) -> tuple[torch.Tensor, ...]:
    """Caches of pages in random order with the rows below lens, NaN elsewhere; the table, with garbage."""
    batch, heads, length, size = k.shape
    width = -(-length // page)
    table = torch.randperm(batch * width + 3)[: batch * width].view(batch, width).int()
    caches = torch.full((2, batch * width + 3, heads, page, size), float("nan"), dtype=k.dtype)
    for b in range(batch):
        for at in range(int(lens[b])):
            caches[0, table[b, at // page], :, at % page] = k[b, :, at]
            caches[1, table[b, at // page], :, at % page] = v[b, :, at]
        table[b, -(-int(lens[b]) // page) :] = torch.tensor(10**8 if b % 2 else -7)
    return caches[0], caches[1], table


def compare(query: Any, key: Any, value: Any, **given: Any) -> torch.Tensor:
    got, lse = gossamer.attention(query, key, value, enable_gqa=True, return_lse=True, **given)
    given["backend"] = "reference"
    want, want_lse = gossamer.attention(query, key, value, enable_gqa=True, return_lse=True, **given)
    rough = query.dtype == torch.float16
    torch.testing.assert_close(got, want, rtol=2e-3 if rough else 1e-4, atol=2e-3 if rough else 1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    return got


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("q_len, page", [(1, 0), (3, 16), (16, 64)])
def test_decoding_against_a_long_cache(name, q_len, page):
    lens = torch.tensor([1211, 17, 640])
    q, k, v = tensors(3, 8, q_len, 16, kv=1216, heads=2)
    given: dict[str, Any] = {"mask": MASKS[name], "q_offset": (lens - q_len).clamp(min=0), "kv_lens": lens}
    if page:
        k, v, given["block_table"] = paged(k, v, lens, page)
    else:
        for b, n in enumerate(lens):
            k[b, :, n:], v[b, :, n:] = float("nan"), float("nan")
    out = compare(q, k, v, **given)
    assert out.isfinite().all()


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (16, 1), (5, 1)])
def test_groups_of_query_heads(heads):
    q, k, v = tensors(2, heads[0], 2, 32, kv=1100, heads=heads[1], dtype=torch.float16)
    compare(q, k, v, mask=masks.sliding_window(500, 0), q_offset=1098)


def test_caches_laid_out_another_way():
    lens = torch.tensor([70, 3], dtype=torch.int32)
    q, k, v = tensors(2, 2, 1, 16, kv=80, heads=2)
    k, v, table = paged(k, v, lens, 16)
    other = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]  # (pages, page_size, Hk, D)
    given = dict(block_table=table, kv_lens=lens, mask=masks.causal(), q_offset=lens - 1)
    a, b = (gossamer.attention(q, *x, **given) for x in ((k, v), other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["none", "causal", "window by head", "prefix"])
def test_packed_sequences(name):
    q_bounds, kv_bounds = torch.tensor([0, 37, 37, 101]), torch.tensor([0, 50, 90, 150], dtype=torch.int32)
    q, k, v = tensors(1, 8, 104, 16, kv=160, heads=4)
    out = compare(q, k, v, mask=MASKS[name], cu_seqlens_q=q_bounds, cu_seqlens_kv=kv_bounds)
    assert (out[:, :, 101:] == 0).all()


def test_packed_queries_and_pages():
    """Prefill of one sequence beside decoding of others, as serving engines mix them."""
    lens, bounds = torch.tensor([5, 700, 64]), torch.tensor([0, 1, 70, 71])
    q, k, v = tensors(1, 4, 71, 16, kv=704, heads=2, batch=3)
    k, v, table = paged(k, v, lens, 32)
    offset = lens - torch.diff(bounds)
    compare(
        q,
        k,
        v,
        mask=masks.sliding_window(60, 0),
        cu_seqlens_q=bounds,
        block_table=table,
        kv_lens=lens,
        q_offset=offset,
    )


def test_sinks_and_scores_see_heads_and_positions():
    sinks, slopes = torch.linspace(-1, 2, 8), torch.linspace(0, 0.1, 8)
    q, k, v = tensors(2, 8, 1, 16, kv=1200, heads=2)

    def alibi(score, b, h, q, k):
        return score - slopes[h] * (q - k)

    offset = torch.tensor([1000, 30])
    compare(q, k, v, mask=masks.causal(), score_mod=alibi, sinks=sinks, q_offset=offset)


def test_a_mask_tensor_has_a_row_for_every_sequence():
    q, k, v = tensors(3, 2, 4, 16, kv=40, heads=2)
    table = torch.rand(3, 1, 4, 40) < 0.5
    compare(q, k, v, mask=table, kv_lens=torch.tensor([40, 7, 20]))


def test_lengths_offsets_and_tables_compile_nothing():
    def call(kv: int, offset: int, lens: list[int]) -> None:
        q, k, v = tensors(len(lens), 4, 1, 16, kv=kv, heads=2)
        gossamer.attention(q, k, v, enable_gqa=True, mask=masks.causal(), q_offset=offset)
        gossamer.attention(
            q, k, v, enable_gqa=True, mask=masks.causal(), kv_lens=torch.tensor(lens), q_offset=offset
        )

    call(1100, 900, [5, 7])
    before = compilations()
    call(2300, 17, [1, 2000, 0])
    assert compilations() == before


def test_splits_are_the_same_for_the_same_sizes_and_fill_the_machine():
    assert [even_splits(n, 264, 256) for n in (8, 128, 1000)] == [33, 2, 1]
    assert even_splits(128, 264, 1) == 1 and even_splits(0, 264, 9) == 1


SMALL = torch.randn(2, 2, 4, 16)
CACHE = torch.randn(6, 2, 16, 16)
LENS = torch.tensor([4, 3])
TABLE = torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"q_offset": -1}, InputError, r"q_offset: expected an integer from 0"),
        ({"q_offset": 1.5}, InputError, r"q_offset: expected an integer"),
        (
            {"q_offset": torch.tensor([0, -3])},
            InputError,
            r"q_offset\[1\]: expected a position from 0.*; got -3",
        ),
        ({"q_offset": torch.tensor([1, 2, 3])}, InputError, r"q_offset: expected shape \(2,\); got \(3,\)"),
        (
            {"q_offset": np.array([1, 2])},
            InputError,
            r"q_offset: expected an integer.*; got array\(\[1, 2\]\)",
        ),
        (
            {"kv_lens": torch.zeros(2, dtype=torch.int64, device="meta")},
            InputError,
            r"kv_lens: expected a tensor on cpu.*; got meta. Pass kv_lens.to\('cpu'\)",
        ),
        ({"kv_lens": torch.tensor([4.0, 3.0])}, InputError, "kv_lens: expected int32 or int64"),
        ({"kv_lens": [4, 3]}, InputError, "kv_lens: expected a torch.Tensor of int32 or int64; got list"),
        (
            {"kv_lens": torch.tensor([5, 3])},
            InputError,
            r"kv_lens\[0\]: expected a length from 0 to 4; got 5",
        ),
        ({"kv_lens": torch.tensor([-1, 3])}, InputError, r"kv_lens\[0\]: expected a length"),
        ({"cu_seqlens_kv": torch.tensor([0, 4])}, InputError, "cu_seqlens_q: expected bounds of the queries"),
        ({"cu_seqlens_q": torch.tensor([0, 4])}, InputError, "Pass cu_seqlens_kv=cu_seqlens_q"),
        ({"block_table": TABLE}, InputError, "kv_lens: expected the number of keys"),
        ({"kv_lens": LENS, "return_column_sums": True}, UnsupportedError, "return_column_sums: not built"),
        (
            {"mask": torch.ones(3, 1, 4, 4, dtype=torch.bool), "kv_lens": LENS},
            InputError,
            "mask: expected a tensor",
        ),
    ],
)
def test_bad_lengths(given, error, message):
    with pytest.raises(error, match=message):
        gossamer.attention(SMALL, SMALL, SMALL, **given)


@pytest.mark.parametrize(
    "bounds, message",
    [
        ([0, 4, 3, 8], r"cu_seqlens_q\[2\]: expected at least 4.*overlap; got 3"),
        ([1, 4, 8], r"cu_seqlens_q\[0\]: expected 0"),
        ([0, 4, 9], r"cu_seqlens_q\[-1\]: expected at most 8"),
        ([0], "cu_seqlens_q: expected two bounds or more"),
    ],
)
def test_bad_bounds(bounds, message):
    x = torch.randn(1, 2, 8, 16)
    with pytest.raises(InputError, match=message):
        gossamer.attention(x, x, x, cu_seqlens_q=torch.tensor(bounds), cu_seqlens_kv=torch.tensor(bounds))


def test_packed_tensors_have_one_batch_and_as_many_bounds():
    bounds = torch.tensor([0, 4])
    with pytest.raises(InputError, match=r"query: expected \(1, Hq, total_q, D\)"):
        gossamer.attention(SMALL, SMALL, SMALL, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    one = SMALL[:1]
    with pytest.raises(InputError, match="cu_seqlens_kv: expected 2 bounds"):
        gossamer.attention(one, one, one, cu_seqlens_q=bounds, cu_seqlens_kv=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize(
    "table, lens, message",
    [
        (
            [[0, 6], [2, 3]],
            [20, 1],
            r"block_table\[0, 1\]: expected one of the 6 pages \(kv_lens\[0\] is 20\); got 6",
        ),
        ([[0, 1], [-1, 3]], [20, 1], r"block_table\[1, 0\]: expected one of the 6 pages"),
        ([[0, 1], [2, 3]], [33, 1], r"kv_lens\[0\]: expected a length from 0 to 32; got 33"),
        ([[0, 1]], [20, 1], r"block_table: expected shape \(2, any\); got \(1, 2\)"),
    ],
)
def test_bad_tables(table, lens, message):
    with pytest.raises(InputError, match=message):
        gossamer.attention(SMALL, CACHE, CACHE, block_table=torch.tensor(table), kv_lens=torch.tensor(lens))


def test_pages_hold_a_key():
    empty = torch.randn(6, 2, 0, 16)
    with pytest.raises(InputError, match="key: expected pages of one key or more"):
        gossamer.attention(SMALL, empty, empty, block_table=TABLE, kv_lens=LENS)


@pytest.mark.parametrize("page, width", [(1, 40), (7, 5), (16, 0)])
def test_odd_pages(page, width):
    lens = torch.tensor([min(page * width, 31), 0])
    cache = torch.randn(90, 2, page, 16)
    table = torch.randperm(90)[: 2 * width].view(2, width)
    compare(SMALL, cache, cache, block_table=table, kv_lens=lens)


def test_reads_are_checked_at_the_positions_of_each_sequence():
    ids = torch.arange(10)
    given: dict[str, Any] = {"mask": lambda b, h, q, k: ids[q] >= k, "kv_lens": LENS}
    gossamer.attention(SMALL, SMALL, SMALL, q_offset=6, **given)
    with pytest.raises(InputError, match=r"c0\[q\]: expected an index from 0 to 9; got 10"):
        gossamer.attention(SMALL, SMALL, SMALL, q_offset=torch.tensor([0, 7]), **given)

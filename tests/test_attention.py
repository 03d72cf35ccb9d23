"""`gossamer.attention` on the CPU: every case against the correctness rule of `check_attention`."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.frontend.checking import check_attention
from gossamer.runtime.driver import compilations

NAN, INF = math.nan, math.inf

from gossamer.tests import attention_cases as CASES  # noqa: E402

tensors, LIBRARY, SCORES, IDS = CASES.tensors, CASES.LIBRARY, CASES.score_mods(), CASES.IDS


# ---- every library mask ----


@pytest.mark.parametrize("name", LIBRARY)
def test_library_mask(name):
    for mask in LIBRARY[name]:
        for q_len, kv_len in ((81, 81), (33, 97), (104, 31)):
            batch = 2 if "batch" in name else 1
            check_attention(*tensors(q_len, kv_len, batch=batch), mask=mask)


@pytest.mark.parametrize(
    "name", ["causal", "strided", "neighborhood", "bigbird", "document", "not longformer"]
)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 90), (90, 1), (0, 9), (9, 0), (0, 0), (64, 64), (32, 65)])
def test_lengths(name, lengths):
    out, lse = check_attention(*tensors(*lengths, size=8), mask=LIBRARY[name][0])
    if 0 in lengths:
        assert (out == 0).all() and (lse == -INF).all()


@pytest.mark.parametrize("shape", [{"batch": 0}, {"batch": 3}, {"batch": 2, "heads": 5}])
def test_batches_and_heads(shape):
    out, _ = check_attention(*tensors(40, 50, size=8, **shape), mask=masks.causal())
    assert out.shape == (shape["batch"], shape.get("heads", 2), 40, 8)


def test_rows_without_pairs_are_zeros():
    q, k, v = tensors(80, 50)
    out, lse = check_attention(q, k, v, mask=lambda b, h, q, k: (k >= q + 20) & (q % 3 != 0))
    empty = (torch.arange(80) >= 30) | (torch.arange(80) % 3 == 0)
    assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -INF).all()
    assert lse[:, :, ~empty].isfinite().all()


# ---- dtypes, sizes, heads ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["full", "longformer", "strided", "document"])
def test_dtypes(dtype, name):
    out, lse = check_attention(*tensors(97, 120, size=24, dtype=dtype), mask=LIBRARY[name][0])
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_large_scores(dtype):
    q, k, v = tensors(50, 60, dtype=dtype)
    check_attention(q * 12, k * 12, v, mask=masks.sliding_window(9))


SIZES = [
    (16, 16),
    (17, 17),
    (64, 64),
    (80, 80),
    (96, 96),
    (128, 128),
    (256, 256),
    (64, 40),
    (24, 128),
    (1, 3),
]


@pytest.mark.parametrize("size, v_size", SIZES)
def test_head_sizes(size, v_size):
    check_attention(*tensors(70, 75, size=size, v_size=v_size), mask=masks.sliding_window(20, 4))


@pytest.mark.parametrize("size, v_size", [(80, 80), (64, 96)])
def test_head_sizes_of_narrow_dtypes(size, v_size):
    check_attention(
        *tensors(70, 75, size=size, v_size=v_size, dtype=torch.bfloat16), mask=masks.sliding_window(20, 4)
    )


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 4), (8, 1), (6, 2), (5, 1), (7, 7)])
def test_grouped_heads(heads, kv_heads):
    q, k, v = tensors(40, 45, batch=2, heads=heads, kv_heads=kv_heads, size=8)
    by_head = torch.randn(heads)
    check_attention(q, k, v, mask=lambda b, h, q, k: k <= q + 3 * h, enable_gqa=heads != kv_heads)
    check_attention(q, k, v, score_mod=lambda s, b, h, q, k: s + by_head[h], enable_gqa=heads != kv_heads)


def test_one_batch_of_keys_for_all_queries():
    q, k, v = tensors(40, 45, batch=3)
    out, _ = gossamer.attention(q, k[:1], v[:1], return_lse=True)
    expected = gossamer.attention(q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1))
    assert torch.equal(out, expected)


BY_BATCH_AND_HEAD = {
    "window of the head": lambda b, h, q, k: abs(q - k) <= 4 * h + b,
    "dilation of the head": lambda b, h, q, k: (q - k) % (h + 1) == 0,
    "one batch causal": lambda b, h, q, k: (k <= q) | (b != 1),
    "one head full": lambda b, h, q, k: (h == 2) | (abs(q - k) <= 3),
    "bits": lambda b, h, q, k: ((q ^ k) & (h + 1)) == 0,
    "products": lambda b, h, q, k: (q * k + h) % 7 <= 3 + b,
}


@pytest.mark.parametrize("name", BY_BATCH_AND_HEAD)
def test_masks_of_batch_and_head(name):
    check_attention(*tensors(61, 83, batch=2, heads=4, size=8), mask=BY_BATCH_AND_HEAD[name])


def test_masks_of_captured_tables():
    lengths, table = torch.tensor([11, 64]), torch.rand(2, 4, 61, 83) < 0.3
    q, k, v = tensors(61, 83, batch=2, heads=4, size=8)
    check_attention(q, k, v, mask=lambda b, h, q, k: k < lengths[b])
    for shape in ((2, 4), (1, 4), (2, 1), (1, 1)):
        check_attention(q, k, v, mask=table[: shape[0], : shape[1]])
    check_attention(q, k, v, mask=table[0, 0])
    check_attention(q, k, v, mask=table[:, :1, :1])
    blocks = torch.rand(4, 6) < 0.5
    check_attention(q, k, v, mask=lambda b, h, q, k: blocks[q // 16, k // 16])


# ---- score_mods ----


@pytest.mark.parametrize("name", SCORES)
def test_score_mods(name):
    for mask in (None, masks.sliding_window(9)) if name == "alibi" else (masks.sliding_window(9),):
        check_attention(*tensors(), mask=mask, score_mod=SCORES[name])


@pytest.mark.parametrize("name", ["alibi", "bias of the pair", "soft cap", "where"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_score_mods_of_other_dtypes(name, dtype):
    check_attention(*tensors(dtype=dtype), mask=masks.strided(8, 4), score_mod=SCORES[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_functions_of_captured_tensors_of_16_bits(dtype):
    bias = torch.randn(40, 50).to(dtype)

    def score_mod(s, b, h, q, k):
        x = bias[q, k]
        return s * torch.sigmoid(x) + torch.exp(x / 4) - x**2 + torch.tanh(x) * torch.log(x.abs() + 0.5)

    check_attention(*tensors(40, 50, dtype=dtype), score_mod=score_mod)


@pytest.mark.parametrize(
    "score_mod",
    [
        lambda s, b, h, q, k: s + (q - k),
        lambda s, b, h, q, k: s + 0.125 * (q - k),
        lambda s, b, h, q, k: (s + (k - q)) / 2,
    ],
)
def test_distances_are_exact_far_from_the_origin(score_mod):
    q, k, v = tensors(3000, 3000, heads=1, size=8)
    check_attention(q, k, v, mask=masks.sliding_window(40), score_mod=score_mod)


def test_scale_is_an_argument():
    q, k, v = tensors()
    check_attention(q, k, v, mask=masks.causal(), scale=0.25)
    before = compilations()
    for scale in (0.0, -1.0, 3, torch.tensor(0.7)):
        check_attention(q, k, v, mask=masks.causal(), scale=scale)
    assert compilations() == before


def test_lse_merges_halves():
    q, k, v = tensors(40, 100, dtype=torch.float64)
    whole, total = gossamer.attention(q, k, v, return_lse=True)
    halves = [
        gossamer.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(37), slice(37, None))
    ]
    merged = sum(out * torch.exp(lse - total)[..., None] for out, lse in halves)
    torch.testing.assert_close(merged, whole, atol=1e-13, rtol=1e-13)


# ---- views ----


def test_views_are_read_in_place():
    q, k, v = (torch.randn(2, 50, 4, 16).transpose(1, 2) for _ in range(3))
    out, _ = check_attention(q, k, v, mask=masks.causal())
    assert torch.equal(out, gossamer.attention(*(t.contiguous() for t in (q, k, v)), mask=masks.causal()))
    packed = torch.randn(2, 50, 3, 4, 16)
    check_attention(*(packed[:, :, i].transpose(1, 2) for i in range(3)), mask=masks.causal())


@pytest.mark.parametrize("moved", [(True, True, True), (False, True, False)])
def test_strided_last_dimension(moved):
    made = [torch.randn(1, 2, 16, 50).transpose(2, 3) if m else torch.randn(1, 2, 50, 16) for m in moved]
    check_attention(*made, mask=masks.causal())


def test_odd_views():
    q, k, v = (torch.randn(1, 2, 100, 32)[:, :, ::2, 1::2] for _ in range(3))
    check_attention(q, k, v, mask=masks.causal())
    one = torch.randn(1, 1, 50, 16)
    check_attention(q, one.expand(1, 2, 50, 16), one.expand(1, 2, 50, 16), mask=masks.causal())
    flat = torch.randn(50 * 16 + 1)
    shifted = flat[1:].view(1, 1, 50, 16).expand(1, 2, 50, 16)
    check_attention(shifted, shifted, shifted, mask=masks.causal())


def test_views_of_captured_tensors():
    q, k, v = tensors(50, 60)
    ids, bias = torch.arange(120)[::2] // 7, torch.randn(90, 70).T
    check_attention(q, k, v, mask=masks.document(ids))
    check_attention(q, k, v, score_mod=lambda s, b, h, q, k: s + bias[q, k])
    every = torch.tensor(0.5).expand(60)
    check_attention(q, k, v, score_mod=lambda s, b, h, q, k: s + every[k])


# ---- NaN ----

MASKS = {
    "full": masks.full(),
    "window": masks.sliding_window(9),
    "strided": masks.strided(8, 5),
    "box": masks.neighborhood((9, 9), 3),
    "document": masks.document(IDS),
    "bits": gossamer.Mask.trace(lambda b, h, q, k: (q & k) == 0),
}


@pytest.mark.parametrize("name", MASKS)
def test_nothing_beyond_the_lengths_is_read(name):
    q, k, v = tensors()
    wide = [torch.full((1, 2, 200, 16), NAN) for _ in range(3)]
    for whole, part in zip(wide, (q, k, v), strict=True):
        whole[:, :, : part.shape[2]] = part
    views = [whole[:, :, : part.shape[2]] for whole, part in zip(wide, (q, k, v), strict=True)]
    out, lse = check_attention(*views, mask=MASKS[name])
    plain = gossamer.attention(q, k, v, mask=MASKS[name])
    assert torch.equal(out, plain) and not lse.isnan().any()


DIAGONAL = torch.eye(10, dtype=torch.bool)
BOUNDED = {
    "causal": masks.causal(),
    "window": masks.sliding_window(9),
    "strided": masks.strided(4, 5) & masks.causal(),
    "longformer": masks.longformer(9, 3) & masks.causal(),
    "document": masks.document(np.arange(600) // 20),
    "bits": gossamer.Mask.trace(lambda b, h, q, k: ((q & k) == 0) & (k <= q)),
    "table": gossamer.Mask.trace(lambda b, h, q, k: DIAGONAL[q // 64, k // 64]),
    "too many terms": masks.fixed(38, 8) & masks.causal() & ~(masks.dilated_window(9, 5) & masks.blocked(7)),
}


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", BOUNDED)
def test_what_lies_in_empty_tiles_reaches_nobody(name, bad):
    q, k, v = tensors(600, 600, size=8)
    clean = gossamer.attention(q, k, v, mask=BOUNDED[name])
    k[:, :, 500:], v[:, :, 500:] = bad, bad
    out = gossamer.attention(q, k, v, mask=BOUNDED[name])
    assert torch.equal(out[:, :, :300], clean[:, :, :300])
    assert not out[:, :, -100:].isfinite().all()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_query_stays_in_its_row(name, bad):
    q, k, v = tensors()
    k[..., 3] = k[..., 3].abs()  # a row of nothing but -inf would count as empty
    clean = gossamer.attention(q, k, v, mask=MASKS[name])
    q[0, 1, 8, 3] = bad
    out, lse = check_attention(q, k, v, mask=MASKS[name])
    hit = torch.zeros(1, 2, 61, dtype=torch.bool)
    hit[0, 1, 8] = True
    assert torch.equal(out[~hit], clean[~hit]) and out[hit].isnan().all() and lse[~hit].isfinite().all()


# ---- modes ----


def test_gradient_modes():
    q, k, v = (t.requires_grad_() for t in tensors())
    assert gossamer.attention(q, k, v).requires_grad
    with torch.no_grad():
        out = gossamer.attention(q, k, v)
    assert not out.requires_grad
    with torch.inference_mode():
        made = torch.randn(83)
        assert torch.equal(gossamer.attention(q, k, v), out)
        check_attention(*tensors(), mask=lambda b, h, q, k: made[k] > 0)
    assert torch.equal(gossamer.attention(q.detach(), k.detach(), v.detach()), out)


# ---- one kernel for many calls ----

CLOSED = [name for name in LIBRARY if LIBRARY[name][0].ir.exact]


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_take_no_index_arrays(name):
    from gossamer.passes.pipeline import compile_spec

    spec = gossamer.AttentionSpec(LIBRARY[name][0], qk_size=8, return_lse=True)
    known = {"q", "k", "v", "o", "lse", "log_sum"}
    for kernel in compile_spec(spec.ir).kernels:
        assert {t.name for t in kernel.tensors} <= known


CALLS = {
    "window": [masks.sliding_window(n) for n in (3, 50, 0)],
    "longformer": [masks.longformer(n, g) for n, g in ((9, 2), (0, 40))],
    "strided": [masks.strided(16, n) for n in (1, 30)],
    "document": [masks.document(np.arange(99) // n) for n in (5, 20)],
}


@pytest.mark.parametrize("name", CALLS)
def test_other_lengths_heads_and_integers_compile_nothing(name):
    first, *others = CALLS[name]
    gossamer.attention(*tensors(40, 40, size=8), mask=first)
    before = compilations()
    shapes = [(1, 1), (64, 33), (80, 99)]
    for mask in (first, *others):
        for q_len, kv_len in shapes:
            for batch, heads, kv_heads in ((1, 1, 1), (2, 4, 2), (3, 6, 1)):
                q, k, v = tensors(q_len, kv_len, batch=batch, heads=heads, kv_heads=kv_heads, size=8)
                gossamer.attention(q, k, v, mask=mask, enable_gqa=True)
    assert compilations() == before


def test_a_function_made_again_compiles_nothing():
    q, k, v = tensors()

    def call(width, slope):
        bias = torch.randn(83)
        check_attention(
            q, k, v,
            mask=lambda b, h, q, k: abs(q - k) <= width,
            score_mod=lambda s, b, h, q, k: s * slope + bias[k],
        )  # fmt: skip

    call(4, 0.5)
    before = compilations()
    call(30, 0.25)
    assert compilations() == before


def test_captured_tensors_are_read_at_each_call():
    q, k, v = tensors()
    ids, bias = torch.arange(83) // 10, torch.randn(83)

    def call():
        out, _ = check_attention(
            q, k, v, mask=masks.document(ids), score_mod=lambda s, b, h, q, k: s + bias[k]
        )
        return out

    first, before = call(), compilations()
    bias.mul_(-3)
    second = call()
    ids.copy_(torch.arange(83) // 21)
    third = call()
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert compilations() == before


def test_ids_may_become_unsorted():
    q, k, v = tensors()
    ids = torch.arange(83) // 10
    mask = masks.document(ids)
    check_attention(q, k, v, mask=mask)
    ids.copy_(ids.flip(0))
    check_attention(q, k, v, mask=mask)
    ids.copy_(torch.arange(83) % 4)
    check_attention(q, k, v, mask=mask)


def test_threads_call_at_once():
    made = [tensors(70 + i, 90, size=8) for i in range(8)]
    kinds = [masks.sliding_window(9), masks.strided(16, 3), masks.blocked(16), masks.causal()]
    expected = [gossamer.attention(*made[i], mask=kinds[i % 4], backend="reference") for i in range(8)]

    def work(i):
        return [gossamer.attention(*made[i], mask=kinds[i % 4]) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(work, range(8)), expected, strict=True):
            for out in found:
                torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)


def test_results_do_not_depend_on_the_call():
    q, k, v = tensors(200, 200)
    first = gossamer.attention(q, k, v, mask=masks.longformer(20, 4))
    assert all(
        torch.equal(first, gossamer.attention(q, k, v, mask=masks.longformer(20, 4))) for _ in range(5)
    )

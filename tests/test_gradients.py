"""Gradients of attention on a CPU: every mask, map and placement, against the dense formula."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer
from gossamer import masks
from gossamer.ir.errors import UnsupportedError
from gossamer.tests import attention_cases as CASES
from gossamer.tests.gradient_cases import check_gradients


@pytest.mark.parametrize("name", CASES.LIBRARY)
def test_library_mask(name):
    for mask in CASES.LIBRARY[name][:2]:
        for q_len, kv_len in ((81, 81), (33, 97)):
            check_gradients(q_len, kv_len, mask, batch=2 if "batch" in name else 1)


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 40), (40, 1), (65, 64), (64, 63), (0, 5), (5, 0)])
def test_lengths(q_len, kv_len):
    check_gradients(q_len, kv_len, masks.causal())


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("name", ["causal", "sliding_window", "strided", "document"])
def test_grouped_heads(heads, name):
    check_gradients(50, 70, CASES.LIBRARY[name][0], batch=2, heads=heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    check_gradients(70, 90, masks.sliding_window(9), dtype=dtype)


@pytest.mark.parametrize("size, v_size", [(1, 3), (33, 16), (16, 40), (80, 80)])
def test_sizes(size, v_size):
    check_gradients(40, 50, masks.causal(), size=size, v_size=v_size)


@pytest.mark.parametrize("edge", [0, 1, 31, 32, 33, 63, 64, 65])
def test_windows_at_the_edges_of_tiles(edge):
    check_gradients(130, 130, masks.sliding_window(edge, 0))


def test_rows_without_pairs():
    check_gradients(40, 40, masks.causal() & ~masks.sliding_window(5))


def test_negative_scale():
    check_gradients(40, 40, masks.causal(), scale=-0.3)


SCORES = {
    "soft cap": ((), lambda: lambda s, b, h, q, k: 5 * torch.tanh(s / 5)),
    "alibi": ((2,), lambda t: lambda s, b, h, q, k: s + t[h] * (k - q)),
    "distance": ((200,), lambda t: lambda s, b, h, q, k: s + t[q - k + 100]),
    "head and distance": ((2, 200), lambda t: lambda s, b, h, q, k: s + t[h, abs(q - k)]),
    "pair": ((2, 61, 90), lambda t: lambda s, b, h, q, k: s + t[h, q, k]),
    "row": ((61,), lambda t: lambda s, b, h, q, k: s * t[q // 2]),
    "column": ((90, 2), lambda t: lambda s, b, h, q, k: s + t[k, h]),
    "one number": ((1,), lambda t: lambda s, b, h, q, k: s * t[0]),
    "read twice": ((200,), lambda t: lambda s, b, h, q, k: s * t[q] + t[k + 1]),
    "Gaussian": ((2, 2), lambda t: lambda s, b, h, q, k: s - torch.exp(-((t[h, 0] * (q - k)) ** 2))),
    "minus infinity": ((), lambda: lambda s, b, h, q, k: torch.where((q - k) % 5 == 0, -math.inf, s)),
    "where": ((3,), lambda t: lambda s, b, h, q, k: torch.where(q > k + 3, s * t[1], t[2] * s)),
    "clamp": ((), lambda: lambda s, b, h, q, k: torch.clamp(s, min=0) + abs(s)),
    "exp and log": ((), lambda: lambda s, b, h, q, k: torch.log(1 + torch.exp(s))),
    "sigmoid": ((), lambda: lambda s, b, h, q, k: 3 * torch.sigmoid(s) * s**2),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("mask", [masks.causal(), masks.sliding_window(9)], ids=["causal", "window"])
def test_score_maps(name, mask):
    shape, make = SCORES[name]
    captures = [torch.randn(shape, dtype=torch.float64)] if shape else []
    check_gradients(61, 90, mask, captures=captures, score=make, dtype=torch.float64)


def test_captures_in_single_precision_and_groups():
    table = torch.randn(2, 200, dtype=torch.float64)
    score = lambda t: lambda s, b, h, q, k: s + t[h // 2, abs(q - k)]  # noqa: E731
    check_gradients(100, 120, masks.strided(8, 4), batch=2, heads=(4, 2), captures=[table], score=score)


PROBS = {
    "toeplitz": lambda w: lambda p, b, h, q, k: p * w[abs(q - k)],
    "by head": lambda w: lambda p, b, h, q, k: p * w[h],
    "square": lambda w: lambda p, b, h, q, k: p * p * w[k],
    "threshold": lambda w: lambda p, b, h, q, k: torch.clamp(p - 0.05, min=0) * w[0],
}


@pytest.mark.parametrize("name", PROBS)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_prob_maps(name, sinks):
    captures = [torch.randn(120, dtype=torch.float64)]
    options = {"captures": captures, "prob": PROBS[name], "sinks": sinks, "dtype": torch.float64}
    check_gradients(61, 90, masks.causal(), **options)


def test_both_maps_at_once_over_two_row_orders():
    t, w = (torch.randn(200, dtype=torch.float64) for _ in range(2))
    score = lambda t, w: lambda s, b, h, q, k: s + t[abs(q - k)]  # noqa: E731
    prob = lambda t, w: lambda p, b, h, q, k: p * w[k]  # noqa: E731
    check_gradients(90, 90, masks.strided(8, 5), captures=[t, w], score=score, prob=prob, sinks=True)


def test_sinks_without_a_gradient_of_the_lse():
    check_gradients(50, 60, masks.causal(), heads=(4, 2), sinks=True, through_lse=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_replays_its_bits(dtype):
    """Gradients are those of the weights that the forward kept."""
    q, k, v = (torch.randn(1, 2, 40, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    options = {"mask": masks.causal(), "dropout_p": 0.4, "dropout_seed": 11}
    eye = torch.eye(40, dtype=dtype).expand(1, 2, -1, -1)
    weights = gossamer.attention(q, k, eye, **options)
    grad = torch.randn(1, 2, 40, 16, dtype=dtype)
    out = gossamer.attention(q, k, v, **options)
    (dv,) = torch.autograd.grad(out, v, grad, retain_graph=True)
    torch.testing.assert_close(dv, weights.detach().mT @ grad)
    kept = weights.detach() != 0
    scores = (q @ k.mT) / 4
    scores = scores.masked_fill(~torch.ones(40, 40).tril().bool(), -math.inf)
    dropped = torch.where(kept, scores.softmax(-1) / 0.6, 0)
    wanted = torch.autograd.grad(dropped @ v, (q, k), grad)
    for got, right in zip(torch.autograd.grad(out, (q, k), grad), wanted, strict=True):
        torch.testing.assert_close(got, right)


# ---- sequences ----


def test_packed_sequences():
    lengths_q, lengths_kv = [5, 0, 40, 33], [7, 3, 40, 20]
    bounds_q, bounds_kv = (torch.tensor([0, *np.cumsum(x)]).int() for x in (lengths_q, lengths_kv))
    total_q, total_kv = sum(lengths_q) + 2, sum(lengths_kv) + 3
    attends = torch.zeros(1, 4, total_q, total_kv, dtype=torch.bool)
    for n in range(4):
        rows, cols = slice(*bounds_q[n : n + 2]), slice(*bounds_kv[n : n + 2])
        attends[:, :, rows, cols] = torch.ones(lengths_q[n], lengths_kv[n]).tril().bool()
    options = {"cu_seqlens_q": bounds_q, "cu_seqlens_kv": bounds_kv, "attends": attends}
    check_gradients(total_q, total_kv, masks.causal(), heads=(4, 2), **options)


@pytest.mark.parametrize("mask", [masks.causal(), masks.sliding_window(9), masks.strided(8, 3)], ids=str)
def test_shorter_keys_and_offsets(mask):
    lens, offsets = torch.tensor([70, 0, 33]), torch.tensor([20, 0, 3])
    attends = torch.zeros(3, 2, 50, 70, dtype=torch.bool)
    for b in range(3):
        whole = torch.from_numpy(mask.to_dense(90, 70))
        attends[b, :, :, : lens[b]] = whole[offsets[b] : offsets[b] + 50, : lens[b]]
    check_gradients(50, 70, mask, batch=3, kv_lens=lens, q_offset=offsets, attends=attends)


def test_pages_have_no_gradient():
    q = torch.randn(1, 1, 1, 16, requires_grad=True)
    pages = torch.randn(4, 1, 16, 16)
    given = {"block_table": torch.arange(4)[None].int(), "kv_lens": torch.tensor([50])}
    with pytest.raises(UnsupportedError, match="pages"):
        gossamer.attention(q, pages, pages, **given).sum().backward()


# ---- random masks ----

PARTS = st.one_of(
    st.builds(masks.sliding_window, st.integers(0, 40), st.integers(0, 40)),
    st.builds(masks.dilated_window, st.integers(1, 20), st.integers(2, 5)),
    st.builds(masks.strided, st.integers(2, 20), st.integers(0, 20)),
    st.builds(masks.blocked, st.integers(1, 40)),
    st.builds(masks.global_tokens, st.integers(0, 9)),
    st.builds(masks.prefix_lm, st.integers(0, 60)),
    st.just(masks.causal()),
)
MASKS = st.recursive(
    PARTS,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=3,
)


@settings(max_examples=12, deadline=None)
@given(MASKS, st.integers(1, 90), st.integers(1, 90))
def test_random_masks(mask, q_len, kv_len):
    check_gradients(q_len, kv_len, mask, heads=(2, 1))


# ---- exactness ----


def test_keys_that_thousands_of_queries_attend_to():
    """Sums of thousands: a tile is added up before it meets the rest."""
    check_gradients(2048, 2048, masks.causal(), heads=(1, 1))


def gradcheck(call, *captures, lengths=(9, 9), heads=(2, 2), batch=1):
    """Slopes of f64 against differences, along random directions of all inputs."""
    shapes = [
        (batch, h, n, 4)
        for h, n in zip((heads[0], *heads[1:] * 2), (lengths[0], *lengths[1:] * 2), strict=True)
    ]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    learned = [t.clone().requires_grad_() for t in captures]
    assert torch.autograd.gradcheck(call, (*leaves, *learned), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("name", CASES.LIBRARY)
def test_gradcheck_of_masks(name):
    mask = CASES.LIBRARY[name][0]
    attend = lambda q, k, v: gossamer.attention(q, k, v, mask=mask)  # noqa: E731
    gradcheck(attend, lengths=(7, 11), batch=2 if "batch" in name else 1)


@pytest.mark.parametrize("name", SCORES)
def test_gradcheck_of_score_maps(name):
    shape, make = SCORES[name]
    attend = lambda q, k, v, *t: gossamer.attention(  # noqa: E731
        q, k, v, mask=masks.causal(), score_mod=make(*t), return_lse=name != "minus infinity", enable_gqa=True
    )
    gradcheck(attend, *([torch.randn(shape, dtype=torch.float64)] if shape else []), heads=(2, 1))


@pytest.mark.parametrize("name", PROBS)
def test_gradcheck_of_prob_maps(name):
    attend = lambda q, k, v, w, sinks: gossamer.attention(  # noqa: E731
        q, k, v, mask=masks.causal(), prob_mod=PROBS[name](w), sinks=sinks, return_lse=True
    )
    captures = torch.rand(20, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    gradcheck(attend, *captures, lengths=(9, 7))


def test_runs_agree_to_the_bit():
    q, k, v = (torch.randn(2, 4, 130, 16, requires_grad=True) for _ in range(3))
    table = torch.randn(300, requires_grad=True)
    call = functools.partial(gossamer.attention, q, k, v, mask=masks.longformer(9, 3), deterministic=True)
    runs = []
    for _ in range(3):
        out = call(score_mod=lambda s, b, h, i, j: s + table[i - j + 150])
        runs.append(torch.autograd.grad(out.square().sum(), (q, k, v, table)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_what_pairs_do_not_see_stays_out():
    """NaN behind the keys of a sequence reaches no gradient."""
    q, k, v = (torch.randn(1, 1, 40, 16) for _ in range(3))
    k[:, :, 30:], v[:, :, 30:] = math.nan, math.inf
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = gossamer.attention(*leaves, kv_lens=torch.tensor([30]))
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()

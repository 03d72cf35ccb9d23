"""Gradients of attention on a GPU: every case of the CPU's by the same rule.

pytest -m gpu -n 12 tests/test_gpu_gradients.py
"""

import itertools

import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.tests import attention_cases as CASES
from gossamer.tests import gradient_cases as GRADIENTS

pytestmark = pytest.mark.gpu

HALF = {"device": "cuda", "dtype": torch.bfloat16, "size": 64}


def check(q_len, kv_len, mask, **options):
    mask = None if mask is None else mask.to("cuda")
    return GRADIENTS.check_gradients(q_len, kv_len, mask, **HALF | options)


@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", CASES.LIBRARY)
def test_library_mask(name, narrow):
    options = {} if narrow else {"dtype": torch.float32, "size": 32}
    for mask in CASES.LIBRARY[name][:2]:
        for q_len, kv_len in ((81, 81), (33, 97), (104, 31)):
            check(q_len, kv_len, mask, batch=2 if "batch" in name else 1, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size, v_size", [(32, 32), (80, 64), (128, 128), (96, 33), (256, 256)])
def test_dtypes_and_sizes(dtype, size, v_size):
    if dtype == torch.float64 and size == 256:
        size, v_size = 128, 128
    check(150, 170, masks.causal(), dtype=dtype, size=size, v_size=v_size)


LONG = [
    masks.full(),
    masks.causal(),
    masks.sliding_window(128),
    masks.strided(64, 64),
    masks.longformer(128, 64),
]


@pytest.mark.parametrize("mask", LONG, ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_long(mask, size):
    check(1000, 1025, mask, heads=(4, 2), size=size)


MAPS = {
    "alibi": ((2,), lambda t: lambda s, b, h, q, k: s + t[h] * (k - q)),
    "distance": ((600,), lambda t: lambda s, b, h, q, k: s + t[q - k + 300]),
    "pair": ((2, 150, 170), lambda t: lambda s, b, h, q, k: s + t[h, q, k]),
    "row": ((150,), lambda t: lambda s, b, h, q, k: s * t[q // 2]),
    "column": ((170, 2), lambda t: lambda s, b, h, q, k: s + t[k, h]),
    "one number": ((1,), lambda t: lambda s, b, h, q, k: s * t[0]),
}


@pytest.mark.parametrize("name", MAPS)
def test_captures(name):
    shape, make = MAPS[name]
    captures = [torch.randn(shape, dtype=torch.float64, device="cuda")]
    check(150, 170, masks.causal(), dtype=torch.float32, size=32, captures=captures, score=make)


@pytest.mark.parametrize("linear", [True, False])
def test_prob_maps_and_sinks(linear):
    captures = [torch.randn(600, dtype=torch.float64, device="cuda")]
    prob = lambda w: lambda p, b, h, q, k: (p if linear else p * p) * w[abs(q - k)]  # noqa: E731
    options = {"dtype": torch.float32, "size": 32, "captures": captures, "prob": prob, "sinks": True}
    check(150, 170, masks.sliding_window(40), **options)


def test_packed_sequences():
    bounds = torch.tensor([0, 70, 70, 200, 233], dtype=torch.int32)
    attends = torch.zeros(1, 4, 240, 240, dtype=torch.bool)
    for first, last in itertools.pairwise(bounds.tolist()):
        attends[:, :, first:last, first:last] = torch.ones(last - first, last - first).tril().bool()
    given = {"cu_seqlens_q": bounds.cuda(), "cu_seqlens_kv": bounds.cuda(), "attends": attends.cuda()}
    check(240, 240, masks.causal(), heads=(4, 2), **given)


def test_shorter_keys_and_offsets():
    lens, offsets = torch.tensor([170, 0, 33]), torch.tensor([20, 0, 3])
    attends = torch.zeros(3, 2, 150, 170, dtype=torch.bool)
    whole = torch.from_numpy(masks.sliding_window(30).to_dense(200, 170))
    for b in range(3):
        attends[b, :, :, : lens[b]] = whole[offsets[b] : offsets[b] + 150, : lens[b]]
    given = {"kv_lens": lens.cuda(), "q_offset": offsets.cuda(), "attends": attends.cuda()}
    check(150, 170, masks.sliding_window(30), batch=3, **given)


def test_runs_agree_to_the_bit():
    q, k, v = (torch.randn(2, 4, 700, 64, device="cuda", requires_grad=True) for _ in range(3))
    runs = []
    for _ in range(3):
        out = gossamer.attention(q, k, v, mask=masks.longformer(64, 8), deterministic=True)
        runs.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_captured_tensors_agree_to_the_bit(dtype):
    q, k, v = (torch.randn(2, 4, 700, 64, device="cuda", dtype=dtype) for _ in range(3))
    slopes, table = (torch.randn(n, device="cuda", requires_grad=True) for n in (4, 1400))
    score = lambda s, b, h, i, j: s * slopes[h] + table[i - j + 700]  # noqa: E731
    runs = []
    for _ in range(3):
        out = gossamer.attention(q, k, v, mask=masks.strided(16, 30), score_mod=score, deterministic=True)
        runs.append(torch.autograd.grad(out.square().sum(), (slopes, table)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_as_integers(dtype):
    table = torch.randn(400, dtype=torch.float64, device="cuda")
    score = lambda t: lambda s, b, h, q, k: s * t[h] + t[q - k + 200] + t[k]  # noqa: E731
    check(150, 170, masks.longformer(20, 3), captures=[table], score=score, dtype=dtype, deterministic=True)


def test_memory_is_linear():
    q, k, v = (torch.randn(1, 4, 8192, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grad = torch.randn_like(q)
    for _ in range(2):
        out = gossamer.attention(*leaves, mask=masks.causal())
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = torch.autograd.grad(out, leaves, grad)
        extra = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in found)
    assert extra <= 4 * 8192 * 4 * 2 + 4096

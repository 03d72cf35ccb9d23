"""SPLAT's three kernels: against dense softmax attention, one step at a time."""

import math

import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.ir.errors import InputError, UnsupportedError

CASES = {
    "window": masks.sliding_window(9),
    "dilated": masks.dilated_window(8, 3),
    "strided": masks.strided(8, local=4),
    "longformer": masks.longformer(5, 3),
    "causal": masks.causal(),
    "box": masks.neighborhood((7, 9), (3, 5), edges="clip"),
    "empty rows": gossamer.Mask.trace(lambda b, h, q, k: k >= q + 20),
}


@pytest.mark.parametrize("name", CASES)
def test_three_kernels_make_attention(name):
    mask = CASES[name]
    q_len, kv_len = (63, 63) if name == "box" else (61, 50)
    q, k, v = torch.randn(2, 4, q_len, 16), torch.randn(2, 2, kv_len, 16), torch.randn(2, 2, kv_len, 24)
    attends = torch.as_tensor(mask.to_dense(q_len, kv_len))
    scores = gossamer.sddmm(q, k, mask, enable_gqa=True)
    products = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    wanted = (products / math.sqrt(16)).masked_fill(~attends, -math.inf)
    torch.testing.assert_close(scores.to_dense(-math.inf), wanted, atol=1e-5, rtol=1e-5)
    weights = gossamer.sparse_softmax(scores)
    wanted = torch.nan_to_num(wanted.softmax(-1), 0.0)
    torch.testing.assert_close(weights.to_dense(), wanted, atol=1e-6, rtol=1e-5)
    out = gossamer.spmm(weights, v, enable_gqa=True)
    torch.testing.assert_close(out, wanted @ v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)


def test_storage_is_proportional_to_the_entries():
    scores = gossamer.sddmm(torch.randn(1, 1, 512, 16), torch.randn(1, 1, 512, 16), masks.sliding_window(8))
    assert scores.values.shape == (1, 1, 512, 17)


def test_opaque_masks_are_refused():
    with pytest.raises(UnsupportedError, match="union of ACSR terms"):
        gossamer.sddmm(torch.randn(1, 1, 32, 16), torch.randn(1, 1, 32, 16), lambda b, h, q, k: (q & k) == 0)


def test_other_things_are_refused():
    q = torch.randn(1, 1, 32, 16)
    scores = gossamer.sddmm(q, q, masks.sliding_window(3))
    with pytest.raises(InputError, match=r"sparse_softmax.scores: expected an ACSRTensor.*; got Tensor"):
        gossamer.sparse_softmax(q)
    with pytest.raises(InputError, match=r"spmm.weights: expected an ACSRTensor.*; got Tensor"):
        gossamer.spmm(q, q)
    with pytest.raises(InputError, match=r"the weights' dtype torch.float32; got torch.float64"):
        gossamer.spmm(scores, q.double())
    with pytest.raises(InputError, match=r"spmm.value: expected \(B, Hk, 32, Dv\); got \(1, 1, 20, 16\)"):
        gossamer.spmm(scores, q[:, :, :20])

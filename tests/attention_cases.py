"""Inputs, masks and score_mods that the tests of `gossamer.attention` share, on any device."""

import math

import numpy as np
import torch

import gossamer
from gossamer import masks


def tensors(
    q_len=61,
    kv_len=83,
    *,
    batch=1,
    heads=2,
    kv_heads=None,
    size=16,
    v_size=None,
    dtype=torch.float32,
    device="cpu",
):
    """Query, key and value of standard normal numbers."""
    kv_heads, v_size = kv_heads or heads, v_size or size
    shapes = (batch, heads, q_len, size), (batch, kv_heads, kv_len, size), (batch, kv_heads, kv_len, v_size)
    return tuple(torch.randn(shape).to(device, dtype) for shape in shapes)


IDS = np.repeat(np.arange(12), [3, 1, 40, 7, 25, 64, 9, 30, 2, 50, 33, 40])
UNSORTED = np.random.default_rng(0).integers(0, 4, 304)
BOUNDS = np.random.default_rng(1).integers(0, 120, (1, 2, 130, 4))

# Masks that differ in runtime integers only share a kernel: several of a kind cost one compilation.
LIBRARY = {
    "full": [masks.full()],
    "causal": [masks.causal()],
    "sliding_window": [masks.sliding_window(*w) for w in ((0,), (7,), (40, 0), (0, 200), (3, 90))],
    "dilated_window": [masks.dilated_window(w, 4) for w in (1, 8, 33)],
    "dilated_window, odd": [masks.dilated_window(6, 3)],
    "strided": [masks.strided(16, local) for local in (0, 1, 16, 100)],
    "strided, causal": [masks.strided(7, 5) & masks.causal()],
    "fixed": [masks.fixed(24, summary) for summary in (0, 3, 24)],
    "blocked": [masks.blocked(20)],
    "blocked by one": [masks.blocked(1)],
    "chunked_causal": [masks.chunked_causal(48)],
    "global_tokens": [masks.global_tokens(n) for n in (0, 1, 33, 500)],
    "global rows": [masks.global_tokens(5, columns=False)],
    "global columns": [masks.global_tokens(5, rows=False)],
    "longformer": [masks.longformer(w, n) for w, n in ((8, 4), (0, 0), (40, 1))],
    "longformer, causal": [masks.longformer(8, 4) & masks.causal()],
    "bigbird": [masks.bigbird(w, n, 2, 16, s) for w, n, s in ((8, 4, 0), (0, 1, 7))],
    "random_blocks by head": [masks.random_blocks(2, 16, 5, per_head=True)],
    "prefix_lm": [masks.prefix_lm(n) for n in (0, 30, 400)],
    "prefix_lm by batch": [masks.prefix_lm(torch.tensor([4, 50]))],
    "document": [masks.document(IDS), masks.document(UNSORTED)],
    "document, offsets": [masks.document(offsets=torch.tensor([0, 5, 5, 60, 304]))],
    "document by batch": [
        masks.document(torch.from_numpy(np.stack([IDS, IDS[::-1].copy()]))) & masks.causal()
    ],
    "axial rows": [masks.axial((9, 9), 1)],
    "axial columns": [masks.axial((9, 9), 0)],
    "neighborhood": [masks.neighborhood((9, 9), 3)],
    "neighborhood, clipped": [masks.neighborhood((9, 9), (5, 3), edges="clip")],
    "neighborhood, dilated": [masks.neighborhood((9, 9), 3, dilation=(1, 2), edges="clip")],
    "neighborhood, causal": [masks.neighborhood((9, 9), 3, causal=(True, False))],
    "neighborhood, 1-d": [masks.neighborhood(81, 7)],
    "neighborhood, 3-d": [masks.neighborhood((3, 4, 7), 3, edges="clip")],
    "from_flashmask": [masks.from_flashmask(BOUNDS, causal=False)],
    "from_flashmask, causal": [masks.from_flashmask(BOUNDS[..., :1])],
    "not longformer": [~masks.longformer(w, 3) for w in (0, 9)],
    "nothing": [masks.causal() & ~masks.causal()],
    "recovered": [gossamer.Mask.from_dense(masks.sliding_window(6).to_dense(90, 90))],
    "stored": [gossamer.Mask.from_dense(np.random.default_rng(2).random((120, 120)) < 0.1)],
}


def score_mods(device="cpu"):
    """score_mods by name, with their tensors on a device; for two heads, at most 61 queries and 90 keys."""
    slopes, by_distance = torch.tensor([0.5, 0.0625]).to(device), torch.randn(200).to(device)
    by_head, by_pair = torch.randn(2, 200).to(device), torch.randn(2, 61, 90).to(device)
    types, type_bias = torch.randint(0, 5, (90,)).to(device), torch.randn(5, 5).half().to(device)
    return {
        "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
        "bias of the distance": lambda s, b, h, q, k: s + by_distance[q - k + 100],
        "bias of head and distance": lambda s, b, h, q, k: s + by_head[h, abs(q - k)],
        "bias of the pair": lambda s, b, h, q, k: s + by_pair[h, q, k],
        "bias of types": lambda s, b, h, q, k: s + type_bias[types[q], types[k]],
        "integers": lambda s, b, h, q, k: s + (q - k),
        "integers, scaled": lambda s, b, h, q, k: 0.5 * (s + (q - k)),
        "soft cap": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
        "where": lambda s, b, h, q, k: torch.where(q > k + 3, s, 0.5 * s),
        "where, minus infinity": lambda s, b, h, q, k: torch.where((q - k) % 5 == 0, -math.inf, s),
        "sin and cos": lambda s, b, h, q, k: torch.sin(s) + torch.cos(2 * s),
        "exp and log": lambda s, b, h, q, k: torch.log(1 + torch.exp(s)),
        "sqrt": lambda s, b, h, q, k: torch.sqrt(abs(s)),
        "pow": lambda s, b, h, q, k: s**2 - torch.pow(s, 3) / 8,
        "sigmoid": lambda s, b, h, q, k: 3 * torch.sigmoid(s),
        "relu": lambda s, b, h, q, k: torch.clamp(s, min=0),
        "constant": lambda s, b, h, q, k: s * 0 + 1.5,
    }  # fmt: skip

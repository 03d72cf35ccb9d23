"""Programs with attention in them, as people write it: what capture is tested on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, S, D = 2, 4, 20, 8
Program = Callable[..., Any]
SPELLINGS: dict[str, Program] = {}


def spelling(function: Program) -> Program:
    SPELLINGS[function.__name__] = function
    return function


@spelling
def matmul_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    mask = torch.tril(torch.ones(q.size(2), k.size(2)))
    return torch.matmul(F.softmax(scores.masked_fill(mask == 0, float("-inf")), dim=-1), v)


@spelling
def at_operator_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    causal = i[:, None] >= i[None, :]
    s = (q * q.shape[-1] ** -0.5) @ k.mT
    return torch.where(causal, s, torch.tensor(float("-inf"), dtype=s.dtype)).softmax(-1) @ v


@spelling
def einsum_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3
    bias = torch.triu(torch.full((q.shape[2], k.shape[2]), float("-inf"), dtype=s.dtype), diagonal=1)
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(s + bias, dim=3), v)


@spelling
def bmm_of_merged_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
    s = torch.bmm(q, k.transpose(1, 2)).view(b, h, n, n)
    blocked = torch.ones(n, n, dtype=torch.bool).triu(1)
    p = s.div(math.sqrt(d)).masked_fill(blocked, -1e9).view(b * h, n, n).softmax(dim=-1)
    return torch.bmm(p, v).view(b, h, n, d)


@spelling
def softmax_of_split_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    s = torch.baddbmm(
        torch.zeros(1, 1, 1, dtype=q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.0, alpha=d**-0.5
    )
    p = s.unflatten(0, (b, h)).softmax(-1)
    return (p.reshape(b * h, n, n) @ v.reshape(b * h, n, d)).view(b, h, n, d)


@spelling
def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2]).unsqueeze(1)
    j = torch.arange(k.shape[-2]).unsqueeze(0)
    near = torch.logical_and(i >= j, (i - j) < 5)
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return s.masked_fill(~near, torch.finfo(s.dtype).min).softmax(-1) @ v


@spelling
def band_of_triangles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    band = torch.tril(torch.ones(n, n), 3) * torch.triu(torch.ones(n, n), -3)
    s = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1]) + (1.0 - band) * -1e9
    return s.softmax(-1) @ v


@spelling
def einsum_with_dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("...id,...jd", q, k) * q.shape[-1] ** -0.5
    s = s - s.amax(dim=-1, keepdim=True).detach()
    return torch.einsum("...ij, ...jd -> ...id", s.softmax(-1), v)


@spelling
def einsum_of_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum(q, [0, 1, 2, 4], k, [0, 1, 3, 4], [0, 1, 2, 3])
    return torch.einsum(s.softmax(-1).type_as(s), [..., 2, 3], v, [..., 3, 4], [..., 2, 4])


@spelling
def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    s = (q @ k.mT * 0.3).masked_fill(i[:, None] < i, float("-inf"))
    e = torch.exp(s - torch.max(s, dim=-1, keepdim=True)[0].detach())
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@spelling
def softmax_by_logarithms(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * 0.3
    return (s - s.logsumexp(-1, keepdim=True)).exp() @ v


@spelling
def masked_in_bytes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2], dtype=torch.uint8)
    s = (q @ k.mT).masked_fill(i[:, None] - i > 5, float("-inf"))  # differences below 0 wrap around
    return s.softmax(-1) @ v


@spelling
def length_before_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    n = torch.arange(q.shape[1])
    s = s + torch.where(n[None, :] <= n[:, None], 0.0, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v).transpose(1, 2)


@spelling
def grouped_by_interleaving(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k[:, :2], v[:, :2]
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    return (q @ k.mT * 0.5).softmax(-1) @ v


@spelling
def grouped_by_expanding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, _, n, d = q.shape
    k, v = (x[:, :2, None].expand(b, 2, 2, n, d).reshape(b, 4, n, d) for x in (k, v))
    return (q @ k.mT * 0.5).softmax(-1) @ v


@spelling
def grouped_in_five_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, _, n, d = q.shape
    q, k, v = q.view(b, 2, 2, n, d), k[:, :2].unsqueeze(2), v[:, :2].unsqueeze(2)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    s = (q @ k.transpose(-1, -2) * 0.4).masked_fill(causal.logical_not(), float("-inf"))
    return (s.softmax(-1) @ v).reshape(b, 4, n, d)


@spelling
def one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k[:, 0], v[:, 0]
    p = torch.einsum("bhqd,bkd->bhqk", q, k).mul(0.35).softmax(-1)
    return torch.einsum("bhqk,bkd->bhqd", p, v)


@spelling
def keys_before_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (k @ q.mT) * 0.3  # (B, H, keys, queries)
    i = torch.arange(s.shape[-1])
    s = s.masked_fill(i[:, None] > i, float("-inf"))
    return torch.softmax(s, -2).mT @ v


@spelling
def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s *= 0.25
    s.masked_fill_(torch.ones(s.shape[-2:], dtype=torch.bool).triu_(1), float("-inf"))
    return s.softmax(-1) @ v


@spelling
def stable_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * 0.3
    s = s - s.max(dim=-1, keepdim=True).values
    return F.dropout(s.softmax(-1, dtype=torch.float64).to(q.dtype), 0.1, training=False) @ v


@spelling
def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.tanh(q @ k.mT * 0.3 / 5.0) * 5.0
    i = torch.arange(s.shape[-1])
    return s.masked_fill((i[:, None] - i).abs() > 6, float("-inf")).softmax(-1) @ v


@spelling
def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = 2.0 ** -(torch.arange(4, dtype=q.dtype) + 1)
    i = torch.arange(q.shape[2])
    s = q @ k.mT * 0.3 + slopes.view(4, 1, 1) * (i[None, :] - i[:, None])
    return s.masked_fill(i[None] > i[:, None], float("-inf")).softmax(-1) @ v


@spelling
def blocks_and_strides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.meshgrid(torch.arange(q.shape[2]), torch.arange(k.shape[2]), indexing="ij")
    mask = (i // 4 == j // 4) | ((i - j) % 5 == 0) & (j <= i)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling
def fused_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling
def fused_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], scale=0.2, enable_gqa=True)


@spelling
def fused_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    bias = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype).masked_fill(i[:, None] < i, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@spelling
def fused_in_three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], is_causal=True)


@spelling
def rows_without_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    s = (q @ k.mT * 0.3).masked_fill(i[:, None] <= i + 2, -1e9)  # the first rows have none: a mean of values
    return s.softmax(-1) @ v


@spelling
def weighed_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return ((q @ k.mT * 0.3).softmax(-1) * (i[:, None] >= i)) @ v


@spelling
def masked_before_scaling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    s = (q @ k.mT).masked_fill(i[:, None] < i, float("-inf")) / math.sqrt(q.shape[-1])
    return F.softmax(s, -1) @ v


def inputs(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, S, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]

"""Linear attention as programs write it: what capture is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, S, D = 2, 3, 20, 8
Program = Callable[..., Any]
SPELLINGS: dict[str, Program] = {}


def spelling(function: Program) -> Program:
    SPELLINGS[function.__name__] = function
    return function


@spelling
def einsum_of_states(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fast-transformers' own, length before heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    kv = torch.einsum("nshd,nshm->nhmd", k, v)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
    return torch.einsum("nlhd,nhmd,nlh->nlhm", q, kv, z).transpose(1, 2).contiguous()


@spelling
def matmul_of_states(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = torch.relu(q) + 1e-3, torch.relu(k) + 1e-3
    out = q @ (k.transpose(-2, -1) @ v)
    return out / (q @ k.sum(dim=-2, keepdim=True).transpose(-2, -1) + 1e-4)


@spelling
def multiplied_by_the_inverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = torch.exp(q * 0.3), torch.exp(k * 0.3)
    total = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
    return torch.matmul(q, torch.einsum("bhjd,bhjm->bhdm", k, v)) * (1.0 / total)


@spelling
def masked_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    scores = (q @ k.mT) * torch.tril(torch.ones(q.shape[2], k.shape[2], dtype=q.dtype))
    return (scores @ v) / (scores.sum(-1, keepdim=True) + 1e-6)


@spelling
def filled_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    i = torch.arange(q.shape[2])
    scores = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(i[:, None] < i, 0.0)
    out = torch.einsum("bhij,bhjm->bhim", scores, v)
    return out / scores.sum(-1)[..., None]


@spelling
def triangle_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tril((q.sigmoid() * 0.5) @ k.sigmoid().mT)
    return (scores / (scores.sum(-1, keepdim=True) + 0.01)) @ v


@spelling
def running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    states = torch.einsum("bhnd,bhnm->bhndm", k, v).cumsum(dim=2)
    z = 1 / (torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(dim=2)) + 1e-6)
    return torch.einsum("bhnd,bhndm,bhn->bhnm", q, states, z)


@spelling
def running_sums_unnormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), dim=-3)
    return torch.einsum("bhnd,bhndm->bhnm", q * 8**-0.5, states)


@spelling
def softmax_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Normalised over features, and over keys."""
    context = torch.einsum("bhnd,bhne->bhde", k.softmax(dim=-2), v)
    return torch.einsum("bhnd,bhde->bhne", q.softmax(dim=-1) * 8**-0.5, context)


@spelling
def random_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Performer's positive features."""
    projection = torch.linspace(-1, 1, 8 * 12, dtype=q.dtype).view(8, 12)

    def features(x: Tensor) -> Tensor:
        x = x * 8**-0.25
        return 12**-0.5 * (torch.exp(x @ projection - (x * x).sum(-1, keepdim=True) / 2) + 1e-4)

    q, k = features(q), features(k)
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1))


@spelling
def merged_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = torch.bmm(q, torch.bmm(k.transpose(1, 2), v))
    return (out / (torch.bmm(q, k.sum(1, keepdim=True).mT) + 1e-6)).view(b, h, n, d)


@spelling
def padded_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = torch.arange(k.shape[2])
    k = (F.elu(k) + 1) * torch.sigmoid(n.to(k.dtype) - 9)[:, None]
    q = F.elu(q) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT + 1e-6)


def inputs(length: int = S, dtype: Any = torch.float64, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, length, D, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]

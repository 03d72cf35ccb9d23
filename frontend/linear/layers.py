"""Attention of published models made of linear attention, local products and summaries.

    relative_linear_attention   kernelised attention with relative positions (Luo et al., 2021)
    mossformer_attention        local squared ReLU and global linear attention (Zhao and Ma, 2023)
    combiner_attention          the own block directly, others by a summary (Ren et al., 2021)

Each is composed of `linear_attention`, `attention` and products of torch, and differentiable through them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import pad

from ...ir.errors import InputError
from ..attention import attention
from ..mask import Mask
from ..moe.layers import FLOATS, check_tensor
from ..pure import pure
from . import feature_maps
from .attention import linear_attention

CHUNK = 128  # rows whose near keys are weighed at once, at most
WORKSPACE = 1 << 26  # numbers that a transform works on at once


def relative_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    feature_map: Any = "elu",
    *,
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    method: str = "window",
) -> torch.Tensor:
    """Linear attention whose scores have a factor by distance, exp(b[j - i]) (phi(q_i) . phi(k_j)).

    Args:
        query, key, value: (B, H, S, D), (B, H, S, D), (B, H, S, Dv); one dtype and device.
        bias: (2 W + 1,) or (H, 2 W + 1): b of j - i = -W to W. Keys further away than W get the bias of the
            end of their side, as with clipped relative positions; W = S - 1 says all of a Toeplitz matrix.
        feature_map, normalize, eps: of `linear_attention`. causal: keys 0 to i only.
        method: "window": pairs within W one by one, all others by linear attention over sequences that are
            moved by W + 1, which takes O(S W) operations. "fft": the Toeplitz product of every feature and
            value by fast Fourier transforms (the paper's way), O(S log S) for any W, and errors relative to
            the largest result. The first is faster for W up to a few hundred.

    Returns (B, H, S, Dv) in the query's dtype, computed in float32 (float64 for float64). Gradients flow to
    all tensors. Raises InputError, and what `linear_attention` raises.
    """
    where = "relative_linear_attention"
    _check(where, {"query": query, "key": key, "value": value})
    check_tensor(f"{where}.bias", bias, getattr(bias, "ndim", 2), "(heads, 2 W + 1)")
    heads, length = query.shape[1:3]
    by_head = bias.shape[0] if bias.dim() == 2 else 1
    if bias.dim() not in (1, 2) or bias.shape[-1] % 2 == 0 or by_head not in (1, heads):
        raise InputError(f"{where}.bias", f"(2 W + 1,) or ({heads}, 2 W + 1)", tuple(bias.shape))
    if method not in ("window", "fft"):
        raise InputError(f"{where}.method", "'window' or 'fft'", repr(method))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (t.to(wide) for t in (query, key, value))
    features = feature_maps.of(feature_map, f"{where}.feature_map")
    factors = bias.to(wide).reshape(-1, bias.shape[-1]).exp().expand(heads, -1)
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # the last column sums the scores
    if length == 0:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    compute = _by_windows if method == "window" else _by_transforms
    found = compute(q, k, values, factors, features, causal)
    out = found[..., :-1] / (found[..., -1:] + eps) if normalize else found[..., :-1]
    return out.to(query.dtype)


def _by_windows(q: Any, k: Any, values: Any, factors: Any, features: Any, causal: bool) -> torch.Tensor:
    reach, length = (factors.shape[1] - 1) // 2, q.shape[2]
    out = _near(features(q), features(k), values, factors, causal)

    def far(sides: Any, factor: Any) -> torch.Tensor:
        """Keys more than `reach` before their row, for sequences in this direction."""
        rows, *others = sides
        keys, given = (pad(t[:, :, : length - reach - 1], (0, 0, reach + 1, 0)) for t in others)
        found = linear_attention(rows, keys, given, features, causal=True, normalize=False)
        return found * factor[:, None, None]

    if reach + 1 < length:
        out = out + far((q, k, values), factors[:, 0])
        if not causal:
            flipped = far((t.flip(2) for t in (q, k, values)), factors[:, -1])
            out = out + flipped.flip(2)
    return out


def _near(fq: Any, fk: Any, values: Any, factors: Any, causal: bool) -> torch.Tensor:
    """What keys within reach give, in chunks of rows with the chunks around them."""
    reach, length = (factors.shape[1] - 1) // 2, fq.shape[2]
    size = min(max(16, reach), CHUNK)
    around = -(-reach // size) * size
    if 2 * around + size >= length:
        size, around = length, 0
    chunks = -(-length // size)
    rows = pad(fq, (0, 0, 0, chunks * size - length)).unflatten(2, (chunks, size))

    def windows(t: Any) -> torch.Tensor:
        wide = pad(t, (0, 0, around, around + chunks * size - length))
        return wide.unfold(2, size + 2 * around, size)  # (.., chunks, features, keys)

    i = torch.arange(size, device=fq.device)[:, None]
    j = torch.arange(size + 2 * around, device=fq.device) - around
    distance = j - i
    weigh = factors[:, (distance + reach).clamp(0, 2 * reach)]
    allowed = (distance <= 0) & (distance >= -reach) if causal else distance.abs() <= reach
    weights = (rows @ windows(fk)) * torch.where(allowed, weigh, 0)[:, None]
    return (weights @ windows(values).transpose(-1, -2)).flatten(2, 3)[:, :, :length]


def _by_transforms(q: Any, k: Any, values: Any, factors: Any, features: Any, causal: bool) -> torch.Tensor:
    fq, fk = features(q), features(k)
    length, reach = fq.shape[2], (factors.shape[1] - 1) // 2
    total = 2 * length
    offset = torch.arange(total, device=q.device)
    distance = torch.where(offset < length, -offset, total - offset)  # j - i of what row i gets from j
    factor = factors[:, (distance + reach).clamp(0, 2 * reach)]
    unused = offset == length
    factor = torch.where(unused | (distance > 0) if causal else unused, 0, factor)
    spectrum = torch.fft.rfft(factor, dim=-1)[:, :, None, None]
    out = torch.zeros_like(values)
    step = max(1, WORKSPACE // (total * values.shape[0] * values.shape[1] * values.shape[3]))
    for first in range(0, fk.shape[3], step):
        part = slice(first, first + step)
        pairs = fk[..., part, None] * values[..., None, :]
        summed = torch.fft.irfft(torch.fft.rfft(pairs, total, dim=2) * spectrum, total, dim=2)[:, :, :length]
        out = out + (fq[..., part, None] * summed).sum(3)
    return out


def mossformer_attention(
    local_query: torch.Tensor,
    local_key: torch.Tensor,
    linear_query: torch.Tensor,
    linear_key: torch.Tensor,
    value: torch.Tensor,
    *,
    chunk: int = 256,
) -> torch.Tensor:
    """Joint local and global attention: relu(q k^T / chunk)^2 v within chunks, plus q' (k'^T v) / S over all.

    Args:
        local_query, local_key: (B, H, S, D). linear_query, linear_key: (B, H, S, D'), in the models the same
            shared projection scaled and moved. value: (B, H, S, Dv). The models have one head.
        chunk: rows of a chunk; the last one may be shorter.

    Returns (B, H, S, Dv) in value's dtype, before gates. Gradients flow to all. Raises InputError.
    """
    where = "mossformer_attention"
    _check(where, {"local_query": local_query, "local_key": local_key, "value": value})
    _check(where, {"linear_query": linear_query, "linear_key": linear_key, "value": value})
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InputError(f"{where}.chunk", "a number of rows, at least 1", repr(chunk))
    length = value.shape[2]
    if length == 0:
        return torch.zeros_like(value)
    wide = torch.float32 if value.dtype == torch.float16 else value.dtype  # sums leave the range of float16
    rest = -length % chunk
    q, k, v = (
        pad(t.to(wide), (0, 0, 0, rest)).unflatten(2, (-1, chunk)) for t in (local_query, local_key, value)
    )
    weights = (q @ k.transpose(-1, -2) / chunk).relu().square()
    local = (weights @ v).flatten(2, 3)[:, :, :length]
    rows, keys, values = (t.to(wide) for t in (linear_query, linear_key, value))
    everywhere = linear_attention(rows, keys, values, "identity", normalize=False)
    return (local + everywhere / length).to(value.dtype)


def combiner_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block: int,
    causal: bool = True,
    summary: str = "max",
    count: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Combiner-Fixed: softmax over the keys of a row's own block and one summary of every other block.

    Args:
        query, key, value: (B, H, S, D), (B, H, S, D), (B, H, S, Dv), S a multiple of `block`.
        block: rows of a block. causal: keys 0 to i of the own block, summaries of earlier blocks; else all.
        summary: how queries and keys of a block become the summary's, "max" (the paper's) or "mean", over the
            block. Its value is the expectation under softmax(summary query . k_j) within the block.
        count: add log(block) to the scores of summaries, which then weigh as much as a block of such keys.
        scale: default 1 / sqrt(D).

    Returns (B, H, S, Dv). O(S (block + S / block)) pairs. Gradients flow to all. Raises InputError, and what
    `gossamer.attention` raises.
    """
    where = "combiner_attention"
    _check(where, {"query": query, "key": key, "value": value})
    length = query.shape[2]
    if isinstance(block, bool) or not isinstance(block, int) or block < 1 or length % block:
        raise InputError(f"{where}.block", f"a number of rows that divides the length {length}", repr(block))
    if summary not in ("max", "mean"):
        raise InputError(f"{where}.summary", "'max' or 'mean'", repr(summary))
    factor = query.shape[3] ** -0.5 if scale is None else float(scale)
    q, k, v = (t.unflatten(2, (-1, block)) for t in (query, key, value))
    summarise = (lambda t: t.amax(3)) if summary == "max" else (lambda t: t.mean(3))
    keys, queries = summarise(k), summarise(q)
    inside = torch.softmax((queries.unsqueeze(3) @ k.transpose(-1, -2)) * factor, -1)
    values = (inside @ v).squeeze(3)
    blocks = length // block
    every_key, every_value = (torch.cat(pair, 2) for pair in ((keys, key), (values, value)))
    added = math.log(block)

    def counted(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return torch.where(k < blocks, score + added, score)

    mask = _combined(block, causal, blocks)
    score = counted if count else None
    out: Any = attention(query, every_key, every_value, mask=mask, score_mod=score, scale=factor)
    return out


@pure
def _combined(block: int, causal: bool, blocks: int) -> Mask:
    """Columns: `blocks` summaries, then the keys."""
    return _mask(block, causal, blocks)


@lru_cache(maxsize=64)
def _mask(block: int, causal: bool, blocks: int) -> Mask:

    def attends(b: Any, h: Any, q: Any, k: Any) -> Any:
        own = (k >= blocks) & ((k - blocks) // block == q // block)
        if causal:
            return ((k < blocks) & (k < q // block)) | (own & (k - blocks <= q))
        return ((k < blocks) & (k != q // block)) | own

    return Mask.trace(attends)


def _check(where: str, tensors: dict[str, Any]) -> None:
    """One batch, number of heads, length, dtype and device; keys as wide as queries."""
    (first, query), *rest = tensors.items()
    for name, tensor in tensors.items():
        check_tensor(f"{where}.{name}", tensor, 4, "(batch, heads, length, size)")
    if query.dtype not in FLOATS:
        raise InputError(f"{where}.{first}", "float16, bfloat16, float32 or float64", query.dtype)
    for name, tensor in rest:
        size = query.shape[3] if name.endswith("key") else tensor.shape[3]
        expected = (*query.shape[:3], size)
        if tuple(tensor.shape) != expected:
            raise InputError(f"{where}.{name}", f"shape {expected}, as {first} has", tuple(tensor.shape))
        if tensor.dtype != query.dtype or tensor.device != query.device:
            got = f"{tensor.dtype} on {tensor.device}"
            raise InputError(f"{where}.{name}", f"{query.dtype} on {query.device}, as {first}", got)

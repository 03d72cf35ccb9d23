"""What rows without keys give in programs that people write: NaN, or the mean of all values.

A kernel gives zeros there, and a log-sum-exp of -inf by which they are known. Gradients are the programs'
too: those of NaN are NaN, and scores that an added fill has swallowed still have their slopes.
"""

from __future__ import annotations

import torch


def with_empty_rows(out: torch.Tensor, lse: torch.Tensor, value: torch.Tensor, empty: str) -> torch.Tensor:
    """The output in which rows of empty scores give "nan", or the "mean" of the values.

    out: (B, Hq, q_len, Dv). lse: (B, Hq, q_len). value: (B, Hkv, kv_len, Dv)."""
    rows = torch.isneginf(lse)[..., None]
    if empty != "nan":
        return torch.where(rows, _by_head(_mean(value, lse), out).to(out.dtype), out)
    if not (torch.is_grad_enabled() and value.requires_grad):
        return out.masked_fill(rows, float("nan"))
    # A row's NaN weights every value of its head.
    weight = torch.where(rows.any(-2, keepdim=True), float("nan"), 0.0).to(out.dtype)
    return torch.where(rows, weight * _by_head(value.sum(-2, keepdim=True), out), out)


def with_sums(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The output in which rows of equal scores give the mean of the values, and its slopes to their scores.

    A fill that swallows the score s = scale * q . k leaves all n weights at 1/n, whose slopes are those of a
    softmax: the output moves by (v - mean) / n with a key's score. Summed over keys, that is a matrix a head.
    query: (B, Hq, q_len, D), key: (B, Hkv, kv_len, D); the others as in `with_empty_rows`."""
    rows = torch.isneginf(lse)[..., None]
    mean = _mean(value, lse)
    apart = (value.to(lse.dtype) - mean).detach()
    slope = _by_head(key.to(lse.dtype).mT @ apart, out) * (scale / max(1, key.shape[2]))
    moved = query.to(lse.dtype) @ slope
    row = _by_head(mean, out) + (moved - moved.detach())
    return torch.where(rows, row.to(out.dtype), out)


def nearest(lse: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """The level of each row's scores; 0 for a row of -inf."""
    found, distance = torch.zeros_like(lse), lse.abs()
    for level in levels:
        apart = (lse - level).abs()
        found = torch.where(apart < distance, level, found)
        distance = torch.minimum(apart, distance)
    return found


def _mean(value: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return value.mean(-2, keepdim=True, dtype=lse.dtype)


def _by_head(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What belongs to a head of the values, for each head of the queries."""
    shared = out.shape[1] // x.shape[1]
    return x if shared == 1 else x.repeat_interleave(shared, 1)

"""The reference backend: dense attention in float64, the oracle beside every kernel.

Slow and O(q_len * kv_len) on purpose: it is the definition, evaluated. Captured tensors are read as
they are; rows without any pair give zeros and an LSE of -inf.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from .attention import Problem
    from .mask import Mask
    from .score import ScoreMod


def reference_attention(
    problem: Problem, mask: Mask, score: ScoreMod | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a checked problem, computed in float64 and rounded to the result dtypes."""
    import torch

    q, k, v = (t.detach().to(torch.float64) for t in (problem.query, problem.key, problem.value))
    group = problem.heads // k.shape[1] if k.shape[1] else 1
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(problem.qk_size) if scale is None else scale)
    grid = np.ogrid[: problem.batch, : problem.heads, : problem.q_len, : problem.kv_len]
    lengths = {"q_len": problem.q_len, "kv_len": problem.kv_len}
    if score is not None:
        mapped = score.ir.evaluate(
            scores.numpy(), *grid, score.values, _arrays(score.tensors), floats=np.float64, **lengths
        )
        scores = torch.from_numpy(np.ascontiguousarray(np.broadcast_to(mapped, scores.shape)))
    attends = mask.ir.evaluate(*grid, mask.values, _arrays(mask.tensors), **lengths)
    scores = scores.masked_fill(~torch.from_numpy(np.ascontiguousarray(attends)), -math.inf)
    lse = torch.logsumexp(scores, -1) if problem.kv_len else scores.new_full(scores.shape[:-1], -math.inf)
    weights = torch.exp(scores - torch.where(lse.isneginf(), 0.0, lse)[..., None])
    lse_dtype = torch.float64 if problem.dtype == "f64" else torch.float32
    return (weights @ v).to(problem.query.dtype), lse.to(lse_dtype)


def _arrays(tensors: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().numpy() if hasattr(t, "detach") else np.asarray(t) for t in tensors)

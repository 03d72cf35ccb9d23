"""The reference backend: dense attention in float64, the oracle beside every kernel.

Slow and O(q_len * kv_len) on purpose: it is the definition, evaluated. Captured tensors are read as
they are; rows without any pair give zeros and an LSE of -inf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from .mask import Mask
    from .problem import Problem
    from .score import ScoreMod


def reference_attention(
    problem: Problem, mask: Mask, score: ScoreMod | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a checked problem, computed in float64 and rounded to the result dtypes."""
    import torch

    out, lse = exact_attention(problem, mask, score, scale, np.float64)
    wide = torch.float64 if problem.dtype == "f64" else torch.float32
    return (
        torch.from_numpy(out).to(problem.device, problem.query.dtype),
        torch.from_numpy(lse).to(problem.device, wide),
    )


def exact_attention(
    problem: Problem, mask: Mask, score: ScoreMod | None, scale: float | None, floats: type
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in the NumPy dtype `floats`: float64, or longdouble to judge float64 kernels by."""
    import torch

    q, k, v = (
        t.detach().to("cpu", torch.float64).numpy().astype(floats)
        for t in (problem.query, problem.key, problem.value)
    )
    group = problem.heads // k.shape[1] if k.shape[1] else 1
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    with np.errstate(all="ignore"):
        factor = 1 / np.sqrt(floats(problem.qk_size)) if scale is None else floats(scale)
        scores = (q @ k.swapaxes(-1, -2)) * factor
        b, h, q_at, k_at = np.ogrid[: problem.batch, : problem.heads, : problem.q_len, : problem.kv_len]
        lengths = {"q_len": problem.q_len, "kv_len": problem.kv_len}
        attends = mask.ir.evaluate(b, h, q_at, k_at, mask.values, _arrays(mask.tensors), **lengths)
        attends = np.broadcast_to(attends, scores.shape)
        if score is not None:  # which is defined on pairs that attend only
            points = b, h, q_at, k_at = np.nonzero(attends)
            scores[points] = score.ir.evaluate(
                scores[points], b, h, q_at, k_at, score.values, _arrays(score.tensors), floats=floats
            )
        scores = np.where(attends, scores, -np.inf)
        peak = scores.max(-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(peak), 0, peak))
        total = weights.sum(-1, keepdims=True)
        empty = total == 0
        lse = np.where(empty, -np.inf, peak + np.log(np.where(empty, 1, total)))[..., 0]
        return (weights / np.where(empty, 1, total)) @ v, lse


def _arrays(tensors: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().cpu().numpy() if hasattr(t, "detach") else np.asarray(t) for t in tensors)

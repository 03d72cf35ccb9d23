"""The reference backend: dense attention in float64, the oracle beside every kernel.

Slow and O(q_len * kv_len) on purpose: it is the definition, evaluated. Captured tensors are read as
they are; rows without any pair give zeros and an LSE of -inf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .captured import as_numpy
from .placement import PLAIN as EVEN
from .placement import Placement
from .softmax import PLAIN, Softmax

if TYPE_CHECKING:
    import torch

    from .mask import Mask
    from .problem import Problem
    from .score import ScoreMod

Array = np.ndarray


def reference_attention(
    problem: Problem,
    mask: Mask,
    score: ScoreMod | None,
    scale: float | None,
    softmax: Softmax = PLAIN,
    placed: Placement = EVEN,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, column sums) of a checked problem, computed in float64 and rounded to the result dtypes.

    Column sums are those of sequences of one length; of others, zeros."""
    import torch

    out, *rows = exact_attention(problem, mask, score, scale, np.float64, softmax, placed)
    wide = torch.float64 if problem.dtype == "f64" else torch.float32
    lse, sums = (torch.from_numpy(row).to(problem.device, wide) for row in rows)
    return torch.from_numpy(out).to(problem.device, problem.query.dtype), lse, sums


def exact_attention(
    problem: Problem,
    mask: Mask,
    score: ScoreMod | None,
    scale: float | None,
    floats: type,
    softmax: Softmax = PLAIN,
    placed: Placement = EVEN,
) -> tuple[Array, Array, Array]:
    """(out, lse, column sums) in the NumPy dtype `floats`: float64, or longdouble to judge its kernels by."""
    if not placed.uneven:
        b = np.arange(problem.batch)
        return _dense(problem, mask, score, scale, floats, softmax, b, placed.values.get("q_offset", 0))
    rows = (problem.batch, problem.heads, problem.q_len)
    out, lse = np.zeros((*rows, problem.v_size), floats), np.full(rows, -np.inf, floats)
    for piece in placed.pieces(problem):
        b, at = np.array([piece.b]), (piece.batch, slice(None), piece.rows)
        own = piece.problem(problem)
        (out[at],), (lse[at],), _ = _dense(own, mask, score, scale, floats, softmax, b, piece.offset)
    return out, lse, np.zeros(0, floats)


def _dense(
    problem: Problem,
    mask: Mask,
    score: ScoreMod | None,
    scale: float | None,
    floats: type,
    softmax: Softmax,
    batch: Array,
    offset: int,
) -> tuple[Array, Array, Array]:
    """batch: the number of every sequence. offset: the position of their first queries."""
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
        _, h, q_at, k_at = np.ogrid[: problem.batch, : problem.heads, : problem.q_len, : problem.kv_len]
        b, q_at = batch[:, None, None, None], q_at + offset
        lengths = {"q_len": problem.q_len, "kv_len": problem.kv_len}
        attends = mask.ir.evaluate(b, h, q_at, k_at, mask.values, _arrays(mask.tensors), **lengths)
        attends = np.broadcast_to(attends, scores.shape)
        if score is not None:
            scores = map_pairs(score, scores, attends, floats, batch, offset)
        scores = np.where(attends, scores, -np.inf)
        peak = scores.max(-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(peak), 0, peak))
        total = weights.sum(-1, keepdims=True)
        empty = total == 0
        lse = np.where(empty, -np.inf, peak + np.log(np.where(empty, 1, total)))[..., 0]
        weights = weights / np.where(empty, 1, total)
        if softmax.sinks is not None:  # its part of the sum; also for one that is larger than any score
            sinks = softmax.sinks.to("cpu", torch.float64).numpy().astype(floats)[:, None]
            weights = weights * (1 / (1 + np.exp(sinks - lse)))[..., None]
            weights[empty[..., 0]] = 0
        sums = weights.sum(2)
        if softmax.prob is not None:
            weights = np.where(attends, map_pairs(softmax.prob, weights, attends, floats, batch, offset), 0)
        return weights @ v, lse, sums


def map_pairs(
    mapped: ScoreMod, values: Array, attends: Array, floats: type, batch: Array, offset: int
) -> Array:
    """Scores or probabilities by a map, which is defined on pairs that attend only.

    batch: the number of every sequence. offset: the position of their first queries."""
    points = b, h, q, k = np.nonzero(attends)
    out, tensors = values.copy(), _arrays(mapped.tensors)
    out[points] = mapped.ir.evaluate(
        values[points], batch[b], h, q + offset, k, mapped.values, tensors, floats=floats
    )
    return out


def _arrays(tensors: tuple[Any, ...]) -> tuple[Array, ...]:
    return tuple(as_numpy(t) if hasattr(t, "detach") else np.asarray(t) for t in tensors)

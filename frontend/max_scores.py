"""The largest score of each row, which PyTorch's flex_attention calls `max_scores`.

The fused kernel's running maximum may lag behind the true one, so this is computed beside it, a few
rows at a time: exact, O(q_len * kv_len) in time, never in memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .captured import as_numpy
from .mask import Mask
from .score import ScoreMod

if TYPE_CHECKING:
    from torch import Tensor

PAIRS = 1 << 22  # scores held at once


def max_scores(
    query: Tensor, key: Tensor, mask: Mask, score_mod: ScoreMod | None, scale: float | None
) -> Tensor:
    """(B, Hq, q_len), float32 (float64 for float64): -inf where a row has no pair.

    The arguments are those of an attention that has been called with them, and so checked.
    """
    batches, heads, q_len, size = query.shape
    kv_len = key.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = 1 / math.sqrt(size) if scale is None else scale
    out = torch.full((batches, heads, q_len), -math.inf, dtype=wide)
    if kv_len == 0:
        return out
    keys = key.detach().to(wide).expand(batches, -1, -1, -1).repeat_interleave(heads // key.shape[1], 1)
    step = max(1, PAIRS // (batches * heads * kv_len))
    for first in range(0, q_len, step):
        rows = slice(first, min(first + step, q_len))
        scores = query[:, :, rows].detach().to(wide) @ keys.transpose(-1, -2) * scale
        points = np.ogrid[:batches, :heads, rows, :kv_len]
        out[:, :, rows] = _scores_at(scores, points, mask, score_mod, (q_len, kv_len)).amax(-1)
    return out


def _scores_at(
    scores: Tensor, points: Any, mask: Mask, score_mod: ScoreMod | None, lengths: tuple[int, int]
) -> Tensor:
    """The scores after score_mod, -inf outside the mask."""
    b, h, q, k = points
    if score_mod is not None:
        floats = np.float64 if scores.dtype == torch.float64 else np.float32
        tensors = _arrays(score_mod.tensors)
        found = score_mod.ir.evaluate(scores.numpy(), b, h, q, k, score_mod.values, tensors, floats=floats)
        scores = torch.from_numpy(np.array(np.broadcast_to(found, scores.shape), floats))
    attends = mask.ir.evaluate(b, h, q, k, mask.values, _arrays(mask.tensors), *lengths)
    return scores.masked_fill(~torch.from_numpy(np.array(attends)), -math.inf)


def _arrays(tensors: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    return tuple(map(as_numpy, tensors))

"""Hugging Face's BigBird: its block-sparse attention, which gathers keys and writes probabilities in place.

Rows of blocks see the first and the last block, three blocks around their own and some random ones; the first
and the last row of blocks see everything. A block that a row finds twice counts twice in its softmax.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..attention import attention
from .adapters import Adapter, register

PENALTY = -10000.0  # what BigBird adds to scores of padding


def take(
    module: Any,
    hidden_states: Any,
    band_mask: Any = None,
    from_mask: Any = None,
    to_mask: Any = None,
    from_blocked_mask: Any = None,
    to_blocked_mask: Any = None,
    **kwargs: Any,
) -> tuple[Any, ...] | str:
    from transformers.utils.output_capturing import _active_collector

    asked = _active_collector.get()
    if kwargs.get("output_attentions") or (asked is not None and "attentions" in asked):
        return "its probabilities are asked for"
    if hidden_states.shape[1] % module.block_size or from_mask is None or to_mask is None:
        return "a length that is no multiple of its blocks, or no masks"
    return hidden_states, from_mask, to_mask


def compute(
    module: Any, hidden: torch.Tensor, from_mask: torch.Tensor, to_mask: torch.Tensor
) -> torch.Tensor:
    """hidden: (B, S, E). from_mask: (B, 1, S, 1), to_mask: (B, 1, 1, S), 1 or 0. Gives (B, S, E)."""
    batch, length, _ = hidden.shape

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, length, module.num_attention_heads, -1).transpose(1, 2)

    query, key, value = (heads(f(hidden)) for f in (module.query, module.key, module.value))
    mask, weigh = (
        of_drawn_blocks(module, length, hidden.device) if module.training else of_first_block(module, length)
    )
    whole = hidden.device.type == "cpu" and bool(to_mask.all())
    added = (1.0 - to_mask[:, 0, 0]) * PENALTY

    def score_mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        score = score + weigh(h, q, k)
        return score if whole else score + added[b, k]

    out: Any = attention(query, key, value, mask=mask, score_mod=score_mod)
    return (out * from_mask).transpose(1, 2).reshape(batch, length, -1)


def of_first_block(module: Any, length: int) -> tuple[Any, Any]:
    """Outside of training every random block is the first one: (mask, what a score gets for repetition)."""
    size, repeated = module.block_size, math.log(1 + module.num_random_blocks)
    last = length - size

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        near = (q // size - k // size).abs() <= 1
        return near | (k < size) | (k >= last) | (q < size) | (q >= last)

    def weigh(h: Any, q: Any, k: Any) -> Any:
        return torch.where((k < size) & (q >= size) & (q < last), repeated, 0.0)

    return mask, weigh


def of_drawn_blocks(module: Any, length: int, device: Any) -> tuple[Any, Any]:
    """The same for the blocks that the module draws in training, from NumPy's generator."""
    size, drawn = module.block_size, draw(module, length)
    heads, inner, _ = drawn.shape
    blocks = torch.arange(inner + 2)
    near = (blocks[:, None] - blocks).abs() <= 1
    near[:, [0, -1]] = True
    counts = near.int().repeat(heads, 1, 1)
    counts[:, 1:-1].scatter_add_(2, drawn, torch.ones_like(drawn, dtype=torch.int32))
    counts[:, [0, -1]] = 1
    counts = counts.to(device)
    logs = counts.float().log().clamp(min=0.0)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return counts[h, q // size, k // size] > 0

    def weigh(h: Any, q: Any, k: Any) -> Any:
        return logs[h, q // size, k // size]

    return mask, weigh


def draw(module: Any, length: int) -> torch.Tensor:
    """(heads, blocks - 2, random blocks): the blocks that the module would draw for its rows of blocks."""
    heads, size, count = module.num_attention_heads, module.block_size, module.num_random_blocks
    np.random.seed(module.seed)
    if length in (1024, 3072, 4096):
        rows = [
            module._bigbird_block_rand_mask(
                module.max_seqlen, module.max_seqlen, size, size, count, last_idx=1024
            )[: length // size - 2]
            for _ in range(heads)
        ]
    else:
        plan, counts = module._get_rand_attn_plan(length, size, count)
        rows = module._bigbird_block_rand_mask_with_head(
            from_seq_length=length,
            to_seq_length=length,
            from_block_size=size,
            to_block_size=size,
            num_heads=heads,
            plan_from_length=plan,
            plan_num_rand_blocks=counts,
        )
    return torch.as_tensor(np.stack(rows), dtype=torch.long)


register(
    "bigbird",
    Adapter(
        "attention",
        ("transformers.models.big_bird.modeling_big_bird", "BigBirdBlockSparseAttention.forward"),
        take,
        compute,
        lambda result: (result, None),
    ),
)

"""Losses that keep a router from sending everything to a few experts. Plain torch; they differentiate.

load_balance_loss    E * sum over experts of (share of rows) * (mean probability); 1 where all is even
                     (Switch Transformer, arXiv:2101.03961, eq. 4 to 6; with top_k > 1 as Hugging Face has it)
importance_loss      squared coefficient of variation of the summed probabilities (arXiv:1701.06538, eq. 6)
entropy_loss         mean Tsallis entropy of the probabilities, which makes routers decide (DynMoLE,
                     arXiv:2504.00661)
z_loss               mean of the squared log-sum-exp of the logits (ST-MoE, arXiv:2202.08906, eq. 5)
"""

from __future__ import annotations

import torch

from ..ir.errors import InputError


def load_balance_loss(
    router_logits: torch.Tensor, topk_ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """router_logits (T, E), topk_ids (T, k) (ids outside 0 .. E - 1 count nowhere), mask (T,): tokens that
    count.

    A scalar: top_k where all is even, as in transformers."""
    tokens, experts = _shape(router_logits)
    if topk_ids.dim() != 2 or topk_ids.shape[0] != tokens:
        raise InputError("load_balance_loss.topk_ids", f"shape ({tokens}, top_k)", tuple(topk_ids.shape))
    counts = router_logits.new_ones(tokens) if mask is None else mask.to(router_logits.dtype)
    inside = (topk_ids >= 0) & (topk_ids < experts)
    amount = torch.where(inside, counts[:, None], 0).reshape(-1)
    rows = amount.new_zeros(experts).index_add(0, topk_ids.clamp(0, experts - 1).reshape(-1).long(), amount)
    chances = (router_logits.softmax(-1) * counts[:, None]).sum(0)
    total = counts.sum().clamp(min=1)
    return experts * ((rows / total) * (chances / total)).sum()


def importance_loss(router_logits: torch.Tensor) -> torch.Tensor:
    """router_logits (T, E) -> a scalar, 0 where experts are as probable as each other."""
    _shape(router_logits)
    importance = router_logits.softmax(-1).sum(0)
    return importance.var(unbiased=False) / (importance.mean() ** 2 + 1e-20)


def entropy_loss(router_logits: torch.Tensor, index: float = 1.1) -> torch.Tensor:
    """router_logits (T, E) -> a scalar, 0 where one expert has all probability.

    index: Tsallis's; 1 gives Shannon's entropy."""
    _shape(router_logits)
    chances = router_logits.softmax(-1)
    if index == 1:
        return torch.special.entr(chances).sum(-1).mean()
    return ((1 - chances.pow(index).sum(-1)) / (index - 1)).mean()


def z_loss(router_logits: torch.Tensor) -> torch.Tensor:
    """router_logits (T, E) -> a scalar, which keeps logits small."""
    _shape(router_logits)
    return router_logits.logsumexp(-1).square().mean()


def _shape(logits: torch.Tensor) -> tuple[int, int]:
    if logits.dim() != 2:
        raise InputError("router_logits", "2 dimensions (tokens, experts)", tuple(logits.shape))
    return logits.shape[0], logits.shape[1]

"""Losses that keep a router from sending everything to a few experts. Plain torch; they differentiate.

load_balance_loss    E * sum over experts of (share of rows) * (mean probability); 1 where all is even
                     (Switch Transformer, arXiv:2101.03961, eq. 4 to 6; with top_k > 1 as Hugging Face has it)
importance_loss      squared coefficient of variation of the summed probabilities (arXiv:1701.06538, eq. 6)
entropy_loss         mean Tsallis entropy of the probabilities, which makes routers decide (DynMoLE,
                     arXiv:2504.00661)
z_loss               mean of the squared log-sum-exp of the logits (ST-MoE, arXiv:2202.08906, eq. 5)

All of them take logits (T, E) of any float dtype and a mask of the tokens that count, (T,) or (batch,
sequence), and give a scalar in float32 (float64 for float64), 0 where no token counts. Of logits of 16 bits,
exponentials and sums are taken in float32.
"""

from __future__ import annotations

import torch

from ...ir.errors import InputError
from .layers import FLOATS
from .routing import Routing


def load_balance_loss(
    router_logits: torch.Tensor, topk_ids: torch.Tensor | Routing, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """router_logits (T, E), topk_ids (T, k) (ids outside 0 .. E - 1 count nowhere) or a Routing, mask (T,):
    tokens that count.

    A scalar: top_k where all is even, as in transformers."""
    logits, amount, total = _counted("load_balance_loss", router_logits, mask)
    tokens, experts = logits.shape
    if isinstance(topk_ids, Routing):
        chosen = topk_ids
        if (chosen.num_tokens, chosen.num_experts) != (tokens, experts):
            expected = f"a Routing of {tokens} tokens among {experts} experts"
            raise InputError("load_balance_loss.topk_ids", expected, chosen)
        token_ids, expert_ids = chosen.token_ids.long(), chosen.expert_ids.long()
        rows = torch.arange(len(token_ids), device=logits.device)
        inside = rows < chosen.counts.sum()
        each = torch.where(inside, amount[token_ids.clamp(0, max(tokens - 1, 0))] if tokens else 0, 0)
    else:
        if not isinstance(topk_ids, torch.Tensor) or topk_ids.dim() != 2 or topk_ids.shape[0] != tokens:
            got = tuple(topk_ids.shape) if isinstance(topk_ids, torch.Tensor) else type(topk_ids).__name__
            raise InputError("load_balance_loss.topk_ids", f"shape ({tokens}, top_k), or a Routing", got)
        inside = (topk_ids >= 0) & (topk_ids < experts)
        each = torch.where(inside, amount[:, None], 0).reshape(-1)
        expert_ids = topk_ids.reshape(-1).long()
    rows = logits.new_zeros(experts).index_add(0, expert_ids.clamp(0, experts - 1), each)
    chances = (logits.softmax(-1) * amount[:, None]).sum(0)
    return experts * ((rows / total) * (chances / total)).sum()


def importance_loss(router_logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """router_logits (T, E), mask (T,) -> a scalar, 0 where experts are as probable as each other."""
    logits, amount, _ = _counted("importance_loss", router_logits, mask)
    importance = (logits.softmax(-1) * amount[:, None]).sum(0)
    return importance.var(unbiased=False) / (importance.mean() ** 2 + 1e-20)


def entropy_loss(
    router_logits: torch.Tensor, index: float = 1.1, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """router_logits (T, E), mask (T,) -> a scalar, 0 where one expert has all probability.

    index: Tsallis's; 1 gives Shannon's entropy."""
    logits, amount, total = _counted("entropy_loss", router_logits, mask)
    chances = logits.softmax(-1)
    if index == 1:
        each = torch.special.entr(chances).sum(-1)
    else:
        each = (1 - chances.pow(index).sum(-1)) / (index - 1)
    return (each * amount).sum() / total


def z_loss(router_logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """router_logits (T, E), mask (T,) -> a scalar, which keeps logits small."""
    logits, amount, total = _counted("z_loss", router_logits, mask)
    return (logits.logsumexp(-1).square() * amount).sum() / total


def _counted(
    where: str, logits: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits in a dtype that sums can be taken in; what each token counts, and all together, 1 at least."""
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.dtype not in FLOATS:
        got = (
            f"{logits.dtype} {tuple(logits.shape)}"
            if isinstance(logits, torch.Tensor)
            else type(logits).__name__
        )
        raise InputError(f"{where}.router_logits", "floats (tokens, experts)", got)
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if mask is None:
        amount = wide.new_ones(wide.shape[0])
    elif not isinstance(mask, torch.Tensor) or mask.numel() != wide.shape[0]:
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputError(f"{where}.mask", f"a number for each of {wide.shape[0]} tokens", got)
    else:
        amount = mask.reshape(-1).to(wide)
    return wide, amount, amount.sum().clamp(min=1)

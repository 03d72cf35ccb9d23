"""Layers of experts that are measured: sizes, routings, exact results and bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Model:
    """A layer of experts: gate_up [experts, 2 inner, hidden], down [experts, hidden, inner]."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int


MODELS = {
    m.name: m
    for m in (
        Model("mixtral", 8, 2, 4096, 14336),
        Model("qwen3-30b", 128, 8, 2048, 768),
        Model("gpt-oss-20b", 32, 4, 2880, 2880),
        Model("olmoe", 64, 8, 2048, 1024),
        Model("deepseek-v3/4", 64, 8, 7168, 2048),
    )
}
ZIPF = 1.2


def routed(
    model: Model, tokens: int, skewed: bool, device: torch.device, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and weights [tokens, top_k]: different experts for a token, all as likely, or by Zipf's law."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, model.experts + 1, dtype=torch.float64)
    likely = ranks**-ZIPF if skewed else torch.ones(model.experts, dtype=torch.float64)
    likely = likely[torch.randperm(model.experts, generator=generator)]
    # Gumbel's trick: the largest keys are a draw without replacement.
    keys = likely.log() - torch.rand(tokens, model.experts, generator=generator).double().log().neg().log()
    ids = keys.topk(model.top_k, -1)[1]
    weights = torch.rand(tokens, model.top_k, generator=generator)
    return ids.to(device), (weights / weights.sum(-1, keepdim=True)).to(device)


def exact_experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The layer in float64, one expert after another."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in range(up.shape[0]):
        tokens, place = torch.where(ids == e)
        if len(tokens):
            gate, value = (x[tokens].double() @ up[e].double().T).chunk(2, -1)
            y = (torch.nn.functional.silu(gate) * value) @ down[e].double().T
            out.index_add_(0, tokens, y * weights[tokens, place, None].double())
    return out


def bound_ms(
    model: Model, tokens: int, ids: torch.Tensor, flops: float, bandwidth: float, size: float = 2
) -> float:
    """Milliseconds that the products take at `flops`, or the tensors' bytes at `bandwidth`: `size` bytes a
    number of the matrices, 2 of x and of the result."""
    products = 6 * tokens * model.top_k * model.hidden * model.inner
    active = torch.unique(ids).numel() * 3 * model.hidden * model.inner
    return 1e3 * max(products / flops, (active * size + 4 * tokens * model.hidden) / bandwidth)

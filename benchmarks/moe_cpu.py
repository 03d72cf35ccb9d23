"""Mixture of experts on the CPU: gossamer and Hugging Face's paths in one run, interleaved.

    python benchmarks/moe_cpu.py
    python benchmarks/moe_cpu.py --tokens 1,16,512 --json benchmarks/results/moe_cpu_mine.json

Peers: the experts of Mixtral as transformers has them, `eager` (one expert after another) and `grouped_mm`.
All start from ids and weights. The result is held against float64 before its time counts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import interleaved
from moe_models import Model, exact_experts, routed
from report import provenance, save

import gossamer

PEERS = ("eager", "grouped_mm")


def main(
    tokens: Annotated[str, typer.Option(help="numbers of tokens, separated by commas")] = "512",
    experts: int = 64,
    top_k: int = 8,
    hidden: int = 512,
    inner: int = 256,
    rounds: int = 9,
    threads: Annotated[int, typer.Option(help="of gossamer and of torch; 0: the cores")] = 0,
    json: Annotated[Path | None, typer.Option(help="write the results here")] = None,
) -> None:
    """Time a layer of experts in float32 on this machine's CPU."""
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    os.environ["GOSSAMER_NUM_THREADS"] = str(threads)
    model = Model("here", experts, top_k, hidden, inner)
    results: dict[str, Any] = provenance(threads) | {"shape": [experts, top_k, hidden, inner], "rows": []}
    with torch.inference_mode():
        for count in map(int, tokens.split(",")):
            for skewed in (False, True):
                results["rows"].append(race(model, count, skewed, rounds))
    if json is not None:
        save(json, results)


def race(model: Model, tokens: int, skewed: bool, rounds: int) -> dict[str, Any]:
    """Milliseconds a call of everybody, medians and best."""
    torch.manual_seed(0)
    module = huggingface(model)
    x, (ids, weights) = torch.randn(tokens, model.hidden), routed(model, tokens, skewed, torch.device("cpu"))
    up, down = module.gate_up_proj, module.down_proj

    def ours() -> torch.Tensor:
        return gossamer.experts(x, ids, weights, up, down)

    def peer(name: str) -> torch.Tensor:
        module.config._experts_implementation = name
        return module(x, ids, weights)

    error = (ours() - exact_experts(x, ids, weights, up, down)).abs().max().item()
    theirs = (peer("eager") - exact_experts(x, ids, weights, up, down)).abs().max().item()
    if not error <= 2 * theirs + 1e-6:
        raise SystemExit(f"wrong: error {error:.3g}, eager's {theirs:.3g}")
    named = {"gossamer": ours, **{name: lambda name=name: peer(name) for name in PEERS}}
    found = interleaved(named, rounds=rounds)
    row = {
        "tokens": tokens,
        "routing": "zipf1.2" if skewed else "uniform",
        "error": error,
        "eager_error": theirs,
        "ms": {name: [1e3 * t.median, 1e3 * t.best] for name, t in found.items()},
    }
    row["speedup"] = {name: row["ms"][name][0] / row["ms"]["gossamer"][0] for name in PEERS}
    shown = "  ".join(f"{name} {median:.2f} (best {best:.2f})" for name, (median, best) in row["ms"].items())
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["speedup"].items())
    print(f"T={tokens} {row['routing']:8} ms: {shown};  {ratios};  error {error:.1e}")
    return row


def huggingface(model: Model) -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=model.hidden,
        intermediate_size=model.inner,
        num_local_experts=model.experts,
        num_experts_per_tok=model.top_k,
    )
    module = MixtralExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return module


if __name__ == "__main__":
    typer.run(main)

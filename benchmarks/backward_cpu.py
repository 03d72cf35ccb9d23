"""Forward and gradients on this machine's CPU: gossamer, and SDPA with a dense mask, in one run.

    python benchmarks/backward_cpu.py --json benchmarks/results/backward_cpu_mine.json

Contestants take turns, round after round; gradients are those of q, k and v through autograd. `error` is the
largest one against float64 over what the rule of docs/design.md allows: times without it say little.
FlexAttention has no backward on CPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from cases import cases, chosen
from gpu_check import gradient_accuracy
from gpu_prepare import backward_of
from measure import interleaved
from report import provenance, save
from rich.console import Console
from rich.table import Table

import gossamer

SHAPE = (1, 8, 2048, 64)  # batch, heads, length, size of a head
console = Console()


def main(
    masks: Annotated[
        str, typer.Option(help="names, separated by commas, or 'all'")
    ] = "causal,window256,longformer",
    rounds: Annotated[int, typer.Option(help="turns of every contestant")] = 7,
    json: Annotated[Path | None, typer.Option(help="where to write results")] = None,
) -> None:
    """Time forward, and forward with gradients, in float32."""
    torch.set_num_threads(2)
    rows = [measure(name, rounds) for name in chosen(masks, tuple(cases(64)), "mask")]
    heads = ("mask", "forward", "with gradients", "ratio", "SDPA with gradients", "over SDPA", "error")
    table = Table(*heads, title="milliseconds; error over what is allowed")
    for row in rows:
        table.add_row(row["mask"], *(f"{row[name]:.2f}" for name in list(row)[1:]))
    console.print(table)
    if json is not None:
        save(json, provenance(threads=2) | {"shape": SHAPE, "rows": rows})


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One row: medians in milliseconds, and ratios."""
    case = cases(SHAPE[2])[name]
    made = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(SHAPE, generator=made) for _ in range(3))
    mask, dense = gossamer.Mask.trace(case.mask_mod), case.dense(SHAPE[2])

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return gossamer.attention(q, k, v, mask=mask)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    given, run = backward_of(tensors, ours)
    judged = gradient_accuracy(run(), given, lambda rows: case.dense(SHAPE[2], rows))
    grad = given[3]

    def learn(attend: Any) -> Any:
        leaves = [t.detach().requires_grad_() for t in tensors]
        return lambda: torch.autograd.grad(attend(*leaves), leaves, grad)

    def forward() -> Any:
        with torch.no_grad():
            return ours(*tensors)

    found = interleaved({"forward": forward, "ours": learn(ours), "sdpa": learn(sdpa)}, rounds=rounds)
    ms = {name: 1e3 * timing.median for name, timing in found.items()}
    return {
        "mask": name,
        "forward_ms": ms["forward"],
        "ms": ms["ours"],
        "over_forward": ms["ours"] / ms["forward"],
        "sdpa_ms": ms["sdpa"],
        "over_sdpa": ms["sdpa"] / ms["ours"],
        "error": judged.error,
    }


if __name__ == "__main__":
    typer.run(main)

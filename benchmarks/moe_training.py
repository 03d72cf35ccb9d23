"""Gradients of layers of experts on a GPU: what a backward takes beside its forward, and what is kept for it.

`benchmarks/moe_gpu.py --backward` asks for it. Times are of CUDA graphs: a forward that keeps what gradients
need, and a step of forward and backward, gradients of x, of both matrices and of the routing weights; a
backward is the difference. Memory is torch's: `kept`, what is held between the two beside the result; `peak`,
the most of a step beside its inputs and the gradients it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Layer = Callable[..., torch.Tensor]  # (x, ids, weights, up, down) -> (T, H)


def compared(
    run: dict[str, Layer], replayed: Callable[[Callable[[], Any]], float], given: tuple[Any, ...]
) -> dict[str, Any]:
    """What each layer takes, by name. given: x, ids, weights, up, down. Gradients of the others are held
    against those of the first; one that fails says why."""
    x, ids, weights, up, down = given
    leaves = [t.detach().requires_grad_() for t in (x, weights, up, down)]
    slope = torch.randn_like(x)
    rows: dict[str, Any] = {}
    first: list[torch.Tensor] = []
    for name, layer in run.items():

        def forward(layer: Layer = layer) -> torch.Tensor:
            return layer(leaves[0], ids, leaves[1], *leaves[2:])

        def step(forward: Callable[[], torch.Tensor] = forward) -> Any:
            return torch.autograd.grad(forward(), leaves, slope)

        try:
            found = [g.float().cpu() for g in step()]
            first = first or found
            row = {"difference": max(map(_difference, found, first))} | memory(forward, leaves, slope)
            del found
            ahead, whole = replayed(forward), replayed(step)
            rows[name] = row | {"forward_ms": ahead, "backward_ms": whole - ahead}
            rows[name]["backward_of_forward"] = (whole - ahead) / ahead
        except Exception as error:  # one that fails is a result
            torch.cuda.synchronize()
            rows[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    return rows


def memory(
    forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor], slope: torch.Tensor
) -> dict[str, float]:
    """MiB that are kept between forward and backward, and at most held within a step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = forward()
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    found = torch.autograd.grad(out, leaves, slope)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in found)
    return {"kept_mib": kept / 2**20, "peak_mib": peak / 2**20}


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest gradient."""
    return float((found - expected).abs().max() / expected.abs().max())

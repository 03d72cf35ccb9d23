"""Gradients of a layer of experts, timed: of x, weights of entries and both matrices, ours and grouped_mm's.

Kernels take milliseconds at the sizes that this is for, so that calls are timed as they are made, without a
graph. Memory is what a forward with its backward holds at most, beyond inputs, result and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.testing import do_bench

NAMES = ("x", "weights", "gate_up", "down")
CLOSE = 0.05  # of the largest gradient, that bf16 results of two orders of summation differ by at most


def measured(call: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> tuple[dict[str, float], Any]:
    """Milliseconds forward (keeping what gradients need) and backward, bytes held, and the gradients.

    call: of x, weights, gate_up and down."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    generator = torch.Generator(leaves[0].device).manual_seed(0)
    gradient = torch.empty_like(leaves[0], requires_grad=False).normal_(generator=generator)

    def once() -> Any:
        return torch.autograd.grad(call(*leaves), leaves, gradient)

    found = once()
    kept = sum(g.nbytes for g in found)
    del found
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = once()
    torch.cuda.synchronize()
    row = {"bytes": float(torch.cuda.max_memory_allocated() - before - kept)}
    out = call(*leaves)
    row["backward_ms"] = _median(lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True))
    row["forward_ms"] = _median(lambda: call(*leaves))
    return row, found


def _median(call: Callable[[], Any]) -> float:
    found: Any = do_bench(call, warmup=20, rep=100, return_mode="median")
    return float(found)


def compared(ours: Any, theirs: Any) -> dict[str, float]:
    """How far gradients are apart, as a share of the largest of each. Raises AssertionError."""
    apart = {
        name: ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        for name, a, b in zip(NAMES, ours, theirs, strict=True)
    }
    if not max(apart.values()) <= CLOSE:
        raise AssertionError(f"gradients differ: {apart}")
    return apart

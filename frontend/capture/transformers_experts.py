"""Hugging Face's experts, which loop over those that tokens have chosen, by gossamer's.

All their classes look up what computes them under the name that a model's configuration has; the adapter is
what they find there in place of transformers' own functions.
"""

from __future__ import annotations

from typing import Any

import torch

from ...ir.errors import GossamerError
from .adapters import Adapter, capturing, register, run

THEIRS = (None, "eager", "batched_mm", "grouped_mm")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wrap(name: str, original: Any) -> Any:
    def get_interface(self: Any, experts_implementation: Any, default: Any) -> Any:
        found = original(self, experts_implementation, default)
        if experts_implementation not in THEIRS or not capturing():
            return found
        return lambda module, *args, **kwargs: run(name, found, module, args, kwargs)

    return get_interface


def take(module: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...] | str:
    if kwargs or len(args) != 3:
        return "called with other arguments than its tokens, ids and weights"
    why = why_not(module)
    return args if why is None else why


@torch._dynamo.assume_constant_result
def why_not(module: torch.nn.Module) -> str | None:
    """Why a module of experts is left alone."""
    from ..huggingface_experts import gate_of

    if getattr(module, "has_post_expert_norm", False):
        return "a norm behind each expert"
    if not all(type(p) is torch.nn.Parameter and p.dtype in FLOATS for p in module.parameters(recurse=False)):
        return "its parameters are no floats, or tensors of another class"
    theirs = getattr(getattr(module, "config", None), "_experts_implementation", None) == "grouped_mm"
    if theirs and any(p.device.type == "cpu" and p.element_size() == 2 for p in module.parameters()):
        return "torch's grouped_mm in 16 bits, which is faster on a CPU"
    try:
        gate_of(module)
    except GossamerError as error:
        return str(error)
    return None


def compute(module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """hidden: (T, H); ids, weights: (T, k). Gives (T, H)."""
    from ..huggingface_experts import experts_forward

    return experts_forward(module, hidden, ids, weights)


register(
    "experts",
    Adapter(
        "experts",
        ("transformers.integrations.moe", "ExpertsInterface.get_interface"),
        take,
        compute,
        wrap=wrap,
    ),
)

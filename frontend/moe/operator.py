"""`torch.ops.gossamer.moe` and its gradient: what torch's tracers see of the steps of a mixture of experts.

See `frontend/operators/step.py`, which says what the operators take and give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators.rules import is_traced
from ..operators.step import Arguments, Made, at_once, define, learns, refuse
from .form import MoeForm

define(
    "moe",
    {
        "route": "moe.router_step",
        "expert_choice": "moe.expert_choice_step",
        "groups": "moe.group_step",
        "experts": "moe.experts_step",
        "light": "moe.light_step",
        "product": "moe.product_step",
        "outer": "moe.outer_step",
    },
)


def call(
    form: MoeForm, tensors: Sequence[Tensor], integers: Sequence[int] = (), numbers: Sequence[float] = ()
) -> Sequence[Tensor]:
    """The results of a step: by its operator where somebody watches, else at once."""
    if torch.compiler.is_compiling() or is_traced(tensors):
        if not torch.compiler.is_compiling():
            refuse(form, tensors)
        return torch.ops.gossamer.moe(list(tensors), list(integers), list(numbers), form.text)
    return at_once(form, tensors, integers, numbers)


__all__ = ["Arguments", "Made", "MoeForm", "call", "learns"]

"""`torch.ops.gossamer.moe` and its gradient: what torch's tracers see of the steps of a mixture of experts.

See `frontend/step_operator.py`, which says what the operators take and give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moe_form import MoeForm
from .operator_rules import is_traced
from .step_operator import Arguments, Made, at_once, define, learns, refuse

define(
    "moe",
    {
        "route": "router_step",
        "expert_choice": "expert_choice_step",
        "groups": "group_step",
        "experts": "experts_step",
        "light": "light_step",
        "product": "product_step",
        "outer": "outer_step",
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

"""`gossamer.operators`: loading it registers `torch.ops.gossamer`, which exported programs call."""

from . import linear_operator, moe_operator, operators

__all__ = ["linear_operator", "moe_operator", "operators"]

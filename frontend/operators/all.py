"""`gossamer.operators`: loading it registers `torch.ops.gossamer`, which exported programs call."""

from ..linear import operator as linear_operator
from ..moe import operator as moe_operator
from . import calls as operators

__all__ = ["linear_operator", "moe_operator", "operators"]

"""The classes that attributes of graph operations may hold, beside numbers, strings and tuples.

A pass that attaches a dataclass of its own registers it: `@register` of `ir.text`. The `dump` and `load` of
this module know all of these.
"""

from __future__ import annotations

from .formats import ACSR, Blocks, Dense, Progression, Remainder, StoredACSR
from .kernel import Span
from .linear import Chunks, FeatureMap
from .mask import Capture, Mask
from .order import Order, OrderDim
from .plan import Group, Lists, Loops, Schedule, Summary
from .quantized import Quantized
from .ragged import Tiling
from .score import ProbGrad, ProbMap, ScoreGrad, ScoreMap
from .sequences import Sequences
from .text import dump, load, register

__all__ = ["dump", "load"]

for _cls in (ACSR, Blocks, Capture, Dense, Group, Loops, Mask, Order, OrderDim, Progression):
    register(_cls)
for _cls in (
    Chunks,
    FeatureMap,
    Lists,
    ProbGrad,
    ProbMap,
    Quantized,
    Remainder,
    Schedule,
    ScoreGrad,
    ScoreMap,
    Sequences,
    Span,
    StoredACSR,
    Summary,
    Tiling,
):
    register(_cls)

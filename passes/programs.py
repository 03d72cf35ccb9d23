"""programs: in which order the row tiles of a kernel start on a GPU.

Blocks start in the order of the launch grid. Row tiles of one head side by side share their keys in the
cache; but a few row tiles with far more keys than the others, or later rows with more keys than earlier
ones, would then start last and leave the machine to them. Counts are taken from the loops themselves at
a reference length, with the mask's integers at a typical size: they decide speed, never results. Lists
may have any length: the long ones of a batch start side by side.

Leaves alone: loops whose bounds depend on captured tensors, orders with residues (their row tiles share
lines of memory with the next residue, not with the next head), and CPUs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..ir.errors import InterpretError
from ..ir.evaluate import evaluate
from ..ir.expr import integer
from ..ir.plan import Group, Loops, Schedule

LENGTH = 4096  # where counts are taken
TYPICAL = 128  # of the mask's integers
LOCAL = 512  # keys: row tiles that visit no more are served from the cache in any order
HEAVY = 3  # times the median


def order_programs(group: Group, schedule: Schedule, loops: Loops) -> Loops:
    """The loops with the order in which their row tiles start."""
    if loops.lists is not None:
        return replace(loops, programs="heads")
    residues = any(dim.row_stride > 1 for dim in group.order.dims)
    counts = None if residues else _counts(group, schedule, loops)
    if counts is None or not counts.any():
        return loops
    typical = float(np.median(counts))
    local = len(group.order.dims) == 1 and typical * math.prod(schedule.cols) <= LOCAL
    if local or counts.max() > HEAVY * typical:
        return replace(loops, programs="spread")
    quarter = -(-counts.size // 4)
    growing = counts[-quarter:].mean() > 1.5 * counts[:quarter].mean()
    return replace(loops, programs="reversed") if growing else loops


def _counts(group: Group, schedule: Schedule, loops: Loops) -> np.ndarray | None:
    """Key tiles of each row tile along the outermost dimension, the other coordinates in the middle."""
    dims = group.order.dims
    inner = math.prod(d.width or 1 for d in dims[1:])
    step = dims[0].row_stride * schedule.rows[0]
    values: dict[str, object] = {"q_len": LENGTH, "kv_len": LENGTH, "b": 0, "h": 0}
    values["m0"] = np.arange(-(-LENGTH // (inner * step)))
    for d, dim in enumerate(dims):
        values[f"r{d}"] = 0
        if d:
            values[f"m{d}"] = (dim.width or 1) // (2 * dim.row_stride * schedule.rows[d])
    bounds = [e for spans in loops.spans for span in spans for e in (span.lo, span.hi)]
    for name in {s.name for e in bounds for s in e.free_symbols} - set(values):
        values[name] = TYPICAL
    counts = np.ones(np.shape(values["m0"]))
    for d, spans in enumerate(loops.spans):
        if any({integer(f"n{o}") for o in range(d)} & e.free_symbols for s in spans for e in (s.lo, s.hi)):
            return None
        try:
            lengths = [np.maximum(evaluate(s.hi, values) - evaluate(s.lo, values), 0) for s in spans]
        except InterpretError:
            return None
        counts = counts * np.sum(np.broadcast_arrays(*lengths, counts)[:-1], axis=0)
    return counts

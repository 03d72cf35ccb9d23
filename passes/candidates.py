"""candidates: the GPU schedules that fit a device, best first by the cost model.

A bounded set: tiles of 16 to 128 rows and keys, 4 or 8 warps, 1 to 4 stages, key tiles on their grid or
anchored. What does not fit shared memory or the registers is left out. The rest is ranked by the geometric
mean of the predicted times on the reference problems of `survey`, one for each of `NUMBERS` in place of
the mask's integers: a schedule serves every length and every window, so it is chosen over several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..ir.plan import Group, Schedule
from .cost_gpu import kernel_time
from .footprint import SCALAR, footprint, padded
from .machine import Device
from .spec import AttentionSpec
from .survey import Survey

ROWS, KEYS, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
NUMBERS = (32, 128, 1024)
UNROLLED = 1 << 17  # multiply-adds that compilers spell out for a tile where no tensor core takes them


@dataclass(frozen=True)
class Candidate:
    """A schedule and its predicted seconds on the reference problem."""

    schedule: Schedule
    seconds: float

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """Rows and keys, all dimensions together, warps and stages."""
        hints = dict(self.schedule.meta)
        rows, keys = math.prod(self.schedule.rows), math.prod(self.schedule.cols)
        return rows, keys, hints["warps"], hints["stages"]


def candidates(spec: AttentionSpec, group: Group, device: Device) -> tuple[Candidate, ...]:
    """Every schedule of one group that fits the device, fastest first by the model.

    Where no tile keeps to the registers (large head sizes), those that spill. None where no tile fits
    shared memory. device: a GPU with a chip."""
    assert device.chip is not None, "candidates are asked of GPUs with a chip only"
    surveys = [Survey(spec.mask, group, n) for n in (NUMBERS if spec.mask.params else NUMBERS[:1])]
    sizes = spec.product_dtype, spec.qk_size, spec.v_size
    taken = [(s, footprint(device.chip, s, *sizes)) for s in _schedules(surveys[0])]
    resident = [(s, f) for s, f in taken if f.resident(device.chip)]
    fitting = [s for s, f in resident if not f.short and _unrolls(spec, s)] or [s for s, _ in resident]
    ranked = [Candidate(s, _seconds(spec, s, device, surveys)) for s in fitting]
    return tuple(sorted(ranked, key=lambda c: c.seconds))


def _schedules(survey: Survey) -> Iterator[Schedule]:
    """All schedules of the set, the plainest first: equal predictions keep this order."""
    rank = len(survey.group.order.dims)
    anchored = survey.group.exact and any(a is not None for a in survey.anchors)  # lists need the grid
    anchors = [(), survey.anchors] if anchored else [()]
    for rows, keys, start in itertools.product(ROWS, KEYS, anchors):
        aligned = None in (start or (None,))
        shape = (
            ((rows,), (keys,))
            if rank == 1
            else survey.boxes.shape(rows, keys, aligned=aligned, sizes=(keys,))
        )
        for warps, stages in itertools.product(WARPS, STAGES):
            if warps == WARPS[0] or rows >= 64:
                meta = (("stages", stages), ("warps", warps))
                yield Schedule(*shape, start, lazy_rescale=False, meta=meta)


def _unrolls(spec: AttentionSpec, schedule: Schedule) -> bool:
    """Whether the products of a tile are few enough to be spelled out, where they are."""
    cells = math.prod(schedule.rows) * math.prod(schedule.cols)
    return spec.product_dtype not in SCALAR or cells * padded(max(spec.qk_size, spec.v_size)) <= UNROLLED


def _seconds(spec: AttentionSpec, schedule: Schedule, device: Device, surveys: Sequence[Survey]) -> float:
    """Geometric mean over the surveys in which the group is not empty."""
    logs = []
    for survey in surveys:
        size = survey.size(spec.product_dtype, spec.qk_size, spec.v_size)
        tiles = survey.tiles(schedule, size)
        if tiles.visited:
            logs.append(math.log(kernel_time(device, size, schedule, tiles, size.io_bytes).seconds))
    return math.exp(sum(logs) / len(logs)) if logs else 0.0

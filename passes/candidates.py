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
from typing import Any

from ..ir.plan import Group, Schedule
from .cost_gpu import kernel_time
from .devices import has_copy_engine
from .footprint import SCALAR, footprint, padded
from .machine import Device
from .spec import AttentionSpec
from .survey import Survey
from .tile_count import BYTES

ROWS, KEYS, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
WIDE = 256  # head sizes from which on tiles of 16 keys are tried
NUMBERS = (32, 512)
# Multiply-adds that compilers spell out for a tile where no tensor core takes them: more take seconds to
# compile.
UNROLLED = 1 << 16
# Keys of a box that no tensor core takes: with Triton 3.6 on an H100, boxes of (2, 8) rows by (16, 8) keys in
# f32 give wrong rows at one and two stages, which no interpreter does; (8, 8) and fewer are right.
SCALAR_BOX = 64


Tile = tuple[int, int, int, int]  # rows and keys, all dimensions together, warps, stages


@dataclass(frozen=True)
class Candidate:
    """A schedule and its predicted seconds on the reference problem."""

    schedule: Schedule
    seconds: float


def candidates(spec: AttentionSpec, group: Group, device: Device) -> tuple[Candidate, ...]:
    """Every schedule of one group that fits the device, fastest first by the model.

    Where no tile keeps to the registers (large head sizes), those that spill. None where no tile fits
    shared memory. device: a GPU with a chip."""
    assert device.chip is not None, "candidates are asked of GPUs with a chip only"
    surveys = [Survey(spec.mask, group, n) for n in (NUMBERS if spec.mask.params else NUMBERS[:1])]
    narrow = padded(max(spec.qk_size, spec.v_size)) < WIDE
    sizes = spec.product_dtype, spec.qk_size, spec.v_size
    taken = [(s, footprint(device.chip, s, *sizes)) for s in _schedules(spec, surveys[0], KEYS[narrow:])]
    resident = [(s, f) for s, f in taken if f.resident(device.chip)]
    fitting = [s for s, f in resident if not f.short and _unrolls(spec, s)] or [s for s, _ in resident]
    ranked = [Candidate(s, _seconds(spec, s, device, surveys)) for s in fitting]
    return tuple(sorted(ranked, key=lambda c: c.seconds))


def tiled(spec: AttentionSpec, group: Group, tile: Tile) -> Schedule:
    """The schedule of a tile of that size: on the grid, or the best box."""
    rows, keys, warps, stages = tile
    shape = next(_shapes(Survey(spec.mask, group, NUMBERS[0]), rows, keys))
    return Schedule(*shape, lazy_rescale=False, meta=hints(spec, warps, stages))


def hints(spec: AttentionSpec, warps: int, stages: int) -> tuple[tuple[str, int], ...]:
    """The hints of a GPU schedule, tensor descriptors among them where target and tensors allow for them."""
    described = has_copy_engine(spec.target) and spec.descriptors and spec.aligned and BYTES[spec.dtype] == 2
    return ((("descriptors", 1),) if described else ()) + (("stages", stages), ("warps", warps))


def _schedules(spec: AttentionSpec, survey: Survey, sizes: tuple[int, ...]) -> Iterator[Schedule]:
    """All schedules of the set, the plainest first: equal predictions keep this order."""
    boxes = len(survey.anchors) > 1 and spec.product_dtype in SCALAR
    sizes = tuple(n for n in sizes if n <= SCALAR_BOX) if boxes else sizes
    for rows, keys in itertools.product(ROWS, sizes):
        for shape in _shapes(survey, rows, keys):
            for warps, stages in itertools.product(WARPS, STAGES):
                if warps == WARPS[0] or rows >= 64:
                    yield Schedule(*shape, lazy_rescale=False, meta=hints(spec, warps, stages))


def _shapes(survey: Survey, rows: int, keys: int) -> Iterator[tuple[Any, ...]]:
    """(rows, cols, anchors) of so many rows and keys: on the grid and anchored, or the best box."""
    may = tuple(form is not None for form in survey.anchors)
    if len(may) == 1:
        yield (rows,), (keys,), ()
        if may[0]:
            yield (rows,), (keys,), survey.anchors
        return
    shape, chosen = survey.boxes.fewest(rows, keys, may)
    anchors = tuple(form if a else None for form, a in zip(survey.anchors, chosen, strict=True))
    yield *shape, anchors if any(chosen) else ()


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

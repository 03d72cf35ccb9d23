"""schedule: tile sizes and backend hints of every group.

CPU tiles keep 32 rows (two AVX-512 registers of f32) in the lanes; the micro-kernels then hold 8 by
2 accumulators. For boxes the shape is the one that reads the fewest keys a row tile, counting what
misaligned key tiles waste, from the extents of k - q in each dimension. Where k - q is bounded from
below, key tiles are anchored there instead of on a grid.

GPU tiles have the size that won sweeps on the device (`measured`), else they are the best of `candidates`
by the cost model. Both look at the structure of a mask alone, so that another length, window or batch
compiles nothing. Keys and values in 16 bits come through tensor descriptors where the hardware has them
(compute capability 9.0 and later): that saves the registers of addresses.

Leaves alone: groups whose schedule is given.
"""

from __future__ import annotations

import math
from dataclasses import replace

import sympy

from ..ir.errors import InputError, UnsupportedError
from ..ir.plan import Group, Schedule
from . import devices
from .boxes import Boxes
from .candidates import candidates, hints, tiled
from .distance import anchor, bounds
from .footprint import shared_bytes
from .machine import Device
from .measured import measured
from .schedule_gradients import choose_gradient
from .spec import AttentionSpec
from .tile_count import BYTES

MAX_EXTENT = 1024
CPU_ROWS, CPU_KEYS = 32, 32
BOX_ROWS = 64
HINTS = {
    "descriptors": (0, 1),
    "warps": (1, 2, 4, 8, 16),
    "stages": (1, 2, 3, 4, 5, 6, 7, 8),
    "block": tuple(range(1, 33)),
}
LISTS = ("none", "all", "open")


def choose(spec: AttentionSpec, group: Group, kind: str = "attention") -> Schedule:
    """The default schedule of a group of an operation of this kind on a target.

    Raises UnsupportedError for head sizes of which no tile fits the target."""
    if spec.few:
        return _choose_few(spec, group)
    if spec.target_kind == "cpu":
        return _choose_cpu(spec, group)
    if kind.startswith("grad_"):
        return choose_gradient(spec, group, kind)
    device = devices.device_of(spec.target)
    if device is None or device.chip is None:
        return _choose_unknown(spec, group)
    tile = measured(spec, group, device)
    if tile is not None:
        return tiled(spec, group, tile)
    ranked = candidates(spec, group, device)
    if not ranked:
        raise UnsupportedError(
            f"attention in {spec.dtype} with head sizes {spec.qk_size} and {spec.v_size}: no tile fits the "
            f"{device.chip.shared_program} bytes of shared memory of {device.name}. Use a 16-bit dtype"
        )
    return ranked[0].schedule


def _choose_cpu(spec: AttentionSpec, group: Group) -> Schedule:
    keys = CPU_KEYS // 2 if spec.dtype == "f64" else CPU_KEYS
    anchors = tuple(anchor(group, d) for d in range(len(group.order.dims)))
    if len(group.order.dims) == 1:
        return Schedule((CPU_ROWS,), (keys,), anchors, lists="open")
    return Schedule(*Boxes.of(group).shape(BOX_ROWS, keys, aligned=None in anchors), anchors)


def shortlist(spec: AttentionSpec, group: Group, limit: int) -> tuple[Schedule, ...]:
    """At most `limit` schedules worth timing for one group, the default first.

    On a GPU the best of every tile size by the cost model; on a CPU variations of the default."""
    default = choose(spec, group)
    if spec.few:
        *outer, keys = default.cols
        found = tuple(replace(default, cols=(*outer, n)) for n in (2 * keys, keys // 2))
    elif spec.target_kind == "cpu":
        found = _variations(default)
    else:
        device = devices.device_of(spec.target)
        ranked = candidates(spec, group, device) if device is not None and device.chip is not None else ()
        best: dict[object, Schedule] = {}
        for c in ranked:
            best.setdefault((c.schedule.rows, c.schedule.cols, c.schedule.anchors), c.schedule)
        found = tuple(best.values())
    return (default, *(s for s in found if s != default))[:limit]


def _variations(default: Schedule) -> tuple[Schedule, ...]:
    """Other tiles for a CPU: more or fewer keys, half the rows, on the grid, rescaled at every key tile."""
    *outer, keys = default.cols
    *above, rows = default.rows
    return (
        replace(default, cols=(*outer, 2 * keys)),
        replace(default, cols=(*outer, max(1, keys // 2))),
        replace(default, rows=(*above, max(1, rows // 2))),
        replace(default, anchors=()),
        replace(default, lazy_rescale=False),
    )


FEW_KEYS = (16, 128)  # the least and most keys of a tile for few rows
TILE_BYTES = 32768  # of the keys and values in it: two tiles on their way keep the memory of an H100 busy


def _choose_few(spec: AttentionSpec, group: Group) -> Schedule:
    """Row tiles of 16 and more that hold all rows of a key head if they can; programs share the keys.

    Time goes to reading keys and values, so a tile is as many of them as keep memory busy."""
    rows = max(1, max(spec.few, 16) // spec.group)
    cpu = spec.target_kind == "cpu"
    if cpu:
        keys, meta = CPU_KEYS // 2 if spec.dtype == "f64" else CPU_KEYS, ()
    else:
        device = devices.device_of(spec.target)
        large = device is None or device.chip is None or device.chip.shared_program >= 4 * TILE_BYTES
        room = TILE_BYTES if large and spec.target_kind == "cuda" else TILE_BYTES // 2
        size = BYTES[spec.dtype] * (spec.qk_size + spec.v_size)
        most = 1 << max(room // size, 1).bit_length() - 1
        keys = min(max(most, FEW_KEYS[0]), FEW_KEYS[1])
        meta = (("stages", 3), ("warps", 4))  # 5 cost pages 5 to 35 % on an H100
    if len(group.order.dims) == 1:
        shape = (rows,), (keys,)
    else:
        shape = Boxes.of(group).shape(1 << rows.bit_length() - 1, keys, aligned=True)
    return Schedule(*shape, lazy_rescale=cpu, lists="none", meta=meta, split=True)


# Rows, keys, warps, stages by kind of number and padded head size, for GPUs that the cost model does not
# describe: no spills on sm_100 and gfx942.
UNKNOWN = {
    "16-bit": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2), 1024: (32, 16, 8, 1)},
    "f32": {64: (64, 32, 4, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2), 1024: (16, 16, 8, 1)},
    "f64": {64: (32, 16, 4, 1), 128: (32, 16, 8, 1), 1024: (16, 16, 8, 1)},
}


def _choose_unknown(spec: AttentionSpec, group: Group) -> Schedule:
    table = UNKNOWN[spec.dtype if spec.dtype in UNKNOWN else "16-bit"]
    size = max(spec.qk_size, spec.v_size)
    rows, keys, warps, stages = next(found for limit, found in table.items() if size <= limit)
    if spec.target_kind == "hip":
        stages = min(stages, 2)
    one = len(group.order.dims) == 1
    shape = ((rows,), (keys,)) if one else Boxes.of(group).shape(rows, keys, aligned=True)
    return Schedule(*shape, lazy_rescale=False, meta=hints(spec, warps, stages))


def check(spec: AttentionSpec, group: Group, schedule: Schedule) -> None:
    """Whether a given schedule computes this group on the target. Raises InputError."""
    rank = len(group.order.dims)
    for name, extents in (("rows", schedule.rows), ("cols", schedule.cols)):
        sizes = isinstance(extents, tuple) and all(isinstance(n, int) and n >= 1 for n in extents)
        if not sizes or len(extents) != rank or math.prod(extents) > MAX_EXTENT:
            wanted = f"one extent a dimension ({rank}), at least 1 each, {MAX_EXTENT} together at most"
            raise InputError(f"schedule.{name}", wanted, extents)
    if not isinstance(schedule.anchors, tuple) or len(schedule.anchors) not in (0, rank):
        raise InputError("schedule.anchors", f"none, or one anchor a dimension ({rank})", schedule.anchors)
    for d, form in enumerate(schedule.anchors):
        if form is not None and not (isinstance(form, sympy.Basic) and bounds(form, group, d)):
            expected = "an expression of the mask's integers that bounds k - q from below"
            raise InputError(f"schedule.anchors[{d}]", expected, form, "Leave it out, or pass None")
    _check_options(schedule)
    if spec.target_kind != "cpu":
        _check_gpu(spec, schedule, devices.device_of(spec.target))


def _check_options(schedule: Schedule) -> None:
    for name in ("lazy_rescale", "split"):
        value = getattr(schedule, name)
        if not isinstance(value, bool):
            raise InputError(f"schedule.{name}", "True or False", repr(value))
    if schedule.lists not in LISTS:
        raise InputError("schedule.lists", f"one of {', '.join(map(repr, LISTS))}", repr(schedule.lists))
    if schedule.split and schedule.lists != "none":
        raise InputError("schedule.lists", "'none' where programs split the key tiles", repr(schedule.lists))
    meta = schedule.meta
    pairs = isinstance(meta, tuple) and all(isinstance(hint, tuple) and len(hint) == 2 for hint in meta)
    if not pairs or not all(name in HINTS for name, _ in meta):
        raise InputError("schedule.meta", f"pairs of a name ({', '.join(HINTS)}) and a number", repr(meta))
    for name, value in meta:
        if value not in HINTS[name]:
            raise InputError(f"schedule.meta: {name}", f"one of {', '.join(map(str, HINTS[name]))}", value)


def _check_gpu(spec: AttentionSpec, schedule: Schedule, device: Device | None) -> None:
    for name, extents in (("rows", schedule.rows), ("cols", schedule.cols)):
        whole = math.prod(extents)
        if (whole & (whole - 1) or whole < 16) and not (name == "rows" and spec.group > 1):
            raise InputError(f"schedule.{name}", "a power of two from 16, all dimensions together", extents)
    if device is None or device.chip is None:
        return
    most = device.chip.shared_program
    taken = shared_bytes(device.chip, schedule, spec.product_dtype, spec.qk_size, spec.v_size)
    if taken > most:
        wanted = f"at most {most} bytes of shared memory ({device.name})"
        raise InputError("schedule", wanted, taken, "Fewer stages or smaller tiles")

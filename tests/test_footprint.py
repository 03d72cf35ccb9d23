"""What a GPU kernel takes of a multiprocessor: estimates against what compilers report."""

import json
from pathlib import Path

import numpy as np
import pytest

from gossamer.ir.plan import Schedule
from gossamer.passes.devices import device_of
from gossamer.passes.footprint import footprint

RECORDED = json.loads((Path(__file__).parent / "data" / "footprints.json").read_text())["rows"]
TARGETS = sorted({row[0] for row in RECORDED})


def tiles(rows, keys, warps, stages):
    return Schedule((rows,), (keys,), lazy_rescale=False, meta=(("stages", stages), ("warps", warps)))


def estimates(target):
    """(estimate, shared, registers, spilled bytes) of every recorded kernel of a target."""
    chip = device_of(target).chip
    for of, dtype, size, rows, keys, warps, stages, shared, registers, spilled in RECORDED:
        if of == target:
            found = footprint(chip, tiles(rows, keys, warps, stages), dtype, size, size)
            yield found, shared, registers, spilled


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_is_exact(target):
    assert all(found.shared == shared for found, shared, _, _ in estimates(target))


@pytest.mark.parametrize("target", TARGETS)
def test_registers_are_close_where_the_compiler_had_enough(target):
    errors = [
        found.wanted - regs for found, _, regs, spilled in estimates(target) if regs < 250 and spilled <= 24
    ]
    assert len(errors) > 80
    assert np.sqrt(np.mean(np.square(errors))) < 17
    assert abs(np.mean(errors)) < 6


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_foreseen(target):
    """Of the kernels that spill more than a few registers, few are missed; of the others, few are refused."""
    heavy = [found.short > 0 for found, _, _, spilled in estimates(target) if spilled > 64]
    light = [found.short > 0 for found, _, _, spilled in estimates(target) if spilled <= 24]
    assert np.mean(heavy) > 0.8
    assert np.mean(light) < 0.08


def test_programs_at_once_are_bounded_by_what_runs_out_first():
    chip = device_of("cuda:sm_90").chip
    one = footprint(chip, tiles(64, 64, 4, 3), "bf16", 128, 128)
    assert one.shared == 112 * 1024 and one.resident(chip) == 2  # 2 * 113 KiB of 228
    assert footprint(chip, tiles(64, 64, 4, 4), "bf16", 128, 128).resident(chip) == 1
    assert footprint(chip, tiles(128, 128, 8, 4), "bf16", 128, 128).resident(chip) == 0  # 288 KiB
    wide = footprint(chip, tiles(128, 64, 8, 2), "bf16", 128, 128)
    assert wide.resident(chip) == 1  # by registers: shared memory would do for two
    assert 2 * (wide.shared + 1024) <= chip.shared


RUNS = [
    ("cuda:sm_90", "bf16", 64, (64, 64, 4, 3)),
    ("cuda:sm_90", "f16", 128, (64, 128, 8, 2)),
    ("cuda:sm_90", "bf16", 80, (128, 32, 8, 3)),
    ("cuda:sm_80", "bf16", 128, (64, 32, 4, 3)),
    ("cuda:sm_80", "f32", 64, (32, 32, 4, 2)),
]


@pytest.mark.parametrize("target, dtype, size, tile", RUNS)
def test_kernels_of_today_take_what_is_predicted(target, dtype, size, tile):
    pytest.importorskip("triton")
    from gossamer.codegen.triton import emit
    from gossamer.ir.mask import Mask
    from gossamer.passes.pipeline import compile_spec
    from gossamer.passes.spec import AttentionSpec
    from gossamer.runtime.gpu import compile_ahead

    mask = Mask.parse("mask(p0) { abs(q - k) <= p0 }")
    spec = AttentionSpec(mask=mask, dtype=dtype, qk_size=size, v_size=size, target=target)
    binary = compile_ahead(emit(compile_spec(spec, tiles(*tile)).kernels[0]), target)
    found = footprint(device_of(target).chip, tiles(*tile), dtype, size, size)
    assert found.shared == binary.shared
    assert abs(found.registers - binary.registers) < 50

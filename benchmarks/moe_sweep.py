"""Tiles of the two products of a layer of experts, timed on the device beside the default."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch


def candidates(mean: float) -> list[tuple[Any, Any]]:
    """Pairs of tilings for layers whose experts get so many rows on average."""
    from gossamer.ir.ragged import Tiling

    def both(rows: int, cols: int, inner: int, warps: int, stages: int, wide: int) -> tuple[Any, Any]:
        meta = (("stages", stages), ("warps", warps))
        first, second = (Tiling(rows, c, inner, wide=wide, meta=meta) for c in (cols, 2 * cols))
        return first, second

    few = [
        both(16, cols, inner, warps, stages, 1 << 20)
        for cols in (32, 64)
        for inner in (128, 256)
        for warps, stages in ((4, 3), (4, 5), (8, 4))
    ]
    some = [
        both(64, cols, 64, warps, stages, wide)
        for cols in (64, 128)
        for warps in (4, 8)
        for stages in (3, 4)
        for wide in (8, 1 << 20)
    ]
    many = [
        both(128, cols, inner, warps, stages, wide)
        for cols in (64, 128)
        for inner, stages in ((64, 3), (64, 4), (32, 5))
        for warps in (4, 8)
        for wide in (4, 8, 16)
        if not (cols == 128 and warps == 4)
    ]
    return few if mean <= 16 else some if mean <= 64 else many


def coded_candidates(mean: float, group: int) -> list[tuple[Any, Any]]:
    """The same for quantised matrices whose scales belong to so many columns."""
    from gossamer.ir.ragged import Tiling

    rows, widths, modes = (
        (16, (64, 128, 256), ("products", "codes")) if mean <= 16 else (64, (128,), ("codes",))
    )
    if mean > 64:
        rows, widths, modes = 128, (128, 256), ("sums", "codes")
    found = []
    for cols, step, scales in product(widths, (32, 64, 128), modes):
        for warps, stages in ((4, 3), (4, 5), (8, 3), (8, 4)):
            meta = (("stages", stages), ("warps", warps))
            more = {"scales": scales, "turned": True, "unroll": max(1, 64 // step)}
            pair = [
                Tiling(rows, c, min(step, group), wide=8 if mean > 64 else 1 << 20, meta=meta, **more)
                for c in (cols // 2, cols)
            ]
            found.append((pair[0], pair[1]))
    return found


def timed(
    pairs: list[tuple[Any, Any]], x: Any, ids: Any, weights: Any, up: Any, down: Any
) -> list[dict[str, Any]]:
    """Milliseconds of each kernel of the programs with these tilings, fastest first."""
    return sorted(_rows(pairs, x, ids, weights, up, down), key=lambda row: row.get("ms", float("inf")))


def _rows(pairs: Any, x: Any, ids: Any, weights: Any, up: Any, down: Any) -> Iterator[dict[str, Any]]:
    from triton.testing import do_bench

    from gossamer.frontend.device import target_of
    from gossamer.frontend.prepare import allocate
    from gossamer.ir.expr import real, sigmoid
    from gossamer.passes.moe_pipeline import compile_experts
    from gossamer.passes.moe_spec import ExpertsSpec
    from gossamer.runtime.driver import driver

    swiglu = real("x0") * sigmoid(real("x0")) * real("x1")
    experts, hidden, inner = down.shape
    for pair in pairs:
        target = target_of(x.device)
        spec = ExpertsSpec(
            experts, ids.shape[1], hidden, inner, swiglu, dtype="bf16", target=target, tiling=pair,
            single=ids.numel() <= 512, quantized=tuple(getattr(w, "_q", None) for w in (up, down)),
        )  # fmt: skip
        row: dict[str, Any] = {"tilings": [str(t) for t in pair]}
        try:
            out = torch.empty_like(x)
            values = {
                "x": x,
                "ids": ids.reshape(-1),
                "weights": weights.reshape(-1),
                "o": out,
            }
            for name, matrix in (("gate_up", up), ("down", down)):
                values |= matrix.tensors(name) if hasattr(matrix, "tensors") else {name: matrix}
            executable = driver().compile(compile_experts(spec), target)
            bound = executable.bind(values, allocate=partial(allocate, device=x.device))
            bound(values)
            made = {name: allocate(shape, dtype, x.device) for name, shape, dtype in bound.intermediates}
            held = values | made
            for run, pick in bound.steps:
                run(pick(held), None)
            launches = [launch.kernel for launch in executable.artifact.manifest.launches]
            steps = zip(launches, bound.steps, strict=True)
            row["kernels"] = {
                name: do_bench(partial(run, pick(held), None), rep=30) for name, (run, pick) in steps
            }
            row["ms"] = sum(row["kernels"].values())
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        yield row

"""Schedules of the kernels of a layer of experts, timed on the device one beside the other.

A candidate is what a schedule decides: a Tiling for each product, and whether matrices of codes are decoded
before them. Kernels are timed one by one, so that the best of the first product and the best of the second
are found in one go. Programs are compiled by as many processes as there are cores; what these leave in the
cache on disk is loaded here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch

from gossamer.ir.expr import real, sigmoid
from gossamer.ir.ragged import Tiling
from gossamer.passes.moe.pipeline import compile_experts, compile_gradients
from gossamer.passes.moe.spec import ExpertsSpec
from gossamer.runtime.driver import driver

SWIGLU = real("x0") * sigmoid(real("x0")) * real("x1")
ALL = 1 << 20  # column tiles side by side: all of them


@dataclass(frozen=True)
class Candidate:
    """A schedule. tilings: of both products; None: the default ones. more: other fields of the spec."""

    name: str
    tilings: tuple[Tiling, Tiling] | None = None
    more: dict[str, Any] = field(default_factory=dict)


def tile(
    rows: int,
    cols: int,
    inner: int,
    warps: int,
    stages: int,
    wide: int = ALL,
    *,
    boxes: bool = False,
    **more: Any,
) -> Tiling:
    """A Tiling; boxes: tiles come through tensor descriptors."""
    meta = (*((("descriptors", 1),) if boxes else ()), ("stages", stages), ("warps", warps))
    return Tiling(rows, cols, inner, wide=wide, meta=meta, **more)


def candidates(kind: str, tokens: int, mean: float, q: tuple[Any, Any]) -> list[Candidate]:
    """What to time beside the default for matrices of a kind, of experts that get so many rows on average."""
    if kind == "bf16":
        return [*_dense(tokens, mean)]
    if tokens == 1:
        return [*_entries(q)]
    if mean > 64:
        return [Candidate("decoded once", more={"once": (True, True)}), *_coded(q)]
    return [*_coded_few(q)]


def _dense(tokens: int, mean: float) -> Iterator[Candidate]:
    if tokens == 1:
        return
    if mean <= 16:
        few = product((16, 32), (32, 64), (128,), (4,), (3, 4), (False, True))
        for rows, cols, inner, warps, stages, boxes in few:
            yield _pair(rows, cols, inner, warps, stages, ALL, boxes)
        return
    if mean <= 64:
        some = product((64,), (64, 128), (64, 128), (4, 8), (3, 4), (False, True))
        for rows, cols, inner, warps, stages, boxes in some:
            if (cols, inner, stages) != (128, 128, 4):
                yield _pair(rows, cols, inner, warps, stages, ALL, boxes)
        return
    for boxes in (False, True):
        for wide in (4, 8, 16):
            yield _pair(128, 128, 64, 8, 3, wide, boxes)
        yield _pair(128, 128, 64, 8, 4, 8, boxes)
        yield _pair(128, 64, 64, 4, 3, 8, boxes)
        yield _pair(128, 64, 64, 4, 4, 8, boxes)
        yield _pair(128, 64, 64, 8, 4, 8, boxes)
        yield _pair(256, 64, 64, 8, 3, 8, boxes)
        yield _pair(256, 64, 64, 8, 4, 8, boxes)
        yield _pair(64, 128, 64, 4, 3, 8, boxes)
    for rest in (16, 32, 64):
        yield _pair(128, 128, 64, 8, 4, 8, True, rest)
        yield _pair(256, 64, 64, 8, 4, 8, True, rest)


def _pair(
    rows: int, cols: int, inner: int, warps: int, stages: int, wide: int, boxes: bool, rest: int = 0
) -> Candidate:
    """Both products alike: the first has two halves of the columns that the second has."""
    first, second = (
        tile(rows, c, inner, warps, stages, wide, boxes=boxes, rest=rest) for c in (cols, 2 * cols)
    )
    name = f"{rows}x{cols} by {inner}, {warps} warps, {stages} stages, wide {wide if wide < ALL else 'all'}"
    name += (", boxes" if boxes else "") + (f", rest {rest}" if rest else "")
    return Candidate(name, (first, second))


def _entries(q: tuple[Any, Any]) -> Iterator[Candidate]:
    for cols, warps, unroll in product((2, 4, 8), (2, 4, 8), (1, 2)):
        if cols * unroll <= 8:
            meta = (("stages", 1), ("warps", warps))
            one = Tiling(1, cols, 256 * warps, meta=meta, unroll=unroll, scales="products")
            yield Candidate(f"{cols} columns, {warps} warps, unroll {unroll}", (one, one))


def _coded_few(q: tuple[Any, Any]) -> Iterator[Candidate]:
    scales = "sums" if q[0].groups == 1 else "products"
    ways = product((64, 128), ((4, 3), (4, 4), (4, 5), (8, 4)), (True, False), (False, True))
    for step, (warps, stages), ahead, boxes in ways:
        if step > q[0].group or (not ahead and (scales == "sums" or boxes)) or (step, stages) == (128, 5):
            continue
        more = {"scales": scales, "turned": True, "ahead": ahead}
        first, second = (
            tile(16, c, step, warps, stages, boxes=boxes, **more) for c in (64, 64 * (warps // 4))
        )
        ways_taken = [", ahead"] * ahead + [", boxes"] * boxes
        name = f"by {step}, {warps} warps, {stages} stages{''.join(ways_taken)}"
        yield Candidate(name, (first, second))


def _coded(q: tuple[Any, Any]) -> Iterator[Candidate]:
    scales = "sums" if q[0].groups == 1 else "codes"
    more = {"scales": scales, "turned": True}
    step = min(64 // q[0].slices, q[0].group)
    shapes = (  # rows, columns of both products, warps, stages
        (128, 128, 256, 8, 3), (128, 128, 128, 8, 4), (128, 64, 128, 4, 3), (128, 64, 64, 4, 3),
        (256, 64, 128, 8, 3), (256, 64, 64, 8, 3), (64, 128, 256, 8, 3),
    )  # fmt: skip
    for (rows, up, down, warps, stages), boxes in product(shapes, (False, True)):
        pair = tuple(tile(rows, c, step, warps, stages, 8, boxes=boxes, **more) for c in (up, down))
        name = f"{rows}x{up}/{down} by {step}, {warps} warps, {stages} stages{', boxes' if boxes else ''}"
        yield Candidate(name, pair)  # type: ignore[arg-type]


def specs(
    found: list[Candidate],
    shape: tuple[int, int, int, int],
    load: str,
    single: bool,
    target: str,
    q: tuple[Any, Any],
) -> list[ExpertsSpec]:
    """The spec of each candidate. shape: experts, top_k, hidden, inner."""
    facts = {"dtype": "bf16", "target": target, "load": load, "single": single, "quantized": q}
    return [ExpertsSpec(*shape, SWIGLU, **facts, tiling=c.tilings, **c.more) for c in found]


def with_gradients(spec: ExpertsSpec) -> list[tuple[ExpertsSpec, tuple[str, ...]]]:
    """What a step of training compiles, keeping the first product or not: forward and gradients of all."""
    found: list[tuple[ExpertsSpec, tuple[str, ...]]] = []
    for keeps in (True, False):
        routed = replace(spec, routed=True, keeps=keeps, single=False, routing=("i32", "f32"))
        found.append((routed, ()))
        found.append((replace(routed, routing=("i32", "bf16")), ("x", "weights", "gate_up", "down")))
    return found


def compiled_ahead(every: list[Any]) -> None:
    """Compile specs, or specs and of which inputs the gradients are wanted, in parallel; errors come again
    where the program is asked for."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(min(cores, 16), mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, every, chunksize=1))


def _compile(asked: Any) -> None:
    spec, wanted = asked if isinstance(asked, tuple) else (asked, ())
    with suppress(Exception):
        made = compile_gradients(spec, wanted) if wanted else compile_experts(spec)
        driver().compile(made, spec.target)


def timed(
    found: list[Candidate],
    every: list[ExpertsSpec],
    x: Any,
    ids: Any,
    weights: Any,
    up: Any,
    down: Any,
    expected: Any,
) -> list[dict[str, Any]]:
    """Milliseconds of each kernel of each candidate, fastest first. expected: the result."""
    rows = [_row(c, s, x, ids, weights, up, down, expected) for c, s in zip(found, every, strict=True)]
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


def _row(
    candidate: Candidate, spec: ExpertsSpec, x: Any, ids: Any, weights: Any, up: Any, down: Any, expected: Any
) -> Any:
    from triton.testing import do_bench

    from gossamer.frontend.prepare import allocate

    row: dict[str, Any] = {"name": candidate.name}
    try:
        out = torch.empty_like(x)
        values = {"x": x, "ids": ids.reshape(-1), "weights": weights.reshape(-1), "o": out}
        for name, matrix in (("gate_up", up), ("down", down)):
            values |= matrix.tensors(name) if hasattr(matrix, "tensors") else {name: matrix}
        executable = driver().compile(compile_experts(spec), spec.target)
        bound = executable.bind(values, allocate=partial(allocate, device=x.device))
        bound(values)
        difference = (out.float() - expected.float()).abs().max().item()
        row["difference"] = difference / expected.float().abs().max().item()
        made = {name: allocate(shape, dtype, x.device) for name, shape, dtype in bound.intermediates}
        held = values | made
        for run, pick in bound.steps:
            run(pick(held), None)
        launches = [launch.kernel for launch in executable.artifact.manifest.launches]
        steps = zip(launches, bound.steps, strict=True)
        row["kernels"] = {
            name: do_bench(partial(run, pick(held), None), warmup=5, rep=20, return_mode="median")
            for name, (run, pick) in steps
        }
        row["ms"] = sum(row["kernels"].values())
        del made, held
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"[:160]
    return row

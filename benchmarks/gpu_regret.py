"""How good the cost model's choice is: every schedule that it chose from, timed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from cases import cases
from gpu_prepare import Job, Shape, prepare, random_inputs

import gossamer
from gossamer.frontend.measure_gpu import milliseconds

# Masks that run as one kernel, so that a sweep over its schedules is exhaustive.
MASKS = ("causal", "window256", "causal_window1024", "dilated16_full", "document_causal", "natten2d_13")


def regret(names: Sequence[str], dims: Sequence[int], deadline: float, limit: int) -> dict[str, Any]:
    """By mask and head size: the time of the schedule taken over that of the best one, less one.

    limit: candidates a mask at most, the best by the model. deadline: of time.monotonic, for compiling."""
    cases_ = [(name, (4, 16, 4096, dim)) for dim in dims for name in MASKS if name in names]
    spaces = {case: _Space(*case) for case in cases_}
    jobs = [
        Job("gossamer", *case, "bf16", schedule)
        for case, space in spaces.items()
        for schedule in space.all[:limit]
    ]
    done = prepare(jobs, deadline=deadline)
    failed = {job: outcome.error for job, outcome in done.items() if outcome.error}
    rows = []
    for case, space in spaces.items():
        ready = [j.schedule for j in jobs if (j.mask, j.shape) == case and j in done and j not in failed]
        if ready:
            rows.append(_row(*case, space, ready))
    found = {"rows": rows, "candidates": len(jobs), "not_run": len(jobs) - len(done) + len(failed)}
    found["errors"] = sorted(set(failed.values()))[:5]
    return found | ({"median": statistics.median(row["regret"] for row in rows)} if rows else {})


class _Space:
    """taken: the schedule that a call takes. all: every candidate, the best by the model first."""

    def __init__(self, name: str, shape: Shape) -> None:
        from gossamer.frontend.device import target_of
        from gossamer.passes.candidates import candidates
        from gossamer.passes.devices import device_of

        mask = gossamer.Mask.trace(cases(shape[2], "cuda")[name].mask_mod)
        target = target_of(torch.device("cuda"))
        spec = gossamer.AttentionSpec(mask, dtype="bf16", qk_size=shape[3]).ir
        self.spec, self.device, self.shape = replace(spec, target=target), device_of(target), shape
        self.values = {f"p{i}": value for i, value in enumerate(mask.values)}
        self.values |= {f"c{i}": tensor.cpu().numpy() for i, tensor in enumerate(mask.tensors)}
        [(group, self.taken, _)] = self._plans(None)
        self.all = [candidate.schedule for candidate in candidates(self.spec, group, self.device)]
        self.all = [self.taken, *(s for s in self.all if s != self.taken)]

    def predicted_ms(self, schedule: Any) -> float:
        from gossamer.passes.cost import Size, estimate

        batch, heads, length, dim = self.shape
        size = Size(length, length, batch, heads, heads, dim, dim, "bf16", self.values)
        return 1e3 * estimate(self.device, size, self._plans(schedule)).seconds

    def _plans(self, schedule: Any) -> tuple[Any, ...]:
        from gossamer.passes.pipeline import compile_spec

        graphs: list[Any] = []
        compile_spec(self.spec, schedule, watch=lambda name, graph: graphs.append(graph))
        [op] = graphs[-1].of_kind("attention")
        return tuple(zip(op.attr("groups"), op.attr("schedules"), op.attr("loops"), strict=True))


def _row(name: str, shape: Shape, space: _Space, ready: list[Any]) -> dict[str, Any]:
    tensors, mask = random_inputs(shape, "bf16"), gossamer.Mask.trace(cases(shape[2], "cuda")[name].mask_mod)

    def time_of(schedule: Any, rep: int) -> float:
        call = lambda: gossamer.attention(*tensors, mask=mask, schedule=schedule)  # noqa: E731
        return milliseconds(call, warmup=rep // 4, rep=rep)

    times = {number: time_of(schedule, 12) for number, schedule in enumerate(ready)}
    best = ready[min(times, key=times.__getitem__)]
    taken_ms, best_ms = time_of(space.taken, 60), time_of(best, 60)
    return {
        "mask": name, "dim": shape[3], "schedules": len(ready), "taken_ms": taken_ms, "best_ms": best_ms,
        "regret": max(0.0, taken_ms / best_ms - 1), "predicted_ms": space.predicted_ms(space.taken),
        "predicted_best_ms": space.predicted_ms(best), "best": str(best), "taken": str(space.taken),
    }  # fmt: skip

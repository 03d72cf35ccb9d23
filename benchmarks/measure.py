"""How things are timed: every contestant in turn, in several rounds, so that all see the same machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

GEMM = 1024  # the matrix product that everything is compared with is this long in every direction


@dataclass(frozen=True)
class Timing:
    """Seconds a call."""

    median: float
    best: float
    calls: int


def interleaved(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int, slot: float = 0.1
) -> dict[str, Timing]:
    """Time each contestant for about `slot` seconds a round; the first call of a slot is not counted."""
    for run in contestants.values():
        run()
    calls = {name: max(2, round(slot / _seconds(run))) for name, run in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            run()
            samples[name] += [_seconds(run) for _ in range(calls[name])]
    return {name: Timing(statistics.median(s), min(s), len(s)) for name, s in samples.items()}


def gemm() -> Callable[[], object]:
    """A float32 matrix product of 2 * GEMM^3 operations."""
    a, b, out = (torch.ones(GEMM, GEMM) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dense: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """The attention in float64, a few hundred rows of one head at a time."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b, h in torch.cartesian_prod(*map(torch.arange, q.shape[:2])).tolist():
        queries, keys, values = (t[b, h].double() for t in (q, k, v))
        for first in range(0, q.shape[2], 512):
            rows = slice(first, min(first + 512, q.shape[2]))
            scores = queries[rows] @ keys.T / q.shape[3] ** 0.5
            scores = scores.masked_fill(~dense(rows), -torch.inf)
            out[b, h, rows] = torch.nan_to_num(torch.softmax(scores, -1), 0.0) @ values
    return out


def _seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start

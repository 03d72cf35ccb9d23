"""Compile before anything is timed, in many processes: what is compiled stays in each one's cache on disk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter
from typing import Any

import torch

Shape = tuple[int, int, int, int]  # batch, heads, length, size of a head
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class Job:
    """One thing to compile: who ('gossamer' or a peer), which mask, for which shape and dtype.

    schedule: of gossamer, in place of the default. backward: the gradients too."""

    who: str
    mask: str
    shape: Shape
    dtype: str
    schedule: Any = None
    backward: bool = False


@dataclass(frozen=True)
class Outcome:
    seconds: float
    error: str | None = None


def prepare(jobs: Sequence[Job], *, deadline: float, processes: int = 0) -> dict[Job, Outcome]:
    """Do the jobs, in order, until `deadline` (of time.monotonic); what is not done by then is missing."""
    processes = processes or max(1, min(len(jobs), len(os.sched_getaffinity(0)) - 2))
    done: dict[Job, Outcome] = {}
    with _environment(TORCHINDUCTOR_COMPILE_THREADS="1"):
        pool = multiprocessing.get_context("spawn").Pool(processes)
    with pool:  # which ends what is still running
        pending = [(job, pool.apply_async(_do, (job,))) for job in jobs]
        for job, result in pending:
            try:
                done[job] = result.get(max(0.0, deadline - monotonic()))
            except multiprocessing.TimeoutError:
                continue
    return done


def _do(job: Job) -> Outcome:
    start = perf_counter()
    try:
        with torch.set_grad_enabled(job.backward):
            _compile(job)
        torch.cuda.synchronize()
    except Exception as error:
        return Outcome(perf_counter() - start, f"{type(error).__name__}: {error}"[:500])
    return Outcome(perf_counter() - start)


def _compile(job: Job) -> None:
    from cases import cases, more_cases
    from gpu_peers import differentiable, peer

    import gossamer

    length = job.shape[2]
    case = (cases(length, "cuda") | more_cases(length, "cuda"))[job.mask]
    tensors = random_inputs(job.shape, job.dtype)
    if job.who == "gossamer":
        mask = gossamer.Mask.trace(case.mask_mod)
        call = partial(gossamer.attention, mask=mask, schedule=job.schedule)
        if job.backward:
            backward_of(tensors, call)[1]()
        else:
            call(*tensors)
    elif job.backward:
        backward_of(tensors, differentiable(job.who, case, length))[1]()
    else:
        peer(job.who, case, tensors)


def backward_of(
    tensors: tuple[torch.Tensor, ...], call: Callable[..., torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], Callable[[], tuple[torch.Tensor, ...]]]:
    """((q, k, v, gradient), run): run gives the gradients of q, k and v, whose forward was run once."""
    with torch.enable_grad():
        leaves = tuple(t.detach().requires_grad_() for t in tensors)
        out = call(*leaves)
    made = torch.Generator(out.device).manual_seed(1)
    grad = torch.randn(out.shape, generator=made, device=out.device, dtype=out.dtype)
    return (*tensors, grad), lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def random_inputs(
    shape: Shape, dtype: str, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of normal numbers, the same in every process."""
    made = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=made, device=device, dtype=DTYPES[dtype]) for _ in range(3))
    return q, k, v


@contextmanager
def _environment(**changes: str) -> Any:
    """For processes started inside."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ |= changes
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            os.environ |= {} if value is None else {name: value}

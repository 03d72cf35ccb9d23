"""Gradients on a GPU: ours and peers' through autograd, with floors, errors and memory.

Times are those of CUDA graphs of the calls, ours and peers', so that the host hides no kernel; `call_ms` is a
call from Python.

The floor is max(10 nnz D / peak, 8 tensors / copy bandwidth): five products of every pair that attends, and
q, k, v, the output and the gradients of all four read or written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic, perf_counter
from typing import Any

import torch
from cases import Case
from gpu_check import gradient_accuracy
from gpu_prepare import Job, Shape, backward_of, prepare, random_inputs

import gossamer
from gossamer.frontend.measure_gpu import milliseconds, recorded

SHARE = 0.4  # of the budget, that compiling side by side may take


def backward(
    picked: Sequence[tuple[str, Shape]],
    case_of: Callable[[str, Shape], Case],
    dtype: str,
    peers: Sequence[str],
    deadline: float,
    keep: Callable[..., None],
    say: Callable[[str], None],
) -> None:
    """Rows `backward` of the results: ours on every case, then each peer that has the mask."""
    from gpu_peers import able

    jobs = [Job("gossamer", *case, dtype, backward=True) for case in picked]
    jobs += [Job("flex", *case, dtype, backward=True) for case in picked if "flex" in peers]
    began = monotonic()
    prepared = prepare(jobs, deadline=began + SHARE * max(0.0, deadline - began))
    say(f"compiled {len(prepared)} of {len(jobs)} gradients in {monotonic() - began:.0f} s")
    with torch.cuda.stream(torch.cuda.Stream()):  # autograd runs where the forward ran, which graphs record
        for name, shape in picked:
            row = _ours(case_of(name, shape), shape, dtype)
            say(f"{name:18} {shape} backward: {row.get('ms', row.get('failed'))}")
            keep(backward=[row])
        for name, shape in picked:
            for other in peers:
                if able(other, case_of(name, shape)) and monotonic() < deadline:
                    row = _beside(other, case_of(name, shape), shape, dtype)
                    found = row["peers"][other]
                    say(f"{name:18} {shape} backward: {other} {found.get('ms', found.get('failed'))}")
                    keep(backward=[row])


def floor_ms(pairs: int, shape: Shape, dtype: str) -> float:
    """Milliseconds, by the ceilings of this device."""
    from gossamer.frontend.measure_gpu import measured_gpu

    batch, heads, length, dim = shape
    device, width = measured_gpu(), torch.finfo(random_dtype(dtype)).bits // 8
    compute = 10 * pairs * dim * batch * heads / device.peak(dtype)
    return 1e3 * max(compute, 8 * batch * heads * length * dim * width / device.bandwidth)


def random_dtype(dtype: str) -> torch.dtype:
    from gpu_prepare import DTYPES

    return DTYPES[dtype]


def _ours(case: Case, shape: Shape, dtype: str) -> dict[str, Any]:
    row: dict[str, Any] = {"mask": case.name, "shape": shape, "dtype": dtype}
    try:
        pairs = case.pairs(shape[2])
        row |= {"pairs": pairs, "floor_ms": floor_ms(pairs, shape, dtype)}
        tensors, run = our_backward(case, shape, dtype)
        began = perf_counter()
        grads = run()
        torch.cuda.synchronize()
        row["first_call_s"] = perf_counter() - began
        judged = gradient_accuracy(grads, tensors, lambda rows: case.dense(shape[2], rows))
        row |= {"error": judged.error, "allowed": judged.allowed, "extra_mib": _memory(run)}
        if not judged.passes:
            raise AssertionError(f"error {judged.error:.3g}, allowed {judged.allowed:.3g}")
        row |= {"ms": timed(run), "call_ms": milliseconds(run)}
    except Exception as error:  # one mask that fails is a result; the others are measured all the same
        row["failed"] = f"{type(error).__name__}: {error}"[:500]
    return row


def our_backward(case: Case, shape: Shape, dtype: str) -> tuple[Any, Callable[[], Any]]:
    """(q, k, v, gradient of the output), and what gives the gradients of the first three."""
    mask = gossamer.Mask.trace(case.mask_mod)
    tensors = random_inputs(shape, dtype)
    return backward_of(tensors, lambda *given: gossamer.attention(*given, mask=mask))


def _memory(run: Callable[[], Any]) -> float:
    """MiB that a backward takes at its peak beside what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = run()
    torch.cuda.synchronize()
    results = sum(t.numel() * t.element_size() for t in made)
    return (torch.cuda.max_memory_allocated() - before - results) / 2**20


def _beside(other: str, case: Case, shape: Shape, dtype: str) -> dict[str, Any]:
    """What a peer takes, and ours right before it."""
    from gpu_peers import differentiable

    row: dict[str, Any] = {"mask": case.name, "shape": shape, "dtype": dtype}
    began = perf_counter()
    try:
        tensors = random_inputs(shape, dtype)
        _, ours = our_backward(case, shape, dtype)
        _, run = backward_of(tensors, differentiable(other, case, shape[2]))
        difference = max(float((a - b).abs().max()) for a, b in zip(run(), ours(), strict=True))
        first = perf_counter() - began
        found = {"ours_ms": timed(ours), "ms": timed(run), "prepare_s": first, "difference": difference}
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"[:500]}
    return row | {"peers": {other: found}}


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds of the launches of a call on the current stream."""
    return milliseconds(recorded(run, torch.cuda.current_stream()))

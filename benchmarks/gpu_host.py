"""What surrounds a kernel: first calls, the host's time a call, tile lists, CUDA graphs."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import isolated
import torch
from cases import cases
from gpu_prepare import random_inputs

import gossamer
from gossamer import masks
from gossamer.frontend.measure_gpu import milliseconds

STARTED = ("window256", "strided64", "bigbird")
ATTENTION = re.compile(r"attention_[a-z]+_fwd(_\d+)?")  # kernels that make no lists


def first_call(repeats: int = 2) -> dict[str, Any]:
    """Seconds from `import torch` and inputs on the GPU to the first result, in new processes."""
    rows = []
    for name in STARTED:
        with isolated.empty_cache() as cache:
            fresh = isolated.measure("gpu_call", name, cache=cache)
            cached = [isolated.measure("gpu_call", name, cache=cache) for _ in range(repeats)]
        assert fresh["compilations"] and not cached[-1]["compilations"]
        middle = sorted(cached, key=lambda run: run["seconds"])[len(cached) // 2]
        rows.append({
            "mask": name, "uncached_s": fresh["seconds"], "cached_s": middle["seconds"],
            "import_s": middle["import"], "imported": ", ".join(middle["imported"]),
        })  # fmt: skip
    worst = {key: max(row[key] for row in rows) for key in ("uncached_s", "cached_s")}
    return {**worst, "rows": rows}


def overhead(calls: int = 200, rounds: int = 15, device: str = "cuda") -> dict[str, Any]:
    """Microseconds of host time a call, and of the launch alone, its arguments ready.

    The problem is so small that the host is what takes time; medians of rounds."""
    from gossamer.frontend import prepare as front
    from gossamer.frontend.problem import Problem

    q, k, v = random_inputs((1, 1, 128, 64), "bf16", device)
    mask_mod = cases(4096, device)["window256"].mask_mod
    mask = gossamer.Mask.trace(mask_mod)
    problem = Problem(q, k, v, False)
    values = front.call_values(problem, mask, None, None) | {"o": torch.empty_like(q)}
    bound = front.executable_for(problem, mask, None).bind(values)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    slopes = torch.randn_like(q)

    def gradients() -> Any:
        return torch.autograd.grad(gossamer.attention(*leaves, mask=mask), leaves, slopes)

    runs: dict[str, Callable[[], Any]] = {
        "launch_us": lambda: bound(values, 1),
        "mask_us": lambda: gossamer.attention(q, k, v, mask=mask),
        "mask_mod_us": lambda: gossamer.attention(q, k, v, mask=mask_mod),
        "mask_and_lse_us": lambda: gossamer.attention(q, k, v, mask=mask, return_lse=True),
        "with_gradients_us": gradients,
    }
    found = {
        name: statistics.median(_host_us(run, calls, device) for _ in range(rounds))
        for name, run in runs.items()
    }
    return {"above_launch_us": found["mask_us"] - found["launch_us"], **found}


def _host_us(run: Callable[[], Any], calls: int, device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    synchronize()
    start = perf_counter()
    for _ in range(calls):
        run()
    seconds = perf_counter() - start
    synchronize()
    return 1e6 * seconds / calls


def lists(length: int = 8192) -> dict[str, Any]:
    """Device time of each call's kernels but the attention itself: what makes tile lists."""
    ids = torch.sort(torch.randint(0, 16, (length,), device="cuda")).values.int()
    starts = torch.randint(0, length, (length,), device="cuda")
    made = {
        "window": masks.sliding_window(128),
        "strided64": gossamer.Mask.trace(cases(length)["strided64"].mask_mod),
        "neighborhood": masks.neighborhood((64, 128), 13, edges="clip"),
        "documents": masks.document(ids),
        "documents, causal": masks.document(ids) & masks.causal(),
        "start of each row": gossamer.Mask.trace(lambda b, h, q, k: (k >= starts[q]) & (k <= q)),
        "bigbird": gossamer.Mask.trace(cases(length, "cuda")["bigbird"].mask_mod),
    }
    tensors, rows = random_inputs((1, 16, length, 64), "bf16"), []
    for name, mask in made.items():
        found = kernels(lambda mask=mask: gossamer.attention(*tensors, mask=mask))
        other = {kernel: us for kernel, us in found.items() if not ATTENTION.fullmatch(kernel)}
        closed = not mask.tensors
        rows.append({
            "mask": name, "closed": closed, "list_kernels": len(other), "list_us": sum(other.values()),
            "attention_us": sum(found.values()) - sum(other.values()), "kernels": found,
        })  # fmt: skip
    return {
        "length": length,
        "closed_kernels": sum(row["list_kernels"] for row in rows if row["closed"]),
        "data_us": max(row["list_us"] for row in rows if not row["closed"]),
        "rows": rows,
    }


def kernels(run: Callable[[], Any], calls: int = 20) -> dict[str, float]:
    """Microseconds of every kernel that a call launches, by name, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    found = {event.key: event.device_time_total / calls for event in profiled.key_averages()}
    return {key: us for key, us in found.items() if us}  # events of the host take no time there


def graphs() -> list[dict[str, Any]]:
    """Calls replayed from a CUDA graph against the same calls made from Python."""
    rows = []
    for name in ("window256", "strided64", "document_causal", "bigbird"):
        tensors = random_inputs((1, 16, 4096, 64), "bf16")
        mask = gossamer.Mask.trace(cases(4096, "cuda")[name].mask_mod)
        wanted = gossamer.attention(*tensors, mask=mask)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = gossamer.attention(*tensors, mask=mask)
        graph.replay()
        called = milliseconds(lambda tensors=tensors, mask=mask: gossamer.attention(*tensors, mask=mask))
        rows.append({
            "mask": name, "same": torch.equal(out, wanted), "called_ms": called,
            "replayed_ms": milliseconds(graph.replay),
        })  # fmt: skip
    return rows

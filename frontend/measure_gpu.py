"""What a GPU does at best, and what a call takes on it: the ruler of `gossamer bench` and of benchmarks/."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..passes.cost import Device

GEMM = 8192  # rows, columns and depth of the matrix product
COPY = 1 << 31  # bytes, far more than any cache


def samples(run: Callable[[], Any], *, warmup: int = 10, rep: int = 40) -> list[float]:
    """Milliseconds of calls on the GPU, by its events; the L2 cache is overwritten before each.

    warmup, rep: milliseconds to spend. What the host does is hidden while it stays ahead of the device."""
    from triton.testing import do_bench

    return do_bench(run, warmup=warmup, rep=rep, return_mode="all")  # type: ignore[return-value]


def milliseconds(run: Callable[[], Any], *, warmup: int = 10, rep: int = 40) -> float:
    """The median of `samples`."""
    return statistics.median(samples(run, warmup=warmup, rep=rep))


def recorded(run: Callable[[], Any], stream: torch.cuda.Stream | None = None) -> Callable[[], None]:
    """Replays the launches of a call, from a CUDA graph: what the device takes, without the host.

    stream: to record on, that of a forward whose gradients the call computes."""
    import torch

    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is compiled, settled or allocated once
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


@cache
def measured_gpu() -> Device:
    """The current CUDA device by its own matrix products and copy, for `passes.cost.floor`; about a second.

    f16 and bf16: products of GEMM^3 on random numbers. f32: of half that size, without tf32. bandwidth:
    bytes read and written by a copy of COPY bytes, or of an eighth of the free memory."""
    import torch

    from ..passes.cost import Device

    def rate(dtype: torch.dtype, n: int) -> float:
        a, b = torch.randn(2, n, n, device="cuda", dtype=dtype).unbind()
        out = torch.empty_like(a)
        return 2e3 * n**3 / milliseconds(lambda: torch.mm(a, b, out=out))

    names = {"bf16": torch.bfloat16, "f16": torch.float16}
    flops = tuple((name, rate(dtype, GEMM)) for name, dtype in names.items())
    flops += (("f32", rate(torch.float32, GEMM // 2)),)
    size = min(COPY, torch.cuda.mem_get_info()[0] // 8)
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2e3 * size / milliseconds(lambda: target.copy_(source))
    properties = torch.cuda.get_device_properties()
    workers = properties.multi_processor_count
    return Device(properties.name, flops, bandwidth, 0, workers, tile=0, launch=0, source="measured")

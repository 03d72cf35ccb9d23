"""``gossamer bench``: a mask on this machine, ours beside PyTorch's attention with a dense mask."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..ir.errors import InputError, MissingDependencyError
from .cli_options import Batch, Debug, Dim, Dtype, Heads, KvHeads, KvLen, MaskText, QLen, VDim, dtype_of

if TYPE_CHECKING:
    from ..passes.cost import Size
    from .mask import Mask

DENSE_BYTES = 4 << 30  # what scores of the peer may take before it is left out
SLOWEST = 60.0  # seconds after which a run is not repeated


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, best first, and what the last one returned."""

    seconds: list[float]
    result: Any

    @property
    def best(self) -> float:
        return self.seconds[0]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def bench(
    mask: MaskText,
    q_len: QLen = 2048,
    kv_len: KvLen = None,
    dtype: Dtype = "f32",
    dim: Dim = 64,
    v_dim: VDim = None,
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    batch: Batch = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", min=1, help="How often to run each.")
    ] = 20,
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="PyTorch with a dense mask.")] = True,
    debug: Debug = False,
) -> None:
    """Time a mask on this machine: gossamer, and PyTorch's scaled_dot_product_attention with a dense mask.

    Prints median and best time, GFLOP/s counted on the exact non-zeros (so that
    work on masked pairs earns nothing), and the share of the floor: the least
    time that arithmetic or memory of this machine allow, both measured here.
    Close other programs first.

    \b
    Examples:
      gossamer bench "sliding_window(256)"
      gossamer bench "strided(64, 64)" --q-len 4096 --repeats 50
      gossamer bench causal --q-len 16384 --no-dense
      GOSSAMER_NUM_THREADS=1 gossamer bench causal
    """
    torch = _torch()
    from ..passes.cost import Size, floor
    from ..passes.devices import measured_cpu
    from . import cli_output as show
    from .cli_explain import count_pairs
    from .pattern_text import parse_mask

    kind = dtype_of(dtype)
    key_heads = kv_heads or heads
    if heads % key_heads:
        raise InputError("--kv-heads", f"a number that divides --heads {heads}", key_heads)
    size = Size(q_len, kv_len or q_len, batch, heads, key_heads, dim, v_dim or dim, kind)
    bound = parse_mask(mask)
    with show.working("counting pairs") as say, torch.no_grad():
        nnz = count_pairs(bound, size)
        say("measuring this machine")
        least = floor(measured_cpu(), size, nnz)
        inputs = _inputs(torch, size)
        say("compiling")
        start = perf_counter()
        ours = _ours(bound, inputs, key_heads != heads)
        ours()
        compiled = perf_counter() - start
        say("timing gossamer")
        timings = {"gossamer": _time(ours, repeats)}
        peer = _dense(torch, bound, inputs, size) if dense else None
        if peer is not None:
            say("timing PyTorch with a dense mask")
            timings["torch SDPA, dense mask"] = _time(peer, repeats)
    show.text(f"{mask}: B{batch} H{heads} q_len {q_len} kv_len {size.kv_len} head size {dim} {kind}")
    density = nnz / (batch * heads * q_len * size.kv_len)
    show.text(f"{nnz:,} pairs, density {density:.3g}, floor {show.seconds(least)}")
    _print(timings, nnz * size.pair_flops, least)
    show.text(f"first call {show.seconds(compiled)}, compilation included if the cache did not have it")
    if dense and peer is None:
        show.text("PyTorch left out: its dense scores would take more than 4 GiB")
    elif peer is not None:
        ours_out, dense_out = (torch.nan_to_num(t.result.double()) for t in timings.values())
        show.text(f"largest difference to PyTorch {(ours_out - dense_out).abs().max():.2g}")


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingDependencyError("torch", "torch", "gossamer bench") from None
    return torch


def _inputs(torch: Any, size: Size) -> tuple[Any, Any, Any]:
    kinds = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
    shapes = (
        (size.batch, size.heads, size.q_len, size.qk_size),
        (size.batch, size.kv_heads, size.kv_len, size.qk_size),
        (size.batch, size.kv_heads, size.kv_len, size.v_size),
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=generator).to(kinds[size.dtype]) for s in shapes)
    return q, k, v


def _ours(mask: Mask, inputs: tuple[Any, Any, Any], shared: bool) -> Callable[[], Any]:
    from .attention import attention

    return lambda: attention(*inputs, mask=mask, enable_gqa=shared)


def _dense(torch: Any, mask: Mask, inputs: tuple[Any, Any, Any], size: Size) -> Callable[[], Any] | None:
    """PyTorch's attention with the mask as a tensor; None where its scores would not fit."""
    if size.batch * size.heads * size.q_len * size.kv_len * 4 > DENSE_BYTES:
        return None
    used = {str(s) for s in mask.ir.predicate.free_symbols}
    batches, heads = (n if name in used else 1 for name, n in (("b", size.batch), ("h", size.heads)))
    matrices = [
        torch.stack([torch.from_numpy(mask.to_dense(size.q_len, size.kv_len, b, h)) for h in range(heads)])
        for b in range(batches)
    ]
    dense, shared = torch.stack(matrices), size.kv_heads != size.heads
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(*inputs, attn_mask=dense, enable_gqa=shared)


def _time(run: Callable[[], Any], repeats: int) -> Timing:
    result, seconds = run(), []
    for _ in range(repeats):
        start = perf_counter()
        result = run()
        seconds.append(perf_counter() - start)
        if sum(seconds) > SLOWEST:
            break
    return Timing(sorted(seconds), result)


def _print(timings: dict[str, Timing], flops: int, least: float) -> None:
    from . import cli_output as show

    numbers = ("median", "best", "GFLOP/s", "of the floor", "speed")
    table = show.table("", *numbers, right=tuple(range(1, 6)))
    slowest = max(timing.median for timing in timings.values())
    for name, timing in timings.items():
        table.add_row(
            name,
            show.seconds(timing.median),
            show.seconds(timing.best),
            f"{flops / timing.median / 1e9:.1f}",
            f"{least / timing.median:.0%}",
            f"{slowest / timing.median:.3g}x",
        )
    show.console().print(table)

"""``gossamer bench``: a mask on this machine, ours beside what PyTorch has."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...ir.errors import InputError, MissingDependencyError
from .options import Batch, Debug, Dim, Heads, KvHeads, KvLen, MaskText, QLen, VDim, dtype_of

if TYPE_CHECKING:
    from ...passes.cost import Device
    from ..bench_calls import Timing


def bench(
    mask: MaskText,
    q_len: QLen = 2048,
    kv_len: KvLen = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="DTYPE", help="f16, bf16, f32 or f64.", show_default="f32; bf16 on a GPU"
        ),
    ] = None,
    dim: Dim = 64,
    v_dim: VDim = None,
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    batch: Batch = 1,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="DEVICE", help="cpu or cuda.", show_default="cuda if there is one"),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", min=1, help="How often to run each on a CPU.")
    ] = 20,
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="PyTorch with a dense mask.")] = True,
    flex: Annotated[
        bool, typer.Option("--flex/--no-flex", help="PyTorch's FlexAttention, compiled, on a GPU.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Time a mask on this machine: gossamer, and what PyTorch has for it.

    PyTorch's scaled_dot_product_attention gets a dense mask, and none where the
    mask is full or causal; its FlexAttention is compiled for these sizes (on a GPU;
    that may take a minute). Prints median and best time, GFLOP/s counted on the
    exact non-zeros (so that work on masked pairs earns nothing), and the share of
    the floor: the least time that arithmetic or memory of this machine allow,
    both measured here. Close other programs first.

    \b
    Examples:
      gossamer bench "sliding_window(256)"
      gossamer bench "strided(64, 64)" --q-len 4096 --repeats 50
      gossamer bench "strided(64, 64)" --batch 4 --heads 16 --q-len 4096 --dim 128 --device cuda
      gossamer bench causal --q-len 16384 --no-dense
      GOSSAMER_NUM_THREADS=1 gossamer bench causal --device cpu
    """
    torch = _torch()
    from ...passes.cost import Size, floor
    from .. import bench_calls as calls
    from ..pattern_text import parse_mask
    from . import output as show
    from .explain import count_pairs

    place = _device(torch, device)
    kind = dtype_of(dtype or ("bf16" if place == "cuda" else "f32"))
    key_heads = kv_heads or heads
    if heads % key_heads:
        raise InputError("--kv-heads", f"a number that divides --heads {heads}", key_heads)
    size = Size(q_len, kv_len or q_len, batch, heads, key_heads, dim, v_dim or dim, kind)
    bound = parse_mask(mask)
    with show.working("counting pairs") as say, torch.no_grad():
        nnz = count_pairs(bound, size)
        say("measuring this machine")
        machine = _measured(place)
        least = floor(machine, size, nnz)
        bound, tensors = bound.to(place), calls.inputs(size, place)
        say("compiling")
        start = perf_counter()
        run = calls.ours(bound, tensors, size)
        run()
        if place == "cuda":
            torch.cuda.synchronize()
        compiled = perf_counter() - start
        say("timing gossamer")
        timings = {"gossamer": calls.time(run, place, repeats)}
        makers = {
            "torch SDPA": calls.sdpa if place == "cuda" else None,
            "torch SDPA, dense mask": calls.dense if dense else None,
            "torch FlexAttention, compiled": calls.flex if flex and place == "cuda" else None,
        }
        for name, make in makers.items():
            say(f"timing {name}")
            peer = make(bound, tensors, size) if make else None
            if peer is not None:
                timings[name] = calls.time(peer, place, repeats)
    where = f"{machine.name}, " if place == "cuda" else ""
    show.text(f"{mask}: {where}B{batch} H{heads} q_len {q_len} kv_len {size.kv_len} head size {dim} {kind}")
    density = nnz / (batch * heads * q_len * size.kv_len)
    show.text(f"{nnz:,} pairs, density {density:.3g}, floor {show.seconds(least)}")
    _print(timings, nnz * size.pair_flops, least)
    show.text(f"first call {show.seconds(compiled)}, compilation included if the cache did not have it")
    if dense and "torch SDPA, dense mask" not in timings:
        show.text("PyTorch with a dense mask left out: its scores would take more than 4 GiB")
    if len(timings) > 1:
        first, *others = (torch.nan_to_num(t.result.double()) for t in timings.values())
        largest = max(float((first - other).abs().max()) for other in others)
        show.text(f"largest difference to PyTorch {largest:.2g}")


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingDependencyError("torch", "torch", "gossamer bench") from None
    return torch


def _device(torch: Any, wanted: str | None) -> str:
    present = torch.cuda.is_available()
    if wanted not in (None, "cpu", "cuda"):
        raise InputError("--device", "cpu or cuda", repr(wanted))
    if wanted == "cuda" and not present:
        raise InputError("--device", "cpu: torch finds no GPU", "cuda")
    return wanted or ("cuda" if present else "cpu")


def _measured(device: str) -> Device:
    if device == "cpu":
        from ...passes.devices import measured_cpu

        return measured_cpu()
    from ..measure_gpu import measured_gpu

    return measured_gpu()


def _print(timings: dict[str, Timing], flops: int, least: float) -> None:
    from . import output as show

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

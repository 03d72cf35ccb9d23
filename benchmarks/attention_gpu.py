"""Attention on this machine's GPU: gossamer, its peers and the device's own floor, in one run.

    python benchmarks/attention_gpu.py --peers flex,cudnn,fa4
    python benchmarks/attention_gpu.py --masks window256,strided64 --dims 128 --peers none
    python benchmarks/attention_gpu.py --sections decode,first_call,overhead,lists,graphs,regret
    python benchmarks/attention_gpu.py --peers flex --more-sizes --budget 500     # adds to the same JSON
    python benchmarks/attention_gpu.py --backward --peers flex,cudnn

The device's ceilings come first. Every output is held against float64 before its time counts. Gossamer is
timed on all cases before the first peer, and again beside each peer, which is what the ratio is made of.
Times are medians of many calls by events, with the L2 cache overwritten in between (triton's do_bench); what
is needed once (block masks, compilation) is left out. Results go to one JSON a device, and an invocation
replaces only what it measured. `python benchmarks/gpu_report.py FILE` says which goals they meet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Annotated, Any

import torch
import typer
from cases import Case, cases, chosen, more_cases
from gpu_prepare import DTYPES, Job, Shape, prepare, random_inputs
from gpu_regret import regret
from gpu_report import console, merged, print_report
from report import ROOT, load, provenance, save

import gossamer

SECTIONS = ("speed", "decode", "first_call", "overhead", "lists", "graphs", "regret")
PEERS = ("flex", "cudnn", "flash", "fa4")
MORE_SIZES = ((1, 16, 16384), (16, 16, 1024))
SHARE = 0.4  # of the budget, that compiling side by side may take


def main(
    masks: Annotated[str, typer.Option(help="names, separated by commas, or 'all'")] = "all",
    dims: Annotated[str, typer.Option(help="sizes of a head")] = "128,64",
    sizes: Annotated[str, typer.Option(help="batch x heads x length, separated by commas")] = "4x16x4096",
    more_sizes: Annotated[bool, typer.Option(help="also 1x16x16384 and 16x16x1024")] = False,
    dtype: Annotated[str, typer.Option(help=f"one of {', '.join(DTYPES)}")] = "bf16",
    peers: Annotated[str, typer.Option(help=f"of {', '.join(PEERS)}; or 'none'")] = "flex,cudnn",
    sections: Annotated[str, typer.Option(help=f"of {', '.join(SECTIONS)}")] = "speed",
    budget: Annotated[float, typer.Option(help="seconds; no peer is started after them")] = 480.0,
    backward: Annotated[bool, typer.Option(help="time gradients in place of the section speed")] = False,
    candidates: Annotated[int, typer.Option(help="schedules a mask that the section regret times")] = 200,
    out: Annotated[Path | None, typer.Option(help="JSON; default benchmarks/results/gpu_DEVICE.json")] = None,
) -> None:
    """Time attention on this machine's GPU."""
    start = monotonic()
    wanted = chosen(sections, SECTIONS, "section")
    others = () if peers == "none" else chosen(peers, PEERS, "peer")
    shapes = [(*size, dim) for size in parse_sizes(sizes, more_sizes) for dim in parse_dims(dims)]
    names = chosen(masks, tuple(cases(64) | more_cases(64)), "mask")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"no dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if not torch.cuda.is_available():
        raise SystemExit("attention_gpu.py needs a CUDA GPU; torch finds none. On a CPU: attention_cpu.py")

    path = out or ROOT / "benchmarks" / "results" / f"gpu_{device_slug()}.json"
    results = load(path)

    def keep(**found: Any) -> None:
        results.update(merged(results, found))
        save(path, results)

    with torch.no_grad():
        keep(**provenance_gpu())
        for section in wanted:
            if section == "speed" and backward:
                gradients(names, shapes, dtype, others, start + budget, keep)
            elif section == "speed":
                speed(names, shapes, dtype, others, start + budget, keep)
            elif section == "regret":
                sweep = partial(regret, names, parse_dims(dims), start + budget, candidates)
                keep(regret=attempt(sweep))
            else:
                keep(**{section: attempt(partial(extra, section, bool(others)))})
    print_report(results)
    console.print(f"wrote {path} after {monotonic() - start:.0f} s")
    rows = [*results.get("speed", ()), *results.get("backward", ())]
    failed = [row["mask"] for row in rows if "failed" in row]
    if failed:
        raise SystemExit(f"wrong or failed: {', '.join(failed)}")


# ---- speed ----


def speed(
    names: Sequence[str],
    shapes: Sequence[Shape],
    dtype: str,
    peers: Sequence[str],
    deadline: float,
    keep: Callable[..., None],
) -> None:
    """Ours on every case, then, case by case, each peer that has the mask."""
    from gpu_peers import able

    picked = [(name, shape) for shape in shapes for name in names]
    jobs = [Job("gossamer", *case, dtype) for case in picked]
    jobs += [Job("flex", *case, dtype) for case in picked if "flex" in peers]
    began = monotonic()
    prepared = prepare(jobs, deadline=began + SHARE * max(0.0, deadline - began))
    console.print(f"compiled {len(prepared)} of {len(jobs)} in {monotonic() - began:.0f} s")
    for job, outcome in prepared.items():
        if outcome.error:
            console.print(f"{job.mask} {job.shape}: {job.who} does not compile: {outcome.error}")
    for name, shape in picked:
        keep(speed=[_ours(name, shape, dtype, prepared.get(Job("gossamer", name, shape, dtype)))])
    for name, shape in picked:
        case = case_of(name, shape)
        for other in peers:
            if able(other, case) and monotonic() < deadline:
                keep(speed=[_beside(other, case, shape, dtype)])


def gradients(
    names: Sequence[str],
    shapes: Sequence[Shape],
    dtype: str,
    peers: Sequence[str],
    deadline: float,
    keep: Callable[..., None],
) -> None:
    """Rows `backward`: see gpu_backward.py."""
    from gpu_backward import backward

    picked = [(name, shape) for shape in shapes for name in names]
    with torch.enable_grad():
        backward(picked, case_of, dtype, peers, deadline, keep, console.print)


def case_of(name: str, shape: Shape) -> Case:
    return (cases(shape[2], "cuda") | more_cases(shape[2], "cuda"))[name]


def _ours(name: str, shape: Shape, dtype: str, prepared: Any) -> dict[str, Any]:
    """One row: pairs, floor, error and time of ours; `failed` says why where there is no time."""
    from gpu_check import accuracy

    case = case_of(name, shape)
    row = {"mask": name, "shape": shape, "dtype": dtype, "compile_s": prepared and prepared.seconds}
    try:
        tensors, call = our_call(case, shape, dtype)
        pairs = gossamer.Mask.trace(cases_on_cpu(name, shape).mask_mod).analyze(shape[2], shape[2]).nnz
        if pairs != case.pairs(shape[2]):
            raise AssertionError(f"analyze counts {pairs} pairs, the mask_mod has {case.pairs(shape[2])}")
        row |= {"pairs": pairs, "density": pairs / shape[2] ** 2, "floor_ms": floor_ms(pairs, shape, dtype)}
        began = perf_counter()
        found = call()
        torch.cuda.synchronize()
        row["first_call_s"] = perf_counter() - began
        judged = accuracy(found, tensors, lambda rows: case.dense(shape[2], rows))
        row |= {"error": judged.error, "allowed": judged.allowed}
        if not judged.passes:
            raise AssertionError(f"error {judged.error:.3g}, allowed {judged.allowed:.3g}")
        row["ms"] = timed(call)
    except Exception as error:  # one mask that fails is a result; the others are measured all the same
        row["failed"] = f"{type(error).__name__}: {error}"[:500]
    console.print(f"{name:18} {shape}: {row.get('ms', row.get('failed'))}")
    return row


def _beside(other: str, case: Case, shape: Shape, dtype: str) -> dict[str, Any]:
    """What a peer takes, and ours right before it."""
    from gpu_peers import peer

    row: dict[str, Any] = {"mask": case.name, "shape": shape, "dtype": dtype}
    began = perf_counter()
    try:
        tensors, call = our_call(case, shape, dtype)
        run = peer(other, case, tensors).call
        torch.cuda.synchronize()
        difference = float((run().float() - call().float()).abs().max())
        first = perf_counter() - began
        found = {"ours_ms": timed(call), "ms": timed(run), "prepare_s": first, "difference": difference}
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"[:500]}
    console.print(f"{case.name:18} {shape}: {other} {found.get('ms', found.get('failed'))}")
    return row | {"peers": {other: found}}


def our_call(case: Case, shape: Shape, dtype: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    """Inputs, and the call a user would make, with a mask captured once."""
    tensors, mask = random_inputs(shape, dtype), gossamer.Mask.trace(case.mask_mod)
    return tensors, lambda: gossamer.attention(*tensors, mask=mask)


def cases_on_cpu(name: str, shape: Shape) -> Case:
    return (cases(shape[2]) | more_cases(shape[2]))[name]


def floor_ms(pairs: int, shape: Shape, dtype: str) -> float:
    """Milliseconds that the pairs' products or the tensors' bytes take at the ceilings of this device."""
    from gossamer.frontend.measure_gpu import measured_gpu
    from gossamer.passes.cost import Size, floor

    batch, heads, length, dim = shape
    size = Size(length, length, batch, heads, heads, dim, dim, dtype)
    return 1e3 * floor(measured_gpu(), size, pairs * batch * heads)


def timed(run: Callable[[], Any]) -> float:
    from gossamer.frontend.measure_gpu import milliseconds

    return milliseconds(run)


# ---- the other sections ----


def extra(section: str, peers: bool) -> Any:
    """decode, first_call, overhead, lists or graphs."""
    import gpu_decode
    import gpu_host

    return gpu_decode.decode(peers) if section == "decode" else getattr(gpu_host, section)()


def attempt(run: Callable[[], Any]) -> Any:
    """What a section found; {"failed": why} where it could not be measured."""
    try:
        return run()
    except Exception as error:
        console.print_exception()
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


# ---- the device, and options ----


def provenance_gpu() -> dict[str, Any]:
    """Device, versions, commit, date, and the ceilings that floors are made of."""
    from gossamer.frontend.measure_gpu import measured_gpu

    properties, ceilings = torch.cuda.get_device_properties(), measured_gpu()
    found = provenance(threads=1)
    found["device"] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "cuda": torch.version.cuda,
    }
    found["ceilings"] = {
        **{f"{name}_tflops": rate / 1e12 for name, rate in ceilings.flops},
        "copy_tbs": ceilings.bandwidth / 1e12,
    }
    return found


def device_slug() -> str:
    """'nvidia_h100_80gb_hbm3'."""
    return re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()).strip("_")


def parse_dims(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"expected sizes of a head such as 128,64; got {text!r}")
    return list(map(int, parts))


def parse_sizes(text: str, more: bool) -> list[tuple[int, int, int]]:
    found = []
    for part in filter(None, text.split(",")):
        numbers = part.split("x")
        if len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
            raise typer.BadParameter(f"expected batch x heads x length such as 4x16x4096; got {part!r}")
        batch, heads, length = map(int, numbers)
        if length % 64:
            raise typer.BadParameter(f"expected a length that is a multiple of 64; got {length}")
        found.append((batch, heads, length))
    return found + (list(MORE_SIZES) if more else [])


if __name__ == "__main__":
    typer.run(main)

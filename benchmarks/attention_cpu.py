"""Attention on the CPU: gossamer and its peers in one run, interleaved.

    python benchmarks/attention_cpu.py                          # everything, about ten minutes
    python benchmarks/attention_cpu.py --masks window256,strided64 --quick --no-flex
    python benchmarks/attention_cpu.py --json benchmarks/results/cpu_mine.json

Peers: FlexAttention compiled by torch.compile (needs a C++ compiler) and scaled_dot_product_attention with a
dense boolean mask, for the causal mask also with is_causal. What each needs once (block masks, dense masks,
compilation) is left out of the times a call; each gets all threads. Errors are against float64.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import isolated
import torch
import typer
from cases import Case, cases, chosen
from measure import GEMM, exact, gemm, interleaved
from peers import peers
from report import provenance, save
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gossamer

SECTIONS = ("speed", "scaling", "analysis", "start")
DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
console = Console(width=None if sys.stdout.isatty() else 150)


def main(
    masks: Annotated[str, typer.Option(help="names, separated by commas")] = "all",
    dtype: Annotated[str, typer.Option(help=f"one of {', '.join(DTYPES)}")] = "f32",
    batch: int = 1,
    heads: int = 8,
    seq: Annotated[int, typer.Option(help="queries and keys, a multiple of 64")] = 2048,
    dim: Annotated[int, typer.Option(help="size of a head")] = 64,
    threads: Annotated[int, typer.Option(help="of gossamer and of torch; 0: the cores")] = 0,
    sections: Annotated[str, typer.Option(help=f"which of {', '.join(SECTIONS)}")] = ",".join(SECTIONS),
    quick: Annotated[bool, typer.Option(help="fewer rounds")] = False,
    flex: Annotated[bool, typer.Option(help="also time compiled FlexAttention")] = True,
    json: Annotated[Path | None, typer.Option(help="write the results here")] = None,
) -> None:
    """Time attention on this machine's CPU."""
    threads = _set_threads(threads)
    wanted = chosen(sections, SECTIONS, "section")
    results: dict[str, Any] = provenance(threads)
    console.print(f"{results['machine']['cpu']}, {threads} threads; torch {torch.__version__}")
    with torch.inference_mode():
        if "speed" in wanted:
            every = cases(seq)
            picked = [every[name] for name in chosen(masks, tuple(every), "mask")]
            shape = (batch, heads, seq, dim)
            results["speed"] = speed(picked, shape, dtype, rounds=3 if quick else 9, flex=flex)
        if "scaling" in wanted:
            results["scaling"] = scaling(heads, dim, rounds=3 if quick else 9)
        if "analysis" in wanted:
            results["analysis"] = analysis(repeats=1 if quick else 5)
        if "start" in wanted:
            results["start"] = start()
    if json is not None:
        save(json, results)
        console.print(f"wrote {json}")


# ---- speed ----


def speed(
    picked: list[Case], shape: tuple[int, int, int, int], dtype: str, *, rounds: int, flex: bool
) -> dict[str, Any]:
    """Milliseconds a call of every contestant on every mask, and how exact ours is."""
    torch.manual_seed(0)
    tensors = tuple(torch.randn(shape).to(DTYPES[dtype]) for _ in range(3))
    rows = [
        _race(case, tensors, rounds=rounds, flex=flex) | {"tiles": _tiles(case, dtype, shape[3])}
        for case in track(picked, "timing", console=console, transient=True)
    ]
    b, h, s, d = shape
    table = Table(title=f"B{b} H{h} S{s} D{d} {dtype}: milliseconds a call, medians")
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    ours = ("speed-up", "wanted", "GFLOP/s", "of GEMM", "error", "SDPA's", "tiles")
    columns = ("mask", "density", *names, *ours)
    for column in columns:
        table.add_column(column, justify="left" if column == "mask" else "right", no_wrap=True)
    for row in rows:
        goal = row["goal"]
        style = "" if goal is None else "green" if row["speedup"] >= goal else "red"
        table.add_row(
            row["mask"],
            f"{row['density']:.3f}",
            *(f"{row['ms'][n][0]:.2f}" if n in row["ms"] else "" for n in names),
            f"[{style}]{row['speedup']:.2f}x[/]" if style else f"{row['speedup']:.2f}x",
            "" if goal is None else f"{goal}x",
            f"{row['gflops']:.0f}",
            f"{row['of_gemm']:.0%}",
            f"{row['error']:.1e}",
            f"{row['peer_error']:.1e}",
            row["tiles"],
        )
    console.print(table)
    return {"shape": shape, "dtype": dtype, "rounds": rounds, "masks": rows}


def _race(case: Case, tensors: Any, *, rounds: int, flex: bool) -> dict[str, Any]:
    mask = gossamer.Mask.trace(case.mask_mod)
    start = perf_counter()
    gossamer.attention(*tensors, mask=mask)
    first = perf_counter() - start
    found = peers(case, tensors, flex=flex)
    calls = {"gossamer": lambda: gossamer.attention(*tensors, mask=mask)}
    calls |= {peer.name: peer.call for peer in found}
    times = interleaved({**calls, "gemm": gemm()}, rounds=rounds)
    matmul = times.pop("gemm")
    batch, heads, length, size = tensors[0].shape
    pairs = case.pairs(length)
    flops = 4 * pairs * size * batch * heads / times["gossamer"].median
    want = exact(*tensors, lambda rows: case.dense(length, rows))
    return {
        "mask": case.name,
        "density": pairs / length**2,
        "ms": {name: (t.median * 1e3, t.best * 1e3) for name, t in times.items()},
        "speedup": min(times[peer.name].median for peer in found) / times["gossamer"].median,
        "goal": case.goal,
        "gflops": flops / 1e9,
        "gemm_gflops": 2 * GEMM**3 / matmul.median / 1e9,
        "of_gemm": flops * matmul.median / (2 * GEMM**3),
        "error": _error(calls["gossamer"](), want),
        "peer_error": _error(found[0].call(), want),
        "first_call_s": {"gossamer": first, **{p.name: p.prepared for p in found if p.prepared}},
    }


def _tiles(case: Case, dtype: str, dim: int) -> str:
    """Rows by keys of the tiles of each kernel, as its IR states them."""
    kernel = gossamer.compile(gossamer.AttentionSpec(case.mask_mod, dtype=dtype, qk_size=dim))
    found = re.findall(r"rows \(([\d, ]+)\), keys \(([\d, ]+)\)", kernel.ir)
    sides = [["x".join(re.findall(r"\d+", side)) for side in pair] for pair in found]
    return ", ".join(" by ".join(pair) for pair in sides)


def _error(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((torch.nan_to_num(found.double()) - want).abs().max())


# ---- scaling ----


def scaling(heads: int, dim: int, *, rounds: int) -> dict[str, Any]:
    """window256 at growing lengths: time, and memory beyond q, k, v and the output."""
    lengths = (2048, 4096, 8192, 16384)
    mask = gossamer.Mask.trace(cases(2048)["window256"].mask_mod)
    tensors = {n: torch.randn(3, 1, heads, n, dim).unbind() for n in lengths}
    calls = {str(n): lambda n=n: gossamer.attention(*tensors[n], mask=mask) for n in lengths}
    times = interleaved(calls, rounds=rounds)
    rows = []
    for n in track(lengths, "memory", console=console, transient=True):
        seconds = times[str(n)].median
        a_row = seconds / n
        peak = isolated.measure("memory", n)["bytes"]
        rows.append({"length": n, "ms": seconds * 1e3, "us_a_row": a_row * 1e6, "peak_bytes": peak})
    table = Table(title="window256, growing lengths")
    for column in ("length", "ms", "µs a row", "against linear", "memory beyond q, k, v, o"):
        table.add_column(column, justify="right")
    for row in rows:
        row["against_linear"] = row["us_a_row"] / rows[0]["us_a_row"]
        cells = (row["length"], f"{row['ms']:.2f}", f"{row['us_a_row']:.2f}", f"{row['against_linear']:.2f}")
        table.add_row(*map(str, cells), f"{row['peak_bytes'] / 2**20:.1f} MiB")
    console.print(table)
    return {"rows": rows}


# ---- analysis ----


def analysis(repeats: int) -> dict[str, Any]:
    """Terms of closed-form masks at lengths from 2^11 to 2^24, each found for the first time."""
    exponents = (11, 14, 17, 20, 24)
    runs = {
        e: [isolated.measure("analysis", 1 << e) for _ in range(repeats)]
        for e in track(exponents, "analysis", console=console, transient=True)
    }
    table = Table(title=f"capture and analysis of a new mask: milliseconds, median of {repeats}")
    for column in ("mask", *(f"2^{e}" for e in exponents), "terms"):
        table.add_column(column, justify="left" if column == "mask" else "right")
    rows = []
    for name, first in runs[exponents[0]][0].items():
        ms = {e: statistics.median(run[name]["ms"] for run in runs[e]) for e in exponents}
        rows.append({"mask": name, "terms": first["terms"], "ms": {str(1 << e): t for e, t in ms.items()}})
        table.add_row(name, *(f"{t:.2f}" for t in ms.values()), str(first["terms"]))
    console.print(table)
    return {"rows": rows}


# ---- start ----


def start() -> dict[str, Any]:
    """Imports, first calls with new masks, and first calls that find their kernel on disk."""
    with isolated.empty_cache() as cache:
        fresh = isolated.measure("first_calls", cache=cache)
        isolated.measure("call", cache=cache)
        cached = [isolated.measure("call", cache=cache) for _ in range(5)]
    bare = [isolated.measure("bare")["import_gossamer"] for _ in range(5)]
    very_first = fresh["seconds"].pop("very first")
    slowest = max(fresh["seconds"], key=fresh["seconds"].get)
    found = {
        "import_gossamer_s": statistics.median(bare),
        "cached_call_s": statistics.median(c["seconds"] for c in cached),
        "cached_call_imports": cached[-1]["imported"],
        "cached_call_compilations": cached[-1]["compilations"],
        "very_first_call_s": very_first,
        "new_mask_s": fresh["seconds"],
        "compilations_of_other_sizes": fresh["compilations_of_other_sizes"],
    }
    table = Table("", "seconds", "", title="starting")
    table.add_row("import gossamer", f"{found['import_gossamer_s']:.3f}", "")
    brought = ", ".join(found["cached_call_imports"]) or "none of tvm, sympy, islpy, networkx"
    table.add_row(
        "new process, kernel on disk: first call after import torch, gossamer",
        f"{found['cached_call_s']:.3f}",
        f"imports {brought}; compiles {found['cached_call_compilations']}",
    )
    table.add_row(
        "first call of a process that compiles, with tvm imported", f"{very_first:.3f}", "starts LLVM"
    )
    middle = statistics.median(fresh["seconds"].values())
    table.add_row("first call with a new mask, median", f"{middle:.3f}", "")
    table.add_row("first call with a new mask, slowest", f"{fresh['seconds'][slowest]:.3f}", slowest)
    compiled = found["compilations_of_other_sizes"]
    table.add_row("another batch, q_len, kv_len, window", "", f"compiles {compiled}")
    console.print(table)
    return found


# ---- options ----


def _set_threads(threads: int) -> int:
    threads = threads or len(os.sched_getaffinity(0))
    os.environ["GOSSAMER_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return threads


if __name__ == "__main__":
    typer.run(main)

"""Mixture of experts on this machine's GPU: gossamer and torch's grouped_mm, replayed from CUDA graphs, in
one run.

    python benchmarks/moe_gpu.py                    # every model, 1 to 8192 tokens, both routings
    python benchmarks/moe_gpu.py --models olmoe,qwen3-30b --tokens 16,1024 --peers none
    python benchmarks/moe_gpu.py --sweep --models olmoe --tokens 8192    # tile sizes of the two products
    python benchmarks/moe_gpu.py --backward --tokens 8192 --routing uniform
    python benchmarks/moe_gpu.py --models mixtral --weights bf16,int4,int8,fp8,mxfp4 --tokens 1,16,8192

All start from ids and weights. Every result is held against float64 (over some tokens) before its time
counts. Bound: 6 T K H I operations at the measured rate of a matrix product, or the bytes of the matrices in
use, of x and of the result at that of a copy, whichever takes longer. Times are medians of many replays
(triton's do_bench, the L2 cache overwritten in between); `call_us` is a call without a graph. Quantised
matrices are judged by the numbers that their codes stand for, their bound counts their own bytes, and
`over_bf16` says how many times faster they are than bf16 in the same run, if that was measured. Results go to
one JSON a device, and an invocation replaces only what it measured; nothing is started when the budget is
spent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from time import monotonic, perf_counter
from typing import Annotated, Any

import torch
import typer
from attention_gpu import device_slug, provenance_gpu
from moe_models import MODELS, Model, bound_ms, routed
from moe_training import compared
from report import ROOT, load, save

import gossamer

SAMPLE = 48  # tokens whose results are computed in float64
PEERS = ("grouped_mm", "compiled")
CODES = ("int8", "int4", "int2", "fp8", "mxfp4")


def main(
    models: Annotated[str, typer.Option(help=f"of {', '.join(MODELS)}; or 'all'")] = "all",
    tokens: Annotated[str, typer.Option(help="numbers of tokens")] = "1,16,128,1024,8192",
    peers: Annotated[str, typer.Option(help=f"of {', '.join(PEERS)}; or 'none'")] = "grouped_mm",
    routing: Annotated[str, typer.Option(help="uniform, zipf or both")] = "both",
    weights: Annotated[str, typer.Option(help=f"bf16 or formats of codes: {', '.join(CODES)}")] = "bf16",
    backward: Annotated[bool, typer.Option(help="also time gradients and see what they hold")] = False,
    sweep: Annotated[bool, typer.Option(help="time other schedules of the kernels, and print them")] = False,
    budget: Annotated[float, typer.Option(help="seconds; nothing is started after them")] = 480.0,
    out: Annotated[
        Path | None, typer.Option(help="JSON; default benchmarks/results/moe_gpu_DEVICE.json")
    ] = None,
) -> None:
    """Time layers of experts in bfloat16 on this machine's GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("moe_gpu.py needs a CUDA GPU; torch finds none. On a CPU: moe_cpu.py")
    deadline = monotonic() + budget
    path = out or ROOT / "benchmarks" / "results" / f"moe_gpu_{device_slug()}.json"
    results = load(path) | provenance_gpu()
    rows = {tuple(row["case"]): row for row in results.get("rows", ())}
    rates = results["ceilings"]["bf16_tflops"] * 1e12, results["ceilings"]["copy_tbs"] * 1e12
    names = list(MODELS) if models == "all" else models.split(",")
    others = () if peers == "none" else tuple(peers.split(","))
    kinds = {"uniform": (False,), "zipf": (True,), "both": (False, True)}[routing]
    failed: list[Any] = []
    counts = [int(n) for n in tokens.split(",")]
    ahead([MODELS[name] for name in names], weights.split(","), counts, sweep=sweep, backward=backward)
    for name in names:
        dense = Layer(MODELS[name])
        for kind in weights.split(","):
            layer = dense if kind == "bf16" else CodedLayer(dense, kind)
            for count, skewed in product(map(int, tokens.split(",")), kinds):
                if monotonic() > deadline:
                    print(f"the budget is spent before {name} T={count} {kind}")
                    continue
                row = layer.measure(count, skewed, others if kind == "bf16" else (), rates, sweep)
                if "ms" in row and dense.times.get((count, skewed)):
                    row["over_bf16"] = dense.times[count, skewed] / row["ms"]
                    print(f"  {row['over_bf16']:.2f} times as fast as bf16")
                if backward and kind == "bf16":
                    row["backward"] = dense.gradients(count, skewed)
                rows[tuple(row["case"])] = row
                failed += [row["case"]] if "failed" in row else []
                results["rows"] = list(rows.values())
                save(path, results)
            del layer
        del dense
        torch.cuda.empty_cache()
    print(f"wrote {path}")
    if failed:
        raise SystemExit(f"wrong or failed: {failed}")


class Layer:
    """The matrices of one model on the device."""

    kind = "bf16"
    times: dict[tuple[int, bool], float]  # milliseconds by tokens and skew

    def __init__(self, model: Model) -> None:
        self.model, self.times = model, {}
        torch.manual_seed(0)

        def made(*shape: int) -> torch.Tensor:
            found = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
            return found.normal_(0, 0.02)

        self.up = made(model.experts, 2 * model.inner, model.hidden)
        self.down = made(model.experts, model.hidden, model.inner)

    def bytes_each(self) -> float:
        """Bytes a number of the matrices."""
        return 2.0

    def matrices(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the two matrices of an expert hold."""
        return self.up[expert], self.down[expert]

    def measure(
        self, tokens: int, skewed: bool, peers: tuple[str, ...], rates: tuple[float, float], sweep: bool
    ) -> dict[str, Any]:
        """One row: bound, error, our time and the peers'."""
        model, device = self.model, torch.device("cuda")
        x = torch.randn(tokens, model.hidden, device=device, dtype=torch.bfloat16)
        ids, weights = routed(model, tokens, skewed, device)
        row: dict[str, Any] = {"case": [model.name, tokens, "zipf1.2" if skewed else "uniform"]}
        row["case"] += [] if self.kind == "bf16" else [self.kind]
        row["bound_ms"] = bound_ms(model, tokens, ids, *rates, self.bytes_each())
        with torch.inference_mode():
            try:
                began = perf_counter()
                found = gossamer.experts(x, ids, weights, self.up, self.down)
                torch.cuda.synchronize()
                row["first_call_s"] = perf_counter() - began
                row |= self._judged(found, x, ids, weights)
                call = lambda: gossamer.experts(x, ids, weights, self.up, self.down)  # noqa: E731
                row["ms"], row["call_us"] = replayed(call), eager_us(call)
                self.times[tokens, skewed] = row["ms"]
                row["of_bound"] = row["bound_ms"] / row["ms"]
                for peer in peers:
                    row[peer] = self._beside(peer, x, ids, weights, found)
                if sweep:
                    row["sweep"] = self._sweep(x, ids, weights, found)
            except Exception as error:  # a case that fails is a result; the others are measured all the same
                row["failed"] = f"{type(error).__name__}: {error}"[:500]
        shown = {k: v for k, v in row.items() if k not in ("case", "sweep")}
        print(
            *row["case"],
            {k: round(v, 4) if isinstance(v, float) else v for k, v in shown.items()},
            flush=True,
        )
        return row

    def gradients(self, tokens: int, skewed: bool) -> dict[str, Any]:
        """What gradients take and hold: ours, ours with the first product computed again, grouped_mm's."""
        x = torch.randn(tokens, self.model.hidden, device="cuda", dtype=torch.bfloat16)
        ids, weights = routed(self.model, tokens, skewed, torch.device("cuda"))
        layers = {
            "gossamer": gossamer.experts,
            "recompute": partial(gossamer.experts, recompute=True),
            "grouped_mm": grouped_mm,
        }
        rows = compared(layers, replayed, (x, ids, weights, self.up, self.down))
        for name, row in rows.items():
            print(
                " ", name, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True
            )
        return rows

    def _judged(self, found: Any, x: Any, ids: Any, weights: Any) -> dict[str, float]:
        """Errors of ours and of bf16 torch against float64, over a few tokens. Raises AssertionError."""
        picked = torch.linspace(0, len(x) - 1, min(SAMPLE, len(x)), device=x.device).long().unique()
        x, ids, weights = x[picked], ids[picked], weights[picked]
        exact, plain = torch.zeros(x.shape, dtype=torch.float64, device=x.device), torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, place = torch.where(ids == e)
            first, second = self.matrices(e)
            for out, dtype in ((exact, torch.float64), (plain, x.dtype)):
                gate, up = (x[token].to(dtype) @ first.to(dtype).T).chunk(2, -1)
                y = (torch.nn.functional.silu(gate) * up) @ second.to(dtype).T
                out.index_add_(0, token, (y * weights[token, place, None].to(dtype)).to(out.dtype))
        error, theirs = ((o.double() - exact).abs().max().item() for o in (found[picked], plain))
        allowed = 2 * theirs + exact.abs().max().item() * 2.0**-8
        if not error <= allowed:
            raise AssertionError(f"error {error:.3g}, allowed {allowed:.3g}")
        return {"error": error, "allowed": allowed}

    def _beside(self, peer: str, x: Any, ids: Any, weights: Any, ours: Any) -> dict[str, Any]:
        """What a peer takes."""
        try:
            run = torch.compile(grouped_mm, dynamic=False) if peer == "compiled" else grouped_mm
            call = lambda: run(x, ids, weights, self.up, self.down)  # noqa: E731
            difference = (call().float() - ours.float()).abs().max().item()
            return {"ms": replayed(call), "call_us": eager_us(call), "difference": difference}
        except Exception as error:
            torch.cuda.synchronize()
            return {"failed": f"{type(error).__name__}: {error}"[:300]}

    def _sweep(self, x: Any, ids: Any, weights: Any, expected: Any) -> list[dict[str, Any]]:
        """Times of other schedules, kernel by kernel."""
        from moe_sweep import timed

        formats = tuple(getattr(matrix, "_q", None) for matrix in (self.up, self.down))
        found, every = schedules(self.model, self.kind, len(x), formats)
        rows = timed(found, every, x, ids, weights, self.up, self.down, expected)
        for row in rows:
            shown = {
                name.removeprefix("experts_"): round(ms, 4) for name, ms in row.get("kernels", {}).items()
            }
            print(f"    {row.get('ms', 0):8.4f}  {row['name']}: {row.get('failed', shown)}", flush=True)
        return rows


def schedules(model: Model, kind: str, tokens: int, formats: tuple[Any, Any]) -> tuple[list[Any], list[Any]]:
    """What a sweep times for a case, the default first, and the specs of it."""
    from moe_sweep import Candidate, candidates, specs

    from gossamer.frontend.device import target_of
    from gossamer.frontend.moe.layer import is_handful, load_of
    from gossamer.passes.moe.once import decodes_once

    entries = tokens * model.top_k
    alone = is_handful(tokens, entries, model.experts)
    load = "one" if alone else load_of(entries / model.experts, torch.device("cuda"))
    mean, target = entries / model.experts, target_of(torch.device("cuda"))
    once = tuple(load == "many" and q is not None and decodes_once(q, mean, "bf16", target) for q in formats)
    found = [Candidate("default", more={"once": once}), *candidates(kind, tokens, mean, formats)]
    shape = (model.experts, model.top_k, model.hidden, model.inner)
    return found, specs(found, shape, load, entries <= 512, target, formats)


def ahead(models: list[Model], kinds: list[str], tokens: list[int], *, sweep: bool, backward: bool) -> None:
    """Compile what these cases time, in parallel."""
    from moe_sweep import compiled_ahead, with_gradients

    every: list[Any] = []
    for model, kind, count in product(models, kinds, tokens):
        formats: tuple[Any, Any] = (None, None)
        if kind != "bf16":
            sizes = model.hidden, model.inner
            formats = tuple(gossamer.quantize(torch.zeros(1, 1, n), kind)._q for n in sizes)  # type: ignore[assignment]
        found = schedules(model, kind, count, formats)[1]
        every += found if sweep else found[:1]
        every += with_gradients(found[0]) if backward and kind == "bf16" else ()
    began = perf_counter()
    compiled_ahead(every)
    print(f"compiled {len(every)} programs in {perf_counter() - began:.0f} s", flush=True)


class CodedLayer(Layer):
    """A layer's matrices, quantised."""

    def __init__(self, dense: Layer, kind: str) -> None:
        self.model, self.times, self.kind = dense.model, {}, kind
        self.up, self.down = gossamer.quantize(dense.up, kind), gossamer.quantize(dense.down, kind)

    def bytes_each(self) -> float:
        numbers = sum(math.prod(w.shape) for w in (self.up, self.down))
        return (self.up.nbytes + self.down.nbytes) / numbers

    def matrices(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.up.expert(expert).dequantize()[0], self.down.expert(expert).dequantize()[0]


def grouped_mm(x: Any, ids: Any, weights: Any, up: Any, down: Any) -> torch.Tensor:
    """torch's grouped products with their glue, none of which waits for the host."""
    tokens, top_k = ids.shape
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(up.shape[0], device=x.device, dtype=torch.int64)
    bounds = counts.scatter_add(0, flat, torch.ones_like(flat)).cumsum(0).to(torch.int32)
    gate, value = torch._grouped_mm(x[order // top_k], up.transpose(-2, -1), offs=bounds).chunk(2, -1)
    y = torch._grouped_mm(torch.nn.functional.silu(gate) * value, down.transpose(-2, -1), offs=bounds)
    y = y * weights.to(y.dtype).reshape(-1)[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(tokens * top_k, device=x.device)
    return y[back].view(tokens, top_k, -1).sum(1)


def replayed(call: Callable[[], Any]) -> float:
    """Milliseconds of a replay of a CUDA graph of the call."""
    from gossamer.frontend.measure_gpu import milliseconds, recorded

    return milliseconds(recorded(call), warmup=15, rep=60)


def eager_us(call: Callable[[], Any], repeats: int = 30) -> float:
    """Microseconds a call, one after another without a graph, the host included."""
    torch.cuda.synchronize()
    began = perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return 1e6 * (perf_counter() - began) / repeats


if __name__ == "__main__":
    typer.run(main)

"""Chunks, warps, stages and numbers of programs of kernels of linear attention on a GPU, timed one by one.

    python benchmarks/linear_sweep.py --ops read_values,read_gradients
    python benchmarks/linear_sweep.py --batch 4 --heads 16 --length 8192 --keys 256 --size 64

Each variant is the whole forward or backward of one linear attention (bfloat16, elu, rows of all heads side
by side in memory, as projections leave them) with other chunks for one operation; milliseconds of its
launches without the host. The first line of an operation is what the schedule chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from time import monotonic
from typing import Annotated, Any

import torch
import typer

from gossamer.frontend.linear import feature_maps
from gossamer.frontend.measure_gpu import milliseconds
from gossamer.frontend.prepare import allocate
from gossamer.frontend.term_expr import to_expr
from gossamer.ir.graph import Graph
from gossamer.ir.linear import Chunks, FeatureMap
from gossamer.passes.linear.build import build_linear, build_linear_gradients
from gossamer.passes.linear.pipeline import lower_linear, run_linear
from gossamer.passes.linear.spec import LinearSpec
from gossamer.runtime.driver import driver
from gossamer.runtime.gpu import target_of


def main(
    ops: Annotated[str, typer.Option(help="kinds of operations")] = "read_values,read_gradients",
    batch: int = 4,
    heads: int = 16,
    length: int = 8192,
    keys: int = 256,
    size: int = 64,
    causal: bool = False,
    rows: Annotated[str, typer.Option(help="of a chunk")] = "32,64,128",
    warps: str = "4,8",
    stages: str = "2,3,4",
    programs: Annotated[str, typer.Option(help="programs to aim at")] = "528",
    budget: Annotated[float, typer.Option(help="seconds; nothing is compiled after them")] = 120.0,
) -> None:
    """Print milliseconds of every variant."""
    deadline = monotonic() + budget
    target = target_of(*torch.cuda.get_device_capability())
    traced = feature_maps.elu()
    elu = FeatureMap(tuple(to_expr(part, frozenset(("x0",))) for part in traced.parts))
    spec = LinearSpec(
        elu, elu, dtype="bf16", qk_size=size, v_size=size, causal=causal, eps=1e-6, split=keys >= 1024,
        keeps=True, precision="tf32", target=target,
    )  # fmt: skip
    tensors = Tensors(spec, batch, heads, length, length if causal else keys)
    graphs = [build_linear(spec), build_linear_gradients(spec, ("q", "k", "v"))]
    found = [run_linear(graph, spec) for graph in graphs]
    numbers = [[int(n) for n in text.split(",")] for text in (rows, warps, stages, programs)]
    for kind, graph in product(ops.split(","), found):
        if not graph.of_kind(kind):
            continue
        for graph_of, count, text in variants(graph, kind, *numbers):
            if monotonic() > deadline:
                print(f"the budget is spent before {kind} {text}")
                break
            try:
                print(f"{kind} {text}: {tensors.time(graph_of, count):.4f} ms", flush=True)
            except Exception as error:  # one that does not fit the device is a result too
                print(f"{kind} {text}: {type(error).__name__} {str(error)[:100]}", flush=True)


def variants(
    graph: Graph, kind: str, rows: list[int], warps: list[int], stages: list[int], programs: list[int]
) -> Iterator[tuple[Graph, int, str]]:
    chosen: Chunks = graph.of_kind(kind)[0].attr("chunks")
    yield graph, programs[0], f"as scheduled {chosen.rows} rows {dict(chosen.meta)}"
    for r, w, s, p in product(rows, warps, stages, programs):
        chunks = replace(chosen, rows=r, meta=(("stages", s), ("warps", w)))
        changed = graph.map_ops(partial(_with, kind, chunks))
        yield changed, p, f"{r} rows {w} warps {s} stages {p} programs"


def _with(kind: str, chunks: Chunks, op: Any) -> Any:
    return op.with_attrs(chunks=chunks) if op.kind == kind else None


class Tensors:
    """What graphs read and make, on the device."""

    def __init__(self, spec: LinearSpec, batch: int, heads: int, length: int, keys: int) -> None:
        self.spec = spec
        self.sizes: dict[Any, int] = {"B": batch, "Hq": heads, "Hk": heads, "L": length, "N": keys}
        self.values: dict[str, torch.Tensor] = {}

    def of(self, name: str, dtype: str, shape: tuple[Any, ...]) -> torch.Tensor:
        if name not in self.values:
            extents = [self.sizes[n] if isinstance(n, str) else int(n) for n in shape]
            if dtype == "bf16":
                extents[1], extents[2] = extents[2], extents[1]
            made = torch.rand(extents, device="cuda")
            self.values[name] = made.bfloat16().transpose(1, 2) if dtype == "bf16" else made
        return self.values[name]

    def time(self, graph: Graph, programs: int) -> float:
        values = {v.name: self.of(v.name, v.dtype, v.shape) for v in graph.inputs}
        values |= {n: self.of(n, graph.values[n].dtype, graph.values[n].shape) for n in graph.outputs}
        executable = driver().compile(lower_linear(graph, self.spec), self.spec.target)
        spans = {}
        for name in ("L", "N"):
            chunks = -(-self.sizes[name] // (64 if self.spec.causal else 128))
            fair = -(-chunks * self.sizes["B"] * self.sizes["Hq"] // programs)
            spans[f"span_{name}"] = max(4 if self.spec.split else 1, fair)
        bound = executable.bind(
            {**values, **spans}, allocate=partial(allocate, device=torch.device("cuda", 0))
        )
        return milliseconds(lambda: bound(values))


if __name__ == "__main__":
    typer.run(main)

"""Linear attention: gossamer, and the plain composition eager and under torch.compile, in one run.

    python benchmarks/linear.py                                        on a GPU if there is one, else a CPU
    python benchmarks/linear.py --cases flurka --launches --json benchmarks/results/linear_mine.json

Forward, and forward with gradients of everything that has them, through autograd. On a GPU milliseconds
come from events over many calls, as everywhere here; `graph` columns are replays of a CUDA graph of the same
call, which leave out what the host does. On a CPU contestants take turns. `error` is the largest one
against float64 over twice that of the plain composition plus one ulp of the largest result, of the output or
of any gradient: above 1 the rule of docs/design.md is broken. Goals for FLuRKA at S=8192 on an H100, over
torch.compile: 2.5 forward, 1.8 with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import torch
import typer
from measure import interleaved
from report import provenance, save
from rich.console import Console
from rich.table import Table

import gossamer
from gossamer import feature_maps
from gossamer.frontend.measure_gpu import milliseconds

console = Console()
EPS = 1e-6
Run = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Tensors by a generator, and the same function by us and by torch operators."""

    tensors: Callable[[torch.device, torch.dtype], list[torch.Tensor]]
    ours: Run
    plain: Run


def elu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.elu(x) + 1


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, phi: Run) -> torch.Tensor:
    """Linear attention as it is written in torch: two products and a quotient."""
    fq, fk = phi(q), phi(k)
    num = fq @ (fk.transpose(-1, -2) @ v)
    den = fq @ fk.sum(-2, keepdim=True).transpose(-1, -2)
    return num / (den + EPS)


def chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, phi: Run, size: int = 64) -> torch.Tensor:
    """Causal linear attention in chunks, by torch operators. The length is a multiple of the size."""
    fq, fk = (phi(t).unflatten(2, (-1, size)) for t in (q, k))
    values = v.unflatten(2, (-1, size))
    values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    states = fk.transpose(-1, -2) @ values
    before = states.float().cumsum(2).to(q.dtype) - states
    found = fq @ before + (fq @ fk.transpose(-1, -2)).tril() @ values
    found = found.flatten(2, 3)
    return found[..., :-1] / (found[..., -1:] + EPS)


def layer(
    x: torch.Tensor,
    wq: torch.Tensor,
    wk: torch.Tensor,
    wv: torch.Tensor,
    e: torch.Tensor,
    phi: Run,
    heads: int,
) -> torch.Tensor:
    """FLuRKA as it is written: projections, low-rank projections of keys and values, linear attention."""
    q, k, v = ((x @ w).unflatten(2, (heads, -1)).transpose(1, 2) for w in (wq, wk, wv))
    return attend(q, e @ k, e @ v, phi).transpose(1, 2).flatten(2)


def flurka(batch: int, length: int, heads: int, size: int, rank: int, variant: str) -> Case:
    channels = heads * size
    maps: dict[str, tuple[Any, Run]] = {"elu": ("elu", elu), "relu": ("relu", lambda x: x.relu() + 1e-3)}

    def tensors(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        shapes = [(batch, length, channels), *[(channels, channels)] * 3, (rank, length)]
        return drawn(shapes, device, dtype, scaled=True)

    if variant == "rfa":
        features = feature_maps.orthogonal_projection(size, size)

        def fourier(x: torch.Tensor) -> torch.Tensor:
            y = torch.nn.functional.normalize(x, dim=-1) @ features.to(x.device, x.dtype)
            return torch.cat([y.sin(), y.cos()], -1) * size**-0.5

        given: Any = None

        def ours(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            nonlocal given
            given = given or feature_maps.random_fourier(features.to(x.device, x.dtype))
            return gossamer.flurka(x, *rest, heads=heads, feature_map=given, eps=EPS)

        return Case(tensors, ours, lambda *t: layer(*t, phi=fourier, heads=heads))
    name, phi = maps[variant]
    return Case(
        tensors,
        lambda *t: gossamer.flurka(*t, heads=heads, feature_map=name, eps=EPS),
        lambda *t: layer(*t, phi=phi, heads=heads),
    )


def linear(batch: int, heads: int, length: int, size: int, causal: bool) -> Case:
    plain = chunked if causal else attend
    return Case(
        lambda device, dtype: drawn([(batch, heads, length, size)] * 3, device, dtype),
        lambda *t: gossamer.linear_attention(*t, "elu", causal=causal, eps=EPS),
        lambda *t: plain(*t, phi=elu),
    )


def drawn(
    shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype, scaled: bool = False
) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=g) for shape in shapes]
    if scaled:  # weights keep the size of what they are applied to
        made[1:] = [t / t.shape[-1 if n == len(made) - 2 else 0] ** 0.5 for n, t in enumerate(made[1:])]
    return [t.to(device, dtype) for t in made]


CASES = {
    "cuda": {
        "flurka_elu": flurka(4, 8192, 16, 64, 256, "elu"),
        "flurka_relu": flurka(4, 8192, 16, 64, 256, "relu"),
        "flurka_rfa": flurka(4, 8192, 16, 64, 256, "rfa"),
        "linear": linear(4, 16, 8192, 64, causal=False),
        "linear_causal": linear(4, 16, 8192, 64, causal=True),
        "linear_causal_128": linear(4, 16, 8192, 128, causal=True),
    },
    "cpu": {
        "flurka_elu": flurka(1, 2048, 8, 64, 128, "elu"),
        "linear": linear(1, 8, 2048, 64, causal=False),
        "linear_causal": linear(1, 8, 2048, 64, causal=True),
    },
}


def main(
    cases: Annotated[str, typer.Option(help="beginnings of names, separated by commas, or 'all'")] = "all",
    rounds: Annotated[int, typer.Option(help="turns of every contestant, on a CPU")] = 5,
    compiled: Annotated[bool, typer.Option(help="time torch.compile too")] = True,
    launches: Annotated[bool, typer.Option(help="on a GPU, print the time of each launch of ours")] = False,
    budget: Annotated[float, typer.Option(help="seconds; no case is started after them")] = 480.0,
    json: Annotated[Path | None, typer.Option(help="where to write results")] = None,
) -> None:
    """Time every case forward and with gradients: bfloat16 on a GPU, float32 on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    starts = tuple("" if c == "all" else c for c in cases.split(","))
    deadline = monotonic() + budget
    results = provenance(threads=torch.get_num_threads()) | {"rows": []}
    for name, case in CASES[device.type].items():
        if not name.startswith(starts):
            continue
        if monotonic() > deadline:
            console.print(f"the budget is spent before {name}")
            continue
        for row in measure(name, case, device, dtype, rounds, compiled, launches):
            results["rows"].append(row)
            if json is not None:
                save(json, results)
    table = Table(*COLUMNS, title=f"milliseconds, {dtype} on {device.type}")
    for row in results["rows"]:
        table.add_row(
            *(f"{row[c]:.3f}" if isinstance(row.get(c), float) else str(row.get(c)) for c in COLUMNS)
        )
    console.print(table)


CONTESTANTS = ("ours", "eager", "compile", "ours graph", "compile graph")
OVER = {"over eager": ("ours", "eager"), "over compile": ("ours", "compile"),
        "over compile graph": ("ours graph", "compile graph")}  # fmt: skip
COLUMNS = ("case", "what", *CONTESTANTS, *OVER, "error")


def measure(
    name: str,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    compiled: bool,
    launches: bool,
) -> Iterator[dict[str, Any]]:
    """Two rows: forward, and forward with gradients."""
    tensors = case.tensors(device, dtype)
    contestants = {"ours": case.ours, "eager": case.plain}
    if compiled:
        contestants["compile"] = torch.compile(case.plain)
    for learns in (False, True):
        what = "with gradients" if learns else "forward"
        runs = {who: runner(run, tensors, learns=learns) for who, run in contestants.items()}
        row: dict[str, Any] = {"case": name, "what": what, "error": judged(case, tensors, learns=learns)}
        if device.type == "cpu":
            row |= {who: 1e3 * t.median for who, t in interleaved(runs, rounds=rounds).items()}
        else:
            row |= {who: milliseconds(run) for who, run in runs.items() if run() is not None}
            graphs = {who: run for who, run in runs.items() if who != "eager"}
            row |= {f"{who} graph": milliseconds(replay(run)) for who, run in graphs.items()}
        row |= {title: row[b] / row[a] for title, (a, b) in OVER.items() if a in row and b in row}
        if launches and device.type == "cuda":
            row["launches_us"] = launched(runs["ours"])
        console.print(row)
        yield row


def runner(run: Run, tensors: list[torch.Tensor], *, learns: bool) -> Callable[[], Any]:
    if not learns:

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return run(*tensors)

        return forward
    leaves = [t.detach().requires_grad_() for t in tensors]
    grad = torch.ones_like(run(*leaves))
    return lambda: torch.autograd.grad(run(*leaves), leaves, grad)


def replay(run: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of the call, as a function that runs it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def launched(run: Callable[[], Any], calls: int = 10) -> list[tuple[str, float]]:
    """The kernels of a call in the order of their launches, with microseconds each, by torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    events = [e for e in found.events() or () if e.device_type == DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    count = len(events) // calls
    last = events[-count:] if count else []
    return [(event.name[:60], float(event.time_range.elapsed_us())) for event in last]


def judged(case: Case, tensors: list[torch.Tensor], *, learns: bool) -> float:
    """Our largest error over what the rule allows, against float64."""
    exact, plain, ours = (
        _results(run, [t.to(dtype) for t in tensors], learns)
        for run, dtype in (
            (case.plain, torch.float64), (case.plain, tensors[0].dtype), (case.ours, tensors[0].dtype),
        )
    )  # fmt: skip
    worst = 0.0
    for e, p, o in zip(exact, plain, ours, strict=True):
        ulp = torch.finfo(o.dtype).eps * e.abs().max()
        worst = max(worst, float((o - e).abs().max() / (2 * (p - e).abs().max() + ulp)))
    return worst


def _results(run: Run, tensors: list[torch.Tensor], learns: bool) -> tuple[torch.Tensor, ...]:
    """The output, or the gradients of a fixed weighted sum of it."""
    leaves = [t.detach().requires_grad_(learns) for t in tensors]
    out = run(*leaves)
    if not learns:
        return (out,)
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=g).to(torch.bfloat16).to(out.device, out.dtype)
    return torch.autograd.grad(out, leaves, weights)


if __name__ == "__main__":
    typer.run(main)

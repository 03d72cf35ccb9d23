"""Linear attention: gossamer, and the plain composition eager and under torch.compile, in one run.

    python benchmarks/linear.py                                        on a GPU if there is one, else a CPU
    python benchmarks/linear.py --cases flurka --json benchmarks/results/linear_mine.json

Forward, and forward with gradients of everything that has them, through autograd. On a GPU milliseconds come
from events over many calls, as everywhere here; on a CPU contestants take turns. `error` is the largest one
against float64 over twice that of the plain composition plus one ulp of the largest result: above 1 the rule
of docs/design.md is broken. Goals for FLuRKA at S=8192 on an H100, over torch.compile: 2.5 forward, 1.8 with
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import interleaved
from report import provenance, save
from rich.console import Console
from rich.table import Table

import gossamer
from gossamer import feature_maps

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
    json: Annotated[Path | None, typer.Option(help="where to write results")] = None,
) -> None:
    """Time every case forward and with gradients: bfloat16 on a GPU, float32 on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    starts = tuple("" if c == "all" else c for c in cases.split(","))
    rows = []
    for name, case in CASES[device.type].items():
        if name.startswith(starts):
            rows += measure(name, case, device, dtype, rounds, compiled)
            if json is not None:
                save(json, provenance(threads=torch.get_num_threads()) | {"rows": rows})
    heads = ("case", "what", "ours", "eager", "compile", "over eager", "over compile", "error")
    table = Table(*heads, title=f"milliseconds, {dtype} on {device.type}")
    for row in rows:
        told = (f"{row[h]:.3f}" if isinstance(row[h], float) else str(row[h]) for h in row)
        table.add_row(*told)
    console.print(table)


def measure(
    name: str, case: Case, device: torch.device, dtype: torch.dtype, rounds: int, compiled: bool
) -> list[dict[str, Any]]:
    """Two rows: forward, and forward with gradients."""
    tensors = case.tensors(device, dtype)
    error = judged(case, tensors)
    contestants = {"ours": case.ours, "eager": case.plain}
    if compiled:
        contestants["compile"] = torch.compile(case.plain)
    rows = []
    for what in ("forward", "with gradients"):
        runs = {who: runner(run, tensors, learns=what != "forward") for who, run in contestants.items()}
        ms = timed(runs, device, rounds)
        rows.append(
            {"case": name, "what": what}
            | {who: ms.get(who, float("nan")) for who in ("ours", "eager", "compile")}
            | {f"over {who}": ms.get(who, float("nan")) / ms["ours"] for who in ("eager", "compile")}
            | {"error": error}
        )
        console.print(f"{name} {what}: {ms}")
    return rows


def runner(run: Run, tensors: list[torch.Tensor], *, learns: bool) -> Callable[[], Any]:
    if not learns:

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return run(*tensors)

        return forward
    leaves = [t.detach().requires_grad_() for t in tensors]
    grad = torch.ones_like(run(*leaves))
    return lambda: torch.autograd.grad(run(*leaves), leaves, grad)


def timed(runs: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    if device.type == "cpu":
        return {who: 1e3 * t.median for who, t in interleaved(runs, rounds=rounds).items()}
    from gossamer.frontend.measure_gpu import milliseconds

    for run in runs.values():
        run()
    return {who: milliseconds(run) for who, run in runs.items()}


def judged(case: Case, tensors: list[torch.Tensor]) -> float:
    """Our largest error over what the rule allows, against float64."""
    with torch.no_grad():
        exact = case.plain(*(t.double() for t in tensors))
        plain, ours = (run(*tensors).double() for run in (case.plain, case.ours))
    ulp = torch.finfo(tensors[0].dtype).eps * exact.abs().max()
    return float((ours - exact).abs().max() / (2 * (plain - exact).abs().max() + ulp))


if __name__ == "__main__":
    typer.run(main)

"""Whole models: gossamer.jit, eager mode and torch.compile in one run, interleaved.

    python benchmarks/models.py                                 # minutes on a CPU
    python benchmarks/models.py --cases longformer --layers 2 --no-compile
    python benchmarks/models.py --device cuda --dtype bf16 --rounds 20 --json benchmarks/results/mine.json

Models have the sizes of the published ones and random weights; times are those of a forward pass of one
sequence; differences are those to eager mode. Results are written after each case:

    longformer, bigbird   base-sized, against Hugging Face's eager mode
    step                  a decoder of sliding windows at S=2048: time a call, and time until the call returns
    generate              new tokens a second behind a prompt, static and dynamic caches
    longformer_compiled, bigbird_compiled
                          the same, gossamer with torch.compile for the rest, and torch.compile
    capture               what a first call on the CPU takes, of a decoder of 12 layers, with no kernel in the
                          cache, and in another process with all of them there
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import torch._dynamo
import transformers
import typer
from measure import interleaved
from report import provenance, save
from rich.console import Console
from rich.table import Table

import gossamer

BASE = dict(
    vocab_size=50265, hidden_size=768, intermediate_size=3072, num_attention_heads=12, pad_token_id=1,
    bos_token_id=0, eos_token_id=2, max_position_embeddings=4098,
)  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longformer": ("Longformer", BASE | dict(attention_window=512, sep_token_id=2)),
    "bigbird": ("BigBird", BASE | dict(attention_type="block_sparse", block_size=64, num_random_blocks=3)),
}
CASES = (*MODELS, "step", "generate", *(f"{name}_compiled" for name in MODELS), "capture")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
console = Console(width=None if sys.stdout.isatty() else 120)


def main(
    cases: Annotated[str, typer.Option(help="some of these, in any order")] = ",".join(CASES),
    layers: Annotated[int, typer.Option(help="of each model")] = 12,
    seq: Annotated[int, typer.Option(help="tokens of longformer and bigbird")] = 4096,
    prompt: Annotated[int, typer.Option(help="tokens of step and generate")] = 2048,
    width: Annotated[int, typer.Option(help="of step's and generate's model; 0: 768, 2048 on a GPU")] = 0,
    tokens: Annotated[int, typer.Option(help="that generate makes")] = 64,
    rounds: int = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"one of {', '.join(DTYPES)}")] = "f32",
    compile: Annotated[bool, typer.Option(help="also torch.compile")] = True,
    json: Annotated[Path | None, typer.Option(help="write the results here")] = None,
) -> None:
    """Time whole models on this machine."""
    results: dict[str, Any] = provenance(torch.get_num_threads()) | {"device": device, "dtype": dtype}
    results["load"] = os.getloadavg()[0]  # of everything on this machine, before we start
    if device == "cuda":
        results["gpu"] = torch.cuda.get_device_name()
    width = width or (2048 if device == "cuda" else 768)

    def keep(case: str, found: dict[str, Any]) -> None:
        console.print(case, found)
        results[case] = found
        if json is not None:
            save(json, results)

    with torch.no_grad():
        for case in cases.split(","):
            start = perf_counter()
            if case.removesuffix("_compiled") in MODELS:
                name, _, compiled = case.partition("_")
                if compile or not compiled:
                    made = build(name, layers, seq, device, DTYPES[dtype])
                    keep(case, one(*made, name, rounds, bool(compiled)))
            elif case == "step":
                keep(case, step(decoder(layers, width, device, DTYPES[dtype]), prompt, rounds, compile))
            elif case == "generate":
                keep(case, generate(decoder(layers, width, device, DTYPES[dtype]), prompt, tokens, rounds))
            elif case == "capture":
                keep(case, captures())
            else:
                raise typer.BadParameter(f"{case!r} is none of {', '.join(CASES)}", param_hint="--cases")
            console.print(f"{case} took {perf_counter() - start:.0f} s")
            torch._dynamo.reset()


def one(model: Any, inputs: dict[str, Any], name: str, rounds: int, compile: bool) -> dict[str, Any]:
    """Times of one model, each way beside eager mode, and differences: what one compiler makes of a function
    can keep another from it, so that each starts afresh."""
    layers, seq = model.config.num_hidden_layers, inputs["input_ids"].shape[1]
    ways: dict[str, Callable[[], Any]] = {"gossamer": partial(gossamer.jit, model)}
    if compile:
        ways["with inductor"] = partial(gossamer.jit, model, rest="inductor")
        ways["torch.compile"] = partial(torch.compile, model)
    found: dict[str, Any] = {"name": name, "layers": layers, "seq": seq}
    eager = finished(model, inputs)
    plain = eager().last_hidden_state
    table = Table(
        "by", "s a call", "best", "eager", "over eager", title=f"{name}, {layers} layers, {seq} tokens"
    )
    for by, way in ways.items():
        torch._dynamo.reset()
        call = way()
        run, start = finished(call, inputs), perf_counter()
        out = run().last_hidden_state
        row = {"first call s": perf_counter() - start}
        row["against eager"] = (out.float() - plain.float()).abs().max().item()
        if by == "gossamer":
            found["sites"] = len(call.report().compiled)
        ours, beside = interleaved({by: run, "eager": eager}, rounds=rounds, slot=0.0).values()
        row |= {"median": ours.median, "best": ours.best, "calls": ours.calls, "eager": beside.median}
        row["over eager"] = beside.median / ours.median
        found[by] = row
        table.add_row(by, *(f"{row[key]:.4f}" for key in ("median", "best", "eager", "over eager")))
    console.print(table)
    return found


def finished(call: Callable[..., Any], inputs: dict[str, Any]) -> Callable[[], Any]:
    """A call that returns when the device has done it."""

    def run() -> Any:
        out = call(**inputs)
        if out.last_hidden_state.is_cuda:
            torch.cuda.synchronize()
        return out

    return run


def build(name: str, layers: int, seq: int, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A model of a published one's size, and a sequence; the first token of a Longformer is global."""
    family, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options, num_hidden_layers=layers)
    model = getattr(transformers, f"{family}Model")(config).eval()
    ids = torch.randint(5, 50000, (1, seq))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "longformer":
        inputs["global_attention_mask"] = torch.zeros_like(ids).index_fill(1, torch.tensor([0]), 1)
    return model.to(device, dtype), {key: value.to(device) for key, value in inputs.items()}


# ---- a decoder ----


def decoder(layers: int, width: int, device: str, dtype: torch.dtype) -> Any:
    """A decoder of sliding windows, with grouped heads of 64."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 256), sliding_window=1024,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model: Any = transformers.MistralForCausalLM(config)
    return model.eval().to(device, dtype)


def step(model: Any, seq: int, rounds: int, compile: bool) -> dict[str, Any]:
    """Seconds of a forward pass, and until the call returns, which a GPU hides where it takes longer."""
    ids = torch.randint(5, 30000, (1, seq), device=model.device)
    body, found = model.model, {"layers": model.config.num_hidden_layers, "seq": seq}
    ours = gossamer.jit(body)
    calls = {"gossamer": ("eager", ours), "eager": ("eager", body), "sdpa": ("sdpa", body)}
    calls |= {"torch.compile": ("sdpa", torch.compile(body))} if compile else {}

    def run(attention: str, call: Any) -> Any:
        model.set_attn_implementation(attention)
        return call(input_ids=ids, use_cache=False)

    contestants = {name: partial(run, *how) for name, how in calls.items()}
    plain = contestants["eager"]().last_hidden_state
    for name, run in contestants.items():
        out = run().last_hidden_state
        found[f"{name} against eager"] = (out.float() - plain.float()).abs().max().item()
    found["sites"], found["left"] = len(ours.report().compiled), len(ours.report().left)
    whole = {name: finished(run, {}) for name, run in contestants.items()}
    for name, timing in interleaved(whole, rounds=rounds, slot=0.0).items():
        found[name] = {"median": timing.median, "best": timing.best, "host": returned(contestants[name])}
    extra = found["gossamer"]["host"] - found["sdpa"]["host"]
    found["host time beside sdpa, of a step"] = extra / found["gossamer"]["median"]
    return found


def returned(run: Callable[[], Any]) -> float:
    """Seconds until a call returns, which may be before the device has done it."""
    samples = []
    for _ in range(5):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = perf_counter()
        run()
        samples.append(perf_counter() - start)
    return min(samples)


def generate(model: Any, prompt: int, tokens: int, rounds: int) -> dict[str, Any]:
    """New tokens a second behind a prompt."""
    gossamer.register_transformers()
    ids = torch.randint(5, 30000, (1, prompt), device=model.device)
    found: dict[str, Any] = {"prompt": prompt, "tokens": tokens}
    for cache in ("dynamic", "static"):

        def run(attention: str, cache: str = cache) -> Any:
            model.set_attn_implementation(attention)
            kind = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
            mask = torch.ones_like(ids)
            return model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **kind
            ).cpu()

        runs = {attention: partial(run, attention) for attention in ("gossamer", "sdpa")}
        outs = {name: run() for name, run in runs.items()}
        same = (outs["gossamer"] == outs["sdpa"]).float().mean().item()
        timings = interleaved(runs, rounds=min(rounds, 3), slot=0.0)
        found[cache] = {name: tokens / timing.best for name, timing in timings.items()} | {"same": same}
    return found


# ---- first calls ----

FIRST = """
import time, torch, transformers, gossamer
config = transformers.MistralConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4,
    num_key_value_heads=2, sliding_window=64, attn_implementation="eager")
model = transformers.MistralModel(config).eval()
ids = torch.randint(1000, (1, 256))
with torch.no_grad():
    model(ids, use_cache=False)
    f = gossamer.jit(model)
    start = time.perf_counter()
    f(ids, use_cache=False)
    first = time.perf_counter() - start
    torch._dynamo.reset()
    start = time.perf_counter()
    torch.compile(model, backend="eager")(ids, use_cache=False)
    print(first, time.perf_counter() - start, len(f.report().compiled))
"""


def captures() -> dict[str, float]:
    """Seconds of a first call with an empty and with a full cache, and of torch's capture alone."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "from the cache"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST],
                env=os.environ | {"GOSSAMER_CACHE_DIR": folder},
                capture_output=True,
                text=True,
                check=True,
            )
            first, captured, sites = map(float, done.stdout.split()[-3:])
            found |= {f"{name} s": first, f"capture alone ({name}) s": captured, "sites": sites}
    return found


if __name__ == "__main__":
    typer.run(main)

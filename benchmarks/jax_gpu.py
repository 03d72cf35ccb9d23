"""Kernels under JAX on this machine's NVIDIA GPU: whether they are right, and how long they take.

    python benchmarks/jax_gpu.py                          # both, about two minutes
    python benchmarks/jax_gpu.py --sections right
    python benchmarks/jax_gpu.py --sections speed --length 8192 --budget 120

Every output and gradient is held against float64 by the rule of docs/design.md: at most twice the error of
the formula in plain JAX in the same dtype, plus one ulp of the largest number. Times are of programs compiled
by `jax.jit`, the median of batches of calls that wait for the GPU once a batch. What fails is printed, and
the rest goes on. Results go to benchmarks/results/jax_DEVICE.json, after each case and each time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import gossamer.jax
from gossamer import masks
from gossamer.frontend.jax import gpu as jax_gpu

NAMES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
Dense = Callable[[Any, Any], Any]  # query and key indices -> who attends


@dataclass(frozen=True)
class Case:
    """One attention. dense: the mask, of indices [q, 1] and [k]. bias: the distance times a learned slope of
    each head is added to scores. offset: of queries. lens: of keys."""

    name: str
    mask: Any
    dense: Dense
    dtype: str = "bf16"
    q_len: int = 300
    kv_len: int = 300
    heads: tuple[int, int] = (4, 2)
    size: int = 64
    batch: int = 2
    bias: bool = False
    sinks: bool = False
    offset: int = 0
    lens: tuple[int, ...] = ()
    gradients: bool = True


def is_causal(q: Any, k: Any) -> Any:
    return q >= k


def in_window(q: Any, k: Any) -> Any:
    return (k <= q) & (q - k <= 100)


def cases() -> list[Case]:
    causal, window = masks.causal(), masks.sliding_window(100, 0)
    ids = np.repeat([0, 1, 2, 3], [50, 120, 7, 123])
    allowed = np.random.default_rng(0).random((300, 300)) < 0.3
    even = jnp.asarray(np.arange(300) % 3 != 0)
    return [
        *(Case("causal", causal, is_causal, dtype, size=s) for dtype in NAMES for s in (64, 128)),
        Case("window", window, in_window),
        Case("window, long", window, in_window, q_len=1500, kv_len=1500, size=128),
        Case("window, unequal", window, in_window, q_len=77, kv_len=301),
        Case("strided", masks.strided(16, 32), lambda q, k: (abs(q - k) < 32) | ((q - k) % 16 == 0)),
        Case("longformer", masks.longformer(40, 8), lambda q, k: (abs(q - k) <= 40) | (q < 8) | (k < 8)),
        Case("dilated", masks.dilated_window(9, 4), lambda q, k: ((q - k) % 4 == 0) & (abs(q - k) <= 16)),
        Case("documents", masks.document(ids=jnp.asarray(ids)), lambda q, k: ids[q] == ids[k]),
        Case("captured", masks.causal() & (lambda b, h, q, k: even[k]), lambda q, k: (q >= k) & (k % 3 != 0)),
        Case("dense", jnp.asarray(allowed), lambda q, k: allowed[q, k]),
        Case("none", None, lambda q, k: (q >= 0) & (k >= 0), size=96),
        Case("slopes", causal, is_causal, bias=True),
        Case("sinks", window, in_window, sinks=True, dtype="f16"),
        Case("lengths", causal, is_causal, lens=(300, 41)),
        Case("decode", causal, is_causal, "bf16", 1, 4096, (8, 2), 128, offset=4095, gradients=False),
    ]  # fmt: skip


def attend(case: Case, q: Any, k: Any, v: Any, slopes: Any, sinks: Any) -> Any:
    """By gossamer."""
    options: dict[str, Any] = {}
    if case.bias:
        options["score_mod"] = lambda s, b, h, i, j: s + slopes[h] * (j - i)
    if case.sinks:
        options["sinks"] = sinks
    if case.lens:
        options["kv_lens"] = jnp.asarray(case.lens, jnp.int32)
    if case.offset:
        options["q_offset"] = case.offset
    return gossamer.jax.attention(q, k, v, mask=case.mask, **options)


def formula(np_: Any, case: Case, q: Any, k: Any, v: Any, slopes: Any, sinks: Any) -> Any:
    """By the formula, in the dtype of the arrays, whose scores and sums may be wider."""
    wide = np_.float64 if q.dtype == np.float64 else np_.float32
    k, v = (np_.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    row = np.arange(case.q_len)[None, None, :, None] + case.offset
    column = np.arange(case.kv_len)[None, None, None]
    mask = case.dense(row, column)
    if case.lens:
        mask = mask & (column < np.asarray(case.lens)[:, None, None, None])
    scores = np_.einsum("btnh,bsnh->bnts", q, k).astype(wide) / math.sqrt(case.size)
    if case.bias:
        scores = scores + slopes[:, None, None].astype(wide) * (column - row)
    scores = np_.where(mask, scores, -1e30)
    top = scores.max(-1, keepdims=True)
    if case.sinks:
        top = np_.maximum(top, sinks[:, None, None].astype(wide))
    p = np_.where(mask, np_.exp(scores - top), 0)
    total = p.sum(-1, keepdims=True)
    if case.sinks:
        total = total + np_.exp(sinks[:, None, None].astype(wide) - top)
    p = p / np_.where(total > 0, total, 1)
    return np_.einsum("bnts,bsnh->btnh", p.astype(q.dtype), v)


def inputs(case: Case, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    g = np.random.default_rng(seed)
    shapes = (case.q_len, case.heads[0]), (case.kv_len, case.heads[1]), (case.kv_len, case.heads[1])
    made = [g.standard_normal((case.batch, *shape, case.size)) for shape in shapes]
    made += [g.standard_normal(case.heads[0]) / 10, g.standard_normal(case.heads[0])]
    return made, g.standard_normal(made[0].shape)


Run = Callable[[tuple[Any, ...], Any], tuple[Any, ...]]


def program(function: Callable[..., Any], case: Case) -> Run:
    """(arrays, weight of the output) -> output and gradients, by name in `NAMED`."""

    def total(weight: Any, *arrays: Any) -> Any:
        out = function(*arrays)
        return (out.astype(weight.dtype) * weight).sum(), out

    def run(arrays: tuple[Any, ...], weight: Any) -> tuple[Any, ...]:
        if not case.gradients:
            return (function(*arrays),)
        gradients, out = jax.grad(total, argnums=wanted, has_aux=True)(weight, *arrays)
        return (out, *gradients)

    wanted = (1, 2, 3, *([4] if case.bias else []), *([5] if case.sinks else []))
    return jax.jit(run)


NAMED = ("output", "dq", "dk", "dv", "the others")


def references(case: Case) -> tuple[Run, Run]:
    """The formula in the case's dtype, and in float64 on the CPU; compiled."""

    def compiled(kind: Any, wide: Any) -> Run:
        given, weight = inputs(case, 0)
        arrays = tuple(jax.ShapeDtypeStruct(x.shape, kind) for x in given)
        run: Any = program(partial(formula, jnp, case), case)
        return run.lower(arrays, jax.ShapeDtypeStruct(weight.shape, wide)).compile()

    plain = compiled(NAMES[case.dtype], jnp.float32)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        return plain, compiled(jnp.float64, jnp.float64)


def right(case: Case, known: Future[tuple[Run, Run]], draws: int = 3) -> tuple[float, str]:
    """The largest error over what is allowed, of the output and the gradients, and whose it is.

    known: the references. Errors of all draws count as one: the largest of ours, twice the largest of plain
    JAX."""
    dtype, cpu = NAMES[case.dtype], jax.local_devices(backend="cpu")[0]
    ours = program(partial(attend, case), case)
    plain, exact = known.result()
    errors: dict[str, list[float]] = {}
    for seed in range(draws):
        given, weight = inputs(case, seed)
        arrays = tuple(jnp.asarray(x, dtype) for x in given)
        rounded = [np.asarray(x, np.float64) for x in arrays]
        narrow = jnp.asarray(weight, jnp.float32)
        with jax.enable_x64(True), jax.default_device(cpu):
            true = exact(tuple(jnp.asarray(x) for x in rounded), jnp.asarray(weight, jnp.float64))
            true = [np.asarray(x) for x in true]
        for name, x, y, z in zip(NAMED, ours(arrays, narrow), plain(arrays, narrow), true, strict=False):
            mine, near = (float(np.abs(np.asarray(a, np.float64) - z).max()) for a in (x, y))
            most = errors.setdefault(name, [0.0, 0.0, 0.0])
            ulp = float(jnp.finfo(dtype).eps) * float(np.abs(z).max())
            errors[name] = [max(a, b) for a, b in zip(most, (mine, near, ulp), strict=True)]
            if math.isnan(mine):
                return math.nan, name
    ratios = {name: mine / (2 * near + ulp) for name, (mine, near, ulp) in errors.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    return ratios[worst], worst


def compile_beside(target: str) -> None:
    """Compile the kernels of all cases in processes side by side, which needs no GPU: they share a cache."""
    count = min(len(cases()), max(1, (os.cpu_count() or 2) - 2))
    command = [sys.executable, __file__, "--lower", target, "--share"]
    settings = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = [subprocess.Popen([*command, f"{n}/{count}"], env=settings) for n in range(count)]
    for process in started:
        process.wait()


def lower(target: str, share: str) -> None:
    """Lower each count-th case from the first-th on."""
    first, count = map(int, share.split("/"))
    for case in cases()[first::count]:
        given, weight = inputs(case, 0)
        arrays = tuple(jax.ShapeDtypeStruct(x.shape, NAMES[case.dtype]) for x in given)
        weights = jax.ShapeDtypeStruct(weight.shape, jnp.float32)
        with gossamer.jax.lowering_for(target):
            traced = program(partial(attend, case), case).trace(arrays, weights)
            traced.lower(lowering_platforms=("cuda",))


# speed ----------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], Any], budget: float = 0.6) -> float:
    """A call's time: the median of five batches."""
    jax.block_until_ready(run())
    start = perf_counter()
    jax.block_until_ready([run() for _ in range(3)])
    calls = max(3, min(200, int(budget / 5 / max((perf_counter() - start) / 3, 1e-5))))
    times = []
    for _ in range(5):
        start = perf_counter()
        last = None
        for _ in range(calls):
            last = run()
        jax.block_until_ready(last)
        times.append((perf_counter() - start) / calls)
    return 1e3 * sorted(times)[2]


def contenders(length: int, width: int) -> dict[str, Callable[..., Any]]:
    at = jnp.arange(length)
    matrix = ((at[:, None] >= at) & (at[:, None] - at < width))[None, None]
    sdpa = jax.nn.dot_product_attention
    return {
        "gossamer": partial(gossamer.jax.attention, mask=masks.sliding_window(width - 1, 0)),
        "gossamer.jax.jit": gossamer.jax.jit(partial(sdpa, is_causal=True, local_window_size=(width - 1, 0))),
        "cuDNN local window": partial(
            sdpa, is_causal=True, local_window_size=(width - 1, 0), implementation="cudnn"
        ),
        "cuDNN with the mask": partial(sdpa, mask=matrix, implementation="cudnn"),
        "XLA with the mask": partial(sdpa, mask=matrix, implementation="xla"),
    }


def speed(
    length: int, width: int, backward: bool, until: float, found: dict[str, float], keep: Callable[[], None]
) -> None:
    """Milliseconds of each contender, B=4 N=16 H=128 bf16, into `found`; `keep` is called after each."""
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (4, length, 16, 128), jnp.bfloat16) for key in keys]
    for name, function in contenders(length, width).items():
        if monotonic() > until and found:
            print(f"  {name}: left out, the budget is spent")
            continue

        def loss(*arrays: Any, function: Callable[..., Any] = function) -> Any:
            return function(*arrays).astype(jnp.float32).sum()

        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if backward else function)
        try:
            found[name] = milliseconds(partial(run, *arrays))
            print(f"  {name}: {found[name]:.3f} ms", flush=True)
            keep()
        except Exception as error:  # one that does not fit leaves the others
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
    ours = found.get("gossamer")
    for name, goal in (
        ("cuDNN local window", 1.0),
        ("cuDNN with the mask", 10.0),
        ("XLA with the mask", 10.0),
    ):
        if ours and name in found:
            print(f"  {found[name] / ours:.2f}x over {name} (goal {goal}x)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels under JAX on this machine's NVIDIA GPU")
    parser.add_argument("--sections", default="right,speed")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument(
        "--budget", type=float, default=150.0, help="seconds; nothing new is started after them"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lower", default="", help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.lower:
        lower(asked.lower, asked.share)
        return
    jax.config.update("jax_default_matmul_precision", "highest")
    start, device = monotonic(), jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    results: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "right": {}, "ms": {}}
    folder = Path(__file__).parent / "results"
    path = asked.out or folder / f"jax_{device.device_kind.replace(' ', '_')}.json"

    def keep() -> None:
        path.write_text(json.dumps(results, indent=1) + "\n")

    chosen = [case for case in cases() if asked.only in title(case)] if "right" in asked.sections else []
    for backward in (False, True) if "speed" in asked.sections else ():
        kind = "forward and backward" if backward else "forward"
        what = f"{kind}, S = {asked.length}, window {asked.width}"
        print(what, flush=True)
        times = results["ms"].setdefault(what, {})
        speed(asked.length, asked.width, backward, start + asked.budget, times, keep)
    print(f"{monotonic() - start:.0f} s", flush=True)
    # XLA compiles the references on other cores, beside kernels and cases that run.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        known = [pool.submit(references, case) for case in chosen]
        if device.platform != "cpu" and chosen:
            compile_beside(jax_gpu.device().target)
            print(f"kernels compiled after {monotonic() - start:.0f} s", flush=True)
        failures = 0
        for case, references_of in zip(chosen, known, strict=True):
            if monotonic() - start > asked.budget:
                print("the budget is spent")
                pool.shutdown(wait=False, cancel_futures=True)
                break
            failures += judge(case, references_of, results["right"], told=failures == 0)
            keep()
    print(f"{failures} cases are not right; {monotonic() - start:.0f} s")


def title(case: Case) -> str:
    return f"{case.name} {case.dtype} {case.q_len}x{case.kv_len} size {case.size}"


def judge(case: Case, known: Future[tuple[Run, Run]], found: dict[str, float], *, told: bool) -> bool:
    """Whether a case is not right. told: print where an exception comes from."""
    name = title(case)
    try:
        worst, whose = right(case, known)
        verdict = "right" if worst <= 1 else "inexact" if worst <= 3 else "WRONG"
        print(f"{verdict}: {name}: {worst:.2f} of what is allowed ({whose})", flush=True)
    except Exception as error:
        worst, verdict = math.inf, "FAILED"
        print(f"FAILED: {name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        if told:
            traceback.print_exc(limit=-6)
    found[name] = worst
    return verdict != "right"


if __name__ == "__main__":
    main()

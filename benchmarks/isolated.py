"""Measurements that need a process of their own: start-up, memory, first calls.

    python benchmarks/isolated.py memory 16384        # one line of JSON

`measure(name, ...)` runs one and returns what it printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

HEADS, SIZE = 8, 64


def measure(name: str, *arguments: object, cache: Path | None = None) -> Any:
    """Run a measurement in a new process; cache: the folder it keeps its kernels in."""
    environment = os.environ | ({"GOSSAMER_CACHE_DIR": str(cache)} if cache else {})
    command = [sys.executable, __file__, name, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def empty_cache() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# ---- what runs in the new process ----


def bare() -> dict[str, float]:
    """Seconds of `import gossamer`."""
    start = perf_counter()
    import gossamer  # noqa: F401

    return {"import_gossamer": perf_counter() - start}


def call() -> dict[str, Any]:
    """Seconds of one attention after `import torch, gossamer`, and what it brought in."""
    import torch

    import gossamer
    from gossamer.runtime.driver import compilations

    q = torch.ones(1, 1, 256, SIZE)
    start = perf_counter()
    gossamer.attention(q, q, q, mask=lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() <= 128)
    seconds = perf_counter() - start
    brought = [name for name in ("tvm", "sympy", "islpy", "networkx") if name in sys.modules]
    return {"seconds": seconds, "compilations": compilations(), "imported": brought}


def gpu_call(name: str) -> dict[str, Any]:
    """Seconds of `import gossamer` and one attention, with inputs on the GPU, up to the result."""
    import torch
    from cases import cases

    mask_mod = cases(4096, "cuda")[name].mask_mod
    q = torch.ones(1, 8, 4096, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    start = perf_counter()
    import gossamer

    imported = perf_counter() - start
    gossamer.attention(q, q, q, mask=mask_mod)
    torch.cuda.synchronize()
    seconds = perf_counter() - start
    from gossamer.runtime.driver import compilations

    brought = [name for name in ("triton", "sympy", "islpy", "networkx") if name in sys.modules]
    return {"seconds": seconds, "import": imported, "compilations": compilations(), "imported": brought}


def first_calls() -> dict[str, Any]:
    """Seconds of first calls with new masks; then what other lengths, batches and windows compile."""
    import torch
    import tvm  # noqa: F401
    from cases import cases

    import gossamer
    from gossamer.runtime.driver import compilations

    def attend(mask: Any, batch: int = 1, q_len: int = 512, kv_len: int = 512) -> float:
        q, k = torch.ones(batch, 2, q_len, SIZE), torch.ones(batch, 2, kv_len, SIZE)
        start = perf_counter()
        gossamer.attention(q, k, k, mask=mask)
        return perf_counter() - start

    def window(width: int) -> Any:
        return lambda b, h, q, k: (q - k).abs() <= width

    first = {"very first": attend(lambda b, h, q, k: k - q <= 3)}  # also starts LLVM
    first |= {name: attend(case.mask_mod) for name, case in cases(512).items()}
    attend(window(128))
    before = compilations()
    for batch, q_len, kv_len, width in [
        (2, 512, 512, 128),
        (1, 511, 700, 128),
        (3, 64, 1, 128),
        (1, 512, 512, 9),
    ]:
        attend(window(width), batch, q_len, kv_len)
    return {"seconds": first, "compilations_of_other_sizes": compilations() - before}


def analysis(length: str) -> dict[str, Any]:
    """Milliseconds to capture each closed-form mask and find its terms, nothing of it known before."""
    from cases import cases

    import gossamer

    def terms(mask_mod: Any) -> int:
        return len(gossamer.Mask.trace(mask_mod).analyze(int(length), int(length)).terms)

    terms(lambda b, h, q, k: (q + k) % 3 == 0)  # imports sympy and isl
    found = {}
    for name, case in cases(2048).items():
        if case.closed:
            start = perf_counter()
            count = terms(case.mask_mod)
            found[name] = {"ms": (perf_counter() - start) * 1e3, "terms": count}
    return found


def memory(length: str) -> dict[str, int]:
    """Bytes at the peak of one window attention beyond q, k, v and the output."""
    import torch

    import gossamer

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q - k).abs() <= 128

    small = torch.randn(1, HEADS, 64, SIZE)
    gossamer.attention(small, small, small, mask=mask)  # compile, load, start threads
    q, k, v = (torch.randn(1, HEADS, int(length), SIZE) for _ in range(3))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    out = gossamer.attention(q, k, v, mask=mask)
    return {"bytes": _status("VmHWM") - before - out.nbytes}


def _status(key: str) -> int:
    """A field of /proc/self/status, in bytes."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](*arguments)))

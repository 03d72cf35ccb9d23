"""What a result has to say about where it came from, and how it is shown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "triton",
    "flash-attn-4",
    "apache-tvm",
    "apache-tvm-ffi",
    "apache-tvm-ffi-orcjit",
    "islpy",
    "sympy",
    "numpy",
)
VECTORS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve")


def provenance(threads: int) -> dict[str, Any]:
    """The machine, the versions, the commit and the time."""
    import gossamer

    cpu = _cpuinfo()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "machine": {
            "cpu": cpu.get("model name", platform.processor() or platform.machine()),
            "architecture": platform.machine(),
            "isa": [flag for flag in VECTORS if flag in flags],
            "cores": len(os.sched_getaffinity(0)),
            "threads": threads,
            "system": platform.system(),
        },
        "versions": {
            "python": platform.python_version(),
            "gossamer": gossamer.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
    }


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, numbers to four digits, so that a diff can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(results), indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """The results in a file; empty where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _commit() -> str | None:
    """The commit, with a + when the tree differs from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""What this machine is, as far as machine code cares: system, processor family, instruction sets."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path

# Instruction sets that LLVM uses of its own accord in vector code: LLVM's name -> Linux's name.
_X86 = {
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "popcnt": "popcnt",
    "lzcnt": "abm",
    "movbe": "movbe",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "f16c": "f16c",
    "fma": "fma",
    "fma4": "fma4",
    "xop": "xop",
    "avx": "avx",
    "avx2": "avx2",
    "avxvnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "gfni": "gfni",
}
_ARM = {
    "neon": "asimd",
    "fullfp16": "asimdhp",
    "dotprod": "asimddp",
    "bf16": "bf16",
    "i8mm": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
    "lse": "atomics",
}
_LINUX_NAMES = _X86 | _ARM


def system() -> str:
    """'linux', 'darwin' or 'windows': decides the object file format and the calling convention."""
    return platform.system().lower()


def machine() -> str:
    """'x86_64', 'aarch64', ...: the processor family."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


@cache
def features() -> frozenset[str] | None:
    """The instruction sets of this machine that kernels may need, in Linux's names; None where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split()) & frozenset(_LINUX_NAMES.values())
    return None


def linux_names(llvm_features: Iterable[str]) -> frozenset[str]:
    """The features among LLVM's names that kernels may need, in Linux's names."""
    return frozenset(_LINUX_NAMES[name] for name in llvm_features if name in _LINUX_NAMES)

"""Versions that decide what a compile gives, without importing any of the packages they belong to."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from .. import __version__

_PACKAGES = {"tvm": ("apache-tvm",), "triton": ("triton",)}
_COMPILING = ("ir", "passes", "codegen", "runtime", "frontend")


@cache
def fingerprint() -> str:
    """Hash of gossamer's own source: an edited compiler does not take its older self's kernels."""
    root, digest = Path(__file__).parents[1], sha256()
    for folder in _COMPILING:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def versions(backend: str) -> tuple[tuple[str, str], ...]:
    """(package, version) of gossamer, of its source, and of the compiler behind a backend.

    LLVM comes inside the wheels of TVM and Triton, so that their version stands for LLVM's too.
    """
    packages = [("gossamer", __version__), ("source", fingerprint()[:16])]
    for name in _PACKAGES[backend]:
        try:
            packages.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            packages.append((name, "absent"))
    return tuple(packages)

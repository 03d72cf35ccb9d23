"""What works on this machine: each check tries the thing itself, and says what to do when it fails."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import GossamerError

if TYPE_CHECKING:
    from ..runtime.artifact import Artifact

OK, MISSING, BROKEN = "ok", "missing", "broken"


@dataclass(frozen=True)
class Finding:
    """One check. status: 'ok', 'missing' (an optional part is not installed) or 'broken'.

    fix: what to do about it, '' when it is fine."""

    name: str
    status: str
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Check:
    """name: of what is checked. run: looks. default: whether the default backend needs it."""

    name: str
    run: Callable[[str], Finding]
    default: bool = False


def checks() -> Iterator[Check]:
    """All checks, in the order in which they make sense."""
    yield Check("python", _python, default=True)
    for name in ("numpy", "sympy", "islpy", "networkx"):
        yield Check(name, _package(name, name, ""), default=True)
    yield Check("threads", _threads, default=True)
    yield Check("cache", _cache)
    yield Check("torch", _package("torch", "torch", "torch"), default=True)
    yield Check("tvm", _tvm, default=True)
    yield Check("tvm-ffi", _package("apache-tvm-ffi", "tvm_ffi", "cpu"), default=True)
    yield Check("orcjit", _package("apache-tvm-ffi-orcjit", "tvm_ffi_orcjit", "cpu"), default=True)
    yield Check("cpu kernels", _cpu_kernel, default=True)
    yield Check("triton", _package("triton", "triton", "gpu"))
    yield Check("gpu kernels", _gpu_kernel)
    yield Check("gpu", _gpu)
    yield Check("jax", _package("jax", "jax", "jax"))
    yield Check("jax-tvm-ffi", _package("jax-tvm-ffi", "jax_tvm_ffi", "jax"))
    yield Check("matplotlib", _package("matplotlib", "matplotlib", "plot"))


# ---- this machine ----


def _python(name: str) -> Finding:
    from ..runtime import host

    found = f"{platform.python_version()} on {host.system()} {host.machine()}, {sys.executable}"
    return Finding(name, OK, found)


def _threads(name: str) -> Finding:
    from ..runtime.knobs import NUM_THREADS

    try:
        threads = NUM_THREADS.get()
    except GossamerError as error:
        return Finding(name, BROKEN, str(error), "unset GOSSAMER_NUM_THREADS")
    origin = "GOSSAMER_NUM_THREADS" if os.environ.get("GOSSAMER_NUM_THREADS") else "as many as cores"
    return Finding(name, OK, f"{threads} ({origin}; {os.cpu_count()} in the machine)")


def _cache(name: str) -> Finding:
    from ..runtime import cache

    fix = "set GOSSAMER_CACHE_DIR to a folder that you may write to"
    try:
        found = cache.info()
        folder = Path(found.folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"gossamer")
    except (OSError, GossamerError) as error:
        return Finding(name, BROKEN, str(error), fix)
    if not found.limit:
        return Finding(name, OK, f"off: GOSSAMER_CACHE_SIZE is 0 ({folder})")
    return Finding(name, OK, f"{folder}, {found.artifacts} artifacts, {found.size >> 20} MiB")


# ---- packages ----


def _package(distribution: str, module: str, extra: str) -> Callable[[str], Finding]:
    """A check that a package is there, imports, and has a version that gossamer works with."""

    def run(name: str) -> Finding:
        install = f"pip install 'gossamer[{extra}]'" if extra else "pip install --force-reinstall gossamer"
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return Finding(name, MISSING if extra else BROKEN, "not installed", install)
        try:
            import_module(module)
        except Exception as error:  # whatever a damaged installation raises
            return Finding(name, BROKEN, f"{version} does not import: {_first_line(error)}", install)
        wanted = constraint(distribution)
        if wanted is not None and not wanted.contains(version, prereleases=True):
            return Finding(
                name,
                BROKEN,
                f"{version}, but gossamer needs {wanted}",
                f"pip install '{distribution}{wanted}'",
            )
        return Finding(name, OK, version + (f" ({wanted})" if wanted else ""))

    return run


def constraint(distribution: str) -> Any:
    """The SpecifierSet that the installed gossamer asks for of a package; None where nobody says."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        return None
    try:
        required = metadata.requires("gossamer") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        return None
    for text in required:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) == canonicalize_name(distribution) and requirement.specifier:
            return requirement.specifier
    return None


def _tvm(name: str) -> Finding:
    found = _package("apache-tvm", "tvm", "cpu")(name)
    if found.status != OK:
        return found
    import tvm

    try:
        cpu = tvm.get_global_func("target.llvm_get_system_cpu")()
        llvm = tvm.get_global_func("target.llvm_version_major")()
    except Exception as error:  # a TVM built without LLVM
        return Finding(name, BROKEN, f"no LLVM in it: {_first_line(error)}", "pip install 'gossamer[cpu]'")
    return Finding(name, OK, f"{found.detail}, LLVM {llvm}, this CPU is {cpu}")


def _gpu(name: str) -> Finding:
    try:
        import torch
    except ImportError:
        return Finding(name, MISSING, "cannot tell without torch", "pip install 'gossamer[torch]'")
    if not torch.cuda.is_available():
        return Finding(name, MISSING, f"no GPU that torch {torch.__version__} can use")
    from .device import target_of

    try:
        found = f"{torch.cuda.get_device_name()}, {target_of(torch.device('cuda', 0))}"
    except GossamerError as error:
        return Finding(name, BROKEN, str(error))
    return Finding(name, OK, found)


# ---- kernels ----


def _cpu_kernel(name: str) -> Finding:
    """Compile a small causal attention without the cache, run it, compare it with NumPy."""
    import numpy as np

    fix = "pip install 'gossamer[cpu]', then run again with GOSSAMER_LOG=2"
    try:
        from ..runtime.executable import Executable

        run = Executable(_compiled("cpu", 16))
        rng = np.random.default_rng(0)
        q, k, v = rng.standard_normal((3, 1, 1, 40, 16), np.float32)
        out = np.empty_like(q)
        run({"q": q, "k": k, "v": v, "o": out, "scale": 0.25})
    except Exception as error:  # the point is to say what fails, whatever it is
        return Finding(name, BROKEN, f"{type(error).__name__}: {_first_line(error)}", fix)
    scores = np.where(np.tri(40, dtype=bool), q[0, 0] @ k[0, 0].T * 0.25, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    wanted = weights / weights.sum(1, keepdims=True) @ v[0, 0]
    error = float(np.abs(out[0, 0] - wanted).max())
    if not error < 1e-4:
        return Finding(name, BROKEN, f"a small attention is wrong by {error:.2g}", "please report this")
    return Finding(name, OK, f"a small attention was compiled and run; it is right to {error:.0e}")


def _gpu_kernel(name: str) -> Finding:
    target = "cuda:sm_90"
    try:
        artifact = _compiled(target, 64)
    except Exception as error:  # as above
        if "triton" in str(error) and "install" in str(error):
            return Finding(name, MISSING, "needs triton", "pip install 'gossamer[gpu]'")
        return Finding(
            name, BROKEN, f"{type(error).__name__}: {_first_line(error)}", "pip install 'gossamer[gpu]'"
        )
    binary = artifact.parts[artifact.manifest.launches[0].binary]
    return Finding(name, OK, f"a small attention compiles for {target}: {len(binary) >> 10} KiB of cubin")


def _compiled(target: str, size: int) -> Artifact:
    """A causal attention, compiled without the cache."""
    from ..ir.mask import Mask
    from ..passes.pipeline import compile_spec
    from ..passes.spec import AttentionSpec
    from ..runtime.compile import compile_kernels

    dtype = "f32" if target == "cpu" else "f16"
    mask = Mask.parse("mask() { k <= q }")
    spec = AttentionSpec(mask, dtype=dtype, qk_size=size, v_size=size, target=target)
    return compile_kernels(compile_spec(spec).kernels, target)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

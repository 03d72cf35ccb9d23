"""Triton modules as `codegen.triton` emits them: compiled ahead of time, and launched.

`compile_ahead` needs no GPU. It answers with the binary and what the schedule has to know: shared
memory, registers and spills. `launch` runs a module on the GPU that its tensors are on.
"""

from __future__ import annotations

import hashlib
import linecache
import re
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..ir.errors import BackendError, InputError, MissingDependencyError, UnsupportedError

TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_90a", "cuda:sm_100", "hip:gfx942")

# Shared memory that one program may use, in bytes.
_SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}

_cache_lock = threading.Lock()


@dataclass(frozen=True)
class Binary:
    """One kernel for one target.

    name: its symbol. code: a cubin or hsaco file. assembly: PTX or AMDGCN text. warps: warps a
    program (the block is warps times the warp size wide). shared: bytes a program. registers: 32-bit
    registers a thread. spills: bytes of local memory a thread, which on NVIDIA counts arrays as well
    (sin and cos of large arguments keep one). aligned: whether it relies on `aligned_arguments`."""

    target: str
    name: str
    code: bytes
    assembly: str
    warps: int
    shared: int
    registers: int
    spills: int
    aligned: bool

    @property
    def fits(self) -> bool:
        """Whether a program's shared memory exists on the target."""
        return self.shared <= _SHARED[_architecture(self.target)]


def load(source: str) -> ModuleType:
    """The module of emitted text, executed; the same object for the same text.

    Triton reads a function's text back, so it is entered into linecache under a name made of its
    contents. No file is written, and debug information is the same on every machine."""
    _triton()
    return _load(source)


@lru_cache(maxsize=1024)
def _load(source: str) -> ModuleType:
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    module = ModuleType(f"gossamer_kernel_{digest}")
    module.__file__ = f"<gossamer {digest}>"
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(True), module.__file__)
    exec(compile(source, module.__file__, "exec", dont_inherit=True), module.__dict__)
    return module


def aligned_arguments(source: str) -> tuple[str, ...]:
    """What the aligned variant takes to be multiples of 16: addresses in bytes, strides in elements.

    That is what makes vector loads and pipelining possible. It holds for contiguous tensors whose
    inner size divides by 16; where it does not, compile with aligned=False."""
    return tuple(name for name in load(source).kernel.arg_names if name[:2] in ("p_", "s_"))


def compile_ahead(source: str, target: str, *, aligned: bool = True) -> Binary:
    """Compile emitted text for a target such as 'cuda:sm_90a' or 'hip:gfx942'; no GPU is needed.

    Raises InputError for an unknown target, UnsupportedError for f64 products on AMD, BackendError
    where Triton or its assembler fails."""
    architecture = _architecture(target)
    triton = _triton()
    if triton.knobs.runtime.interpret:
        raise BackendError("triton: cannot compile in a process that has TRITON_INTERPRET set; unset it")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = load(source)
    kernel = module.kernel
    hinted = aligned_arguments(source) if aligned else ()
    code = ASTSource(
        fn=kernel,
        signature={p.name: p.annotation_type for p in kernel.params},
        attrs={(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names) if name in hinted},
    )
    nvidia = target.startswith("cuda:")
    if not nvidia and "out_dtype=tl.float64" in source:
        raise UnsupportedError(
            f"triton cannot compile products of f64 tiles for {target}; use f32, or the CPU"
        )
    device = GPUTarget("cuda", int(architecture[3:]), 32) if nvidia else GPUTarget("hip", architecture, 64)
    try:
        # Triton's own cache is put aside: ours keeps the result, and the home folder may be read-only.
        with _cache_lock, triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
            triton.knobs.cache.dir = folder
            compiled = triton.compile(code, target=device, options=dict(module.OPTIONS))
    except Exception as error:
        raise BackendError(f"triton: {kernel.__name__} does not compile for {target}: {error}") from error
    binary = compiled.asm["cubin" if nvidia else "hsaco"]
    assembly = compiled.asm["ptx" if nvidia else "amdgcn"]
    registers, spills = _nvidia_usage(binary) if nvidia else _amd_usage(assembly)
    meta = compiled.metadata
    usage = meta.num_warps, meta.shared, registers, spills
    return Binary(target, meta.name, binary, assembly, *usage, aligned)


def launch(source: str, arguments: Mapping[str, Any]) -> None:
    """Run emitted text on tensors and scalars given by the kernel's own names; outputs are written in place.

    The tensors are torch's, on one GPU. Triton compiles on the first call and picks the variant by
    the alignment of what it is given."""
    import torch

    module = load(source)
    values = module.bind(**arguments)
    grid = module.grid(**dict(zip(module.kernel.arg_names, values, strict=True)))
    device = next(v.device for v in values if isinstance(v, torch.Tensor))
    with torch.cuda.device(device):
        module.kernel[grid](*values, **module.OPTIONS)


def _architecture(target: str) -> str:
    """'sm_90' of 'cuda:sm_90a': Triton uses the features of the `a` variant from sm_90 on anyway."""
    if target not in TARGETS:
        raise InputError("target", f"one of {', '.join(TARGETS)}", repr(target))
    return target.partition(":")[2].removesuffix("a")


def _triton() -> Any:
    try:
        import triton
    except ImportError:
        raise MissingDependencyError("triton", "gpu", "the GPU backend") from None
    return triton


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, a thread; by the cuobjdump that Triton carries."""
    tool = _triton().knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", done.stdout)
    if found is None:
        raise BackendError(f"cuobjdump says nothing about the cubin: {done.stdout}{done.stderr}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers, and bytes of scratch memory, a thread; from the metadata at the end of the text."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise BackendError(f"the assembly names no {key}")
        return int(found.group(1))

    return number("vgpr_count"), number("private_segment_fixed_size")

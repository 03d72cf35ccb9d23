"""Triton modules as `codegen.triton` emits them, compiled ahead of time: no GPU is needed.

`compile_ahead` answers with the binary and what the schedule has to know: shared memory, registers and
spills. `cuda_driver` launches what it made.
"""

from __future__ import annotations

import hashlib
import linecache
import re
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..ir.errors import BackendError, InputError, MissingDependencyError, UnsupportedError

SMALLER = "Pass schedule= with fewer rows or keys a tile, or fewer stages (`gossamer explain` prints one)"

_compile_lock = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """What one program (a block) may use: bytes of shared memory, 32-bit registers, threads."""

    shared: int
    registers: int = 65_536
    threads: int = 1024

    def lacks(self, shared: int, registers: int, threads: int) -> str:
        """What a program of so many threads, with so many registers each, would need; '' if it fits.

        >>> Limits(101_376).lacks(114_688, 128, 128)
        '114688 bytes of shared memory, of which a program has 101376'
        """
        needs = (
            (shared, self.shared, "bytes of shared memory"),
            (registers * threads, self.registers, "registers"),
            (threads, self.threads, "threads"),
        )
        over = [f"{need} {what}, of which a program has {has}" for need, has, what in needs if need > has]
        return " and ".join(over)


LIMITS = {
    "sm_80": Limits(166_912),
    "sm_86": Limits(101_376),
    "sm_89": Limits(101_376),
    "sm_90": Limits(232_448),
    "sm_100": Limits(232_448),
    "sm_103": Limits(232_448),
    "sm_120": Limits(101_376),
    "sm_121": Limits(101_376),
    "gfx942": Limits(65_536, 131_072),
}
TARGETS = (*(f"cuda:{a}" for a in LIMITS if a[:2] == "sm"), "cuda:sm_90a", "hip:gfx942")


@dataclass(frozen=True)
class Binary:
    """One kernel for one target.

    name: its symbol. code: a cubin or hsaco file. assembly: PTX or AMDGCN text. warps: warps a
    program (the block is warps times the warp size wide). shared: bytes a program. registers: 32-bit
    registers a thread. spills: bytes of local memory a thread, which on NVIDIA counts arrays as well
    (sin and cos of large arguments keep one). scratch: bytes of global memory that a program wants from
    the launcher. boxes: of the tensor descriptors among its parameters, in order, how the copy engine
    swizzles shared memory and the extents of what it fetches at once."""

    target: str
    name: str
    code: bytes
    assembly: str
    warps: int
    shared: int
    registers: int
    spills: int
    scratch: int = 0
    boxes: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def lacks(self) -> str:
        """What a program needs beyond what the target has; '' when it fits."""
        threads = self.warps * (32 if self.target.startswith("cuda:") else 64)
        return LIMITS[_architecture(self.target)].lacks(self.shared, self.registers, threads)


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


def target_of(major: int, minor: int) -> str:
    """The target whose binaries run on an NVIDIA GPU of this compute capability.

    A binary runs on its own capability and, before 9.0, on later ones of the same major number.

    >>> target_of(8, 7)
    'cuda:sm_86'

    Raises UnsupportedError when there is none."""
    known = sorted(int(a[3:]) for a in LIMITS if a[:2] == "sm")
    here = 10 * major + minor
    runs = [n for n in known if n == here or (major == 8 and n // 10 == 8 and n < here)]
    if not runs:
        names = ", ".join(f"{n // 10}.{n % 10}" for n in known)
        raise UnsupportedError(f"GPUs of compute capability {major}.{minor}: expected one of {names}")
    return f"cuda:sm_{runs[-1]}"


def compile_ahead(source: str, target: str) -> Binary:
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
    place = {name: n for n, name in enumerate(kernel.arg_names)}
    code = ASTSource(
        fn=kernel,
        signature={p.name: p.annotation_type or p.annotation for p in kernel.params},
        attrs={(place[name],): [["tt.divisibility", d]] for name, d in module.DIVISORS.items()},
    )
    nvidia = target.startswith("cuda:")
    if not nvidia and "out_dtype=tl.float64" in source:
        raise UnsupportedError(
            f"triton cannot compile products of f64 tiles for {target}; use f32, or the CPU"
        )
    device = GPUTarget("cuda", int(architecture[3:]), 32) if nvidia else GPUTarget("hip", architecture, 64)
    try:
        # Triton's own cache is put aside: ours keeps the result, and the home folder may be read-only.
        with _compile_lock, triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
            triton.knobs.cache.dir = folder
            compiled = triton.compile(code, target=device, options=dict(module.OPTIONS))
    except Exception as error:
        raise BackendError(f"triton: {kernel.__name__} does not compile for {target}: {error}") from error
    binary = compiled.asm["cubin" if nvidia else "hsaco"]
    assembly = compiled.asm["ptx" if nvidia else "amdgcn"]
    registers, spills = _nvidia_usage(binary) if nvidia else _amd_usage(assembly)
    meta = compiled.metadata
    usage = meta.num_warps, meta.shared, registers, spills
    boxes = tuple(
        (d["swizzle"], tuple(d["block_size"])) for d in getattr(meta, "tensordesc_meta", None) or ()
    )
    scratch = getattr(meta, "global_scratch_size", 0) or 0
    return Binary(target, meta.name, binary, assembly, *usage, scratch, boxes)


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

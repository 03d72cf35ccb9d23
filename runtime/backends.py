"""From a Kernel to a binary and from a binary to something callable: one class a backend.

The code generators and compilers behind them are imported when a kernel is compiled, never to run
one that is compiled already.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..ir.errors import BackendError, InputError, MissingDependencyError, UnsupportedError
from . import host
from .manifest import Launch, Requirements
from .target import Target

if TYPE_CHECKING:  # ir.kernel brings sympy, which running a compiled kernel does not need
    from ..ir.kernel import Kernel

# (tensors in the kernel's order, threads or None for GOSSAMER_NUM_THREADS) -> None
Runner = Callable[[Sequence[Any], int | None], None]


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: entry is its symbol; workspace is bytes of scratch memory a worker.

    assembly: the text that the binary was made from, for those who launch that."""

    source: str
    binary: bytes
    entry: str
    workspace: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)
    assembly: str = ""


class Loaded(Protocol):
    """A kernel that this machine can run."""

    def bind(self, values: Mapping[str, Any], sizes: Mapping[str, int]) -> Runner:
        """What runs it on tensors with the sizes and strides of these, and with these scalars.

        sizes: dimensions and integer scalars by name."""
        ...


class Backend(Protocol):
    """suffix: of binaries' file names. concurrent: whether kernels may be compiled side by side."""

    suffix: str
    concurrent: bool

    def compile(self, kernel: Kernel, target: Target) -> Compiled: ...

    def requirements(self, target: Target) -> Requirements: ...

    def versions(self) -> dict[str, str]: ...

    def load(self, launch: Launch, binary: bytes, target: Target) -> Loaded: ...


class TvmBackend:
    """CPUs: TVMScript, LLVM, an object file; run by the ORC JIT of tvm_ffi without tvm."""

    suffix = "o"
    concurrent = True

    def compile(self, kernel: Kernel, target: Target) -> Compiled:
        from ..codegen import tvm as codegen
        from ..codegen.tvm_signature import signature
        from . import cpu

        _check_cpu_name(target)
        source = codegen.emit(kernel)
        binary = cpu.build_object(source, str(target))
        details: dict[str, Any] = {key: value for key, value in kernel.meta if key == "shares"}
        details["parameters"] = [[p.kind, p.source] for p in signature(kernel)]
        return Compiled(source, binary, kernel.name, codegen.workspace_bytes(kernel), details)

    def requirements(self, target: Target) -> Requirements:
        tvm = _tvm()
        name = target.arch or str(tvm.get_global_func("target.llvm_get_system_cpu")())
        llvm = tvm.target.Target({"kind": "llvm", "mcpu": name})
        used = tvm.get_global_func("target.llvm_get_cpu_features")(llvm)
        features = host.linux_names(str(feature) for feature in used)
        return Requirements(host.system(), host.machine(), tuple(sorted(features)))

    def versions(self) -> dict[str, str]:
        tvm = _tvm()
        return {"tvm": tvm.__version__, "llvm": str(tvm.get_global_func("target.llvm_version_major")())}

    def load(self, launch: Launch, binary: bytes, target: Target) -> Loaded:
        from .cpu import CpuKernel

        return CpuKernel(launch, binary)


class TritonBackend:
    """GPUs: Triton source, compiled ahead of time to a cubin or hsaco."""

    suffix = "bin"
    concurrent = False

    def compile(self, kernel: Kernel, target: Target) -> Compiled:
        from ..codegen import triton as codegen
        from . import gpu

        module = codegen.module(kernel)
        built = gpu.compile_ahead(module.source, str(target))
        if built.lacks:
            raise BackendError(f"{kernel.name} does not fit {target}: it needs {built.lacks}. {gpu.SMALLER}")
        details = {
            "warps": built.warps,
            "shared": built.shared,
            "registers": built.registers,
            "spills": built.spills,
            "scratch": built.scratch,
            "parameters": [[a.type, a.source] for a in module.signature],
            "spans": module.spans,
            "boxes": built.boxes,
        }
        assembly = built.assembly if target.kind == "cuda" else ""
        return Compiled(module.source, built.code, built.name, 0, details, assembly)

    def requirements(self, target: Target) -> Requirements:
        return Requirements()

    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {"triton": version("triton")}

    def load(self, launch: Launch, binary: bytes, target: Target) -> Loaded:
        if target.kind != "cuda":
            raise UnsupportedError(
                f"{launch.kernel} is a binary for {target}, which gossamer compiles but does not launch yet. "
                "Compile for 'cpu' or 'cuda:sm_...' to run it here"
            )
        from .cuda_kernel import CudaKernel

        return CudaKernel(launch, binary)


BACKENDS: dict[str, Backend] = {"tvm": TvmBackend(), "triton": TritonBackend()}


def _tvm() -> Any:
    try:
        import tvm
    except ImportError:
        raise MissingDependencyError("apache-tvm", "cpu", "compiling CPU kernels") from None
    return tvm


def _check_cpu_name(target: Target) -> None:
    if not target.arch:
        return
    tvm = _tvm()
    any_cpu = tvm.target.Target({"kind": "llvm"})
    names = [str(name) for name in tvm.get_global_func("target.llvm_get_cpu_archlist")(any_cpu)]
    if target.arch not in names:
        near = difflib.get_close_matches(target.arch, names, 3)
        fix = f"Did you mean {' or '.join(near)}?" if near else f"For instance: {', '.join(names[-6:])}"
        raise InputError("target", "an LLVM CPU name after 'cpu:'", repr(target.arch), fix)

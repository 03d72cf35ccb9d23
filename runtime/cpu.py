"""CPU kernels: TVMScript to an object file, an object file to a function, and a function on all cores.

Only `build_object` imports tvm. Objects are loaded by the ORC JIT of apache-tvm-ffi-orcjit, so that a
first call and a call from the cache run the same code, with no compiler on PATH.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import BackendError, MissingDependencyError
from .cpu_arguments import Arguments
from .knobs import NUM_THREADS
from .manifest import Launch
from .workers import POOL

if TYPE_CHECKING:
    from .backends import Runner

Kernel = Callable[..., None]  # (*arguments, worker, workers, workspace)

# Levels 2 and 3 only add a search for vectors in code that is vectors already (0.4 s).
_LLVM_LEVEL = 1
_SHARES = 2  # a thread, unless a kernel asks for more: they even out cells that take different times and
# cores that are busy elsewhere, at some microseconds each
_LINE = 64


@lru_cache(maxsize=128)
def build_object(source: str, target: str) -> bytes:
    """Compile TVMScript to an object file for target 'cpu' (this machine) or 'cpu:<LLVM CPU name>'.

    The last ones are remembered: programs that differ have kernels in common (routing, row sums, copies).
    Raises MissingDependencyError without tvm, BackendError when TVM refuses the source.
    """
    try:
        import tvm
    except ImportError:
        raise MissingDependencyError("apache-tvm", "cpu", "compiling CPU kernels") from None
    from . import tvm_script

    _register_pipeline()
    cpu = target.partition(":")[2] or str(tvm.get_global_func("target.llvm_get_system_cpu")())
    llvm = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "opt-level": _LLVM_LEVEL})
    try:
        module = tvm.tirx.build(tvm_script.read(source), target=llvm, pipeline=_PIPELINE)
    except Exception as error:
        raise BackendError(f"TVM refused a generated kernel for {target}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        module.write_to_file(str(path), "o")
        return path.read_bytes()


_PIPELINE = "gossamer"


@cache
def _register_pipeline() -> None:
    """TVM's pipeline for host code with an entry of ours, without lowering what no script of ours has, and
    without its simplifier: LLVM does that work, and TVM's takes seconds where values bound by T.let build on
    each other."""
    from tvm import tirx, transform

    from .tvm_entry import entry

    passes = tirx.transform

    def pipeline() -> tuple[Any, Any, Any]:
        lowering = [
            passes.FlattenBuffer(),
            passes.BF16ComputeLegalize(),
            passes.NarrowDataType(32),
            passes.VectorizeLoop(True),
            passes.CommonSubexprElim(),
            entry,
            passes.BF16StorageLegalize(),
        ]
        host = transform.Sequential([passes.LowerTVMBuiltin(), passes.LowerIntrin(), passes.UnrollLoop()])
        return transform.Sequential(lowering), lambda: host, lambda: host

    tirx.compilation_pipeline.register_tir_pipeline(_PIPELINE, pipeline)


def load_object(data: bytes, entry: str) -> Kernel:
    """The function `entry` of an object file. It stays loaded for the life of the process.

    Raises MissingDependencyError without the JIT, BackendError when the object does not load."""
    try:
        # Kernels need no C++ runtime: without a compiler's name the session would run `c++` to find one.
        module = _session().load_module(data, cxx=os.devnull, keep_module_alive=True)
        return module.get_function(entry)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise BackendError(
            f"cannot load kernel {entry!r} from an object of {len(data)} bytes: {error}"
        ) from error


class CpuKernel:
    """One kernel of an artifact on this machine's cores."""

    def __init__(self, launch: Launch, binary: bytes) -> None:
        self._function, self._workspace = load_object(binary, launch.entry), launch.workspace
        self._arguments = Arguments(launch)
        self._shares = int(launch.details.get("shares", _SHARES))

    def bind(self, values: Mapping[str, Any], sizes: Mapping[str, int]) -> Runner:
        """What runs the kernel on tensors with the sizes and strides of these, and with these scalars.

        Raises InputError for tensors that the kernel was not compiled for."""
        function, workspace, shares = self._function, self._workspace, self._shares
        numbers = self._arguments.numbers(values)

        def run(tensors: Sequence[Any], threads: int | None) -> None:
            arguments = (*[tensor.data_ptr() for tensor in tensors], *numbers)
            launch(function, arguments, threads or NUM_THREADS.get(), workspace, shares)

        return run


def launch(
    function: Kernel,
    arguments: Sequence[int | float],
    threads: int,
    workspace_bytes: int,
    a_thread: int = _SHARES,
) -> None:
    """Run a kernel on the calling thread and up to threads - 1 others.

    arguments: addresses and numbers, in the kernel's order; nobody checks them. a_thread: shares of the work
    for each, which threads take one after another. Safe from several threads at once, and after a fork."""
    if threads <= 1:
        function(*arguments, 0, 1, _workspace(workspace_bytes))
        return
    shares = threads * a_thread

    def run(share: int) -> None:
        function(*arguments, share, shares, _workspace(workspace_bytes))

    POOL.run(run, shares, threads)


@cache
def _session() -> Any:
    try:
        import tvm_ffi_orcjit
    except ImportError:
        raise MissingDependencyError("apache-tvm-ffi-orcjit", "cpu", "running CPU kernels") from None
    return tvm_ffi_orcjit.default_session()


class _Scratch(threading.local):
    """One thread's workspace: it grows and is used again."""

    size = -1
    address = 0
    memory: Any = None


_SCRATCH = _Scratch()


def _workspace(size: int) -> int:
    """The address of so many bytes of the thread's own, from the start of a cache line on."""
    if size > _SCRATCH.size:
        import numpy

        memory = numpy.empty(size + _LINE, numpy.uint8)
        _SCRATCH.memory, _SCRATCH.size = memory, size
        _SCRATCH.address = memory.ctypes.data + -memory.ctypes.data % _LINE
    return _SCRATCH.address

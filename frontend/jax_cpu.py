"""CPU kernels under XLA: a handler of XLA's FFI, made by jax-tvm-ffi, which runs what a call's text says.

A kernel that sees other ids when they are sorted is chosen at each call, as on torch tensors; every other
one is compiled while XLA compiles the program around it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import MissingDependencyError
from ..runtime.strided import Strided
from .executables import executable_for
from .jax_call import Call
from .jax_problem import Bound, heads_first
from .trace_tensor import dtype_name

if TYPE_CHECKING:
    from ..runtime.driver import Executable

TARGET = "gossamer_attention_cpu"


@cache
def register() -> str:
    """The name of XLA's target, which is registered once. Raises MissingDependencyError."""
    try:
        import jax_tvm_ffi
        import tvm_ffi
    except ImportError:
        raise MissingDependencyError("jax-tvm-ffi", "jax", "gossamer.jax on a CPU") from None
    handler = tvm_ffi.convert(_handle)
    jax_tvm_ffi.register_ffi_target(TARGET, handler, platform="cpu", pass_owned_tensor=True)
    return TARGET


def encoded(text: str) -> np.ndarray:
    """A call's text as the first operand of the target: jax-tvm-ffi 0.1.3 reads long attributes after they
    were freed."""
    return np.frombuffer(text.encode(), np.uint8)


def compile_early(call: Call, operands: Sequence[Any], results: Sequence[Any]) -> None:
    """Compile and check a call for operands and results of these shapes and dtypes, where only those matter.

    Raises what a call would: InputError, UnsupportedError, BackendError."""
    arrays = [Strided(0, x.shape, str(dtype_name(x.dtype))) for x in (*operands, *results)]
    bound = Bound(call, dict(zip(call.operands, arrays, strict=False)))
    if not bound.mask.segments:
        _executable(bound).bind(_values(bound, arrays), allocate=Strided.empty)


def _handle(*tensors: Any) -> None:
    """tensors: the call's text, operands, results. None of them may be kept."""
    _stay()
    text, *memory = (Strided(t.data_ptr(), t.shape, str(dtype_name(t.dtype))) for t in tensors)
    del tensors
    call = Call.parse(np.asarray(text).tobytes().decode())
    bound = Bound(call, dict(zip(call.operands, memory, strict=False)))
    bound.check()
    values = {name: _shared(value) for name, value in _values(bound, memory).items()}
    _executable(bound)(values, allocate=Strided.empty)


def _shared(value: Any) -> Any:
    """A tensor in the form that kernels take, made once for all threads of a call."""
    import tvm_ffi

    return tvm_ffi.from_dlpack(value) if isinstance(value, Strided) else value


class _Seen(threading.local):
    here = False


_SEEN = _Seen()
_hold = ctypes.PYFUNCTYPE(ctypes.c_int)(("PyGILState_Ensure", ctypes.pythonapi))


def _stay() -> None:
    """Let this thread keep what Python knows of it, once.

    XLA's threads are none of Python's, which forgets them after each call, and in doing so frees a kernel's
    workspace at a moment when DLPack's deleters may not run."""
    if not _SEEN.here:
        _hold()
        _SEEN.here = True


def _executable(bound: Bound) -> Executable:
    given = (bound.problem, bound.mask, bound.score, bound.extra)
    return executable_for(*given, softmax=bound.softmax, placed=bound.placed)


def _values(bound: Bound, memory: Sequence[Strided]) -> dict[str, Any]:
    results: dict[str, Any] = dict(zip(("o", "lse"), memory[len(bound.call.operands) :], strict=False))
    results["o"] = heads_first(results["o"], bound.call.layout)
    return bound.values(results)

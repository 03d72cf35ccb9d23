"""CPU kernels under XLA: a handler of XLA's FFI, made by jax-tvm-ffi, which runs what a call's text says.

A kernel that sees other ids when they are sorted is chosen at each call, as on torch tensors; every other
one is compiled while XLA compiles the program around it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.errors import MissingDependencyError
from ...runtime.strided import Strided
from ..device import target_of
from ..executables import executable_for, gradient_executable, is_positive
from ..problem import is_aligned
from ..trace.tensor import dtype_name
from .call import Call, GradientCall
from .problem import Bound, heads_first

if TYPE_CHECKING:
    from ...runtime.driver import Executable

    Prepared = tuple[Executable, dict[str, Any]]
    Prepare = Callable[[str, Sequence[Strided]], Prepared | None]


class Target:
    """One of XLA's targets. name: XLA's for it. prepare: from a text, operands and results (`Strided`, which
    may have no address yet), a program and its values by name, or None where only contents tell which."""

    def __init__(self, name: str, prepare: Prepare) -> None:
        self.name, self.prepare = name, prepare
        self._registering = threading.Lock()
        self._registered = False

    def register(self) -> str:
        """Its name; XLA knows it from then on. Raises MissingDependencyError."""
        try:
            import jax_tvm_ffi
            import tvm_ffi
        except ImportError:
            raise MissingDependencyError("jax-tvm-ffi", "jax", "gossamer.jax on a CPU") from None
        with self._registering:
            if not self._registered:
                handler = tvm_ffi.convert(self._handle)
                jax_tvm_ffi.register_ffi_target(self.name, handler, platform="cpu", pass_owned_tensor=True)
                self._registered = True
        return self.name

    def compile_early(self, text: str, operands: Sequence[Any], results: Sequence[Any]) -> None:
        """Compile and check a call for operands and results of these shapes and dtypes.

        Raises what a call would: InputError, UnsupportedError, BackendError."""
        memory = [Strided(0, x.shape, str(dtype_name(x.dtype))) for x in (*operands, *results)]
        prepared = self.prepare(text, memory)
        if prepared is not None:
            prepared[0].bind(prepared[1], allocate=Strided.empty)

    def _handle(self, *tensors: Any) -> None:
        """tensors: the call's text, operands, results. None of them may be kept."""
        _stay()
        text, *memory = (Strided(t.data_ptr(), t.shape, str(dtype_name(t.dtype))) for t in tensors)
        del tensors
        prepared = self.prepare(np.asarray(text).tobytes().decode(), memory)
        assert prepared is not None
        executable, values = prepared
        executable(values, allocate=Strided.empty)


def encoded(text: str) -> np.ndarray:
    """A call's text as the first operand of the target: jax-tvm-ffi 0.1.3 reads long attributes after they
    were freed."""
    return np.frombuffer(text.encode(), np.uint8)


class _Seen(threading.local):
    here = False


_SEEN = _Seen()
_hold = ctypes.PYFUNCTYPE(ctypes.c_int)(("PyGILState_Ensure", ctypes.pythonapi))


def _stay() -> None:
    """Let this thread keep what Python knows of it, once.

    XLA's threads are none of Python's, which forgets them after each call, and a kernel's workspace with
    them."""
    if not _SEEN.here:
        _hold()
        _SEEN.here = True


def _attention(text: str, memory: Sequence[Strided]) -> Prepared | None:
    call = Call.parse(text)
    count = len(call.operands)
    bound = Bound(call, dict(zip(call.operands, memory, strict=False)))
    if bound.waits:
        return None
    if bound.known:
        bound.check()
    results: dict[str, Strided] = dict(zip(("o", "lse"), memory[count:], strict=False))
    values = bound.values(_by_heads(call, results))
    given = (bound.problem, bound.mask, bound.score, bound.extra)
    positive = is_positive(values["scale"], target_of(bound.problem.device))
    executable = executable_for(*given, positive=positive, softmax=bound.softmax, placed=bound.placed)
    return executable, values


def _gradient(text: str, memory: Sequence[Strided]) -> Prepared | None:
    asked = GradientCall.parse(text)
    call, count = asked.call, len(asked.operands)
    operands = dict(zip(asked.operands, memory, strict=False))
    bound = Bound(call, {name: operands[name] for name in call.operands})
    if bound.waits:
        return None
    results = dict(zip((f"d{name}" for name in asked.wanted), memory[count:], strict=True))
    if bound.known:
        bound.check()
        for name, result in results.items():
            if name[2:].isdecimal():
                np.asarray(result)[...] = 0  # programs add to it
    given = {name: operands[name] for name in asked.operands[len(call.operands) :]}
    outputs = ("o", "lse") if asked.lse else ("o",)
    values, device = bound.values({}), bound.problem.device
    settings = (bound.problem, bound.mask, bound.score, bound.softmax, bound.placed)
    positive = is_positive(values["scale"], target_of(device))
    aligned = target_of(device) == "cpu" or is_aligned(given["lse"])
    executable = gradient_executable(*settings, positive, asked.wanted, outputs, aligned)
    for name, shape in bound.gradient_shapes.items():
        if name in executable.inputs and name not in results:
            empty = Strided.empty(shape, bound.problem.dtype) if bound.known else None
            results[name] = empty or Strided(0, shape, bound.problem.dtype, device=device)
    return executable, values | _by_heads(call, given | results)


def _by_heads(call: Call, tensors: dict[str, Strided]) -> dict[str, Any]:
    """Tensors laid out as query, key and value are, as kernels index them; others as they are."""
    rows = ("o", "do", "dq", "dk", "dv")
    return {name: heads_first(t, call.layout) if name in rows else t for name, t in tensors.items()}


ATTENTION = Target("gossamer_attention_cpu", _attention)
GRADIENT = Target("gossamer_attention_gradient_cpu", _gradient)

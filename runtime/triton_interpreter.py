"""Emitted Triton text on Triton's interpreter: exact semantics, no GPU, milliseconds a tile.

Triton decides at import whether a process interprets or compiles, so the interpreter lives in a
child process, which is started once and ends with this one.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import IO, Any

from ..ir.errors import BackendError, UnsupportedError
from .gpu import load


def run_interpreted(source: str, arguments: Mapping[str, Any]) -> None:
    """Run emitted text on torch CPU tensors and scalars by name; outputs are written in place.

    Use small sizes: a step of 64x64x32 takes 2 to 3 ms. Raises UnsupportedError for bf16, in which
    Triton's interpreter is silently wrong, and BackendError where the interpreter fails."""
    if "torch.bfloat16" in {str(getattr(v, "dtype", "")) for v in arguments.values()}:
        raise UnsupportedError("triton's interpreter computes bf16 wrongly; test in f32 and f16")
    for name, tensor in _asked((source, dict(arguments), None)).items():
        arguments[name].copy_(tensor)


def launch_interpreted(source: str, grid: int, parameters: Sequence[Any]) -> None:
    """Run emitted text as something else than `bind` launches it, on parameters in the kernel's order.

    parameters: numbers; torch CPU tensors, of which the kernel gets the address; for a descriptor a tensor
    and the extents of its box. Outputs are written in place. Raises as `run_interpreted` does."""
    numbered = dict(enumerate(parameters))
    for n, tensor in _asked((source, numbered, grid)).items():
        parameters[n].copy_(tensor)


def _asked(request: tuple[str, dict[Any, Any], int | None]) -> dict[Any, Any]:
    outcome = _child().ask(request)
    if isinstance(outcome, str):
        raise BackendError(f"triton's interpreter failed:\n{outcome}")
    return outcome


class _Child:
    """The interpreting process: one request at a time, pickled over its pipes."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        )
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, request: object) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            try:
                _send(self._process.stdin, request)
                return pickle.load(self._process.stdout)
            except (EOFError, BrokenPipeError):
                _child.cache_clear()
                raise BackendError(f"triton's interpreter died with code {self._process.wait()}") from None

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


@lru_cache(maxsize=1)
def _child() -> _Child:
    return _Child()


def _send(pipe: IO[bytes], value: object) -> None:
    pickle.dump(value, pipe)
    pipe.flush()


def serve() -> None:
    """Answer requests until standard input ends: the tensors by name afterwards, or what went wrong."""
    import traceback

    import numpy as np
    import torch

    torch.set_num_threads(1)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what kernels print must not get between the answers
    while True:
        try:
            source, arguments, grid = pickle.load(requests)
        except EOFError:
            return
        try:
            with np.errstate(all="ignore"):
                _run(source, arguments, grid)
            _send(answers, {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)})
        except Exception:
            _send(answers, traceback.format_exc())


def _run(source: str, arguments: dict[Any, Any], grid: int | None) -> None:
    module = load(source)
    if grid is not None:
        module.kernel[(grid,)](*map(_described, arguments.values()))
        return
    values = module.bind(**arguments)
    module.kernel[module.grid(**dict(zip(module.kernel.arg_names, values, strict=True)))](*values)


def _described(parameter: Any) -> Any:
    if not isinstance(parameter, tuple):
        return parameter
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(*parameter)

"""GPU kernels under XLA: what a call's text says becomes custom calls (runtime/xla_gpu.py), one a kernel.

Kernels are found and compiled while XLA compiles the program around them, for the GPU that is here or the one
that `lowering_for` names; when the program runs there is no Python. What only contents tell is not checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from ...ir.errors import InputError, UnsupportedError
from ...runtime import xla_gpu
from ...runtime.gpu import TARGETS, target_of
from ...runtime.strided import Device, Strided
from ...runtime.xla_gpu import CustomCall
from ..trace.tensor import dtype_name

_MULTIPROCESSORS = {"cuda:sm_80": 108, "cuda:sm_90": 132, "cuda:sm_90a": 132, "cuda:sm_100": 148}
_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64", "u8": "uint8"}
_DTYPES |= {f"i{n}": f"int{n}" for n in (8, 16, 32, 64)} | {"bool": "bool"}
_ffi_call = jax.ffi.ffi_call
_target: ContextVar[str | None] = ContextVar("gossamer_jax_target", default=None)


@contextlib.contextmanager
def lowering_for(target: str) -> Iterator[None]:
    """Within it, programs for CUDA are lowered for a GPU that need not be here.

    For `jax.jit(f).trace(...).lower(lowering_platforms=("cuda",))` and `jax.export`. target: such as
    "cuda:sm_90". JAX forgets what it has compiled before and within. Needs JAX's plugin for CUDA. Raises
    InputError for another target."""
    if target not in TARGETS or not target.startswith("cuda:"):
        expected = ", ".join(t for t in TARGETS if t.startswith("cuda:"))
        raise InputError("jax.lowering_for", f"one of {expected}", repr(target))
    token = _target.set(target)
    jax.clear_caches()  # which hold what was lowered for another target
    try:
        yield
    finally:
        jax.clear_caches()
        _target.reset(token)


def device() -> Device:
    """The GPU that programs are lowered for. Raises UnsupportedError where none is known."""
    target = _target.get()
    count = _MULTIPROCESSORS.get(target or "", 128)
    if target is None:
        try:
            here = jax.local_devices(backend="cuda")[0]
        except RuntimeError:
            fix = "Lower within gossamer.jax.lowering_for('cuda:sm_90')"
            raise UnsupportedError(f"no GPU is here to compile kernels for. {fix}") from None
        major, minor = map(int, str(here.compute_capability).split("."))
        target, count = target_of(major, minor), getattr(here, "core_count", count)
    asked = getattr(jax.config, "jax_default_matmul_precision", None)
    rounded = asked in ("tensorfloat32", "TF32_TF32_F32")
    precision = "tf32" if rounded else "ieee"
    return Device("cuda", 0, target, precision, count, xla_gpu.makes_descriptors())


class _Array:
    """One array of the program, whose value changes from launch to launch. None: nobody has written it."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


Prepare = Callable[[str, Sequence[Strided]], Any]


def run(prepare: Prepare, call: str, operands: Sequence[Any], results: Sequence[Any]) -> list[Any]:
    """The results of a call, by custom calls. Runs while XLA compiles: operands are traced."""
    here = device()
    arrays = [*map(_Array, operands), *(_Array() for _ in results)]
    described = zip((*operands, *results), arrays, strict=True)
    memory = [Strided(0, x.shape, str(dtype_name(x.dtype)), owner=a, device=here) for x, a in described]
    executable, values = prepare(call, memory)
    calls, made = xla_gpu.custom_calls(executable, values)
    tensors = {name: value for name, value in values.items() if isinstance(value, Strided)}
    tensors |= {name: Strided(0, shape, dtype) for name, shape, dtype in made}
    shapes = {a: (x.shape, x.dtype) for a, x in zip(arrays, (*operands, *results), strict=True)}
    held: dict[str, _Array] = {}
    for name, tensor in tensors.items():
        held[name] = array = tensor.owner if isinstance(tensor.owner, _Array) else _Array()
        shapes.setdefault(array, (tensor.shape, jnp.dtype(_DTYPES[tensor.dtype])))
    for one in calls:
        _launch(one, held, shapes)
    return [
        jnp.zeros(x.shape, x.dtype) if a.value is None else a.value
        for x, a in zip(results, arrays[len(operands) :], strict=True)
    ]


def _launch(call: CustomCall, held: Mapping[str, _Array], shapes: Mapping[_Array, Any]) -> None:
    """One custom call. XLA passes operands, then results: what is written in front of an operand, or has been
    written before, is an operand that becomes a result."""
    arrays = [held[name] for name in call.tensors]
    written = [name in call.written for name in call.tensors]
    given = [
        not out or name in call.updated or array.value is not None
        for name, out, array in zip(call.tensors, written, arrays, strict=True)
    ]
    operands = len(given) - given[::-1].index(True) if any(given) else 0
    for array in arrays[:operands]:
        if array.value is None:
            array.value = jnp.zeros(*shapes[array])
    fresh, kept = arrays[operands:], [n for n in range(operands) if written[n]]
    results = [*fresh, *(arrays[n] for n in kept)]
    types = [jax.ShapeDtypeStruct(*shapes[array]) for array in results]
    aliases = {n: len(fresh) + place for place, n in enumerate(kept)}
    invoke = _ffi_call(xla_gpu.TARGET, types, input_output_aliases=aliases)
    values = invoke(*(a.value for a in arrays[:operands]), name=call.kernel, opaque=call.opaque)
    for array, value in zip(results, values, strict=True):
        array.value = value

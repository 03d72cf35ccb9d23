"""What a CPU kernel is passed: addresses and numbers, and of which tensor or scalar each is."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import UnsupportedError
from ..ir.kernel import Kernel, Tensor
from .tvm_layout import TENSOR_DTYPES
from .tvm_names import safe


@dataclass(frozen=True)
class Parameter:
    """One argument: its name, its kind ('address', 'i64', 'f32' or 'f64'), its type in the script, and its
    source: Python over the kernel's tensors and scalars, for instance `q.stride(2)`."""

    name: str
    kind: str
    type: str
    source: str


def signature(kernel: Kernel) -> tuple[Parameter, ...]:
    """The arguments, in order: the address of each tensor, sizes, strides, then scalars.

    Raises UnsupportedError for a dtype that CPUs lack."""
    addresses = (Parameter(f"p_{t.name}", "address", _pointer(t), t.name) for t in kernel.tensors)
    scalars = (
        Parameter(safe(s.name), kind, f"T.{TENSOR_DTYPES[kind]}", s.name)
        for s in kernel.scalars
        for kind in [s.dtype if s.dtype in ("f32", "f64") else "i64"]
    )
    return (*addresses, *_sizes(kernel), *_strides(kernel), *scalars)


def stride_name(tensor: Tensor, dimension: int) -> str:
    """A stride as the script calls it; the one that is known is a number."""
    return "T.int64(1)" if dimension == tensor.unit else f"{tensor.name}_s{dimension}"


def _pointer(tensor: Tensor) -> str:
    if tensor.dtype not in TENSOR_DTYPES:
        kinds = ", ".join(TENSOR_DTYPES)
        raise UnsupportedError(f"tensor {tensor.name}: no dtype {tensor.dtype!r} on CPUs; use {kinds}")
    return f'T.handle("{TENSOR_DTYPES[tensor.dtype]}")'


def _sizes(kernel: Kernel) -> list[Parameter]:
    """Each named size, from the first tensor that has it."""
    found: dict[str, Parameter] = {}
    for tensor in kernel.tensors:
        for d, size in enumerate(tensor.shape):
            if isinstance(size, str) and size not in found:
                found[size] = Parameter(safe(size), "i64", "T.int64", f"{tensor.name}.shape[{d}]")
    return list(found.values())


def _strides(kernel: Kernel) -> list[Parameter]:
    return [
        Parameter(stride_name(tensor, d), "i64", "T.int64", f"{tensor.name}.stride({d})")
        for tensor in kernel.tensors
        for d in range(len(tensor.shape))
        if d != tensor.unit
    ]

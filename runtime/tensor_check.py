"""Whether tensors are what a CPU kernel was compiled for: it reads addresses, and asks nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ir.errors import InputError
from .manifest import BYTES, Argument, dtype_name

_HERE = ("cpu", "meta")  # a tensor without memory stands for one that is yet to be allocated


def check_tensors(kernel: str, arguments: Sequence[Argument], values: Mapping[str, Any]) -> None:
    """Raise InputError unless dtype, device, sizes, alignment and the stride that is 1 are those that a
    kernel asks for, and sizes of one name agree. Ranks are right (`Executable`)."""
    known: dict[str, tuple[int, str]] = {}
    for argument in arguments:
        tensor, where = values[argument.source], f"{kernel}: {argument.source}"
        _check_memory(where, argument, tensor)
        for d, (size, expected) in enumerate(zip(tensor.shape, argument.shape, strict=True)):
            origin = ""
            if isinstance(expected, str):
                expected, origin = known.setdefault(expected, (size, f"{argument.source}.shape[{d}]"))
            if size != expected:
                raise InputError(f"{where}.shape[{d}]", f"{expected}{origin and f', as {origin}'}", size)
        unit = argument.unit
        if unit is not None and tensor.stride(unit) != 1 and tensor.shape[unit] > 1:
            fix = f"Pass {argument.source}.contiguous()"
            raise InputError(f"{where}.stride({unit})", "1", tensor.stride(unit), fix)


def _check_memory(where: str, argument: Argument, tensor: Any) -> None:
    device, dtype = getattr(tensor, "device", None), getattr(tensor, "dtype", None)
    if device is not None and device.type not in _HERE:
        raise InputError(where, "a tensor on the CPU, which the kernel is for", device)
    if dtype is not None and dtype_name(dtype) != argument.dtype:
        raise InputError(where, f"elements of {argument.dtype}", dtype)
    if tensor.data_ptr() % BYTES[argument.dtype]:
        expected = f"an address that {BYTES[argument.dtype]} bytes divide"
        raise InputError(where, expected, hex(tensor.data_ptr()), f"Pass {argument.source}.clone()")
    if getattr(tensor, "is_neg", _no)():
        raise InputError(
            where, "the numbers that memory holds", "a lazy negative", "Pass resolve_neg() of it"
        )


def _no() -> bool:
    return False

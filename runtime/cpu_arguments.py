"""What a CPU kernel is passed: addresses, and the numbers beside them, which it takes as they are.

It reads addresses and asks nothing itself, so tensors are checked here, once for all calls that share a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ir.errors import InputError
from .manifest import BYTES, Argument, Launch, dtype_name
from .source import Source

_HERE = ("cpu", "meta")  # a tensor without memory stands for one that is yet to be allocated


class Arguments:
    """The arguments of one kernel: the address of each tensor, sizes and strides, then scalars."""

    def __init__(self, launch: Launch) -> None:
        self._kernel = launch.kernel
        self._tensors = [a for a in launch.arguments if a.kind == "tensor"]
        ranks = {a.source: len(a.shape) for a in self._tensors}
        self._places: list[tuple[str, int]] = []  # in a tensor's sizes and strides
        self._scalars: list[tuple[type[int] | type[float], str]] = []
        for kind, text in launch.details["parameters"]:
            name, what, dimension = Source.parse(text)
            if what:
                self._places.append((name, dimension + (ranks[name] if what == "stride" else 0)))
            elif kind != "address":
                self._scalars.append((int if kind == "i64" else float, name))

    def numbers(self, values: Mapping[str, Any]) -> tuple[int | float, ...]:
        """All that follows the addresses, of tensors and scalars by name.

        Raises InputError unless dtype, device, sizes, alignment and the stride that is 1 are those that the
        kernel asks for, and sizes of one name agree. Ranks are right (`Executable`)."""
        looks: dict[str, tuple[int, ...]] = {}
        known: dict[int | str, int] = {}
        for argument in self._tensors:
            tensor = values[argument.source]
            shape, strides = tensor.shape, tensor.stride()
            wrong = _memory(argument, tensor) or _layout(argument, shape, strides, known)
            if wrong is not None:
                what, *rest = wrong
                raise InputError(f"{self._kernel}: {argument.source}{what}", *rest)
            looks[argument.source] = (*shape, *strides)
        read = [looks[name][place] for name, place in self._places]
        return (*read, *[kind(values[name]) for kind, name in self._scalars])


_Wrong = tuple[Any, ...] | None  # what of a tensor, what was expected, what came, and what to do


def _memory(argument: Argument, tensor: Any) -> _Wrong:
    device, dtype = getattr(tensor, "device", None), getattr(tensor, "dtype", None)
    if device is not None and device.type not in _HERE:
        return "", "a tensor on the CPU, which the kernel is for", device
    if dtype is not None and dtype_name(dtype) != argument.dtype:
        return "", f"elements of {argument.dtype}", dtype
    size, address = BYTES[argument.dtype], tensor.data_ptr()
    if address % size:
        return "", f"an address that {size} bytes divide", hex(address), f"Pass {argument.source}.clone()"
    is_neg = getattr(tensor, "is_neg", None)  # of torch's alone
    if is_neg is not None and is_neg():
        fix = f"Pass {argument.source}.resolve_neg()"
        return "", "the numbers that memory holds", "a lazy negative", fix
    return None


def _layout(argument: Argument, shape: Any, strides: Any, known: dict[int | str, int]) -> _Wrong:
    """known: sizes by name, of the tensors before."""
    for d, (size, name) in enumerate(zip(shape, argument.shape, strict=True)):
        expected = name if isinstance(name, int) else known.setdefault(name, size)
        if size != expected:
            as_named = "" if name == expected else f", as {name} of the tensors before it"
            return f".shape[{d}]", f"{expected}{as_named}", size
    unit = argument.unit
    if unit is not None and strides[unit] != 1 and shape[unit] > 1:
        return f".stride({unit})", "1", strides[unit], f"Pass {argument.source}.contiguous()"
    return None

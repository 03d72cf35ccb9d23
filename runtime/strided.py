"""Tensors by address: what kernels need of a tensor whose library is no concern of theirs.

`Strided` describes memory that somebody else owns: an address, a shape, strides in elements and a dtype by
its name in the IR.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.errors import InputError
from .manifest import BYTES

_NUMPY = {
    **{f"f{n}": f"float{n}" for n in (16, 32, 64)},
    **{f"i{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{"u8": "uint8", "bool": "bool", "bf16": "bfloat16"},
}


@dataclass(frozen=True)
class Device:
    """Where memory is, and what kernels have to know of that: type 'cpu' or 'cuda'.

    target: of kernels for it. precision: of products of f32, 'ieee' or 'tf32'. multiprocessors: of a GPU.
    descriptors: whether what launches kernels there makes tensor descriptors."""

    type: str = "cpu"
    index: int = 0
    target: str = "cpu"
    precision: str = "ieee"
    multiprocessors: int = 0
    descriptors: bool = True

    def __str__(self) -> str:
        return self.type if self.type == "cpu" else f"{self.type}:{self.index}"


CPU = Device()


class Strided:
    """Memory as a tensor: address (0: not known yet), shape, strides in elements, dtype by name.

    owner: what has to live as long as this does, or says whose memory it is. Strides default to those of a
    contiguous tensor."""

    __slots__ = ("_strides", "address", "device", "dtype", "owner", "shape")

    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        dtype: str,
        strides: Sequence[int] | None = None,
        owner: Any = None,
        device: Device = CPU,
    ) -> None:
        self.address, self.shape, self.dtype, self.owner = address, tuple(shape), dtype, owner
        contiguous = (math.prod(self.shape[d + 1 :]) for d in range(len(self.shape)))
        self._strides = tuple(contiguous if strides is None else strides)
        self.device = device

    @staticmethod
    def empty(shape: Sequence[int], dtype: str) -> Strided:
        """Uninitialised contiguous memory of NumPy's."""
        memory = np.empty(max(1, math.prod(shape)) * BYTES[dtype], np.uint8)
        return Strided(memory.ctypes.data, shape, dtype, owner=memory)

    @staticmethod
    def of(array: np.ndarray) -> Strided:
        """An array's memory. Raises InputError for elements that kernels do not know."""
        names = [name for name, kind in _NUMPY.items() if kind == array.dtype.name]
        if not names or not array.dtype.isnative or any(s % array.itemsize for s in array.strides):
            expected = f"an array of {', '.join(sorted(_NUMPY.values()))}"
            raise InputError("argument", expected, f"{array.dtype}, strides {array.strides}")
        strides = [s // array.itemsize for s in array.strides]
        return Strided(array.ctypes.data, array.shape, names[0], strides, owner=array)

    def __repr__(self) -> str:
        return f"Strided({self.dtype}{list(self.shape)}, strides {self._strides})"

    def stride(self, dimension: int | None = None) -> Any:
        return self._strides if dimension is None else self._strides[dimension]

    def data_ptr(self) -> int:
        return self.address

    def dim(self) -> int:
        return len(self.shape)

    def element_size(self) -> int:
        return BYTES[self.dtype]

    def permute(self, *order: int) -> Strided:
        """The same memory with its dimensions in another order."""
        shape, strides = ([of[d] for d in order] for of in (self.shape, self._strides))
        return Strided(self.address, shape, self.dtype, strides, self.owner, self.device)

    def expand(self, *sizes: int) -> Strided:
        """The same memory with dimensions of size 1 repeated; -1 keeps a size."""
        pairs = list(zip(self.shape, self._strides, sizes, strict=True))
        shape = [old if new == -1 else new for old, _, new in pairs]
        strides = [stride if new in (-1, old) else 0 for old, stride, new in pairs]
        return Strided(self.address, shape, self.dtype, strides, self.owner, self.device)

    def view(self, dtype: str) -> Strided:
        """The same memory as another dtype of the same size."""
        return Strided(self.address, self.shape, dtype, self._strides, self.owner, self.device)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The memory itself as NumPy has it; bfloat16, which NumPy lacks, widened to float32."""
        kind, size = "uint16" if self.dtype == "bf16" else _NUMPY[self.dtype], self.element_size()
        if math.prod(self.shape) == 0:
            array = np.empty(self.shape, kind)
        else:
            steps = zip(self.shape, self._strides, strict=True)
            last = sum((n - 1) * stride for n, stride in steps)
            memory = (ctypes.c_char * ((last + 1) * size)).from_address(self.address)
            strides = [stride * size for stride in self._strides]
            array = np.ndarray(self.shape, kind, memoryview(memory), strides=strides)
        if self.dtype == "bf16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array if dtype is None else array.astype(dtype)

    def tolist(self) -> Any:
        return np.asarray(self).tolist()

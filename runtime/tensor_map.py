"""Tensor maps: what the copy engine of an NVIDIA GPU (TMA) has to know of a tensor to fetch boxes of it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_uint32, c_uint64, c_void_p
from typing import Any

SIZE = 128  # bytes of a CUtensorMap
_ALIGN = 64  # of the address that the driver writes it to
_TYPES = {"u8": 0, "f16": 6, "f32": 7, "f64": 8, "bf16": 9}  # CUtensorMapDataType
_BYTES = {"u8": 1, "f16": 2, "f32": 4, "f64": 8, "bf16": 2}
_STEP = 16  # strides are multiples of this many bytes
_L2_128 = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
_KEPT = 64  # maps by address: as many buffers as a program is likely to take turns with


class TensorMap:
    """The maps of tensors that share shape, strides and dtype: `at(address)` is the one of a tensor there.

    shape, strides: in elements, the innermost stride 1. box: extents of what is fetched at once. swizzle:
    CUtensorMapSwizzle. Raises BackendError for what the engine cannot take."""

    def __init__(
        self,
        driver: Any,
        device: int,
        dtype: str,
        shape: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        swizzle: int,
    ) -> None:
        size, rank = _BYTES[dtype], len(shape)
        # A dimension of one element has any stride; an empty tensor is never read.
        steps = [s * size if n > 1 else _STEP for s, n in zip(strides[:-1], shape[:-1], strict=True)]
        self._driver, self._device = driver, device
        self._fixed = (
            (c_uint64 * rank)(*(max(1, n) for n in reversed(shape))),
            (c_uint64 * (rank - 1))(*reversed(steps)),
            (c_uint32 * rank)(*reversed(box)),
            (c_uint32 * rank)(*(1,) * rank),
        )
        self._head, self._tail = (_TYPES[dtype], rank), (0, swizzle, _L2_128, 0)
        self._empty = 0 in shape
        self._maps: dict[int, bytes] = {}

    def at(self, address: int) -> bytes:
        """The map of a tensor at an address, in bytes."""
        found = self._maps.get(address)
        if found is None:
            if len(self._maps) >= _KEPT:
                self._maps.clear()
            found = self._maps[address] = bytes(SIZE) if self._empty else self._encoded(address)
        return found

    def _encoded(self, address: int) -> bytes:
        memory = ctypes.create_string_buffer(SIZE + _ALIGN)
        offset = -ctypes.addressof(memory) % _ALIGN
        place = c_void_p(ctypes.addressof(memory) + offset)
        self._driver.encode(self._device, place, *self._head, c_void_p(address), *self._fixed, *self._tail)
        return memory.raw[offset : offset + SIZE]

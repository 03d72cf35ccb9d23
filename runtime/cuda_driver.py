"""The CUDA driver, by ctypes: binaries become functions, functions run on streams.

Nothing else of CUDA is needed, and neither Triton nor a compiler. The driver is loaded when the first
kernel is.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from ctypes import byref, c_int, c_uint, c_void_p
from functools import cache
from typing import Any

from ..ir.errors import BackendError
from .gpu import Limits
from .tensor_map import SIZE as MAP_SIZE

_NAMES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_LIMITS = (97, 12, 1)  # device attributes: opt-in shared memory, registers, threads; each a block
_INVALID_CONTEXT = 201  # the calling thread has no context yet
STATIC_SHARED = 48 << 10  # bytes of shared memory that need no opting in


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{name}_{axis}", c_uint) for name in ("grid", "block") for axis in "xyz"),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("attribute_count", c_uint),
    )


class Driver:
    """The driver's calls that a launcher needs, on devices by their number. Raises BackendError."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._contexts: dict[int, c_void_p] = {}
        self._retaining = threading.Lock()
        self.launch = library.cuLaunchKernelEx
        self.check(library.cuInit(0))

    def function(self, binary: bytes, name: str, device: int, shared: int) -> c_void_p:
        """Load a binary on a device, for the life of the process: its function of that name.

        shared: the bytes of dynamic shared memory that it is launched with."""
        module, function = c_void_p(), c_void_p()
        self.check(self._library.cuCtxPushCurrent_v2(self._context(device)))
        try:
            self.check(self._library.cuModuleLoadData(byref(module), binary))
            self.check(self._library.cuModuleGetFunction(byref(function), module, name.encode()))
            if shared > STATIC_SHARED:
                self.check(self._library.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared))
        finally:
            self._library.cuCtxPopCurrent_v2(byref(c_void_p()))
        return function

    def encode(self, device: int, *arguments: Any) -> None:
        """cuTensorMapEncodeTiled, of memory on a device. Raises BackendError for what it refuses, and before
        CUDA 12."""
        call = getattr(self._library, "cuTensorMapEncodeTiled", None)
        if call is None:
            raise BackendError("the CUDA driver is too old for tensor descriptors, expected 12.0 or later")
        code = call(*arguments)
        if code == _INVALID_CONTEXT:  # the first thing that a thread does, as autograd's own do
            self.enter(device)
            code = call(*arguments)
        self.check(code)

    def limits(self, device: int) -> Limits:
        """What a program may use on a device."""
        found = []
        for attribute in _LIMITS:
            value = c_int()
            self.check(self._library.cuDeviceGetAttribute(byref(value), attribute, self._device(device)))
            found.append(value.value)
        return Limits(*found)

    def enter(self, device: int) -> None:
        """Make the device's primary context, the one that torch uses, current on this thread."""
        self.check(self._library.cuCtxSetCurrent(self._context(device)))

    def check(self, code: int) -> None:
        """Raise BackendError for what a call returned, unless it is success."""
        if not code:
            return
        texts = []
        for call in (self._library.cuGetErrorName, self._library.cuGetErrorString):
            text = ctypes.c_char_p()
            call(code, byref(text))
            texts.append((text.value or b"").decode())
        raise BackendError(f"CUDA driver: {': '.join(filter(None, texts)) or 'an error'} ({code})")

    def _context(self, device: int) -> c_void_p:
        with self._retaining:
            if device not in self._contexts:
                context = c_void_p()
                self.check(self._library.cuDevicePrimaryCtxRetain(byref(context), self._device(device)))
                self._contexts[device] = context
            return self._contexts[device]

    def _device(self, number: int) -> c_int:
        found = c_int()
        self.check(self._library.cuDeviceGet(byref(found), number))
        return found


@cache
def driver() -> Driver:
    """The driver of this machine. Raises BackendError when there is none, or an old one."""
    problem: object = "no library found"
    for name in _NAMES:
        try:
            return Driver(ctypes.CDLL(name))
        except AttributeError as error:
            raise BackendError(f"the CUDA driver is too old, expected 11.8 or later: {error}") from None
        except OSError as error:
            problem = error
    raise BackendError(f"cannot load the CUDA driver ({', '.join(_NAMES)}): {problem}. Install it")


class Layout:
    """Where the parameters of a kernel lie in memory: addresses, what is made of them, then constants.

    types: of the parameters in order: '*' for an address, 'M' for a tensor map, which is made of one, else
    a format of `struct`. places: where each lies. maps: the numbers of the addresses that maps are made of.
    constants: packs everything else. size: of all."""

    def __init__(self, types: Sequence[str]) -> None:
        changing = [kind for kind in types if kind in "*M"]
        self.maps = [number for number, kind in enumerate(changing) if kind == "M"]
        self.addresses = len(changing)
        start = 8 * self.addresses + MAP_SIZE * len(self.maps)
        self.places: list[int] = []
        address, tensor_map, format = 0, 8 * self.addresses, "@"
        for kind in types:
            if kind == "*":
                self.places.append(8 * address)
            elif kind == "M":
                self.places.append(tensor_map)
                tensor_map += MAP_SIZE
            else:
                format += kind
                self.places.append(start + struct.calcsize(format) - struct.calcsize(kind))
            address += kind in "*M"
        self.constants = struct.Struct(format).pack
        self.size = start + struct.calcsize(format)
        whole = f"{self.addresses}Q" + f"{MAP_SIZE}s" * len(self.maps) + f"{self.size - start}s"
        self.fill = struct.Struct(whole).pack_into


class Function:
    """A loaded kernel: `call(grid, addresses, maps, constants, stream)` launches it.

    Safe from several threads at once: each launch writes to a block of memory of its own, and blocks
    are used again. The driver copies arguments before a launch returns, so nothing waits for the GPU.
    """

    def __init__(self, handle: c_void_p, device: int, threads: int, shared: int, layout: Layout) -> None:
        self._driver = driver()
        self._launch = self._driver.launch
        self._handle, self._device = handle, device
        self._shape = threads, shared
        self._layout = layout
        self._fill = layout.fill
        self._free: list[tuple[Any, Any, Any, Any]] = []

    def __call__(
        self, grid: int, addresses: Sequence[int], maps: Sequence[bytes], constants: bytes, stream: int
    ) -> None:
        try:
            block = self._free.pop()
        except IndexError:
            block = self._block()
        memory, pointers, config, reference = block
        self._fill(memory, 0, *addresses, *maps, constants)
        config.grid_x, config.stream = grid, stream
        code = self._launch(reference, self._handle, pointers, None)
        if code == _INVALID_CONTEXT:
            self._driver.enter(self._device)
            code = self._launch(reference, self._handle, pointers, None)
        self._free.append(block)
        if code:
            self._driver.check(code)

    def _block(self) -> tuple[Any, Any, Any, Any]:
        """Memory for the arguments, pointers to each of them, the configuration, and its address."""
        memory = ctypes.create_string_buffer(self._layout.size)
        start, places = ctypes.addressof(memory), self._layout.places
        pointers = (c_void_p * len(places))(*(start + place for place in places))
        threads, shared = self._shape
        config = _Config(1, 1, 1, threads, 1, 1, shared)
        return memory, pointers, config, byref(config)

"""A CUDA driver that runs nothing: it checks how it is called and writes down what kernels were given."""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from gossamer.frontend import executables, gradients, prepare
from gossamer.frontend.linear import form as linear_form
from gossamer.runtime import cuda_driver, cuda_kernel, gpu

# PTX does not tell signed from unsigned.
FORMATS = {"b8": "128s", "u8": "b", "u16": "h", "u32": "i", "u64": "q", "f32": "f", "f64": "d"}


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel's name, its grid, threads and shared memory, stream, and arguments as read."""

    name: str
    grid: int
    threads: int
    shared: int
    stream: int
    arguments: tuple[Any, ...]


@dataclass
class FakeCuda:
    """libcuda as `cuda_driver` sees it.

    formats, sources: of each kernel's parameters, and its text, by its name. optin: bytes of shared
    memory a block. failing: codes that launches return, taken one by one."""

    formats: dict[str, list[str]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    optin: int = 232_448
    failing: list[int] = field(default_factory=list)
    launched: list[Launched] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    entered: int = 0
    stack: list[Any] = field(default_factory=list)
    optins: dict[int, int] = field(default_factory=dict)
    encoded: list[Any] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, out, number):
        _at(out).value = number or 0
        return 0

    def cuDeviceGetAttribute(self, out, attribute, device):
        _at(out).value = {97: self.optin, 12: 65_536, 1: 1024}[attribute]
        return 0

    def cuDevicePrimaryCtxRetain(self, out, device):
        _at(out).value = 0xC0
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.stack.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, out):
        self.stack.pop()
        return 0

    def cuCtxSetCurrent(self, context):
        self.entered += 1
        return 0

    def cuModuleLoadData(self, out, binary):
        assert self.stack and binary[:4] == b"\x7fELF"
        _at(out).value = 0xB0
        return 0

    def cuModuleGetFunction(self, out, module, name):
        self.loaded.append(name.decode())
        _at(out).value = len(self.loaded)
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        assert attribute == 8
        self.optins[function.value] = value
        return 0

    def cuTensorMapEncodeTiled(self, out, dtype, rank, address, shape, strides, box, steps, *rest):
        assert out.value % 64 == 0 and address.value % 16 == 0 and all(s % 16 == 0 for s in strides)
        assert rank == len(shape) == len(strides) + 1 == len(box) and set(steps) == {1} and min(shape) > 0
        record = struct.pack("<3Q", dtype, address.value, box[0]) + struct.pack(f"<{rank}Q", *shape)
        ctypes.memmove(out.value, record.ljust(128, b"\0"), 128)
        self.encoded.append((tuple(shape), tuple(strides), tuple(box), rest))
        return 0

    def cuGetErrorName(self, code, out):
        _at(out).value = b"CUDA_ERROR_FAKE"
        return 0

    def cuGetErrorString(self, code, out):
        _at(out).value = b"it was asked to fail"
        return 0

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        if self.failing:
            return self.failing.pop(0)
        c = _at(config)
        assert c.grid_y == c.grid_z == c.block_y == c.block_z == 1
        assert not c.attribute_count and extra is None
        assert c.shared <= max(cuda_driver.STATIC_SHARED, self.optins.get(function.value, 0))
        name = self.loaded[function.value - 1]
        places = list(parameters)
        assert len(places) == len(self.formats[name])
        values = [
            struct.unpack(f, ctypes.string_at(place, struct.calcsize(f)))[0]
            for place, f in zip(places, self.formats[name], strict=True)
        ]
        with self.lock:
            shape = c.grid_x, c.block_x, c.shared, c.stream or 0
            self.launched.append(Launched(name, *shape, tuple(values)))
        return 0


def _at(reference):
    return reference._obj if hasattr(reference, "_obj") else reference


def parameters(assembly: str) -> dict[str, list[str]]:
    """Formats of each kernel's parameters, as the PTX that Triton made declares them."""
    found = {}
    for name, declared in re.findall(r"\.entry (\w+)\((.*?)\)", assembly, re.S):
        found[name] = [FORMATS[kind] for kind in re.findall(r"\.param (?:\.align \d+ )?\.(\w+)", declared)]
    return found


def install(monkeypatch, cache) -> FakeCuda:
    """A fake driver in place of libcuda, under which CPU tensors pass for those of one GPU.

    cache: an empty folder, so that kernels are compiled: it learns their parameters from that."""
    fake = FakeCuda()
    made = cuda_driver.Driver(fake)
    compile_ahead = gpu.compile_ahead

    def compiled(source: str, target: str) -> gpu.Binary:
        binary = compile_ahead(source, target)
        fake.formats |= parameters(binary.assembly)
        fake.sources[binary.name] = source
        return binary

    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(cache))
    monkeypatch.setattr(gpu, "compile_ahead", compiled)
    monkeypatch.setattr(cuda_kernel, "driver", lambda: made)
    monkeypatch.setattr(cuda_driver, "driver", lambda: made)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    for module in (prepare, executables, gradients, linear_form):
        monkeypatch.setattr(module, "target_of", lambda device: "cuda:sm_90")
    return fake

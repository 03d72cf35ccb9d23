"""A compiled GPU kernel that can be called: arguments as its manifest lists them, memory as torch has it."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ir.errors import ArtifactError, BackendError, InputError
from .cuda_driver import Function, Layout, driver
from .formula import parse_formula
from .gpu import SMALLER
from .manifest import BYTES, Argument, Launch
from .source import Source
from .tensor_map import TensorMap

if TYPE_CHECKING:
    from .backends import Runner

_WARP = 32
_STRUCT = {"i1": "?", "i8": "b", "u8": "B", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
_NAMES = {format: name for name, format in _STRUCT.items()}
_DESCRIPTOR = re.compile(r"tensordesc<(\w+)\[[\d, ]+\]>")
_DTYPES = {"fp64": "f64", "fp32": "f32", "fp16": "f16", "bf16": "bf16", "u8": "u8"}
_LIMIT = 1 << 31


class CudaKernel:
    """One kernel of an artifact. `bind` settles sizes, strides and scalars; what it returns launches.

    Binaries are loaded once a device, by the first `bind` there."""

    def __init__(self, launch: Launch, binary: bytes) -> None:
        self._launch, self._binary = launch, binary
        details = launch.details
        boxes = iter(details["boxes"])
        parameters = [p for kind, source in details["parameters"] for p in _parsed(kind, source, boxes)]
        self._parameters = parameters
        self._constants = [p for p in parameters if p[0] not in "*M"]
        self._boxes = [(name, what) for _, name, what, _ in parameters if isinstance(what, Box)]
        self._scratch: int = details["scratch"]
        # Triton's own parameters come last: scratch memory of the kernel, and of a profiler.
        own = ["*" if self._scratch else "Q", "Q"]
        self._own = (0,) * own.count("Q")
        self._layout = Layout([*(kind for kind, *_ in parameters), *own])
        self._threads, self._shared = details["warps"] * _WARP, details["shared"]
        self._grid = [parse_formula(extent) for extent in launch.grid]
        self._tensors = [a for a in launch.arguments if a.kind == "tensor"]
        places = {a.source: place for place, a in enumerate(self._tensors)}
        # A tensor can come by its address, by a descriptor that is made of it, or both ways.
        self._order = [places[name] for kind, name, *_ in parameters if kind in "*M"]
        self._functions: dict[int, Function] = {}
        self._loading = threading.Lock()

    def bind(self, values: Mapping[str, Any], sizes: Mapping[str, int]) -> Runner:
        """A launcher for tensors with the sizes and strides of these: it takes them in the kernel's order.

        sizes: dimensions and integer arguments by name. Raises InputError for what the kernel cannot
        address, BackendError where it does not fit the device."""
        device = next(value.device.index for value in values.values() if hasattr(value, "device"))
        grid = self._checked_grid(values, sizes)
        constants = self._layout.constants(*self._read(values), *self._own)
        maps = [
            TensorMap(
                driver(),
                device,
                box.dtype,
                values[name].shape,
                values[name].stride(),
                box.extents,
                box.swizzle,
            )
            for name, box in self._boxes
        ]
        numbered = list(zip(self._layout.maps, maps, strict=True))
        return _runner(self._function(device), device, grid, self._order, self._scratch, numbered, constants)

    def describe(self, values: Mapping[str, Any], sizes: Mapping[str, int]) -> Description:
        """The launch that `bind` would make, for who launches it himself. Raises InputError."""
        grid, numbers = self._checked_grid(values, sizes), iter(self._read(values))
        parameters = [
            Parameter("address", name)
            if kind == "*"
            else Parameter("descriptor", name, what)
            if kind == "M"
            else Parameter(_NAMES[kind], name, next(numbers))
            for kind, name, what, _ in self._parameters
        ]
        return Description(self._launch.entry, grid, self._threads // _WARP, self._shared, tuple(parameters))

    def _checked_grid(self, values: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
        """How many programs there are."""
        for argument in self._tensors:
            _check_alignment(self._launch.kernel, argument, values[argument.source])
        self._check_spans(values)
        grid = math.prod(extent(sizes) for extent in self._grid)
        if grid >= _LIMIT:
            shape = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise InputError(
                self._launch.kernel, "fewer than 2**31 tiles", f"{grid} for {shape}", "Split the batch"
            )
        return grid

    def _read(self, values: Mapping[str, Any]) -> list[Any]:
        """Everything but addresses and what is made of them, in the order of the parameters."""
        found = []
        for kind, name, what, dimension in self._constants:
            value = values[name]
            if what:
                value = value.stride(dimension) if what == "stride" else value.shape[dimension]
            if kind == "i" and not -_LIMIT <= value < _LIMIT:
                where = f"{name}.shape[{dimension}]" if what else name
                raise InputError(f"{self._launch.kernel}: {where}", "an integer of 32 bits", value)
            found.append(value)
        return found

    def _check_spans(self, values: Mapping[str, Any]) -> None:
        for name, dimension, coordinate in self._launch.details["spans"]:
            tensor = values[name]
            stride = tensor.stride(dimension)
            if stride * coordinate >= _LIMIT and tensor.shape[dimension] > 1:
                most = (_LIMIT - 1) // coordinate
                where = f"{self._launch.kernel}: {name}.stride({dimension})"
                raise InputError(where, f"at most {most} elements", stride, f"Pass {name}.contiguous()")

    def _function(self, device: int) -> Function:
        function = self._functions.get(device)
        if function is None:
            with self._loading:
                if device not in self._functions:
                    self._functions[device] = self._load(device)
                function = self._functions[device]
        return function

    def _load(self, device: int) -> Function:
        registers = self._launch.details["registers"]
        lacks = driver().limits(device).lacks(self._shared, registers, self._threads)
        if lacks:
            raise BackendError(
                f"{self._launch.kernel} does not fit cuda:{device}: it needs {lacks}. {SMALLER}"
            )
        handle = driver().function(self._binary, self._launch.entry, device, self._shared)
        return Function(handle, device, self._threads, self._shared, self._layout)


def _runner(
    function: Function,
    device: int,
    grid: int,
    order: Sequence[int],
    scratch: int,
    maps: Sequence[tuple[int, TensorMap]],
    constants: bytes,
) -> Runner:
    """What launches on torch's current stream of the device; an empty grid launches nothing.

    order: which of the tensors each parameter is the address of, or is made of."""
    import torch

    stream = torch._C._cuda_getCurrentRawStream
    current = torch._C._cuda_getDevice

    def run(tensors: Sequence[Any], threads: int | None) -> None:
        addresses = [tensors[place].data_ptr() for place in order]
        if scratch:
            memory = torch.empty(grid * scratch, dtype=torch.uint8, device=f"cuda:{device}")
            addresses.append(memory.data_ptr())
        made = [tensor_map.at(addresses[number]) for number, tensor_map in maps]
        if current() == device:
            function(grid, addresses, made, constants, stream(device))
        else:
            with torch.cuda.device(device):
                function(grid, addresses, made, constants, stream(device))

    return run if grid else lambda tensors, threads: None


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel. kind: 'address' or 'descriptor' of a tensor, or the type of a number ('i32',
    'fp32', ...). value: the number, or the box that a descriptor fetches."""

    kind: str
    name: str
    value: Any = None


@dataclass(frozen=True)
class Description:
    """One launch: the kernel's symbol, how many programs of so many warps and bytes of shared memory, and its
    parameters in order, without Triton's own."""

    entry: str
    grid: int
    warps: int
    shared: int
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Box:
    """What a tensor descriptor fetches: elements of a dtype, in a swizzled box."""

    dtype: str
    swizzle: int
    extents: tuple[int, ...]


_Parsed = tuple[str, str, str | Box, int]


def _parsed(kind: str, source: str, boxes: Iterator[Any]) -> list[_Parsed]:
    """What Triton makes of an argument, as (format, '*' or 'M'; name; what; dimension).

    what: 'stride', 'shape', a box or ''. A descriptor is a map, then its tensor's shape and strides."""
    described = _DESCRIPTOR.fullmatch(kind)
    if described is not None:
        swizzle, extents = next(boxes)
        dimensions = range(len(extents))
        return [
            ("M", source, Box(_DTYPES[described[1]], swizzle, tuple(extents)), 0),
            *(("i", source, "shape", d) for d in dimensions),
            *(("q", source, "stride", d) for d in dimensions),
        ]
    if kind[0] != "*" and kind not in _STRUCT:
        expected = "a number or an address"
        raise ArtifactError(
            f"parameter: expected {expected}; got {kind} {source!r}. Compile the kernel again"
        )
    name, what, dimension = Source.parse(source)
    return [("*" if kind[0] == "*" else _STRUCT[kind], name, what, dimension)]


def _check_alignment(kernel: str, argument: Argument, tensor: Any) -> None:
    """The address and every stride that is ever used are multiples of what the kernel was compiled for."""
    if argument.align == 1:
        return
    step = argument.align // math.gcd(argument.align, BYTES[argument.dtype])
    strides = [
        s
        for d, (s, n) in enumerate(zip(tensor.stride(), tensor.shape, strict=True))
        if d != argument.unit and n > 1
    ]
    if tensor.data_ptr() % argument.align or any(s % step for s in strides):
        raise InputError(
            f"{kernel}: {argument.source}",
            f"an address and strides that are multiples of {argument.align} bytes",
            f"address {tensor.data_ptr():#x}, strides {tuple(tensor.stride())}",
            f"Pass {argument.source}.clone(), or compile with aligned=False",
        )

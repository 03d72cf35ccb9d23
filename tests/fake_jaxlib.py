"""jaxlib's library for Triton's kernels, which launches on Triton's interpreter what it was given.

It checks parameters against those that the assembly declares, and takes buffers as XLA passes them: operands,
then results."""

from __future__ import annotations

import pickle
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from gossamer.runtime import gpu, xla_gpu
from gossamer.runtime.triton_interpreter import launch_interpreted

NUMBERS = {"i32": "u32", "i64": "u64", "fp32": "f32", "fp64": "f64"}  # as PTX declares them
TORCH = {6: torch.float16, 7: torch.float32, 8: torch.float64, 9: torch.bfloat16}  # by CUtensorMapDataType


@dataclass
class Library:
    """`jaxlib.gpu_triton` as gossamer sees it. sources: of kernels, by their assembly. launched: names."""

    sources: dict[str, str] = field(default_factory=dict)
    launched: list[str] = field(default_factory=list)

    def create_array_parameter(self, zeroed, divisor):
        assert zeroed == 0
        return ("u64", "array", divisor)

    def create_scalar_parameter(self, value, dtype):
        assert isinstance(value, float if dtype[0] == "f" else int)
        return (NUMBERS[dtype], "number", value)

    def TritonKernel(self, name, warps, ctas, shared, assembly, text, capability, *scratch):
        assert (ctas, capability) == (1, 90) and warps in (1, 2, 4, 8, 16) and shared >= 0
        return name, assembly

    def TritonKernelCall(self, kernel, grid, y, z, parameters):
        return Call(kernel, (grid, y, z), parameters)

    def launch(self, types, input_output_aliases=None):
        """In place of `jax.ffi.ffi_call`."""
        aliases = input_output_aliases or {}

        def invoke(*inputs, name, opaque):
            assert zlib.decompress(opaque)[:1] == b"\x80"
            call = pickle.loads(zlib.decompress(opaque))
            self.launched.append(name)
            results = [torch.full((max(1, t.size),), 0).to(_torch(t.dtype)) for t in types]
            for result, t in zip(results, types, strict=True):
                result.fill_(77 if t.dtype.kind in "iub" else torch.nan)
            operands = [_flat(x) for x in inputs]
            for operand, result in aliases.items():
                assert inputs[operand].shape == types[result].shape
                results[result] = operands[operand] = operands[operand].clone()
            buffers = iter([*operands, *results])
            values = _values(call["parameters"], buffers)
            launch_interpreted(self.sources[call["assembly"]], call["grid"], values)
            return [_array(r, t) for r, t in zip(results, types, strict=True)]

        return invoke


class Described(Library):
    """The library of later versions, which make tensor descriptors."""

    def create_tma_descriptor_parameter(self, elem_type, swizzle, shape, strides, block_shape, oob_fill):
        assert strides[-1] == 1 and oob_fill == 0 and all(s % 8 == 0 for s in strides[:-1])
        return ("b8", "descriptor", (TORCH[elem_type], tuple(shape), tuple(strides), tuple(block_shape)))


@dataclass
class Call:
    kernel: tuple[str, str]
    grid: tuple[int, int, int]
    parameters: list[Any]

    def to_proto(self, name: str, metadata: bytes) -> bytes:
        assert self.grid[1:] == (1, 1) and self.grid[0] > 0 and metadata == b""
        entry, assembly = self.kernel
        declared = re.search(rf"\.entry {entry}\((.*?)\)", assembly, re.S)
        assert declared is not None
        kinds = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)", declared[1])
        assert [p[0] for p in self.parameters] + ["u64", "u64"] == kinds, "Triton adds two of its own"
        return pickle.dumps({"grid": self.grid[0], "parameters": self.parameters, "assembly": assembly})


def _values(parameters: Any, buffers: Any) -> list[Any]:
    """What the kernel's source takes. Behind a descriptor stand its shape and strides, which it has too."""
    left, found = iter(parameters), []
    for _, kind, what in left:
        if kind == "number":
            found.append(what)
            continue
        memory = next(buffers)
        if kind == "descriptor":
            dtype, shape, strides, box = what
            assert memory.dtype == dtype
            told = [next(left) for _ in (*shape, *strides)]
            assert [p[0] for p in told] == ["u32"] * len(shape) + ["u64"] * len(shape)
            memory = torch.as_strided(memory, shape, [p[2] for p in told[len(shape) :]]), list(box)
        found.append(memory)
    return found


def _torch(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, "uint8" if dtype.kind == "b" else dtype)).dtype


def _flat(x: Any) -> torch.Tensor:
    array = np.array(x).reshape(-1)
    return torch.from_numpy(array.view("uint8") if array.dtype.kind == "b" else array)


def _array(tensor: torch.Tensor, t: jax.ShapeDtypeStruct) -> Any:
    return jnp.asarray(tensor.numpy()[: t.size].reshape(t.shape))


def install(monkeypatch: Any, library: Library) -> Library:
    """Let launches of GPU kernels go to a library, whichever jaxlib is here."""
    compile_ahead = gpu.compile_ahead

    def compiled(source: str, target: str) -> gpu.Binary:
        binary = compile_ahead(source, target)
        library.sources[binary.assembly] = source
        return binary

    monkeypatch.setattr(gpu, "compile_ahead", compiled)
    monkeypatch.setattr(xla_gpu, "_library", lambda: library)
    return library

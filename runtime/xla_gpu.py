"""GPU kernels under XLA: launches as custom calls of the target that jaxlib brings for Triton's kernels.

The call carries assembly, the number of programs, and every parameter but addresses; XLA compiles the
assembly once and launches it on its stream, without Python. Read of jaxlib's sources, versions 0.10 and 0.11.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ir.errors import ArtifactError, MissingDependencyError, UnsupportedError
from .cuda_kernel import Box, CudaKernel, Description
from .executable import Executable, Made
from .manifest import BYTES, Launch, assembly_part
from .strided import Strided

TARGET = "triton_kernel_call_ffi"
_TYPES = {"f16": 6, "f32": 7, "f64": 8, "bf16": 9}  # CUtensorMapDataType
_STEP = 16  # bytes that divide the strides of descriptors


@dataclass(frozen=True)
class CustomCall:
    """One launch. tensors: whose addresses it takes, by the program's names, in order. written: those that it
    writes; updated: those of them that it reads first. opaque: what jaxlib launches."""

    kernel: str
    tensors: tuple[str, ...]
    written: frozenset[str]
    updated: frozenset[str]
    opaque: bytes


def makes_descriptors() -> bool:
    """Whether this jaxlib makes tensor descriptors (later than 0.11.0)."""
    return hasattr(_library(), "create_tma_descriptor_parameter")


def custom_calls(
    executable: Executable, values: Mapping[str, Any]
) -> tuple[tuple[CustomCall, ...], tuple[Made, ...]]:
    """The launches of a program on tensors (`Strided`) with numbers, in order, and its intermediates.

    A launch without programs is left out. Raises InputError, ArtifactError for a program compiled without
    assembly, MissingDependencyError without JAX for CUDA."""
    sizes, made = executable.settle(values)
    values = {**values, **{name: Strided(0, shape, dtype) for name, shape, dtype in made}}
    artifact = executable.artifact
    calls = []
    for launch in artifact.manifest.launches:
        part = assembly_part(launch)
        if part not in artifact.parts:
            raise ArtifactError(
                f"{launch.kernel} was compiled without its assembly. Compile the kernel again"
            )
        described = CudaKernel(launch, b"").describe(values, sizes)
        if described.grid:
            target = artifact.manifest.target
            calls.append(_call(launch, artifact.parts[part].decode(), target, described, values))
    return tuple(calls), made


def _call(
    launch: Launch, assembly: str, target: str, described: Description, values: Mapping[str, Any]
) -> CustomCall:
    library = _library()
    capability = int(re.sub(r"\D", "", target.partition("_")[2]))
    kernel = library.TritonKernel(
        described.entry, described.warps, 1, described.shared, assembly, "", capability, *_scratch(launch)
    )
    parameters, tensors = [], []
    for p in described.parameters:
        if p.kind == "descriptor":
            parameters.append(_descriptor(library, p.value, values[p.name]))
        elif p.kind == "address":
            parameters.append(library.create_array_parameter(0, _divisor(launch, p.name)))
        else:
            number = float(p.value) if p.kind.startswith("fp") else int(p.value)
            parameters.append(library.create_scalar_parameter(number, p.kind))
        if p.kind in ("descriptor", "address"):
            tensors.append(p.name)
    call = library.TritonKernelCall(kernel, described.grid, 1, 1, parameters)
    roles = {a.source: a.role for a in launch.arguments if a.kind == "tensor"}
    return CustomCall(
        launch.kernel,
        tuple(tensors),
        frozenset(name for name, role in roles.items() if role != "in"),
        frozenset(name for name, role in roles.items() if role == "inout"),
        zlib.compress(call.to_proto(launch.kernel, b"")),
    )


def _scratch(launch: Launch) -> tuple[int, ...]:
    """Bytes of global memory that a program wants from what launches it, and their alignment."""
    size = launch.details["scratch"]
    if size and not makes_descriptors():  # both came with the same version
        raise UnsupportedError(
            f"{launch.kernel} needs scratch memory, which this jaxlib has not. Upgrade jax"
        )
    return (size, 128) if size else ()


def _divisor(launch: Launch, name: str) -> int:
    align = next((a.align for a in launch.arguments if a.source == name), 1)
    return align if align > 1 else 0


def _descriptor(library: Any, box: Box, tensor: Strided) -> Any:
    step = _STEP // BYTES[box.dtype]
    steps = [s if n > 1 else step for s, n in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)]
    return library.create_tma_descriptor_parameter(
        elem_type=_TYPES[box.dtype],
        swizzle=box.swizzle,
        shape=[max(1, n) for n in tensor.shape],
        strides=[*steps, 1],
        block_shape=list(box.extents),
        oob_fill=0,
    )


def _library() -> Any:
    try:
        from jaxlib import gpu_triton
    except ImportError:
        raise MissingDependencyError("jax", "jax", "gossamer.jax") from None
    if not hasattr(gpu_triton, "TritonKernel"):
        fix = "Install JAX for CUDA (jax[cuda13] or jax[cuda12]), whose versions are those of jaxlib"
        raise UnsupportedError(f"kernels for GPUs need jaxlib's CUDA plugin, which is not here. {fix}")
    return gpu_triton

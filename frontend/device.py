"""What a device means to kernels: their target, and how they may round."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..ir.errors import UnsupportedError
from ..runtime.strided import Device


@lru_cache(maxsize=64)
def target_of(device: Any) -> str:
    """The target of kernels for a device: 'cpu' (this machine) or 'cuda:sm_90' and the like.

    device: torch's, or a `Device` of runtime/strided.py.

    Raises UnsupportedError for a GPU that no kernel can be compiled for, or launched on."""
    if device.type == "cpu":
        return "cpu"
    if isinstance(device, Device):
        return device.target
    import torch

    from ..runtime.gpu import target_of as target_of_capability

    if torch.version.hip is not None:
        raise UnsupportedError(
            f"kernels for {device} (AMD) are compiled ahead of time, with gossamer.compile, and not launched "
            "yet. Pass CPU tensors"
        )
    return target_of_capability(*torch.cuda.get_device_capability(device))


def precision_of(device: Any, dtype: str) -> str:
    """How products of f32 round: 'tf32' on a GPU where torch allows it for its own products, else 'ieee'.

    torch.set_float32_matmul_precision, torch.backends.cuda.matmul.allow_tf32 and fp32_precision decide."""
    if dtype != "f32" or device.type == "cpu":
        return "ieee"
    if isinstance(device, Device):
        return device.precision
    import torch

    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def makes_descriptors(device: Any) -> bool:
    """Whether what launches kernels on a device makes tensor descriptors, where its hardware has them."""
    return device.descriptors if isinstance(device, Device) else True

"""Codes as GPTQ's and AWQ's checkpoints hold them: several in an int32, zero points too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...ir.errors import InputError, UnsupportedError
from .quantized import QuantizedWeight

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns a field of an int32 belongs to, from the lowest


def gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: Any, bits: int, zero_offset: int
) -> QuantizedWeight:
    """As `QuantizedWeight.from_gptq` says."""
    where = "QuantizedWeight.from_gptq"
    if bits not in (2, 4, 8):
        raise InputError(f"{where}: bits", "2, 4 or 8", bits)
    _check(where, qweight, qzeros, scales)
    each = tuple(range(32 // bits))
    codes = _fields(qweight.transpose(1, 2), bits, each)
    zeros = _fields(qzeros, bits, each).transpose(1, 2) + zero_offset
    return _joined(where, f"int{bits}", codes, zeros, scales, g_idx)


def awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
    """As `QuantizedWeight.from_awq` says."""
    where = "QuantizedWeight.from_awq"
    _check(where, qweight, qzeros, scales)
    codes, zeros = (_fields(packed, 4, AWQ_ORDER).transpose(1, 2) for packed in (qweight, qzeros))
    return _joined(where, "int4", codes, zeros, scales, None)


def _check(where: str, qweight: Any, qzeros: Any, scales: Any) -> None:
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales)):
        whole = name != "scales"
        fits = isinstance(tensor, torch.Tensor) and tensor.dim() == 3
        if not fits or (tensor.dtype != torch.int32 if whole else not tensor.is_floating_point()):
            got = f"{getattr(tensor, 'dtype', type(tensor).__name__)} {tuple(getattr(tensor, 'shape', ()))}"
            what = "int32" if whole else "floats"
            raise InputError(f"{where}: {name}", f"{what} of 3 dimensions, experts first", got)


def _fields(packed: torch.Tensor, bits: int, order: Sequence[int]) -> torch.Tensor:
    """Numbers along the last dimension: field i of an int32 is number order[i] of its own."""
    found = torch.stack([packed >> at * bits & (1 << bits) - 1 for at in range(len(order))], -1)
    places = torch.tensor(order, device=packed.device).argsort()
    return found[..., places].flatten(-2)


def _joined(
    where: str, format: str, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, g_idx: Any
) -> QuantizedWeight:
    """Codes (E, N, K), zero points (E, N, G) and scales (E, G, N), which groups of equal size share."""
    columns, groups = codes.shape[2], scales.shape[1]
    size = -(-columns // groups)
    if zeros.shape != scales.transpose(1, 2).shape or zeros.shape[:2] != codes.shape[:2]:
        got = f"codes {tuple(codes.shape)}, zero points {tuple(zeros.shape)}, scales {tuple(scales.shape)}"
        raise InputError(where, "codes (E, N, K), zero points (E, N, G), scales (E, G, N), unpacked", got)
    if g_idx is not None and not (g_idx == torch.arange(columns, device=g_idx.device) // size).all():
        raise UnsupportedError(
            f"{where}: g_idx: groups of features in another order (act-order) are not built. "
            "Quantise with desc_act=False, or dequantise"
        )
    dtype = scales.dtype if scales.dtype in (torch.float16, torch.bfloat16) else torch.float32
    given = scales.transpose(1, 2).to(dtype)
    return QuantizedWeight.from_codes(format, codes, given, group_size=size, zeros=zeros)

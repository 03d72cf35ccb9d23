"""Codes as GPTQ's and AWQ's checkpoints hold them: several in an int32, zero points too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...ir.errors import InputError, UnsupportedError
from .quantized import QuantizedWeight

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns a field of an int32 belongs to, from the lowest


def gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: Any,
    group_size: int | None,
    bits: int,
    zero_offset: int,
) -> QuantizedWeight:
    """As `QuantizedWeight.from_gptq` says."""
    where = "QuantizedWeight.from_gptq"
    if bits not in (2, 4, 8):
        raise InputError(f"{where}: bits", "2, 4 or 8", bits)
    _check(where, qweight, qzeros, scales)
    each = tuple(range(32 // bits))
    codes = _fields(qweight.transpose(1, 2), bits, each)
    zeros = _fields(qzeros, bits, each).transpose(1, 2) + zero_offset
    if g_idx is not None:
        group_size = _size_of(where, g_idx, group_size, codes)
    if bits == 8 and zeros.numel() and zeros.max() > 255:
        what = "zero points up to 255 once zero_offset is added"
        raise InputError(f"{where}: qzeros", what, int(zeros.max()), "Pass zero_offset=0 for gptq_v2")
    return _joined(where, f"int{bits}", codes, zeros, scales, group_size)


def awq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int | None
) -> QuantizedWeight:
    """As `QuantizedWeight.from_awq` says."""
    where = "QuantizedWeight.from_awq"
    _check(where, qweight, qzeros, scales)
    codes, zeros = (_fields(packed, 4, AWQ_ORDER).transpose(1, 2) for packed in (qweight, qzeros))
    return _joined(where, "int4", codes, zeros, scales, group_size)


def _size_of(where: str, g_idx: Any, group_size: int | None, codes: torch.Tensor) -> int:
    """Features of a group, from the group of each."""
    experts, _, columns = codes.shape
    whole = isinstance(g_idx, torch.Tensor) and not g_idx.is_floating_point()
    if not whole or tuple(g_idx.shape) not in ((columns,), (experts, columns)):
        got = (
            f"{g_idx.dtype} {tuple(g_idx.shape)}" if isinstance(g_idx, torch.Tensor) else type(g_idx).__name__
        )
        raise InputError(f"{where}: g_idx", f"integers ({columns},) or ({experts}, {columns})", got)
    if not columns or not experts:
        return group_size or 1
    size = max(1, int((g_idx.reshape(-1, columns)[0] == 0).sum()))
    if not (g_idx == torch.arange(columns, device=g_idx.device) // size).all():
        raise UnsupportedError(
            f"{where}: g_idx: groups of features in another order (act-order) are not built. "
            "Quantise with desc_act=False, or dequantise"
        )
    if group_size not in (None, size) and size < columns:
        raise InputError(f"{where}: group_size", f"{size}, as g_idx has", group_size)
    return size


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
    where: str,
    format: str,
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    group_size: int | None,
) -> QuantizedWeight:
    """Codes (E, N, K), zero points (E, N, G), scales (E, G, N); all groups but the last are of one size."""
    columns, groups = codes.shape[2], scales.shape[1]
    if zeros.shape != scales.transpose(1, 2).shape or zeros.shape[:2] != codes.shape[:2]:
        got = f"codes {tuple(codes.shape)}, zero points {tuple(zeros.shape)}, scales {tuple(scales.shape)}"
        raise InputError(where, "codes (E, N, K), zero points (E, N, G), scales (E, G, N), unpacked", got)
    if group_size is None and columns % max(1, groups):
        what = f"the features of a group, which {groups} groups of {columns} do not tell"
        raise InputError(f"{where}: group_size", what, None, "The checkpoint's configuration has it")
    size = columns // max(1, groups) if group_size is None else group_size
    if size < 1 or -(-columns // size) != groups:
        raise InputError(f"{where}: group_size", f"a size that makes {groups} groups of {columns}", size)
    dtype = scales.dtype if scales.dtype in (torch.float16, torch.bfloat16) else torch.float32
    given = scales.transpose(1, 2).to(dtype)
    return QuantizedWeight.from_codes(format, codes, given, group_size=size, zeros=zeros)

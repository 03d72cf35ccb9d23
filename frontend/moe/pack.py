"""Codes, scales and zero points that others made, checked and laid out as `ir/quantized.py` says."""

from __future__ import annotations

from typing import Any

from ...ir.errors import InputError, MissingDependencyError
from ...ir.quantized import NESTED, Quantized

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.QuantizedWeight") from None

FORMATS = {"int8": ("int", (8,)), "int4": ("int", (4,)), "int2": ("int", (2,)), "fp8": ("e4m3", (8,))}
FORMATS["mxfp4"] = ("e2m1", (4,))
SCALES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.uint8: "e8m0"}
ZEROS = {torch.uint8: "u8", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def checked_format(where: str, format: Any, nested: Any) -> tuple[str, tuple[int, ...]]:
    """The element and the planes of a format. Raises InputError."""
    if format not in FORMATS:
        raise InputError(f"{where}.format", f"one of {', '.join(FORMATS)}", repr(format))
    element, planes = FORMATS[format]
    if nested is None:
        return element, planes
    wanted = tuple(sorted(nested))
    if wanted not in NESTED or (element, wanted[-1]) != ("int", planes[-1]):
        options = ", ".join(map(str, (n for n in NESTED if element == "int" and n[-1] == planes[-1])))
        raise InputError(f"{where}.nested", f"{options or 'None'} for {format}", nested)
    return element, wanted


def symmetric_only(where: str, format: str, element: str, nested: Any) -> None:
    """Raise InputError where codes of a format have no zero points."""
    if element != "int":
        raise InputError(f"{where}.format", "int8, int4 or int2 with zero points", repr(format))
    if nested is not None:
        raise InputError(f"{where}.nested", "None with zero points: nested codes are symmetric", nested)


def checked_scales(scales: Any) -> torch.Tensor:
    """Scales in a dtype that kernels read. Raises InputError."""
    scales = scales if isinstance(scales, torch.Tensor) else torch.tensor(float(scales))
    if scales.dtype not in SCALES:
        expected = "float32, float16, bfloat16 or uint8 (e8m0)"
        raise InputError("QuantizedWeight.from_codes: scales", expected, scales.dtype)
    return scales


def checked_zeros(zeros: Any) -> torch.Tensor:
    """Zero points in a dtype that kernels read, integers as bytes. Raises InputError."""
    where = "QuantizedWeight.from_codes: zeros"
    zeros = torch.as_tensor(zeros)
    if zeros.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return zeros
    if zeros.is_floating_point() or zeros.is_complex() or zeros.dtype == torch.bool:
        raise InputError(where, "integers, float32, float16 or bfloat16", zeros.dtype)
    if zeros.numel():
        least, most = (int(v) for v in zeros.aminmax())
        if least < 0 or most > 255:
            raise InputError(where, "integers from 0 to 255, or floats", least if least < 0 else most)
    return zeros.to(torch.uint8)


def checked(format: str, codes: Any, nested: Any, zeros: bool) -> tuple[Quantized, torch.Tensor]:
    """Codes as integers of 8 bits, what was to be added added. zeros: they have zero points."""
    where = "QuantizedWeight.from_codes"
    element, planes = checked_format(where, format, nested)
    if zeros:
        symmetric_only(where, format, element, nested)
    if not isinstance(codes, torch.Tensor) or codes.dim() != 3 or not codes.shape[2]:
        got = tuple(codes.shape) if isinstance(codes, torch.Tensor) else type(codes).__name__
        raise InputError(f"{where}: codes", "a tensor (experts, out, in)", got)
    q = Quantized(element, planes, codes.shape[2], codes.shape[2], bits=planes[-1])
    if codes.dtype == torch.float8_e4m3fn:
        codes = codes.view(torch.uint8)
        given = "float8_e4m3fn"
    else:
        given = str(codes.dtype)
    if (given == "float8_e4m3fn") > (element == "e4m3") or codes.is_floating_point():
        raise InputError(f"{where}: codes", f"integers for {format}", given)
    if element == "e4m3" and codes.dtype != torch.uint8:
        raise InputError(f"{where}: codes", "float8_e4m3fn or uint8", given)
    if element == "e4m3" or not codes.numel():
        return q, codes.to(torch.uint8)
    half = 1 << (planes[-1] - 1)
    low, high = (-half, half - 1) if element == "int" else (0, 15)
    low, high = (0, 2 * half - 1) if zeros else (low, high)
    least, most = (int(v) for v in codes.aminmax())
    if least < low or most > high:
        raise InputError(f"{where}: codes", f"{low} to {high} for {format}", least if least < low else most)
    return q, (codes.to(torch.int16) + (0 if zeros else q.bias)).to(torch.uint8)


def shaped_groups(
    name: str, scales: torch.Tensor, shape: tuple[int, ...], group_size: int | None, row_block: int
) -> tuple[torch.Tensor, int]:
    """Scales, or zero points, as (E or 1, N or 1, groups), and the columns of one. Raises InputError.

    A column of them lies together in memory: kernels read those of many rows and one group at once."""
    where, (experts, rows, columns) = "QuantizedWeight.from_codes", shape
    if group_size is not None and (isinstance(group_size, bool) or group_size < 1):
        raise InputError(f"{where}: group_size", "at least 1", group_size)
    group = columns if group_size is None else min(group_size, columns)
    groups = -(-columns // group)
    if groups == 1 and row_block == 1:
        if scales.numel() == 1 or tuple(scales.shape) in ((experts,), (experts, 1), (experts, 1, 1)):
            return scales.reshape(-1, 1, 1), group
        if tuple(scales.shape) == (experts, rows):
            scales = scales[..., None]
    if row_block > 1:
        if tuple(scales.shape) == (experts, -(-rows // row_block), groups):
            scales = scales.repeat_interleave(row_block, 1)[:, :rows]
        expected = (
            f"shape ({experts}, {-(-rows // row_block)}, {groups}), for blocks of {row_block} x {group}"
        )
    else:
        expected = f"shape ({experts}, {rows}, {groups}), one of {name} for {group} columns each"
    if tuple(scales.shape) != (experts, rows, groups):
        more = "" if group_size is not None else f"Pass group_size= for {name} of groups"
        raise InputError(f"{where}: {name}", expected, tuple(scales.shape), more)
    return scales.transpose(1, 2).contiguous().transpose(1, 2), group


def packed(q: Quantized, codes: torch.Tensor) -> list[torch.Tensor]:
    """Codes (E, N, K), one a byte, as planes."""
    if q.planes == (8,):
        return [codes.contiguous()]
    padded = torch.nn.functional.pad(codes, (0, q.stretch * q.slices - q.columns))
    planes, before = [], 0
    for each, width in zip(q.plane_bits, q.planes, strict=True):
        field = padded >> q.planes[-1] - width & (1 << each) - 1
        count = 8 // each
        parts = field.unflatten(-1, (count, -1)).unbind(2)
        plane = parts[0].clone()
        for n in range(1, count):
            plane |= parts[n] << n * each
        planes.append(plane)
        before = width
    assert before == q.planes[-1]
    return planes

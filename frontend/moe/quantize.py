"""`gossamer.quantize` and `gossamer.quantize_experts`: from float matrices to `QuantizedWeight`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...ir.errors import InputError
from ...ir.quantized import E2M1
from .pack import checked_format, symmetric_only
from .quantized import QuantizedWeight

GROUPS: dict[str, int | str] = {"int8": "row", "int4": 128, "int2": 64, "fp8": "row", "mxfp4": 32}
SHARED = ("row", "expert", "tensor")
# Of integers of few bits: how far scales are tried below what the largest number asks for.
CLIPS = {4: [1 - 0.03 * n for n in range(10)], 2: [1 - 0.04 * n for n in range(20)]}
PARAMETERS = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"))


def quantize(
    weight: torch.Tensor,
    format: str = "int4",
    *,
    group_size: int | str | None = None,
    nested: Sequence[int] | None = None,
    symmetric: bool = True,
    transposed: bool = False,
) -> QuantizedWeight:
    """Matrices of experts as codes of a few bits.

    Args:
        weight: (E, out, in), any float dtype, on any device; or (E, in, out) if transposed.
        format: "int8", "int4", "int2" (symmetric; of 2 bits, -1.5, -0.5, 0.5 and 1.5 times the scale), "fp8"
            (e4m3) or "mxfp4" (e2m1 with powers of two for scales).
        group_size: consecutive input features that share a scale, or "row" (an output feature each),
            "expert" or "tensor". Default: int4 128, int2 64, mxfp4 32 (always), int8 and fp8 "row".
        nested: for "int8": (4, 8) or (2, 4, 8): codes are stored such that their upper bits can be read
            alone, see `QuantizedWeight.read`. For "int4": (2, 4).
        symmetric: False: integers have zero points too, whole numbers of a byte each, one for each scale:
            (code - zero) * scale, codes from 0 up, reaches from a group's least number to its largest. Not
            for nested codes.

    Codes are rounded to nearest; integers of 2 and 4 bits that are not nested take, of some scales, the one
    of least squared error. Raises InputError, also where a number is not finite: codes hold none."""
    where = "quantize"
    element, planes = checked_format(where, format, nested)
    if not symmetric:
        symmetric_only(where, format, element, nested)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or not weight.is_floating_point():
        got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, torch.Tensor) else type(weight)
        raise InputError(f"{where}.weight", "floats (experts, out, in)", got)
    if not weight.numel():
        raise InputError(f"{where}.weight", "at least one number", tuple(weight.shape))
    weight = weight.detach()
    weight = weight.transpose(1, 2) if transposed else weight
    group = GROUPS[format] if group_size is None else group_size
    valid = group in SHARED if isinstance(group, str) else type(group) is int and group > 0
    if not valid or (format == "mxfp4" and group != 32):
        expected = "32 for mxfp4" if format == "mxfp4" else f"a positive number or one of {', '.join(SHARED)}"
        raise InputError(f"{where}.group_size", expected, repr(group))
    columns = weight.shape[2]
    size = min(group, columns) if isinstance(group, int) else columns
    finite = weight.float().isfinite().flatten(1).all(1)  # float32 is what scales are taken in
    if not finite.all():
        wrong = int((~finite).nonzero()[0])
        raise InputError(
            f"{where}.weight", "finite numbers within float32's range", f"others in expert {wrong}"
        )
    whole = group == "tensor"
    if symmetric:
        largest = weight.abs().amax().float() if whole else None
        made = [_one(w.float(), element, planes, size, group, largest) for w in weight]
    else:
        ends = tuple(end.float().reshape(1, 1, 1) for end in weight.aminmax()) if whole else None
        made = [_with_zeros(w.float(), planes[0], size, group, ends) for w in weight]
    codes, *groups = (torch.stack(parts) for parts in zip(*made, strict=True))
    scales, *zeros = (one[:1] for one in groups) if whole else groups
    return QuantizedWeight.from_codes(
        format, codes, scales, group_size=size if isinstance(group, int) else None, nested=nested,
        zeros=zeros[0] if zeros else None,
    )  # fmt: skip


def _with_zeros(
    w: torch.Tensor, bits: int, size: int, group: int | str, ends: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (N, K), and scales and zero points (N or 1, groups), of one matrix; ranges hold 0. ends: the
    least and the largest number of all matrices, where they share a range."""
    columns, top = w.shape[1], (1 << bits) - 1
    padded = torch.nn.functional.pad(w, (0, -columns % size)).unflatten(-1, (-1, size))
    over = (2,) if isinstance(group, int) or group == "row" else (0, 2)
    low, high = (padded.amin(over, True), padded.amax(over, True)) if ends is None else ends
    low, high = low.clamp(max=0), high.clamp(min=0)
    best: Any = None
    for clip in CLIPS.get(bits, [1.0]) if ends is None else [1.0]:
        scales = (high - low) * (clip / top)
        steps = torch.where(scales > 0, scales, 1.0)
        zeros = torch.round(-low * clip / steps).clamp(0, top)
        codes = (torch.round(padded / steps) + zeros).clamp(0, top)
        error = ((codes - zeros) * scales - padded).square().sum(over, keepdim=True)
        best = _better(best, [error, codes, scales, zeros])
    _, codes, scales, zeros = best
    return codes.flatten(1)[:, :columns].to(torch.uint8), scales[..., 0], zeros[..., 0].to(torch.uint8)


def _better(best: Any, found: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of two tries, by group, that of the smaller error, which comes first."""
    if best is None:
        return found
    better = found[0] < best[0]
    return [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]


def _one(
    w: torch.Tensor, element: str, planes: tuple[int, ...], size: int, group: int | str, largest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) and scales (N or 1, groups) of one matrix."""
    columns = w.shape[1]
    padded = torch.nn.functional.pad(w, (0, -columns % size)).unflatten(-1, (-1, size))
    if largest is None:
        largest = (
            padded.abs().amax((0, 2), keepdim=True) if group == "expert" else padded.abs().amax(-1, True)
        )
    largest = torch.as_tensor(largest).reshape(-1, *([1, 1] if largest.dim() == 0 else largest.shape[1:]))
    if element == "e2m1":
        exponent = torch.floor(torch.log2(largest.clamp(min=2.0**-125))).clamp(-125, 127) - 2
        codes, scales = _e2m1_codes(padded / torch.exp2(exponent)), (exponent + 127).to(torch.uint8)
    elif element == "e4m3":
        scales = torch.where(largest > 0, largest / 448, 1.0)
        codes = (padded / scales).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes, scales = _integers(padded, largest, planes, shared=group == "tensor")
    codes = codes.flatten(1)[:, :columns]
    return codes, scales.squeeze(-1)


def _integers(
    padded: torch.Tensor, largest: torch.Tensor, planes: tuple[int, ...], *, shared: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the scales of groups that leave the least squared error; one try for what is `shared`."""
    bits = planes[-1]
    half, middle = 1 << (bits - 1), 0.5 if planes == (2,) else 0.0
    top = half - 1 + middle
    clips = [1.0] if len(planes) > 1 or shared else CLIPS.get(bits, [1.0])
    best: Any = None
    for clip in clips:
        scales = largest * (clip / top)  # 0 where all is 0: codes of 2 bits have no zero
        codes = torch.round(padded / torch.where(scales > 0, scales, 1.0) - middle).clamp(-half, half - 1)
        over = tuple(d for d in range(3) if scales.shape[d] == 1)
        error = ((codes + middle) * scales - padded).square().sum(over, keepdim=True)
        best = _better(best, [error, codes, scales])
    return best[1].to(torch.int8), best[2]


def _e2m1_codes(value: torch.Tensor) -> torch.Tensor:
    """The nearest e2m1 numbers, of two that are as near the one with an even code."""
    table = torch.tensor(E2M1, device=value.device)
    size = value.abs().contiguous()
    between = (table[1:] + table[:-1]) / 2
    above, from_ = torch.bucketize(size, between), torch.bucketize(size, between, right=True)
    code = torch.where(above % 2 == 0, above, from_)
    return (code + 8 * (value < 0)).to(torch.uint8)


def quantize_experts(
    model: Any,
    format: str = "int4",
    *,
    group_size: int | str | None = None,
    nested: Sequence[int] | None = None,
    symmetric: bool = True,
    transposed: bool = False,
) -> Any:
    """The matrices of all experts of a model, or of a checkpoint, as `QuantizedWeight`.

    model: a module, changed in place and returned: in every module that has `gate_up_proj` (or `up_proj`) and
    `down_proj` of three dimensions, as Hugging Face's experts have, these are replaced, and
    `experts_implementation="gossamer"` computes with them (`gossamer.register_transformers`); biases stay.
    Or a mapping from names to tensors: a dictionary of the same names with matrices of experts replaced;
    what gpt-oss stores as `.._blocks` and `.._scales` becomes one value, as it is, whatever the format.
    transposed: of a mapping, whether matrices are (E, in, out); modules say so themselves.

    Other arguments: as of `quantize`. Raises InputError, also where there are no experts."""
    options: dict[str, Any] = {"group_size": group_size, "nested": nested, "symmetric": symmetric}
    if isinstance(model, torch.nn.Module):
        found = [m for m in model.modules() if _matrices(m)]
        for module in found:
            for name in _matrices(module):
                weight = getattr(module, name)
                made = quantize(
                    weight, format, transposed=bool(getattr(module, "is_transposed", False)), **options
                )
                delattr(module, name)
                setattr(module, name, made)
    elif isinstance(model, Mapping):
        found, model = _mapped(model, format, transposed, options)
    else:
        raise InputError("quantize_experts.model", "a torch.nn.Module or a mapping", type(model).__name__)
    if not found:
        names = "; ".join(" and ".join(pair) for pair in PARAMETERS)
        raise InputError("quantize_experts.model", f"experts: {names}, of 3 dimensions", "none")
    return model


def _matrices(module: torch.nn.Module) -> tuple[str, ...]:
    """The names of a module's matrices of experts, those that are not quantised yet."""
    for names in PARAMETERS:
        if all(getattr(module._parameters.get(n), "ndim", 0) == 3 for n in names):
            return names
    return ()


def _mapped(
    tensors: Mapping[str, Any], format: str, transposed: bool, options: dict[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """Names of the matrices that were found, and the mapping with codes in their places."""
    made: dict[str, Any] = {}
    found: list[str] = []
    for name, tensor in tensors.items():
        last = name.rpartition(".")[2]
        stem = name.removesuffix("_blocks").removesuffix("_scales")
        if stem != name and {f"{stem}_blocks", f"{stem}_scales"} <= tensors.keys():
            if name.endswith("_blocks"):
                made[stem] = QuantizedWeight.from_mxfp4(tensor, tensors[f"{stem}_scales"])
                found.append(stem)
            continue
        if last in ("gate_up_proj", "up_proj", "down_proj") and getattr(tensor, "ndim", 0) == 3:
            made[name] = quantize(tensor, format, transposed=transposed, **options)
            found.append(name)
            continue
        made[name] = tensor
    return found, made

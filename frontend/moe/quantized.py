"""`gossamer.QuantizedWeight`: matrices of experts in a few bits a number, and what makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ...ir.errors import InputError, MissingDependencyError, UnsupportedError
from ...ir.quantized import E2M1, NESTED, PER_EXPERT, Quantized
from ..pure import is_compiled

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.QuantizedWeight") from None

FORMATS = {"int8": ("int", (8,)), "int4": ("int", (4,)), "int2": ("int", (2,)), "fp8": ("e4m3", (8,))}
FORMATS["mxfp4"] = ("e2m1", (4,))
SCALES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.uint8: "e8m0"}


class QuantizedWeight(torch.nn.Module):
    """Matrices (E, N, K) as codes of 2, 4 or 8 bits along K, which groups of columns share scales of.

    `gossamer.experts` and `gossamer.moe` take them where they take matrices (experts, out, in), and decode
    them inside the products, or, where many rows are multiplied, right before them (docs/moe.md says when).
    They are frozen: gradients flow through them, none to them. As a module they move, are saved and loaded
    with the module that holds them; `.to(dtype)` leaves them as they are. Made by `gossamer.quantize`,
    `from_codes` and `from_mxfp4`.

    Attributes: shape (E, N, K); format; group_size, columns that share a scale; bits, the width that is
    read, None where it differs by expert; scales, (E or 1, N or 1, groups); codes, tensors of bytes, in the
    layout of `ir/quantized.py`; nbytes, of all that is stored."""

    scales: torch.Tensor
    widths: torch.Tensor | None

    def __init__(
        self, q: Quantized, shape: Sequence[int], codes: Sequence[torch.Tensor], scales: torch.Tensor,
        widths: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._q, self._shape = q, (int(shape[0]), int(shape[1]), int(shape[2]))
        self.key = dataclasses.astuple(q)
        for number, plane in enumerate(codes):
            self.register_buffer(f"codes{number}", plane)
        self.register_buffer("scales", scales)
        self.register_buffer("widths", widths)

    # what it is -------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    @property
    def format(self) -> str:
        """ "int8", "int4", "int2", "fp8", "mxfp4" or, nested, "int2-4-8" and the like."""
        if len(self._q.planes) > 1:
            return "int" + "-".join(map(str, self._q.planes))
        return next(name for name, what in FORMATS.items() if what == (self._q.element, self._q.planes))

    @property
    def group_size(self) -> int:
        return self._q.group

    @property
    def bits(self) -> int | None:
        return None if self._q.bits == PER_EXPERT else self._q.bits

    @property
    def codes(self) -> tuple[torch.Tensor, ...]:
        return tuple(self._buffers[f"codes{number}"] for number in range(len(self._q.planes)))  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        return self.scales.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._buffers.values() if t is not None)

    def extra_repr(self) -> str:
        return f"{self.format}, {self.shape}, group_size={self.group_size}, bits={self.bits}"

    # what others do with it -------------------------------------------------------------------------

    def read(self, bits: int | torch.Tensor) -> QuantizedWeight:
        """The same memory, of which codes of fewer bits are read: their upper ones.

        bits: one of the widths that the codes were nested for; or a tensor (E,) of integers, a width for
        each expert, on the device of the codes (those on a GPU are not looked at). Raises InputError."""
        q, planes = self._q, self._q.planes
        where = "QuantizedWeight.read"
        if isinstance(bits, torch.Tensor):
            if len(planes) == 1:
                raise InputError(where, "nested codes for a width by expert", self.format, _NEST)
            if tuple(bits.shape) != self.shape[:1] or bits.is_floating_point() or bits.device != self.device:
                got = f"{bits.dtype} of shape {tuple(bits.shape)} on {bits.device}"
                raise InputError(where, f"integers of shape ({self.shape[0]},) on {self.device}", got)
            here = bits.device.type == "cpu" and not is_compiled()
            if here and not all(width in planes for width in bits.tolist()):
                widths = ", ".join(map(str, planes))
                raise InputError(where, f"widths of {widths} for all experts", bits.tolist())
            narrow = dataclasses.replace(q, bits=PER_EXPERT)
            return QuantizedWeight(narrow, self.shape, self.codes, self.scales, bits.to(torch.int32))
        if isinstance(bits, bool) or bits not in planes:
            fix = _NEST if len(planes) == 1 else ""
            raise InputError(where, f"one of the widths {', '.join(map(str, planes))}", bits, fix)
        return QuantizedWeight(dataclasses.replace(q, bits=int(bits)), self.shape, self.codes, self.scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrices (E, N, K) in a float dtype; for looking at, products do without."""
        q, wide = self._q, torch.float64 if dtype == torch.float64 else torch.float32
        code = self._unpacked()
        if q.element == "int":
            middle: Any = q.midpoint(q.bits or q.planes[-1])
            if self.widths is not None:
                lost = (q.planes[-1] - self.widths)[:, None, None]
                code = code >> lost << lost
                middle = ((1 << lost) - 1) * 0.5
            value = (code - q.bias).to(wide) + middle
        elif q.element == "e4m3":
            value = code.to(torch.uint8).view(torch.float8_e4m3fn).to(wide)
        else:
            value = torch.tensor(E2M1, dtype=wide, device=self.device)[code & 7]
            value = torch.where(code < 8, value, -value)
        return (value * self._steps(wide)).to(dtype)

    def expert(self, number: int) -> QuantizedWeight:
        """One expert's matrix, (1, N, K), in the same memory."""
        one = slice(number, number + 1)
        scales = self.scales[one] if self.scales.shape[0] > 1 else self.scales
        widths = None if self.widths is None else self.widths[one]
        return QuantizedWeight(self._q, (1, *self.shape[1:]), [c[one] for c in self.codes], scales, widths)

    def _steps(self, wide: torch.dtype) -> torch.Tensor:
        """Scales of columns, as numbers."""
        steps = self.scales
        if self._q.scale == "e8m0":
            powers = torch.exp2(steps.to(torch.float64) - 127)
            steps = torch.where(steps == 255, torch.nan, powers)
        return steps.to(wide).repeat_interleave(self._q.group, -1)[..., : self.shape[2]]

    def _unpacked(self) -> torch.Tensor:
        """Codes (E, N, K) as integers; bits that are not read are zero."""
        q, total = self._q, torch.zeros((), dtype=torch.int32, device=self.device)
        for number, plane in enumerate(self.codes[: len(q.read)]):
            wide, each = plane.to(torch.int32), q.plane_bits[number]
            parts = [wide >> s & (1 << each) - 1 for s in range(0, 8, each)]
            total = total + (torch.cat(parts, -1)[..., : q.columns] << q.planes[-1] - q.planes[number])
        return total

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What kernels read, by the names that they have for matrices called `name`."""
        count = len(self._q.read)
        found = {f"{name}_codes{n or ''}": plane for n, plane in enumerate(self.codes[:count])}
        found[f"{name}_scales"] = self.scales.expand(*self.shape[:2], -1)
        if self.widths is not None:
            found[f"{name}_bits"] = self.widths
        return found

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """All that is stored, by name; `joined` puts it together again."""
        found = {f"{name}_plane{n}": plane for n, plane in enumerate(self.codes)} | {
            f"{name}_scales": self.scales
        }
        return found if self.widths is None else found | {f"{name}_widths": self.widths}

    @staticmethod
    def joined(key: tuple[Any, ...], name: str, parts: Any) -> QuantizedWeight:
        """The matrices that `parts` were taken of. key: theirs."""
        q = Quantized(*key)
        codes = [parts[f"{name}_plane{n}"] for n in range(len(q.planes))]
        shape = (*codes[0].shape[:2], q.columns)
        return QuantizedWeight(q, shape, codes, parts[f"{name}_scales"], parts.get(f"{name}_widths"))

    def check(self, where: str, x: torch.Tensor) -> None:
        """Raise InputError or UnsupportedError unless kernels can take it beside x."""
        if self.device != x.device:
            raise InputError(where, f"codes on {x.device}, as x is", self.device)
        if any(t is not None and t.requires_grad for t in self._buffers.values()):
            raise UnsupportedError(f"{where}: {_FROZEN}")

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedWeight:
        """Raises UnsupportedError: codes have no gradient."""
        if requires_grad:
            raise UnsupportedError(f"QuantizedWeight.requires_grad_: {_FROZEN}")
        return self

    def forward(self, *_: Any) -> Any:
        raise UnsupportedError("a QuantizedWeight is no layer; pass it to gossamer.experts or gossamer.moe")

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedWeight:
        """Moves between devices; dtypes stay."""

        def moved(t: torch.Tensor) -> torch.Tensor:
            found = fn(t)
            return found if found.dtype == t.dtype else t.to(found.device)

        return super()._apply(moved, recurse)

    def get_extra_state(self) -> torch.Tensor:
        """What the codes mean, for checkpoints: a tensor of bytes, which any file of tensors takes."""
        return torch.tensor([*self._meaning().encode()], dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Raises InputError for codes of another meaning, though shapes are the same."""
        given = bytes(state.tolist()).decode(errors="replace")
        if given != self._meaning():
            raise InputError("QuantizedWeight.load_state_dict", self._meaning(), given)

    def _meaning(self) -> str:
        q = self._q
        planes = "-".join(map(str, q.planes))
        return f"{q.element} codes of {planes} bits, {q.columns} columns, {q.scale} scales of {q.group}"

    # what makes it ----------------------------------------------------------------------------------

    @staticmethod
    def from_codes(
        format: str,
        codes: torch.Tensor,
        scales: torch.Tensor | float,
        *,
        group_size: int | None = None,
        row_block: int = 1,
        nested: Sequence[int] | None = None,
    ) -> QuantizedWeight:
        """Codes (E, N, K), one an element, that are packed here.

        format: "int8", "int4", "int2": codes are integers within the format's range; of "int2" they stand
        for code + 0.5. "fp8": float8_e4m3fn numbers, or their bytes. "mxfp4": e2m1 codes 0 .. 15.
        scales: a number; (E,), (E, 1, 1); a row each, (E, N) or (E, N, 1); or (E, N, groups), a group of
        `group_size` columns each, the last of which may be smaller; float32, float16, bfloat16, or uint8 for
        e8m0 exponents. row_block: rows that share scales too, then scales are (E, N / row_block, groups), as
        DeepSeek-V3's blocks of 128 x 128. nested: widths to be read later, for "int8": (4, 8), (2, 4, 8).
        Raises InputError."""
        q, codes = _checked(format, codes, nested)
        scales = scales if isinstance(scales, torch.Tensor) else torch.tensor(float(scales))
        scales, group = _shaped_scales(scales.to(codes.device), tuple(codes.shape), group_size, row_block)
        q = dataclasses.replace(q, columns=codes.shape[2], group=group, scale=SCALES[scales.dtype])
        # A column of scales lies together in memory: kernels read those of many rows and one group at once.
        scales = scales.transpose(1, 2).contiguous().transpose(1, 2)
        return QuantizedWeight(q, codes.shape, _packed(q, codes), scales)

    @staticmethod
    def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
        """What gpt-oss' checkpoints hold: blocks (E, N, K / 32, 16) of two codes a byte, the lower bits
        first, and scales (E, N, K / 32), exponents of two with 127 added; both uint8. Raises InputError."""
        where = "QuantizedWeight.from_mxfp4"
        for name, tensor, rank in (("blocks", blocks, 4), ("scales", scales, 3)):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.uint8 or tensor.dim() != rank:
                got = (
                    f"{getattr(tensor, 'dtype', type(tensor).__name__)} {tuple(getattr(tensor, 'shape', ()))}"
                )
                raise InputError(f"{where}: {name}", f"uint8 of {rank} dimensions", got)
        if blocks.shape[3] != 16 or blocks.shape[:3] != scales.shape:
            got = f"{tuple(blocks.shape)} and {tuple(scales.shape)}"
            raise InputError(where, "blocks (E, N, G, 16) and scales (E, N, G)", got)
        codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(2)
        return QuantizedWeight.from_codes("mxfp4", codes, scales, group_size=32)


_NEST = "Quantise with nested=(2, 4, 8)"
_FROZEN = (
    "quantised weights are frozen: there is no gradient for codes or scales. "
    "Train LoRA or the router, or keep the weight in a float dtype"
)


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


def _checked(format: str, codes: Any, nested: Any) -> tuple[Quantized, torch.Tensor]:
    """Codes as integers of 8 bits, what was to be added added."""
    where = "QuantizedWeight.from_codes"
    element, planes = checked_format(where, format, nested)
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
    least, most = (int(v) for v in codes.aminmax())
    if least < low or most > high:
        raise InputError(f"{where}: codes", f"{low} to {high} for {format}", least if least < low else most)
    return q, (codes.to(torch.int16) + q.bias).to(torch.uint8)


def _shaped_scales(
    scales: torch.Tensor, shape: tuple[int, ...], group_size: int | None, row_block: int
) -> tuple[torch.Tensor, int]:
    """Scales as (E or 1, N or 1, groups), and the columns that share one. Raises InputError."""
    where, (experts, rows, columns) = "QuantizedWeight.from_codes", shape
    if scales.dtype not in SCALES:
        raise InputError(f"{where}: scales", "float32, float16, bfloat16 or uint8 (e8m0)", scales.dtype)
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
        expected = f"shape ({experts}, {rows}, {groups}), a scale for {group} columns each"
    if tuple(scales.shape) != (experts, rows, groups):
        more = "" if group_size is not None else "Pass group_size= for scales of groups"
        raise InputError(f"{where}: scales", expected, tuple(scales.shape), more)
    return scales, group


def _packed(q: Quantized, codes: torch.Tensor) -> list[torch.Tensor]:
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

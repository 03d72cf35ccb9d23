"""`gossamer.QuantizedWeight`: matrices of experts in a few bits a number, and what makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ...ir.errors import InputError, MissingDependencyError, UnsupportedError
from ...ir.quantized import E2M1, PER_EXPERT, Quantized
from ..pure import is_compiled
from .pack import FORMATS, SCALES, ZEROS, checked, checked_scales, checked_zeros, packed, shaped_groups

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.QuantizedWeight") from None


class QuantizedWeight(torch.nn.Module):
    """Matrices (E, N, K) as codes of 2, 4 or 8 bits along K, which groups of columns share scales of, and
    zero points where there are any.

    `gossamer.experts` and `gossamer.moe` take them where they take matrices (experts, out, in), and decode
    them inside the products, or, where many rows are multiplied, right before them (docs/moe.md says when).
    They are frozen: gradients flow through them, none to them. As a module they move, are saved and loaded
    with the module that holds them; `.to(dtype)` leaves them as they are. Made by `gossamer.quantize`,
    `from_codes`, `from_mxfp4`, `from_gptq` and `from_awq`.

    Attributes: shape (E, N, K); format; group_size, columns that share a scale; bits, the width that is
    read, None where it differs by expert; scales, (E or 1, N or 1, groups); zeros, likewise, or None; codes,
    tensors of bytes, in the layout of `ir/quantized.py`; nbytes, of all that is stored."""

    scales: torch.Tensor
    zeros: torch.Tensor | None
    widths: torch.Tensor | None

    def __init__(
        self, q: Quantized, shape: Sequence[int], codes: Sequence[torch.Tensor], scales: torch.Tensor,
        widths: torch.Tensor | None = None, zeros: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._q, self._shape = q, (int(shape[0]), int(shape[1]), int(shape[2]))
        self.key = dataclasses.astuple(q)
        for number, plane in enumerate(codes):
            self.register_buffer(f"codes{number}", plane)
        self.register_buffer("scales", scales)
        self.register_buffer("widths", widths)
        self.register_buffer("zeros", zeros)

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
        zeros = "" if self.zeros is None else f", zeros={str(self.zeros.dtype).removeprefix('torch.')}"
        return f"{self.format}, {self.shape}, group_size={self.group_size}, bits={self.bits}{zeros}"

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
        narrow = dataclasses.replace(q, bits=int(bits))
        return QuantizedWeight(narrow, self.shape, self.codes, self.scales, zeros=self.zeros)

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
        if self.zeros is not None:
            value = value - (self._by_column(self.zeros.to(wide)) - q.bias)
        return (value * self._steps(wide)).to(dtype)

    def expert(self, number: int) -> QuantizedWeight:
        """One expert's matrix, (1, N, K), in the same memory."""
        one = slice(number, number + 1)
        scales = self.scales if self.scales.shape[0] == 1 else self.scales[one]
        zeros = self.zeros if self.zeros is None or self.zeros.shape[0] == 1 else self.zeros[one]
        widths = None if self.widths is None else self.widths[one]
        codes, shape = [c[one] for c in self.codes], (1, *self.shape[1:])
        return QuantizedWeight(self._q, shape, codes, scales, widths, zeros)

    def _steps(self, wide: torch.dtype) -> torch.Tensor:
        """Scales of columns, as numbers."""
        steps = self.scales
        if self._q.scale == "e8m0":
            powers = torch.exp2(steps.to(torch.float64) - 127)
            steps = torch.where(steps == 255, torch.nan, powers)
        return self._by_column(steps.to(wide))

    def _by_column(self, groups: torch.Tensor) -> torch.Tensor:
        return groups.repeat_interleave(self._q.group, -1)[..., : self.shape[2]]

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
        if self.zeros is not None:
            found[f"{name}_zeros"] = self.zeros.expand(*self.shape[:2], -1)
        if self.widths is not None:
            found[f"{name}_bits"] = self.widths
        return found

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """All that is stored, by name; `joined` puts it together again."""
        found = {f"{name}_plane{n}": plane for n, plane in enumerate(self.codes)}
        more = {"scales": self.scales, "zeros": self.zeros, "widths": self.widths}
        return found | {f"{name}_{what}": tensor for what, tensor in more.items() if tensor is not None}

    @staticmethod
    def joined(key: tuple[Any, ...], name: str, parts: Any) -> QuantizedWeight:
        """The matrices that `parts` were taken of. key: theirs."""
        q = Quantized(*key)
        codes = [parts[f"{name}_plane{n}"] for n in range(len(q.planes))]
        shape = (*codes[0].shape[:2], q.columns)
        scales, widths, zeros = (parts.get(f"{name}_{what}") for what in ("scales", "widths", "zeros"))
        return QuantizedWeight(q, shape, codes, scales, widths, zeros)

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
        zeros = "" if q.zero is None else f", {q.zero} zero points"
        return (
            f"{q.element} codes of {planes} bits, {q.columns} columns, {q.scale} scales of {q.group}{zeros}"
        )

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
        zeros: torch.Tensor | float | None = None,
    ) -> QuantizedWeight:
        """Codes (E, N, K), one an element, that are packed here.

        format: "int8", "int4", "int2": codes are integers within the format's range; of "int2" they stand
        for code + 0.5. "fp8": float8_e4m3fn numbers, or their bytes. "mxfp4": e2m1 codes 0 .. 15.
        scales: a number; (E,), (E, 1, 1); a row each, (E, N) or (E, N, 1); or (E, N, groups), a group of
        `group_size` columns each, the last of which may be smaller; float32, float16, bfloat16, or uint8 for
        e8m0 exponents. row_block: rows that share scales too, then scales are (E, N / row_block, groups), as
        DeepSeek-V3's blocks of 128 x 128. nested: widths to be read later, for "int8": (4, 8), (2, 4, 8).
        zeros: zero points, shaped as scales may be: (code - zero) * scale is what a code then stands for,
        which is an integer of 0 .. 15 for "int4", and so on (GPTQ, AWQ, HQQ). Integers, 0 to 255, are kept
        as bytes, others in float32, float16 or bfloat16. Not for nested codes. Raises InputError."""
        q, codes = checked(format, codes, nested, zeros is not None)
        how = tuple(codes.shape), group_size, row_block
        scales, group = shaped_groups("scales", checked_scales(scales).to(codes.device), *how)
        q = dataclasses.replace(q, columns=codes.shape[2], group=group, scale=SCALES[scales.dtype])
        if zeros is not None:
            zeros, _ = shaped_groups("zeros", checked_zeros(zeros).to(codes.device), *how)
            q = dataclasses.replace(q, zero=ZEROS[zeros.dtype])
        return QuantizedWeight(q, codes.shape, packed(q, codes), scales, zeros=zeros)

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

    @staticmethod
    def from_gptq(
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        *,
        g_idx: torch.Tensor | None = None,
        group_size: int | None = None,
        bits: int = 4,
        zero_offset: int = 1,
    ) -> QuantizedWeight:
        """What GPTQ's checkpoints hold, stacked by expert.

        qweight (E, K / n, N) and qzeros (E, G, N / n): int32 of n = 32 / bits fields, neighbours along K and
        along N, from the lowest; scales (E, G, N). g_idx (E, K) or (K,): the group of each feature, to be
        in order. group_size: features of a group, where neither g_idx nor equal groups tell. Matrices of gate
        and up may be joined along N before. zero_offset: what was taken off zero points, 0 in "gptq_v2".
        Raises InputError, UnsupportedError."""
        from .checkpoints import gptq

        return gptq(qweight, qzeros, scales, g_idx, group_size, bits, zero_offset)

    @staticmethod
    def from_awq(
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        *,
        group_size: int | None = None,
    ) -> QuantizedWeight:
        """What AWQ's checkpoints ("gemm") hold, stacked by expert: 4 bits.

        qweight (E, K, N / 8) and qzeros (E, G, N / 8): int32 of the columns 0, 2, 4, 6, 1, 3, 5, 7 of eight,
        from the lowest bits up; scales (E, G, N). group_size: as for `from_gptq`. Raises InputError."""
        from .checkpoints import awq

        return awq(qweight, qzeros, scales, group_size)


_NEST = "Quantise with nested=(2, 4, 8)"
_FROZEN = (
    "quantised weights are frozen: there is no gradient for codes or scales. "
    "Train LoRA or the router, or keep the weight in a float dtype"
)

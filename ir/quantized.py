"""Quantized: a stack of matrices [E, N, K] as codes of a few bits along K, with scales of groups of them.

    value = (code + midpoint) * scale          code: an integer, an e4m3 or an e2m1 number
    value = (code - zero) * scale              with zero points: a code is an integer of 0 .. 2**B - 1

A row's codes lie in bytes such that no byte holds neighbours: with c codes a byte, byte j holds those of
columns j, j + K/c, j + 2 K/c ... from its lowest bits up (K rounded up to a multiple of c; codes behind K are
zero bits). A tile of consecutive bytes is then c tiles of consecutive columns, one a *slice* of the row: to
unpack them is a shift and a mask, and nothing moves between lanes.

Integers of B bits are stored with 2**(B - 1) added; those with zero points, one for each scale, as they are:
(code - 2**(B - 1)) - (zero - 2**(B - 1)) reads both in the same way.

Codes may be *nested*: `planes` (2, 4, 8) has the two upper bits of each code in one tensor, the next two in
another and the lower four in a third, packed as above.
Who reads the first planes only reads codes of fewer bits, and fewer bytes; what the lower bits might have
been is then taken in the middle (`midpoint`).

Nested codes of one copy: D2MoE (Wang et al., 2025). Weights of experts in 2, 4 or 8 bits: MoQE (Kim et al.,
2023). Zero points: integers (GPTQ, Frantar et al., 2023; AWQ, Lin et al., 2024), floats (HQQ, Badri and
Shaji, 2023). e2m1 with e8m0 scales of 32: OCP Microscaling Formats, 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

ELEMENTS = ("int", "e4m3", "e2m1")
SCALES = ("f32", "f16", "bf16", "e8m0")
ZEROS = ("u8", "f32", "f16", "bf16")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # sizes, by the lower three bits of a code
NESTED = ((4, 8), (2, 4), (2, 4, 8))
PER_EXPERT = 0  # in `bits`: an operand [E] says how many bits of each expert's codes are read


@dataclass(frozen=True)
class Quantized:
    """How one stack of matrices [E, N, K] is stored.

    element: one of ELEMENTS. planes: widths in bits of the codes that are stored, ascending; more than one:
    nested. columns: K. group: columns that share a scale. scale: the dtype of scales, one of SCALES. bits:
    the width that is read, one of `planes`, or PER_EXPERT. zero: the dtype of zero points, one of ZEROS;
    None: none."""

    element: str
    planes: tuple[int, ...]
    columns: int
    group: int
    scale: str = "f32"
    bits: int = PER_EXPERT
    zero: str | None = None

    def __post_init__(self) -> None:
        if self.bits == PER_EXPERT and len(self.planes) == 1:
            object.__setattr__(self, "bits", self.planes[0])

    @property
    def read(self) -> tuple[int, ...]:
        """Widths after each of the planes that are read."""
        return tuple(w for w in self.planes if self.bits in (PER_EXPERT, *self.planes) and self._reads(w))

    def _reads(self, width: int) -> bool:
        return self.bits == PER_EXPERT or width <= self.bits

    @cached_property
    def plane_bits(self) -> tuple[int, ...]:
        """Bits of each plane that is stored."""
        return tuple(b - a for a, b in zip((0, *self.planes), self.planes, strict=False))

    @property
    def slices(self) -> int:
        """In how many slices a row is unpacked: the codes of a byte of the first plane, the densest."""
        return 8 // self.planes[0]

    @property
    def stretch(self) -> int:
        """Columns of a slice."""
        return -(-self.columns // self.slices)

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)

    @property
    def operands(self) -> int:
        """Tensors that a reader takes: planes, scales and, where there are any, zero points and widths."""
        return len(self.read) + 1 + (self.zero is not None) + (self.bits == PER_EXPERT)

    def row_bytes(self, plane: int) -> int:
        """Bytes of a row in a plane."""
        return self.stretch * self.slices * self.plane_bits[plane] // 8

    def blocks(self, plane: int) -> int:
        """Tiles of bytes that hold one tile of each slice in a plane."""
        return self.slices * self.plane_bits[plane] // 8

    def place(self, plane: int, part: int) -> tuple[int, int]:
        """Where a slice lies in a plane: which block of bytes, and by how many bits codes are shifted."""
        blocks = self.blocks(plane)
        return part % blocks, part // blocks * self.plane_bits[plane]

    @property
    def bias(self) -> int:
        """What was added to codes before they were stored, or zero points are read as less by."""
        return 1 << (self.planes[-1] - 1) if self.element == "int" else 0

    def midpoint(self, bits: Any) -> Any:
        """What is added to codes of which the upper `bits` are read.

        Alone, codes of two bits have no zero: they stand for -1.5, -0.5, 0.5 and 1.5."""
        alone = 0.5 if self.planes == (2,) and self.zero is None else 0.0
        return alone + ((1 << (self.planes[-1] - bits)) - 1) * 0.5 if self.element == "int" else 0.0


def e4m3(code: np.ndarray) -> np.ndarray:
    """The numbers of e4m3fn codes (uint8): sign, four bits of exponent, three of fraction; no infinities."""
    size = code & 127
    exponent, fraction = (size >> 3).astype(np.int32), (size & 7).astype(np.float64)
    value = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
    return np.where(size == 127, np.nan, np.where(code & 128, -value, value))


def e2m1(code: np.ndarray) -> np.ndarray:
    """The numbers of e2m1 codes (0 .. 15): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    value = np.array(E2M1)[code & 7]
    return np.where(code & 8, -value, value)


def e8m0(scale: np.ndarray) -> np.ndarray:
    """The numbers of e8m0 scales (uint8): powers of two; 255 is NaN."""
    return np.where(scale == 255, np.nan, 2.0 ** (scale.astype(np.float64) - 127))


def codes_of(q: Quantized, planes: list[np.ndarray]) -> np.ndarray:
    """The codes [E, N, K] as planes hold them, the bits of planes that are missing zero."""
    found: Any = 0
    for number, plane in enumerate(planes):
        wide, parts = plane.astype(np.int64), []
        for part in range(q.slices):
            block, shift = q.place(number, part)
            stretch = wide[..., block * q.stretch : (block + 1) * q.stretch]
            parts.append((stretch >> shift) & ((1 << q.plane_bits[number]) - 1))
        found = found + (np.concatenate(parts, -1) << (q.planes[-1] - q.planes[number]))
    return np.asarray(found)[..., : q.columns]


def dequantize(q: Quantized, operands: list[np.ndarray]) -> np.ndarray:
    """The matrices [E, N, K] in float64. operands: as `Quantized.operands` counts them."""
    count = len(q.read)
    planes, scales = list(operands[:count]), np.asarray(operands[count])
    steps = e8m0(scales) if q.scale == "e8m0" else scales.astype(np.float64)
    codes = codes_of(q, planes)
    if q.element == "int":
        width: Any = q.bits
        if q.bits == PER_EXPERT:
            width = np.asarray(operands[-1]).astype(np.int64)[:, None, None]
            lost = q.planes[-1] - width
            codes = codes >> lost << lost
        value = codes - q.bias + _midpoint(q, width)
    else:
        value = e4m3(codes.astype(np.uint8)) if q.element == "e4m3" else e2m1(codes)
    if q.zero is not None:
        zeros = np.asarray(operands[count + 1]).astype(np.float64) - q.bias
        value = value - _spread(q, zeros)
    return np.asarray(value * _spread(q, steps), np.float64)


def _spread(q: Quantized, groups: np.ndarray) -> np.ndarray:
    """A number for each column."""
    return np.repeat(groups, q.group, -1)[..., : q.columns] if q.group < q.columns else groups


def _midpoint(q: Quantized, width: Any) -> Any:
    return q.midpoint(width) if isinstance(width, int) else (2.0 ** (q.planes[-1] - width) - 1) * 0.5

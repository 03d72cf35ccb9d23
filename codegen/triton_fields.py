"""Floats of the bit fields of bytes, several at once: what decoding quantised matrices is made of.

A kernel asks for it by the hint `fields`, which is for NVIDIA's GPUs. A statement qualifies by its
expression alone: some bits of a tile of bytes, as a float, minus a constant. Conversions of integers run at
half the rate of other instructions and give one number each, so numbers are made of bits: 2**k + n is the
float of 2**k with n in its last bits. In 16 bits two of them share a register, and take a selection of
bytes, (at most) a shift, one logical operation and one addition together; in 32 bits one operation and one
multiply-add each.

Triton's interpreter knows no assembly: there the helpers convert as they would on any other target.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import sympy

from ..ir import expr as ex
from ..ir.expr import Expr
from ..ir.kernel import Compute
from .triton_scope import TL, Scope

MANTISSA = {"bf16": 7, "f16": 10, "f32": 23}
F32 = sympy.Symbol("f32")


@dataclass(frozen=True)
class Field:
    """`bits` bits of the bytes of a tile, from bit `shift` up, minus `offset`, in a float dtype."""

    tile: str
    shift: int
    bits: int
    offset: float
    dtype: str

    @property
    def name(self) -> str:
        """What the helper is called."""
        by = f"{self.offset:g}".replace(".", "_").replace("-", "n")
        return f"field{self.bits}_at{self.shift}_less{by}_{self.dtype}"

    @property
    def source(self) -> str:
        """The helper's definition, after FLAG."""
        says = f"{self.bits} bits of bytes from bit {self.shift} up, minus {self.offset:g}."
        field = f"(b.to(tl.int32) >> {self.shift}) & {(1 << self.bits) - 1}"
        plain = f"({field}).to(tl.float32) - {self.offset!r}"
        return helper(
            self.name, self.dtype, says, plain, _words(self) if self.dtype == "f32" else _halves(self)
        )


def helper(name: str, dtype: str, says: str, plain: str, lines: list[str]) -> str:
    """The text of a function of a tile of bytes: assembly for two of them that gives both numbers in one
    register, or, in f32, for four. plain: the same as an expression over b."""
    wide = dtype == "f32"
    text = "\n".join(f"        {line}" for line in lines)
    inputs, outputs = ("r", "=r,=r,=r,=r") if wide else ("h", "=r")
    return f'''\
@triton.jit
def {name}(b):
    """{says}"""
    if not ASSEMBLY:
        return ({plain}).to({TL[dtype]})
    return tl.inline_asm_elementwise(
        """
        {{
{text}
        }}
        """,
        "{outputs},{inputs}",
        [b],
        dtype={TL[dtype]},
        is_pure=True,
        pack={4 if wide else 2},
    )
'''


FLAG = "ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret)\n"


def field_of(stmt: Compute, scope: Scope) -> Field | None:
    """The field that a statement takes; None if it does something else, or cannot be exact so."""
    terms = sympy.Add.make_args(stmt.expr)
    constant = sum(float(t) for t in terms if t.is_Number)
    rest = [t for t in terms if not t.is_Number]
    if stmt.dtype not in MANTISSA or len(rest) != 1 or not isinstance(rest[0], ex.cast):
        return None
    found = _bits(rest[0], scope)
    if found is None:
        return None
    field = Field(*found, -constant, stmt.dtype)
    return field if _fits(field) else None


def _bits(converted: Expr, scope: Scope) -> tuple[str, int, int] | None:
    """Tile, shift and width of `cast(f32, bitand(shr(tile, shift), 2**width - 1))`."""
    dtype: Any
    taken: Any
    source: Any
    mask: Any
    dtype, taken = converted.args
    if dtype != F32 or not isinstance(taken, ex.bitand) or not taken.args[1].is_Integer:
        return None
    source, mask = taken.args
    shift: Any = 0
    if isinstance(source, ex.shr) and source.args[1].is_Integer:
        source, shift = source.args
    bits = int(mask).bit_length()
    name = scope.names.get(str(source)) if source.is_Symbol else None
    whole = int(mask) == (1 << bits) - 1 and int(shift) + bits <= 8
    return (str(source), int(shift), bits) if name and name.dtype == "u8" and name.axes and whole else None


def _fits(field: Field) -> bool:
    """Whether offset and numbers are exact: integers, or halves where few bits leave room for one more."""
    twice = 2 * field.offset
    room = MANTISSA[field.dtype] - field.bits
    if field.bits == 8 and field.dtype == "bf16":
        return field.offset == 128
    return twice == int(twice) and 0 <= field.offset < 1 << field.bits and (twice % 2 == 0 or room >= 2)


def _halves(field: Field) -> list[str]:
    """Two bytes to two numbers of 16 bits."""
    if field.bits == 8 and field.dtype == "bf16":
        return _signed_bytes()
    mantissa, bias = MANTISSA[field.dtype], {"bf16": 127, "f16": 15}[field.dtype]
    # The lowest bit of a field lies at bit `at`, where the number is 2**(mantissa - at) + n.
    at = least = int(field.offset % 1 != 0)
    if least <= field.shift <= mantissa - field.bits:
        at = field.shift
    move = field.shift - at
    magic, unit = (bias + mantissa) << mantissa, (bias - at) << mantissa
    less = half_bits(-(2.0 ** (mantissa - at) + field.offset), field.dtype)
    mask = ((1 << field.bits) - 1) << at
    return [
        ".reg .b32 a, u, c;",
        "cvt.u32.u16 a, $1;",
        "prmt.b32 a, a, 0, 0x4140;",
        *([f"sh{'r' if move > 0 else 'l'}.b32 a, a, {abs(move)};"] if move else []),
        f"lop3.b32 a, a, {twice(mask)}, {twice(magic)}, 0xEA;",
        f"mov.b32 u, {twice(unit)};",
        f"mov.b32 c, {twice(less)};",
        f"fma.rn.{field.dtype}x2 $0, a, u, c;",
    ]


def _signed_bytes() -> list[str]:
    """Two bytes n to n - 128 in bf16: 128 + its lower 7 bits, minus 128 or 256 by the upper one."""
    return [
        ".reg .b32 a, b, u;",
        "cvt.u32.u16 a, $1;",
        "prmt.b32 a, a, 0, 0x4140;",
        "lop3.b32 b, a, 0x00800080, 0xC380C380, 0x6A;",
        "lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;",
        "mov.b32 u, 0x3F803F80;",
        "fma.rn.bf16x2 $0, a, u, b;",
    ]


def _words(field: Field) -> list[str]:
    """Four bytes to four f32."""
    up = int(field.offset % 1 != 0)  # where the last bit is worth a half
    low = f"shl.b32 l, $4, {up};" if up else "mov.b32 l, $4;"
    lines = [".reg .b32 l, h, a;", ".reg .f32 f;", low, f"shr.u32 h, $4, {16 - up};"]
    for number in range(4):
        word, at = "lh"[number > 1], field.shift + up + 8 * (number % 2)
        mask = ((1 << field.bits) - 1) << at
        less = -(2.0 ** (23 - at) + field.offset)
        lines += [
            f"lop3.b32 a, {word}, 0x{mask:08X}, 0x4B000000, 0xEA;",
            "mov.b32 f, a;",
            f"fma.rn.f32 ${number}, f, {_f32(2.0**-at)}, {_f32(less)};",
        ]
    return lines


def _f32(value: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def half_bits(value: float, dtype: str) -> int:
    if dtype == "f16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    return int(struct.unpack("<I", struct.pack("<f", value))[0] >> 16)


def twice(half: int) -> str:
    return f"0x{half << 16 | half:08X}"

"""Numbers of e2m1 codes (ir/quantized.py) in bytes, several at once, as triton_fields.py has it for integers.

The bits of a code, spread to those of the sign, the last two of the exponent and the first of the fraction,
are the number times a power of two, subnormal ones too: two masks and a multiplication. In 16 bits two codes
share a register.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from ..ir import expr as ex
from ..ir.kernel import Compute
from .triton_fields import F32, MANTISSA, half_bits, helper, twice
from .triton_scope import Scope

MASK = 0x81C00000  # of the sign, the exponent's last two bits and the fraction's first, in an f32
UNIT = {"bf16": 126, "f32": 126, "f16": 14}  # exponents: of the power of two that is missing


@dataclass(frozen=True)
class E2M1:
    """The numbers of the codes in bits `shift` to `shift` + 3 of the bytes of a tile, in a float dtype."""

    tile: str
    shift: int
    dtype: str

    @property
    def name(self) -> str:
        """What the helper is called."""
        return f"e2m1_at{self.shift}_{self.dtype}"

    @property
    def source(self) -> str:
        """The helper's definition, after FLAG."""
        says = f"The e2m1 numbers in bytes, from bit {self.shift} up."
        bits = f"(((b.to(tl.int32) << {28 - self.shift}) >> 6) & {MASK - 2**32})"
        plain = f"{bits}.to(tl.float32, bitcast=True) * 2.0**126"
        return helper(
            self.name, self.dtype, says, plain, _words(self) if self.dtype == "f32" else _halves(self)
        )


def e2m1_of(stmt: Compute, scope: Scope) -> E2M1 | None:
    """The codes that a statement makes numbers of; None if it does something else.

    `cast(f32, float_of_bits(bitand(shr(cast(i32, shl(tile, 28 - shift)), 6), MASK)) * 2**126)`."""
    value: Any = stmt.expr
    if stmt.dtype not in MANTISSA or not isinstance(value, ex.cast) or value.args[0] != F32:
        return None
    factors: Any = sympy.Mul.make_args(value.args[1])  # type: ignore[arg-type]
    found = [f for f in factors if isinstance(f, ex.float_of_bits)]
    others = [float(f) for f in factors if f.is_Number]
    if len(factors) != 2 or len(found) != 1 or others != [2.0**126]:
        return None
    place = _place(found[0].args[0])
    name = scope.names.get(place[0]) if place else None
    if place is None or name is None or name.dtype != "u8" or not name.axes:
        return None
    return E2M1(*place, stmt.dtype)


def _place(bits: Any) -> tuple[str, int] | None:
    """The tile, and the first bit of the codes in its bytes."""
    if not isinstance(bits, ex.bitand) or bits.args[1] != MASK - 2**32:
        return None
    right: Any = bits.args[0]
    moved: Any = right.args[0] if isinstance(right, ex.shr) and right.args[1] == 6 else None
    left: Any = moved.args[1] if isinstance(moved, ex.cast) else None
    if not isinstance(left, ex.shl):
        return None
    tile: Any = left.args[0]
    by: Any = left.args[1]
    return (str(tile), 28 - int(by)) if tile.is_Symbol and by.is_Integer and 24 <= int(by) <= 28 else None


def _halves(code: E2M1) -> list[str]:
    """Two bytes to two numbers of 16 bits. Codes move to the upper bits of their halves, signs first."""
    down = 13 - MANTISSA[code.dtype]
    up = 4 - code.shift
    mask = 0x7000 >> down
    return [
        ".reg .b32 a, b, u, z;",
        "cvt.u32.u16 a, $1;",
        "prmt.b32 a, a, 0, 0x1404;",
        *([f"shl.b32 a, a, {up};"] if up else []),
        f"shr.u32 b, a, {down};",
        f"lop3.b32 b, b, {twice(mask)}, 0, 0xC0;",
        "lop3.b32 a, a, 0x80008000, b, 0xEA;",
        f"mov.b32 u, {twice(half_bits(2.0 ** UNIT[code.dtype], code.dtype))};",
        "mov.b32 z, 0x80008000;",
        f"fma.rn.{code.dtype}x2 $0, a, u, z;",
    ]


def _words(code: E2M1) -> list[str]:
    """Four bytes to four f32."""
    lines = [".reg .b32 a;", ".reg .f32 f;"]
    for number in range(4):
        left = 28 - code.shift - 8 * number
        lines += [
            f"shl.b32 a, $4, {left};" if left else "mov.b32 a, $4;",
            "shr.s32 a, a, 6;",
            f"lop3.b32 a, a, 0x{MASK:08X}, 0, 0xC0;",
            "mov.b32 f, a;",
            f"fma.rn.f32 ${number}, f, 0f7E800000, 0f80000000;",
        ]
    return lines

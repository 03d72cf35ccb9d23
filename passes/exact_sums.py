"""exact_sums: sums of f32 numbers that are exact, and so come out the same in any order.

A superaccumulator (U. Kulisch; R. Neal, "Fast exact summation using small and large superaccumulators",
2015), cut so that a number goes to one place. An element of a sum is BINS 64-bit integers. Bin n counts
multiples of 2**(4 n - 149), the unit of the numbers whose exponent field is 4 n + 1 to 4 n + 4: such a number
is a 24-bit integer shifted by at most 3 bits, below 2**27, so that 2**36 of them fit before a bin can
overflow. Infinities and NaN are counted in the last three bins. Integers add in any order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..ir.expr import bitand, bits_of_float, integer, maximum, real, shl, shr, where
from ..ir.kernel import Compute, Stmt, Store

if TYPE_CHECKING:
    Expr = Any
else:
    from ..ir.expr import Expr

WIDTH = 4  # binary orders of magnitude in a bin, a power of two
FINITE = 64  # bins of numbers: 254 exponents
INF, MINUS_INF, NAN = FINITE, FINITE + 1, FINITE + 2
BINS = FINITE + 3
LEAST = -149  # the exponent of the unit of bin 0: the least f32 number
ROOM = 1 << (63 - 24 - WIDTH + 1)  # numbers that one element takes


def added(tensor: str, index: tuple[Expr, ...], tile: str, axes: tuple[str, ...], guard: Expr) -> list[Stmt]:
    """Statements that add a tile of f32 to elements of i64[.., BINS]."""
    x, bits, steps, whole = real(tile), *(integer(f"{tile}_{part}") for part in ("bits", "steps", "whole"))
    found: Expr = bits_of_float(abs(x))
    exponent: Expr = shr(bits, 23)
    mantissa: Expr = bitand(bits, 2**23 - 1)
    size: Expr = shl(mantissa + where(exponent > 0, 2**23, 0), bitand(steps, WIDTH - 1))
    step: Expr = maximum(exponent, 1)
    sign: Expr = where(x < 0, -1, 1)
    special = where(mantissa > 0, NAN, where(x > 0, INF, MINUS_INF))
    place = where(exponent < 255, shr(steps, WIDTH.bit_length() - 1), special)
    return [
        Compute(bits.name, "i32", axes, found),
        Compute(steps.name, "i32", axes, step - 1),
        Compute(whole.name, "i32", axes, where(exponent < 255, sign * size, 1)),
        Store(tensor, (*index, place), whole, axes, guard, adds=True),
    ]

"""Philox2x32-10 in vector arithmetic: `ir/philox.py` as TVMScript text."""

from __future__ import annotations

from ..ir.philox import MULTIPLIER, ROUNDS, WEYL
from .tvm_math import Let


def random_bits(key: str, x: str, y: str, let: Let) -> str:
    """The first word at the counter (x, y) as an int32; key, x and y are text of uint32 values.

    The product of two 32-bit words is taken in 64 bits, which vector units have an instruction for."""
    for r in range(ROUNDS):
        product = let("w", f'T.Cast("uint64", {x}) * T.uint64({MULTIPLIER})')
        high = f'T.Cast("uint32", T.shift_right({product}, T.uint64(32)))'
        bumped = f"{key} + T.uint32({r * WEYL % 2**32})" if r else key
        x = let("r", f"T.bitwise_xor(T.bitwise_xor({high}, {bumped}), {y})")
        y = let("s", f'T.Cast("uint32", {product})')
    return f'T.reinterpret("int32", {x})'

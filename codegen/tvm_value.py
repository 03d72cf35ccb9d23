"""Typed text: the dtype of an expression goes along with what is written for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .tvm_math import literal

RANK = {"bool": 0, "int32": 1, "int64": 2, "float32": 3, "float64": 4}
ATOM, PRODUCT, SUM, RELATION, NOT, AND, OR = range(7)


@dataclass(frozen=True)
class Text:
    """An expression as text: its dtype, whether it differs inside a tile, how loosely it binds."""

    text: str
    dtype: str
    varying: bool = False
    binding: int = ATOM
    number: bool = False  # an integer literal: takes the dtype of what it meets

    def inside(self, binding: int) -> str:
        """The text as an operand of an operator that binds so tightly."""
        return self.text if self.binding <= binding else f"({self.text})"


class Typing:
    """Conversions between dtypes of text. let: binds text to a fresh name. floats: dtype of float arithmetic.

    address: integers stay at 64 bits, as indices of memory; otherwise scalars take the width of what
    varies inside the tile."""

    def __init__(self, let: Callable[[str, str], str], floats: str, *, address: bool = False) -> None:
        self.let, self.floats, self.address = let, floats, address

    def _to(self, value: Text, dtype: str) -> Text:
        if value.dtype == dtype:
            return value
        if value.number:
            text = literal(float(value.text), dtype) if dtype[0] == "f" else f"T.{dtype}({value.text})"
            return Text(text, dtype)
        if dtype == "bool":
            return Text(f"{value.inside(SUM)} != 0", dtype, value.varying, RELATION)
        return Text(f'T.Cast("{dtype}", {value.text})', dtype, value.varying)

    def _join(self, *values: Text, widening: bool = False) -> list[Text]:
        """The values in their common dtype: scalars follow what varies, unless they index memory.

        widening: they meet in an operator that widens integers by itself."""
        typed = [v for v in values if not v.number]
        if not typed:
            return list(values)
        leading = [v for v in typed if v.varying or RANK[v.dtype] >= RANK["float32"]]
        dtype = max((leading if leading and not self.address else typed), key=lambda v: RANK[v.dtype]).dtype
        if dtype == "bool":
            dtype = "int32" if len(typed) < len(values) else dtype
        keep = dtype in ("int32", "int64")
        if widening and self.address and dtype == "int64":
            return [replace(v, dtype=dtype) if not v.number else v for v in values]
        return [v if keep and v.number else self._to(v, dtype) for v in values]

    def _named(self, value: Text) -> Text:
        if value.text.isidentifier():
            return value
        return Text(self.let("x", value.text), value.dtype, value.varying)

    def _float(self, value: Text) -> Text:
        return value if value.dtype[0] == "f" else self._to(value, self.floats)


def widest(parts: list[Text]) -> str:
    typed = [p for p in parts if not p.number] or parts
    return max(typed, key=lambda p: RANK[p.dtype]).dtype


def nan_aware(a: str, b: str, function: str, dtype: str, constant: bool = False) -> str:
    """The better of two floats by T.min or T.max, or the NaN among them; constant: a is a number.

    Both give b unless a is better, so a NaN in b stays. One in a is looked for; TVM takes a == a for true."""
    best = f"{function}({a}, {b})"
    return best if constant else f"T.Select({a} <= {literal('inf', dtype)}, {best}, {a})"


def bf16_rounded(x: str) -> str:
    """An f32 rounded to bf16, to nearest even: TVM drops a conversion there and back. NaN stays."""
    bits = f'T.reinterpret("int32", {x})'
    odd = f"T.bitwise_and(T.shift_right({bits}, 16), 1)"
    nearest = f'T.reinterpret("float32", T.bitwise_and({bits} + 32767 + {odd}, -65536))'
    return f"T.Select({x} <= {literal('inf', 'float32')}, {nearest}, {x})"


def bf16_widened(x: str) -> str:
    """A bf16 as f32, by its bits: TVM binds a conversion of bf16 to a name with the bits as the number."""
    bits = f'T.Cast("uint32", T.reinterpret("uint16", {x}))'
    return f'T.reinterpret("float32", T.shift_left({bits}, T.uint32(16)))'

"""codes: tiles of quantised matrices, decoded where a product loads them.

Before::  W: bf16[n, d] = load w[expert, row, column]
After::   C: u8[n, d] = load codes[expert, row, byte]
          W0: bf16[n, d] = (bits of C) ; W1: bf16[n, d] = (other bits of C)        a tile for each slice

See ir/quantized.py for what lies where. Numbers are made of bits without conversions of integers, of which
GPUs do few at a time: 2**23 + code is the float whose bits are MAGIC | code. All of them are exact in bf16
and f16; scales join where the Tiling says.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ...ir.expr import (
    Expr,
    all_of,
    bitand,
    bitor,
    cast,
    float_of_bits,
    floordiv,
    integer,
    maximum,
    minimum,
    read,
    real,
    shl,
    shr,
    where,
)
from ...ir.graph import Graph, Op
from ...ir.kernel import Compute, Let, Load, Stmt, Tensor
from ...ir.quantized import PER_EXPERT, Quantized
from .spec import ExpertsSpec

NONE, ZERO = sympy.Float(0.0), sympy.Integer(0)
F32 = sympy.Symbol("f32")
MAGIC = 0x4B000000  # 2**23, whose last bit is worth 1
EXPERT = integer("expert")
NATIVE = ("cuda:sm_89", "cuda:sm_90", "cuda:sm_100", "cuda:sm_103", "cuda:sm_120", "cuda:sm_121")


@dataclass(frozen=True)
class Codes:
    """The operands of quantised matrices in a kernel: planes, scales, zero points and widths by name, and
    their shape."""

    q: Quantized
    names: tuple[str, ...]
    experts: int
    rows: int
    scale_dtype: str
    target: str

    @property
    def is_cpu(self) -> bool:
        return self.target.partition(":")[0] == "cpu"

    @property
    def is_plain(self) -> bool:
        """Whether a load alone gives the numbers: codes are numbers of a dtype that the target has."""
        return self.q.element == "e4m3" and self.target.removesuffix("a") in NATIVE

    @property
    def packs(self) -> bool:
        """Whether codes are bit fields of bytes, which NVIDIA's GPUs turn into floats two at a time
        (codegen/triton_fields.py, triton_e2m1.py)."""
        alone = len(self.q.planes) == 1 and self.q.element in ("int", "e2m1")
        return alone and self.target.partition(":")[0] == "cuda"

    @property
    def hints(self) -> tuple[tuple[str, int], ...]:
        """What a kernel's meta says of them."""
        return (("fields", 1),) if self.packs else ()

    @property
    def dtype(self) -> str:
        """The dtype of codes in memory."""
        return "f8e4m3" if self.is_plain else "u8"

    @property
    def scales(self) -> str:
        return self.names[len(self.q.read)]

    @property
    def zeros(self) -> str:
        return self.names[len(self.q.read) + 1]

    def tensors(self, *, aligned: bool) -> list[Tensor]:
        """The arguments of a kernel."""
        planes = []
        for number in range(len(self.q.read)):
            size = self.q.row_bytes(number)
            align = min(16, size & -size) if aligned and not self.is_cpu else 1
            shape = (self.experts, self.rows, size)
            planes.append(Tensor(self.names[number], self.dtype, shape, unit=2, align=align))
        groups = (self.experts, self.rows, self.q.groups)
        scales = [Tensor(self.scales, self.scale_dtype, groups)]
        scales += [Tensor(self.zeros, self.q.zero, groups)] if self.q.zero else []
        bits = [Tensor(self.names[-1], "i32", (self.experts,), unit=0)] if self.by_expert else []
        return [*planes, *scales, *bits]

    @property
    def by_expert(self) -> bool:
        return self.q.bits == PER_EXPERT

    def widths(self) -> list[Stmt]:
        """What a program has to know of its expert: bits that are read, and the middle of those that are
        not."""
        if not self.by_expert:
            return []
        most = self.q.planes[-1]
        chosen = read(integer(self.names[-1]), EXPERT)
        lost = most - integer("bits")
        ways: Expr = cast(F32, shl(sympy.Integer(1), lost))
        middle = (ways - 1) * sympy.Float(0.5)
        return [
            Let("bits", minimum(maximum(chosen, sympy.Integer(self.q.planes[0])), sympy.Integer(most))),
            Compute("middle", "f32", (), middle),
        ]

    def load(
        self, stem: str, dtype: str, axes: tuple[str, ...], at: tuple[Expr, Expr], guard: Expr
    ) -> list[Stmt]:
        """The bytes of a tile. at: row, and byte within a slice. dtype: of the operands of the product."""
        row, byte = at
        if self.is_plain:
            return [Load(f"{stem}0", dtype, axes, self.names[0], (EXPERT, row, byte), guard, NONE)]
        found: list[Stmt] = []
        for plane, width in enumerate(self.q.read):
            asked = all_of([guard, integer("bits") >= width]) if self.by_expert and plane else guard
            for block in range(self.q.blocks(plane)):
                index = (EXPERT, row, byte + block * self.q.stretch)
                found.append(
                    Load(f"{stem}c{plane}{block}", "u8", axes, self.names[plane], index, asked, ZERO)
                )
        return found

    def decode(
        self, stem: str, part: int, dtype: str, axes: tuple[str, ...], scale: Expr | None = None,
        zero: Expr | None = None,
    ) -> list[Stmt]:  # fmt: skip
        """The tile `{stem}{part}`: the numbers of a slice, times a scale where there is one, of their
        distances from a zero point where there is one."""
        name = f"{stem}{part}"
        value = real(name) if self.is_plain else self._value(stem, part)
        if scale is not None and self.packs:  # fields by themselves
            code = f"{name}_code"
            scaled = self.scaled(real(code), scale, zero)
            return [Compute(code, dtype, axes, value), Compute(name, dtype, axes, scaled)]
        if scale is not None:
            value = self.scaled(value, scale, zero)
        if value == real(name):
            return []
        return [Compute(name, dtype, axes, value, declares=not self.is_plain)]

    @staticmethod
    def scaled(value: Expr, scale: Expr, zero: Expr | None, times: Expr | int = 1) -> Expr:
        """What a code stands for, or a sum of codes times numbers that add up to `times`."""
        return (value if zero is None else value - zero * times) * scale

    def zero(self, name: str) -> Expr | None:
        """The tile of zero points that `scale` loads beside the scales of a name."""
        return real(f"{name}_zero") if self.q.zero else None

    def _value(self, stem: str, part: int) -> Expr:
        """The number that a code stands for, before scales."""
        if self.q.element == "e4m3":
            return _e4m3(integer(f"{stem}c00"))
        planes = [self.q.place(plane, part) for plane in range(len(self.q.read))]
        tiles = [integer(f"{stem}c{plane}{block}") for plane, (block, _) in enumerate(planes)]
        if self.q.element == "e2m1":
            return (_e2m1_cpu if self.is_cpu else _e2m1)(tiles[0], planes[0][1])
        if self.packs:
            field = bitand(_right(tiles[0], planes[0][1]), (1 << self.q.plane_bits[0]) - 1)
            return cast(F32, field) - (self.q.bias - self.q.midpoint(self.q.bits))
        if len(planes) == 1 and not self.is_cpu:
            return self._one_plane(tiles[0], planes[0][1])
        whole: Expr = ZERO
        for tile, (_, shift), width, bits in zip(tiles, planes, self.q.read, self.q.plane_bits, strict=False):
            field = bitand(_right(tile, shift), (1 << bits) - 1)
            whole = _or(whole, _left(field, self.q.planes[-1] - width))
        middle = real("middle") if self.by_expert else self.q.midpoint(self.q.bits)
        if self.is_cpu:
            return cast(F32, whole) + (middle - self.q.bias)
        # 2**22 + code, for a middle of halves needs a bit behind the point.
        return (
            float_of_bits(bitor(_left(whole, 1), sympy.Integer(0x4A800000))) + middle - (2**22 + self.q.bias)
        )

    def _one_plane(self, tile: Expr, shift: int) -> Expr:
        """Codes of one plane. A byte joins the upper bits of 2**23 before others of its bits are masked, and
        what it is shifted by joins the product: two instructions a code on integers, and one on floats."""
        bits, lost = self.q.plane_bits[0], self.q.planes[-1] - self.q.read[0]
        middle = self.q.midpoint(self.q.bits)
        # Where the middle is a half, codes move up until the last bit is worth no more than that.
        up = max(0, lost - shift + 1) if middle else 0
        magic = sympy.Integer(MAGIC - (up << 23))
        number = bitor(_left(tile, up), magic)
        if bits < 8:
            number = bitand(number, magic + ((((1 << bits) - 1) << shift) << up))
        value, unit = float_of_bits(number), lost - shift
        offset = sympy.Float(2.0 ** (23 - up + unit) + self.q.bias - middle)
        return (value * sympy.Float(2.0**unit) if unit else value) - offset

    def scale(
        self, name: str, acc: str, axes: tuple[str, ...], at: tuple[Expr, Expr], guard: Expr
    ) -> list[Stmt]:
        """The tile `name`: scales at a row and a column. `{name}_zero`: zero points, less the bias."""
        row, column = at
        group = ZERO if self.q.groups == 1 else floordiv(column, sympy.Integer(self.q.group))
        index = (EXPERT, row, group)
        zeros: list[Stmt] = []
        if self.q.zero is not None:
            stored, zero = f"{name}_stored", f"{name}_zero"
            zeros.append(Load(stored, acc, axes, self.zeros, index, guard, NONE))
            zeros.append(Compute(zero, acc, axes, real(stored) - self.q.bias))
        if self.q.scale != "e8m0":
            return [Load(name, acc, axes, self.scales, index, guard, NONE), *zeros]
        code = integer(f"{name}_code")
        # 2**(code - 127): code 0 is below the least normal number, 255 is NaN.
        power = float_of_bits(maximum(shl(code, sympy.Integer(23)), sympy.Integer(0x400000)))
        value = where(code < 255, power, sympy.nan)
        return [
            Load(f"{name}_code", "u8", axes, self.scales, index, guard, ZERO),
            Compute(name, acc, axes, value),
            *zeros,
        ]


def codes_of(graph: Graph, op: Op, stored: tuple[str, ...], spec: ExpertsSpec) -> Codes | None:
    """What an operation reads of quantised matrices; None where its matrices are stored as they are."""
    q = op.attr("quantized")
    if q is None:
        return None
    experts, rows, _ = graph.values[stored[0]].shape
    scale = graph.values[stored[len(q.read)]].dtype
    return Codes(q, stored, int(experts), int(rows), scale, spec.target)


def is_uniform(q: Quantized, step: int) -> bool:
    """Whether every step of so many columns of every slice lies in one group."""
    return q.groups == 1 or (q.group % step == 0 and q.stretch % q.group == 0)


def steps_of(q: Quantized, most: int, *, cpu: bool) -> tuple[int, int]:
    """Columns of a slice that a step takes, and steps a turn of the loop: steps of one group where groups
    allow it, and turns of about `most` columns.

    >>> q = Quantized("int", (4,), 4096, 32)
    >>> steps_of(q, 128, cpu=False), steps_of(Quantized("int", (4,), 4096, 40), 128, cpu=False)
    ((32, 4), (128, 1))
    """
    even = [n for n in range(16, most + 1) if is_uniform(q, n) and (cpu or n & (n - 1) == 0)]
    if q.groups == 1 or not even:
        step = min(most, q.stretch) if cpu else min(most, max(16, 1 << (q.stretch - 1).bit_length()))
        return step, 1
    return even[-1], max(1, most // even[-1])


def _right(value: Expr, by: int) -> Expr:
    return shr(value, sympy.Integer(by)) if by else value


def _left(value: Expr, by: int) -> Expr:
    return shl(value, sympy.Integer(by)) if by else value


def _or(a: Expr, b: Expr) -> Expr:
    return b if a == 0 else bitor(a, b)


def _e4m3(code: Expr) -> Expr:
    """Bits of the code where those of an f32 are give the number times 2**-120; 127 is NaN."""
    size: Expr = bitand(code, 127)
    sign = bitand(code, 128)
    bits = bitor(shl(size, sympy.Integer(20)), shl(sign, sympy.Integer(24)))
    value = float_of_bits(bits) * sympy.Float(2.0**120)
    return where(size < 127, value, sympy.nan)


def _e2m1(byte: Expr, shift: int) -> Expr:
    """Bits of the code, spread to where those of an f32 give the number times 2**-126: the sign by a shift
    that copies it."""
    upper = cast(sympy.Symbol("i32"), shl(byte, sympy.Integer(28 - shift)))
    bits = bitand(shr(upper, sympy.Integer(6)), sympy.Integer(0x81C00000 - 2**32))
    # A value of its own: 2**126 times a scale could be too large.
    return cast(F32, float_of_bits(bits) * sympy.Float(2.0**126))


def _e2m1_cpu(byte: Expr, shift: int) -> Expr:
    """The same without numbers below the least normal one, for which CPUs take long."""
    code: Expr = bitand(_right(byte, shift), 15)
    size: Expr = bitand(code, 7)
    large = float_of_bits(shl(size + 252, sympy.Integer(22)))
    value: Expr = where(size < 2, cast(F32, size) * sympy.Float(0.5), large)
    return where(code < 8, value, -value)

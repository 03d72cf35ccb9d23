"""Bit fields of bytes as floats: the assembly that kernels for NVIDIA's GPUs are given, run an instruction at
a time, against what the expressions say."""

import re
import struct

import numpy as np
import pytest

from gossamer.codegen.triton_e2m1 import E2M1, e2m1_of
from gossamer.codegen.triton_fields import Field, field_of
from gossamer.codegen.triton_scope import Name, Scope
from gossamer.ir.expr import bitand, cast, integer, shr
from gossamer.ir.kernel import Compute
from gossamer.ir.quantized import e2m1
from gossamer.passes.moe.codes import F32, _e2m1

WORD = 0xFFFFFFFF


def as_f32(bits):
    return np.array(bits & WORD, np.uint32).view(np.float32)


def bits_of(value):
    return int(np.array(value, np.float32).view(np.uint32))


def halves(word, dtype):
    """The two numbers in a register."""
    parts = word & 0xFFFF, word >> 16
    if dtype == "f16":
        return [float(np.array(p, np.uint16).view(np.float16)) for p in parts]
    return [float(as_f32(p << 16)) for p in parts]


def packed(values, dtype):
    """Two numbers in a register; they have to fit."""
    if dtype == "f16":
        found = [int(np.array(v, np.float16).view(np.uint16)) for v in values]
    else:
        found = [bits_of(v) >> 16 for v in values]
    word = found[0] | found[1] << 16
    assert halves(word, dtype) == list(values), "not exact"
    return word


def lop3(a, b, c, table):
    """Bit by bit what the table says for (a, b, c)."""
    out = 0
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | c >> bit & 1
        out |= (table >> index & 1) << bit
    return out


def prmt(a, b, selector):
    """The bytes of (b, a) that the selector's nibbles name."""
    both = b << 32 | a
    return sum((both >> 8 * (selector >> 4 * n & 7) & 255) << 8 * n for n in range(4))


def run(lines, register, outputs):
    """What PTX leaves in so many outputs; the operand behind them is the input."""
    known = {f"${outputs}": register}

    def value(text):
        if text.startswith("0f"):
            return int(text[2:], 16)
        return known[text] if text in known else int(text, 0)

    for line in lines:
        name, _, rest = line.rstrip(";").partition(" ")
        to, *operands = [part.strip() for part in rest.split(",")]
        if name == ".reg":
            continue
        given = [value(o) for o in operands]
        match name.split("."):
            case ["mov", "b32"] | ["cvt", "u32", "u16"]:
                known[to] = given[0]
            case ["shr", "s32"]:
                known[to] = (given[0] - (given[0] >> 31 << 32) >> given[1]) & WORD
            case ["shr", _]:
                known[to] = given[0] >> given[1]
            case ["shl", _]:
                known[to] = given[0] << given[1] & WORD
            case ["lop3", "b32"]:
                known[to] = lop3(*given)
            case ["prmt", "b32"]:
                known[to] = prmt(*given)
            case ["fma", "rn", "f32"]:
                a, b, c = (float(as_f32(g)) for g in given)
                assert float(np.float32(a * b + c)) == a * b + c, "not exact"
                known[to] = bits_of(a * b + c)
            case ["fma", "rn", ("bf16x2" | "f16x2") as kind]:
                each = zip(*(halves(g, kind[:-2]) for g in given), strict=True)
                known[to] = packed([a * b + c for a, b, c in each], kind[:-2])
            case other:
                raise AssertionError(f"unknown instruction {other}")
    return [known[f"${n}"] for n in range(outputs)]


def assembly(field):
    return re.search(
        r'"""\n        \{\n(.*?)\n        \}\n', field.source.partition("return tl.inline")[2], re.S
    )[1].split("\n")


FIELDS = [(4, 0, 8.0), (4, 4, 8.0), (8, 0, 128.0), *((2, shift, 1.5) for shift in (0, 2, 4, 6)), (2, 2, 2.0)]


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(("bits", "shift", "offset"), FIELDS)
def test_every_byte(bits, shift, offset, dtype):
    field = Field("b", shift, bits, offset, dtype)
    lines = [line.strip() for line in assembly(field)]
    count = 4 if dtype == "f32" else 2
    code = np.random.default_rng(0).permutation(np.repeat(np.arange(256), 4)).reshape(-1, count)
    for given in code.tolist():
        expected = [(n >> shift & (1 << bits) - 1) - offset for n in given]
        word = sum(n << 8 * place for place, n in enumerate(given))
        if dtype == "f32":
            found = [struct.unpack("<f", struct.pack("<I", w))[0] for w in run(lines, word, 4)]
        else:
            found = halves(run(lines, word, 1)[0], dtype)
        assert found == expected


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("shift", [0, 4])
def test_e2m1_of_every_byte(shift, dtype):
    lines = [line.strip() for line in assembly(E2M1("b", shift, dtype))]
    count = 4 if dtype == "f32" else 2
    code = np.random.default_rng(0).permutation(np.repeat(np.arange(256), 4)).reshape(-1, count)
    for given in code.tolist():
        word = sum(n << 8 * place for place, n in enumerate(given))
        found = run(lines, word, 4 if dtype == "f32" else 1)
        numbers = [float(as_f32(w)) for w in found] if dtype == "f32" else halves(found[0], dtype)
        expected = e2m1(np.array(given) >> shift & 15)
        assert numbers == expected.tolist()
        assert np.array_equal(np.signbit(numbers), np.signbit(expected))


@pytest.mark.parametrize("shift", [0, 4])
def test_what_e2m1_is(shift):
    expr = _e2m1(integer("b"), shift)
    assert e2m1_of(compute(expr), scope_of()) == E2M1("b", shift, "bf16")
    assert e2m1_of(compute(2 * expr), scope_of()) is None and e2m1_of(compute(expr), scope_of("i32")) is None
    assert e2m1_of(compute(expr, "f64"), scope_of()) is None and field_of(compute(expr), scope_of()) is None


def scope_of(dtype="u8"):
    return Scope((), {}, {"b": Name("b_b", dtype, ("n",))})


def compute(expr, dtype="bf16"):
    return Compute("w", dtype, ("n",), expr)


def test_what_is_a_field():
    byte = integer("b")
    nibble = cast(F32, bitand(shr(byte, 4), 15)) - 8
    assert field_of(compute(nibble), scope_of()) == Field("b", 4, 4, 8.0, "bf16")
    whole = cast(F32, bitand(byte, 255)) - 128
    assert field_of(compute(whole, "f32"), scope_of()) == Field("b", 0, 8, 128.0, "f32")


@pytest.mark.parametrize(
    ("expr", "dtype", "tile"),
    [
        (cast(F32, bitand(shr(integer("b"), 5), 15)) - 8, "bf16", "u8"),  # beyond the byte
        (cast(F32, bitand(integer("b"), 5)), "bf16", "u8"),  # not neighbours
        (cast(F32, bitand(integer("b"), 15)) - 8, "f64", "u8"),
        (cast(F32, bitand(integer("b"), 15)) - 8, "bf16", "i32"),
        (cast(F32, bitand(integer("b"), 15)) - 8.25, "bf16", "u8"),
        (cast(F32, bitand(integer("b"), 255)) - 127, "bf16", "u8"),  # not exact in bf16
        (2 * cast(F32, bitand(integer("b"), 15)), "bf16", "u8"),
    ],
)
def test_what_is_none(expr, dtype, tile):
    assert field_of(compute(expr, dtype), scope_of(tile)) is None

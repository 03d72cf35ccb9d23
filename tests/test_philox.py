"""Random bits: Random123's known answers, and the same bits from every backend."""

import numpy as np
import pytest
import sympy

from gossamer import testing
from gossamer.ir import expr as E
from gossamer.ir.kernel_text import parse
from gossamer.ir.philox import random_bits

torch = pytest.importorskip("torch")

KNOWN = [  # key, counter, first word: philox2x32 with 10 rounds in Random123's kat_vectors
    (0x00000000, (0x00000000, 0x00000000), 0xFF1DAE59),
    (0xFFFFFFFF, (0xFFFFFFFF, 0xFFFFFFFF), 0x2C3F628B),
    (0x13198A2E, (0x243F6A88, 0x85A308D3), 0xDD7CE038),
]


@pytest.mark.parametrize("key, counter, word", KNOWN)
def test_known_answers(key, counter, word):
    signed = word - 2**32 if word >= 2**31 else word
    assert random_bits(key, *counter) == signed
    assert E.random_bits(*map(sympy.Integer, (key, *counter))) == signed


def test_numbers_count_modulo_32_bits():
    assert random_bits(-1, 2**32 + 5, 7) == random_bits(2**32 - 1, 5, 7 - 2**32)


def test_words_look_random():
    words = random_bits(3, np.arange(400)[:, None], np.arange(500))
    assert len(np.unique(words)) > 199_990  # 5 collisions are expected of 200 000 words
    bits = (words[..., None] >> np.arange(32)) & 1
    counts = bits.reshape(-1, 32).sum(0)
    assert abs(counts - 100_000).max() < 5 * np.sqrt(50_000)
    for shift in ((0, 1), (1, 0), (1, 1)):
        other = bits[shift[0] :, shift[1] :]
        same = (bits[: other.shape[0], : other.shape[1]] == other).mean((0, 1))
        assert abs(same - 0.5).max() < 5 * 0.5 / np.sqrt(other.size / 32)


KERNEL = """
kernel @bits(seed: i64[1] in, x: f32[n, m] out unit 1, key: i64)
grid(t: (n + 15) // 16) axes(i: 16, j: 32) lanes i {
  tile base: i32[] = random_bits(random_bits(key, shr(seed[0], 32), t), seed[0], 0)
  for u in 0 .. (m + 31) // 32 {
    tile bits: i32[i, j] = random_bits(base, 16 * t + i - 5, 32 * u + j)
    tile X: f32[i, j] = where(bits >= key, cast(f32, bitand(bits, 65535)), -1)
    store x[16 * t + i, 32 * u + j] = X over (i, j) where 16 * t + i < n and 32 * u + j < m
  }
}
"""


@pytest.mark.parametrize("seed, key", [(0, 0), (-3, 2**31 - 5), (2**63 - 1, -(2**31)), (12345678901234, -77)])
def test_backends_agree_bit_for_bit(seed, key):
    pytest.importorskip("tvm")
    pytest.importorskip("triton")
    from gossamer.codegen import triton
    from gossamer.runtime.compile import compile_kernels
    from gossamer.runtime.executable import Executable
    from gossamer.runtime.triton_interpreter import run_interpreted

    kernel = parse(KERNEL)
    given = {"seed": np.array([seed]), "x": np.zeros((37, 45), np.float32), "key": key}
    expected = testing.interpret(kernel, given)["x"]
    arguments = {"seed": torch.tensor([seed]), "x": torch.zeros(37, 45), "key": key}
    run_interpreted(triton.emit(kernel), arguments)
    np.testing.assert_array_equal(arguments["x"].numpy(), expected)
    found = torch.zeros(37, 45)
    Executable(compile_kernels([kernel], "cpu"))(arguments | {"x": found}, threads=2)
    np.testing.assert_array_equal(found.numpy(), expected)

"""Functions of the emitted module that Triton lacks. Plain Triton, so they interpret and run on AMD too."""

from __future__ import annotations

HELPERS = {
    "floor_div": '''\
@triton.jit
def floor_div(a, b):
    """a / b rounded down; Triton's // rounds towards zero."""
    return (a - (a % b + b) % b) // b
''',
    "floor_mod": '''\
@triton.jit
def floor_mod(a, b):
    """The remainder with the sign of b; Triton's % takes the sign of a."""
    return (a % b + b) % b
''',
    "tanh": '''\
@triton.jit
def tanh(x, small):
    """tanh; below `small` by its series, because 1 - exp cancels there."""
    a = tl.abs(x)
    t = tl.exp(-2.0 * a)
    a2 = a * a
    series = a * (1.0 - a2 * (1.0 / 3 - a2 * (2.0 / 15 - a2 * (17.0 / 315 - a2 * (62.0 / 2835)))))
    y = tl.where(a < small, series, (1.0 - t) / (1.0 + t))
    return tl.where(x < 0, -y, y)
''',
    "random_bits": '''\
@triton.jit
def random_bits(key, x, y):
    """The first word of Philox2x32-10 at the counter (x, y), as a signed integer."""
    key, x, y = tl.cast(key, tl.uint32), tl.cast(x, tl.uint32), tl.cast(y, tl.uint32)
    for _ in tl.static_range(10):
        low = x * 0xD256D193
        x = tl.umulhi(x, 0xD256D193) ^ key ^ y
        y = low
        key = key + 0x9E3779B9
    return tl.cast(x, tl.int32, bitcast=True)
''',
    "trunc": '''\
@triton.jit
def trunc(x):
    """x rounded towards zero."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))
''',
    "power": '''\
@triton.jit
def power(x, y):
    """x ** y as C's pow: negative bases for whole exponents, 1 for y = 0."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    odd = tl.floor(y * 0.5) * 2.0 != y
    whole = tl.floor(y) == y
    signed = tl.where(whole, tl.where(odd, -size, size), float("nan"))
    return tl.where(y == 0, 1.0, tl.where(x < 0, signed, size))
''',
}

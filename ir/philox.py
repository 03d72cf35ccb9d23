"""Philox2x32-10: random bits as a pure function of a key and a counter.

A counter-based generator has no state, so that any pair of an attention matrix finds its bits in any
kernel, tile and order, again and again. Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3" (SC 2011); constants and ten rounds as in their Random123 library, whose known answers the
tests compare with. One multiplication a round on 32-bit words: the cheapest of the family that passes
TestU01's BigCrush.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MULTIPLIER, WEYL, ROUNDS = 0xD256D193, 0x9E3779B9, 10


def random_bits(key: Any, x: Any, y: Any) -> Any:
    """The first word of the generator at the counter (x, y), as a signed integer of 32 bits in int64.

    key, x, y: integers or integer arrays that broadcast; each counts modulo 2**32.

    >>> hex(int(random_bits(0, 0, 0)) % 2**32)
    '0xff1dae59'
    """
    key, x, y = (np.asarray(v).astype(np.int64).astype(np.uint32) for v in (key, x, y))
    for r in range(ROUNDS):
        product = x.astype(np.uint64) * np.uint64(MULTIPLIER)
        bumped = key + np.uint32(r * WEYL % 2**32)
        x, y = (product >> np.uint64(32)).astype(np.uint32) ^ bumped ^ y, product.astype(np.uint32)
    return x.astype(np.int32).astype(np.int64)[()]

"""magnitude: which integer expressions stay within 32 bits, and 64-bit coordinates for those that may not.

GPU kernels compute in 32 bits where nothing says otherwise. Hashes and other products of indices may need
more; their coordinates are cast, so that the whole is computed in 64.

    >>> from ..ir.expr import integer, parse
    >>> names = {"q": integer("q"), "m0": integer("m0")}
    >>> fits(parse("q % 65521 * 22987 % 65521", names)), fits(parse("q * 22987 % 65521", names))
    (True, False)
    >>> print(widened(parse("m0 * 900000011 % 97 < q", names)))
    floormod(900000011*cast(i64, m0), 97) < q

Leaves alone: sums and comparisons, which hold indices and lengths.
"""

from __future__ import annotations

import re

import sympy

from ..ir.expr import (
    Expr,
    bitand,
    bitor,
    bitxor,
    cast,
    floordiv,
    floormod,
    kind,
    maximum,
    minimum,
    read,
    readf,
    shl,
    shr,
    where,
)

POSITION, TILE, VALUE = 2**24, 2**20, 2**28  # indices and lengths; numbers of tiles; integers of the caller
LIMIT = 2**31
_TILE = re.compile(r"[mnr]\d")
_VALUE = re.compile(r"[pu]\d+")
_WIDE = (floordiv, floormod, read, readf, bitand, bitor, bitxor, shl, shr)


def fits(expr: Expr) -> bool:
    """Whether no part of an expression leaves 32 bits, for indices, tiles and integers of usual sizes."""
    return all(magnitude(e) < LIMIT for e in sympy.preorder_traversal(expr) if kind(e) == "int")


def magnitude(expr: Expr) -> int:
    """The largest absolute value of an integer; LIMIT and more where nothing is known."""
    if expr.is_Integer:
        return abs(int(expr))
    if isinstance(expr, sympy.Symbol):
        return TILE if _TILE.fullmatch(expr.name) else VALUE if _VALUE.fullmatch(expr.name) else POSITION
    if isinstance(expr, read):
        return VALUE
    parts = [magnitude(a) for a in expr.args if kind(a) == "int"]
    match expr:
        case sympy.Add():
            return sum(parts)
        case sympy.Mul():
            return int(sympy.prod(parts))
        case floormod() if expr.args[1].is_Integer:
            return parts[1]
        case floordiv() if expr.args[1].is_Integer and parts[1]:
            return parts[0] // parts[1] + 1
        case floordiv() | floormod() | minimum() | maximum() | where() | sympy.Abs():
            return max(parts)
        case bitand() | bitor() | bitxor():
            return (1 << max(parts).bit_length()) - 1
        case shr():
            return parts[0]
        case cast():
            return 0  # computed in the width it names
    return LIMIT


def widened(expr: Expr) -> Expr:
    """expr with 64-bit coordinates of tiles inside divisions, bit operations and reads that may need them."""
    if isinstance(expr, _WIDE) and not fits(expr):
        tiles = [s for s in expr.free_symbols if _TILE.fullmatch(str(s))]
        return expr.xreplace({s: cast(sympy.Symbol("i64"), s) for s in tiles})
    if not expr.args:
        return expr
    return expr.func(*map(widened, expr.args))

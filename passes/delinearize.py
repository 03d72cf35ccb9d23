"""delinearize: find the widths by which a mask takes linear indices apart, as q // W and q % W.

An index space with widths (W1, W2) numbers its points q = (q0 * W1 + q1) * W2 + q2. A mask speaks of
its coordinates when both q and k are divided, or reduced, by the same numbers; in them a neighbourhood
of an image is a box.

    >>> from ..ir.mask import Mask
    >>> widths(Mask.parse("mask() { abs(q // 64 - k // 64) <= 6 and abs(q % 64 - k % 64) <= 6 }"))
    (64,)
    >>> widths(Mask.parse("mask() { q // 32 == k // 32 and q // 8 % 4 == k // 8 % 4 and q % 8 <= k % 8 }"))
    (4, 8)

Leaves alone: masks on plain indices, such as (q - k) % 64; the answer is ().
"""

from __future__ import annotations

import itertools
import operator

import sympy

from ..ir.expr import Expr, all_of, floordiv, floormod, integer
from ..ir.mask import Mask


def widths(mask: Mask) -> tuple[int, ...]:
    """Extents of the inner dimensions of the mask's index space, outermost first; () when it is plain."""
    both = _strides(mask.predicate, "q") & _strides(mask.predicate, "k")
    strides = [1, *sorted(both)]
    pairs = list(itertools.pairwise(strides))
    if any(large % small for small, large in pairs):
        return ()
    return tuple(large // small for small, large in reversed(pairs))


def coarser(widths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """These widths with dimensions joined, in every way that leaves two or more, few dimensions first.

    >>> coarser((4, 8))
    [(8,), (32,), (4, 8)]
    """
    strides = list(itertools.accumulate(reversed(widths), operator.mul))
    found = []
    for rank in range(1, len(strides) + 1):
        for chosen in itertools.combinations(strides, rank):
            steps = itertools.pairwise((1, *chosen))
            found.append(tuple(large // small for small, large in steps)[::-1])
    return found


def factors(predicate: Expr, widths: tuple[int, ...]) -> list[Expr] | None:
    """One predicate a dimension, over q0 and k0, q1 and k1, ..., whose conjunction is the given one.

    None when some conjunct speaks of several dimensions, or not of coordinates.

    >>> from ..ir.expr import to_text
    >>> m = Mask.parse("mask() { q // 8 == k // 8 and abs(q % 8 - k % 8) <= 2 }")
    >>> [to_text(f) for f in factors(m.predicate, (8,))]
    ['q0 == k0', 'abs(k1 - q1) <= 2']
    """
    names = {c: f"{x}{d}" for x in "qk" for d, forms in enumerate(coordinates(x, widths)) for c in forms}
    inner = predicate.xreplace({c: integer(name) for c, name in names.items()})
    found: list[list[Expr]] = [[] for _ in range(len(widths) + 1)]
    for part in sympy.And.make_args(inner):
        used = {s.name for s in part.free_symbols}
        dims = {int(name[1:]) for name in used & set(names.values())}
        if used & {"q", "k"} or len(dims) > 1:
            return None
        found[dims.pop() if dims else 0].append(part)
    return [all_of(parts) for parts in found]


def coordinates(index: str, widths: tuple[int, ...]) -> list[list[Expr]]:
    """The ways in which each coordinate of an index is written, the plain one first."""
    strides = [1, *itertools.accumulate(reversed(widths), operator.mul)][::-1]
    i, found = integer(index), []
    for d, stride in enumerate(map(sympy.Integer, strides)):
        if d == 0:
            found.append([floordiv(i, stride)])
            continue
        extent, above = sympy.Integer(widths[d - 1]), sympy.Integer(strides[d - 1])
        found.append([floormod(floordiv(i, stride), extent), floordiv(floormod(i, above), stride)])
    return found


def _strides(expr: Expr, index: str) -> set[int]:
    """The numbers above 1 by which an index is divided or reduced, chains multiplied out."""
    found: dict[Expr, tuple[int, set[int]]] = {}
    for node in expr.atoms(floordiv, floormod):
        _chain(node, index, found)
    return set().union(*(strides for _, strides in found.values()))


def _chain(node: Expr, index: str, found: dict[Expr, tuple[int, set[int]]]) -> int | None:
    """How much of the index one unit of `node` is, when node is made of // and % of it alone."""
    if node == integer(index):
        return 1
    if not isinstance(node, floordiv | floormod):
        return None
    unit, divisor = _chain(node.args[0], index, found), node.args[1]
    if unit is None or not isinstance(divisor, sympy.Integer) or divisor <= 1:
        return None
    stride = unit * int(divisor)
    own = stride if isinstance(node, floordiv) else unit
    found[node] = own, {stride}
    return own

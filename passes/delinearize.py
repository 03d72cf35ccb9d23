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

from ..ir.expr import Expr, floordiv, floormod, integer
from ..ir.mask import Mask


def widths(mask: Mask) -> tuple[int, ...]:
    """Extents of the inner dimensions of the mask's index space, outermost first; () when it is plain."""
    both = _strides(mask.predicate, "q") & _strides(mask.predicate, "k")
    strides = [1, *sorted(both)]
    pairs = list(itertools.pairwise(strides))
    if any(large % small for small, large in pairs):
        return ()
    return tuple(large // small for small, large in reversed(pairs))


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
    unit = _chain(node.args[0], index, found)
    if unit is None or not (node.args[1].is_Integer and node.args[1] > 1):
        return None
    stride = unit * int(node.args[1])
    own = stride if isinstance(node, floordiv) else unit
    found[node] = own, {stride}
    return own

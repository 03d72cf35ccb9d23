"""What terms of several experts have in common."""

from __future__ import annotations

from collections.abc import Sequence

from ..term import Term

EXPERT = "e"  # the number of an expert


def generalised(terms: Sequence[tuple[int, Term]]) -> Term | None:
    """One term for several, each with a number, in which that number is "e"; None where they differ more.

    >>> generalised([(0, ("read", "%w", "t", 0)), (1, ("read", "%w", "t", 1))])
    ('read', '%w', 't', 'e')
    """
    first = terms[0][1]
    if all(t == first and type(t) is type(first) for _, t in terms) and len(terms) > 1:
        return first
    if all(type(t) is int and t == e for e, t in terms):
        return first if len(terms) == 1 else EXPERT
    if len(terms) == 1:
        return first
    if not all(isinstance(t, tuple) and isinstance(first, tuple) and len(t) == len(first) for _, t in terms):
        return None
    parts = [generalised([(e, t[i]) for e, t in terms]) for i in range(len(first))]
    return None if None in parts else tuple(parts)

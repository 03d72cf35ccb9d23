"""What masks ask of their terms: to join two, to hold large integers, and which tensors are segment ids."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

from ..ir.errors import InputError
from .pure import pure
from .term import Term, both, children, either, rename, rewrite, shifted

Number = TypeVar("Number", bound=int | float)
LARGE = 2**30  # kernels add runtime integers to 32-bit coordinates
LARGEST = 2**61  # and sums of a few numbers must fit 64 bits


def bake_large(term: Term, values: tuple[Number, ...], letter: str) -> tuple[Term, tuple[Number, ...]]:
    """The term with integers that 32 bits may not hold as numbers, and the values that are left.

    letter: what its integers are called, p0, p1, ... or s0, s1, ... Raises InputError for an integer that
    64 bits may not hold.

    >>> bake_large(("le", ("sub", "q", "p0"), "p1"), (2**40, 7), "p")
    (('le', ('sub', 'q', 1099511627776), 'p0'), (7,))
    """
    names: dict[str, Term] = {}
    kept: list[Number] = []
    for i, value in enumerate(values):
        if isinstance(value, int) and abs(value) > LARGEST:
            raise InputError("mask or score_mod: a captured integer", "at most 2**61 either way", value)
        if isinstance(value, int) and abs(value) >= LARGE:
            names[f"{letter}{i}"] = value
        else:
            names[f"{letter}{i}"] = f"{letter}{len(kept)}"
            kept.append(value)
    return (rename(term, names), tuple(kept)) if len(kept) < len(values) else (term, values)


@pure
def joined(
    how: str, left: Term, right: Term, counts: tuple[int, int], same: tuple[int, ...]
) -> tuple[Term, tuple[int, ...], tuple[int, ...]]:
    """The joined term, and which of both sides' integers and tensors it reads, by first appearance.

    how: "and" or "or". counts: integers and tensors of the left side. same: for each tensor of both
    sides, the first that is the same object; one tensor gets one name.
    """
    return _joined(how, left, right, counts, same)


@lru_cache(maxsize=1024)
def _joined(
    how: str, left: Term, right: Term, counts: tuple[int, int], same: tuple[int, ...]
) -> tuple[Term, tuple[int, ...], tuple[int, ...]]:
    term = (both if how == "and" else either)(left, shifted(right, {"p": counts[0], "c": counts[1]}))
    params: list[int] = []
    captures: list[int] = []

    def leaf(name: str) -> str:
        if not name[1:].isdecimal():
            return name
        i, kept = int(name[1:]), params if name[0] == "p" else captures
        i = i if kept is params else same[i]
        if i not in kept:
            kept.append(i)
        return f"{name[0]}{kept.index(i)}"

    return rewrite(term, leaf), tuple(params), tuple(captures)


def segments(term: Term) -> tuple[int, ...]:
    """The numbers of the tensors that are read only in tests like c0[q] == c0[k]."""
    compared, read = set(), set()

    def visit(node: Term) -> None:
        if isinstance(node, tuple) and node[0] in ("eq", "ne") and _is_segment_test(node):
            compared.add(node[1][1])
            return
        if isinstance(node, tuple) and node[0] in ("read", "readf"):
            read.add(node[1])
        for child in children(node):
            visit(child)

    visit(term)
    return tuple(sorted(int(name[1:]) for name in compared - read))


def _is_segment_test(node: Term) -> bool:
    """Whether an equality compares one tensor at q with itself at k, other indices alike."""
    a, b = node[1], node[2]
    if not (isinstance(a, tuple) and isinstance(b, tuple) and a[0] == b[0] == "read" and a[1] == b[1]):
        return False
    return {a[-1], b[-1]} == {"q", "k"} and a[2:-1] == b[2:-1] and a[2:-1] in ((), ("b",), ("h",), ("b", "h"))

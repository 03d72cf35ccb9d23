"""Equations of `torch.einsum` as operands' letters: what dots and lists of numbers stand for, spelled out."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import fx

from .ops import operation, value_of


def spell_out(graph: fx.Graph) -> None:
    """Give every einsum of a graph an equation of letters alone, which computes the same.

    `einsum("...id,...jd", q, k)` of four dimensions becomes `einsum("abid,abjd->abij", q, k)`."""
    for node in graph.nodes:
        did = operation(node)
        if did is None or did.name != "einsum" or node.kwargs:
            continue
        equation, operands = _parsed(node.args)
        if not all(isinstance(x, fx.Node) and isinstance(value_of(x), torch.Tensor) for x in operands):
            continue
        found = explicit(equation, [value_of(x).dim() for x in operands])
        if found is not None:
            node.args = (found, *operands)


def _parsed(args: tuple[Any, ...]) -> tuple[str, list[Any]]:
    """(equation, operands) of a call, whose operands may be a list, or alternate with lists of numbers."""
    if not isinstance(args[0], str):
        terms = [_letters(numbers) for numbers in args[1::2]]
        out = "->" + _letters(args[-1]) if len(args) % 2 else ""
        return ",".join(terms[: len(args) // 2]) + out, list(args[: len(args) // 2 * 2 : 2])
    operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    return args[0].replace(" ", ""), list(operands)


def _letters(numbers: Any) -> str:
    return "".join("..." if n is Ellipsis else string.ascii_letters[n] for n in numbers)


def explicit(equation: str, ranks: list[int]) -> str | None:
    """The equation without dots and with its result, for operands of these ranks; None if it is wrong.

    >>> explicit("...id,jd", [4, 2])
    'abid,jd->abij'
    """
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    own = [len(term.replace("...", "")) for term in terms]
    dots = max((r - n for term, r, n in zip(terms, ranks, own, strict=False) if "..." in term), default=0)
    free = [letter for letter in string.ascii_letters if letter not in equation]
    if len(terms) != len(ranks) or dots < 0 or dots > len(free):
        return None
    hidden = "".join(free[:dots])
    if not arrow:
        letters = sorted(letter for letter in set(inputs) - set(".,") if inputs.count(letter) == 1)
        out = ("..." if "..." in inputs else "") + "".join(letters)
    spelled = [
        term.replace("...", hidden[dots - (rank - n) :])
        for term, rank, n in zip(terms, ranks, own, strict=True)
    ]
    return ",".join(spelled) + "->" + out.replace("...", hidden)

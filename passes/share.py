"""share: what several values of one tile have in common, computed once.

    exp(a) * x,  exp(a) * y / log(exp(a) + 1)   ->   shared0 = exp(a)
                                                     shared0 * x,  shared0 * y / log(shared0 + 1)

Costly floats only: functions, powers and reads. Both sides of `where` are evaluated and reads are inside
their tensors, so that a value may be computed outside of the condition it stood under.

Leaves alone: reciprocals, because a product with one rounds twice where a division rounds once (their
denominators are shared), and what is computed in a wider dtype than the tile's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import sympy

from ..ir.expr import FUNCTIONS, Expr, cast, kind, maximum, minimum, real, stop_gradient, where

_CHEAP = (where, cast, minimum, maximum, stop_gradient, sympy.Abs, sympy.floor)
_COSTLY = tuple(f for f in FUNCTIONS.values() if isinstance(f, type) and f not in _CHEAP)


def share(values: Sequence[Expr], floats: str) -> tuple[list[tuple[str, Expr]], list[Expr]]:
    """(definitions in order, the values over them).

    floats: the dtype of the tiles that hold what is shared.

    >>> from ..ir.expr import parse, to_text
    >>> names = {n: real(n) for n in "axy"}
    >>> made, rest = share([parse(t, names) for t in ("exp(a) * x", "y / log(exp(a) + 1)")], "f32")
    >>> [(name, to_text(e)) for name, e in made], [to_text(e) for e in rest]
    ([('shared0', 'exp(a)')], ['shared0 * x', 'y / log(shared0 + 1)'])
    """
    uses = _uses(values)
    made: list[tuple[str, Expr]] = []
    known: dict[Expr, Expr] = {}

    def build(e: Expr) -> Expr:
        if not e.args:
            return e
        if e not in known:
            args = [build(a) for a in e.args]
            known[e] = e if all(a is b for a, b in zip(args, e.args, strict=True)) else e.func(*args)
            if uses[e] > 1 and _is_worth_it(e, floats):
                made.append((f"shared{len(made)}", known[e]))
                known[e] = real(made[-1][0])
        return known[e]

    return made, [build(value) for value in values]


def _uses(values: Sequence[Expr]) -> Counter[Expr]:
    """How many different places each part stands in; a place inside a repeated part counts once."""
    uses: Counter[Expr] = Counter(values)
    seen: set[Expr] = set()

    def visit(e: Expr) -> None:
        if e not in seen:
            seen.add(e)
            for a in e.args:
                uses[a] += 1
                visit(a)

    for value in values:
        visit(value)
    for e in seen:
        if _divides(e):
            uses[e.args[0]] += uses[e] - 1
    return uses


def _divides(e: Expr) -> bool:
    return isinstance(e, sympy.Pow) and bool(e.args[1].is_negative)


def _is_worth_it(e: Expr, floats: str) -> bool:
    if e.is_number or kind(e) != "float" or _divides(e):
        return False
    if floats != "f64" and any(str(c.args[0]) == "f64" for c in e.atoms(cast)):
        return False
    return isinstance(e, sympy.Pow) or e.has(*_COSTLY)

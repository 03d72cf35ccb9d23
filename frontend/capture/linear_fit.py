"""Linear attention in a program of any library, however its sums are ordered:

    out_i = sum over j, d of phi(q)[i, d] psi(k)[j, d] v[j], over the same sum without v plus eps, or over 1

Products, sums and running sums are taken apart until three tensors are left (`Sums` of `sums.py`
does so for counts); which of a program's products are parts of it, and which make q, k or v, shows when the
pieces fit. So `phi(q) (phi(k)^T v)`, `(phi(q) phi(k)^T * tril) v` and running sums of `phi(k) v^T` are one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..term import FALSE, TRUE, Term, rename
from .factors import Factor, Part, Splitter
from .terms import kind_of, linear, number, replaced, tidy

X = "x0"


@dataclass(frozen=True)
class Fit:
    """A part as linear attention. factors: of q, k and v. roles: of its indices, those of the batch left out.
    bound: what it sums over, and sizes. eps: None without a denominator. scale: of the output. inside: what
    its sums are."""

    factors: tuple[Factor, Factor, Factor]
    roles: dict[str, str]
    bound: tuple[tuple[str, Any], ...]
    causal: bool
    eps: float | None
    scale: float
    inside: tuple[Any, ...]


class Fitter(Splitter):
    """Fits parts to linear attention. why: why they do not."""

    why = ""
    total: Part

    def is_worth_it(self, part: Part, q: Factor, k: Factor, v: Factor) -> bool:
        """Whether a product of three tensors, without conditions or a denominator, is linear attention."""
        raise NotImplementedError

    def fits(self, part: Part, names: list[Any]) -> Iterator[Fit]:
        """The attentions whose numerator, or result, a part is. names: the indices of the result."""
        bound = {name for name, _ in part.bound}
        for q, k, v in itertools.permutations(part.factors):
            feature, key = (bound & a.names & b.names for a, b in ((q, k), (k, v)))
            columns = [n for n in names if n in v.names and n not in q.names | k.names]
            rows = [n for n in names if n in q.names and n not in k.names | v.names]
            if len(feature) == len(key) == 1 and feature != key and len(columns) == 1 and rows:
                if (feature & v.names) or (key & q.names):
                    continue
                (d,), (j,), (m,) = feature, key, columns
                causal = _causal(part.kept, j, rows)
                if causal is None:
                    self.why = "its mask is another than the causal one"
                    continue
                eps = self._denominator(part, q, k, d, j)
                if eps is False:
                    self.why = "its denominator is another sum than that of its scores and eps"
                    continue
                if not (part.over or part.kept or self.is_worth_it(part, q, k, v)):
                    continue
                roles = {causal or rows[-1]: "q", j: "k", d: "d", m: "e"}
                scale, inside = part.scale, part.inside
                if eps is not None:
                    scale, inside = part.scale / self.total.scale, inside + self.total.inside
                yield Fit((q, k, v), roles, part.bound, bool(causal), eps, scale, inside)

    def _denominator(self, part: Part, q: Factor, k: Factor, d: str, j: str) -> Any:
        """eps of a part's denominator, None where it has none, False where that is another sum."""
        if not part.over:
            return None
        (over,) = part.over
        eps, total = 0.0, over
        if isinstance(over, tuple) and over[0] == "add":
            values = [number(p) for p in over[1:]]
            constant = next((n for n, value in enumerate(values) if value is not None), None)
            if constant is None:
                return False
            eps, total = float(values[constant] or 0), over[2 - constant]
        for way in self.parts(total):
            if len(way.factors) != 2 or len(way.bound) != 2 or way.over or not way.scale > 0:
                continue
            for names in itertools.permutations([name for name, _ in way.bound]):
                back = dict(zip(names, (d, j), strict=True))
                terms = [tidy(rename(f.term, back)) for f in way.factors]
                kept = {tidy(rename(c, back)) for c in way.kept}
                if sorted(map(repr, terms)) != sorted(repr(f.term) for f in (q, k)):
                    continue
                if _normal(kept) == _normal(part.kept) and eps >= 0:
                    self.total = way
                    return eps / way.scale
        return False


def is_known(term: Term) -> bool:
    """Whether kernels can compute a term of an element."""
    from ...ir.errors import GossamerError
    from ..term_expr import to_expr

    try:
        to_expr(term, frozenset((X,)))
    except (GossamerError, KeyError, TypeError, ValueError):
        return False
    return kind_of(replaced(term, X, "score")) == "float"


def _normal(kept: Any) -> set[Any]:
    """Conditions as differences that are at most 0."""
    found = set()
    for condition in kept:
        if condition == TRUE:
            continue
        if not isinstance(condition, tuple) or condition[0] not in ("le", "lt", "ge", "gt"):
            return {FALSE}
        op, a, b = condition
        below = linear(("sub", a, b) if op[0] == "l" else ("sub", b, a))
        if op[1] == "t":
            below[1] = below.get(1, 0) + 1
        found.add(frozenset((t, c) for t, c in below.items() if c))
    return found


def _causal(kept: tuple[Term, ...], j: str, rows: list[Any]) -> Any:
    """The index of rows i where conditions say j <= i, "" where there are none, None for others."""
    if not kept:
        return ""
    found = _normal(kept)
    return next((i for i in rows if found == {frozenset({(j, 1), (i, -1)})}), None)

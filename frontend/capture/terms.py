"""Terms in a normal form: what different spellings of an index, a condition or a score have in common.

Sums of integers become one linear combination, comparisons of integers whose difference is a number are
decided, and an operation on a choice between numbers becomes a choice between its results. So
`(1 - mask.float()) * -1e9`, `torch.where(mask, 0.0, -1e9)` and `zeros.masked_fill(~mask, -1e9)` are one term.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ..term import COMPARISONS, FALSE, NEGATED, TRUE, Term, both, children, constant, either, float_of, negate

_COMPARE = {name: getattr(operator, name) for name in COMPARISONS}
_COMPUTE: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "neg", "abs")},
    "div": operator.truediv,
    "min": min,
    "max": max,
}
_FLOATING = frozenset(
    (
        "div",
        "exp",
        "exp2",
        "log",
        "log2",
        "sqrt",
        "tanh",
        "sin",
        "cos",
        "tan",
        "sigmoid",
        "erf",
        "floor",
        "pow",
    )
) | {"trunc", "readf"}
_BOOLEAN = frozenset((*COMPARISONS, "and", "or", "not"))
Linear = dict[Term, int]


def kind_of(term: Term) -> str:
    """'bool', 'int' or 'float'; every name but score and prob is an integer."""
    if isinstance(term, int):
        return "int"
    if isinstance(term, str):
        return "bool" if term in (TRUE, FALSE) else "float" if term in ("score", "prob") else "int"
    op = term[0]
    if op == "f" or op in _FLOATING:
        return "float"
    if op in _BOOLEAN:
        return "bool"
    if op == "cast":
        return "float" if term[1][0] == "f" or term[1] == "bf16" else "int"
    parts = term[2:] if op == "where" else () if op == "read" else children(term)
    return "float" if any(kind_of(p) == "float" for p in parts) else "int"


def number(term: Term) -> bool | int | float | None:
    """The value of a constant term; None of any other."""
    if isinstance(term, int):
        return term
    if term in (TRUE, FALSE):
        return term == TRUE
    return float_of(term) if isinstance(term, tuple) and term[0] == "f" else None


def tidy(term: Term) -> Term:
    """The normal form of a term.

    >>> tidy(("le", ("sub", ("add", "q", 3), "q"), 2))
    'false'
    >>> tidy(("mul", ("sub", 1, ("where", "c", 1, 0)), constant(2.0)))
    ('where', 'c', ('f', '0x0.0p+0'), ('f', '0x1.0000000000000p+1'))
    """
    if not isinstance(term, tuple) or term[0] == "f":
        return term
    kept = len(term) - len(children(term))
    return _tidy((*term[:kept], *map(tidy, term[kept:])))


def _tidy(term: Term) -> Term:
    """As `tidy`, of a term whose parts are tidy."""
    op, *parts = term
    if op in ("and", "or"):
        return (both if op == "and" else either)(*parts)
    if op == "not":
        return _not(parts[0])
    if op == "where":
        return _where(*parts)
    if op == "cast":
        return _cast(*parts)
    if op in _COMPARE:
        return _compare(op, *parts)
    if op in _COMPUTE:
        return _compute(op, *parts)
    return term


def _not(a: Term) -> Term:
    if isinstance(a, tuple) and a[0] in NEGATED and all(kind_of(p) == "int" for p in a[1:]):
        return (NEGATED[a[0]], *a[1:])
    return negate(a)


def _where(c: Term, a: Term, b: Term) -> Term:
    if c in (TRUE, FALSE):
        return a if c == TRUE else b
    if isinstance(c, tuple) and c[0] == "not":
        return _where(c[1], b, a)
    return a if a == b else ("where", c, a, b)


def _cast(dtype: str, x: Term) -> Term:
    floats = dtype[0] == "f" or dtype == "bf16"
    if floats and kind_of(x) == "float":
        return x  # kernels compute in float32 or wider, and round at the end
    value = number(x)
    if floats and value is not None:
        return constant(float(value))
    choice = _choice(x)
    if choice is not None:
        return _where(choice[0], *(_cast(dtype, side) for side in choice[1:]))
    return x if not floats and isinstance(x, int) else ("cast", dtype, x)


def _choice(term: Term) -> tuple[Term, Term, Term] | None:
    """(condition, a, b) of a choice between numbers."""
    if isinstance(term, tuple) and term[0] == "where" and None not in (number(term[2]), number(term[3])):
        return term[1:]
    return None


def _compare(op: str, a: Term, b: Term) -> Term:
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return TRUE if _COMPARE[op](x, y) else FALSE
    for i, (this, other) in enumerate(((a, b), (b, a))):
        choice = _choice(this)
        if choice is not None and number(other) is not None:
            condition, *sides = choice
            yes, no = (_compare(op, *((s, other) if i == 0 else (other, s))) for s in sides)
            return either(both(condition, yes), both(_not(condition), no))
    pair = _pair(op, a, b)
    if pair is not None:
        return pair
    if "float" in (kind_of(a), kind_of(b)):
        return (op, a, b)
    difference = linear(("sub", a, b))
    if difference.keys() <= {1}:
        return TRUE if _COMPARE[op](difference.get(1, 0), 0) else FALSE
    return (op, a, b)


def _compute(op: str, *parts: Term) -> Term:
    term = (op, *parts)
    values = [number(p) for p in parts]
    floats = kind_of(term) == "float"
    if all(v is not None for v in values):
        try:
            result = _COMPUTE[op](*values)
        except (ArithmeticError, ValueError):
            return term
        return constant(float(result) if floats else int(result))
    for i, part in enumerate(parts):
        choice = _choice(part)
        if choice is not None and all(v is not None for j, v in enumerate(values) if j != i):
            sides = (_compute(op, *(*parts[:i], side, *parts[i + 1 :])) for side in choice[1:])
            return _where(choice[0], *sides)
    pair = _pair(op, *parts)
    if pair is not None:
        return pair
    if not floats:
        return from_linear(_rejoined(linear(term))) if op in ("add", "sub", "neg", "mul") else term
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1}.get(op)
    if neutral is not None and values[1] == neutral and kind_of(parts[0]) == "float":
        return parts[0]
    if op in ("add", "mul") and values[0] == neutral and kind_of(parts[1]) == "float":
        return parts[1]
    return term


def _pair(op: str, *parts: Term) -> Term | None:
    """An operation on two choices, if its results are two at most."""
    choices = [choice for p in parts if (choice := _choice(p)) is not None]
    if len(choices) != 2 or len(parts) != 2:
        return None
    (c, *left), (d, *right) = choices
    found: dict[Term, Term] = {}
    for first, x in ((c, left[0]), (_not(c), left[1])):
        for second, y in ((d, right[0]), (_not(d), right[1])):
            result = _tidy((op, x, y))
            if number(result) is None:
                return None
            found[result] = either(found.get(result, FALSE), both(first, second))
    if len(found) > 2:
        return None
    (chosen, condition), *rest = found.items()
    if chosen in (TRUE, FALSE):
        return found.get(TRUE, FALSE) if rest else chosen
    return _where(condition, chosen, rest[0][0]) if rest else chosen


def _rejoined(parts: Linear) -> Linear:
    """n * (x // n) + x % n is x."""
    for term, coefficient in list(parts.items()):
        if not (isinstance(term, tuple) and term[0] == "mod" and isinstance(term[2], int)):
            continue
        quotient = ("floordiv", *term[1:])
        if parts.get(quotient) == coefficient * term[2]:
            rest = {t: c for t, c in parts.items() if t not in (term, quotient)}
            return _rejoined(combined(rest, linear(term[1]), coefficient))
    return parts


def linear(term: Term) -> Linear:
    """An integer term as a combination of others: coefficients by term, the constant under 1."""
    if isinstance(term, int):
        return {1: term} if term else {}
    if isinstance(term, tuple) and term[0] in ("add", "sub"):
        sign = 1 if term[0] == "add" else -1
        return combined(linear(term[1]), linear(term[2]), sign)
    if isinstance(term, tuple) and term[0] == "neg":
        return combined({}, linear(term[1]), -1)
    if isinstance(term, tuple) and term[0] == "mul":
        for factor, other in (term[1:], term[:0:-1]):
            if isinstance(factor, int):
                return combined({}, linear(other), factor)
    return {term: 1}


def combined(a: Linear, b: Linear, factor: int = 1) -> Linear:
    """a + factor * b."""
    out = dict(a)
    for term, coefficient in b.items():
        out[term] = out.get(term, 0) + factor * coefficient
    return {term: c for term, c in out.items() if c}


def from_linear(parts: Linear) -> Term:
    """A combination as a term: positive parts first, in the order in which they appeared, a number last."""
    terms = [(t, c) for t, c in parts.items() if t != 1]
    terms.sort(key=lambda part: part[1] < 0)
    out: Term = None
    for term, coefficient in terms:
        size = abs(coefficient)
        scaled = term if size == 1 else ("mul", size, term)
        if out is None:
            out = scaled if coefficient > 0 else ("neg", scaled)
        else:
            out = ("add" if coefficient > 0 else "sub", out, scaled)
    rest = parts.get(1, 0)
    if out is None:
        return rest
    return out if rest == 0 else ("add", out, rest) if rest > 0 else ("sub", out, -rest)


def divided(term: Term, divisor: int, sizes: Mapping[str, Any]) -> tuple[Term, Term]:
    """(term // divisor, term % divisor) for names from 0 to their sizes, exclusive; unknown sizes are None.

    >>> divided(("add", ("mul", 8, "i0"), "i1"), 8, {"i0": None, "i1": 8})
    ('i0', 'i1')
    """
    if divisor == 1:
        return term, 0
    whole: Linear = {}
    rest: Linear = {}
    for t, c in linear(term).items():
        if t == 1:
            whole[t], rest[t] = divmod(c, divisor)
        else:
            (whole if c % divisor == 0 else rest)[t] = c // divisor if c % divisor == 0 else c
    low = high = 0
    for t, c in rest.items():
        size = 2 if t == 1 else extent(t, sizes)
        if size is None:
            low = -1
            break
        first, last = (c, c) if t == 1 else sorted((0, c * (size - 1)))
        low, high = low + first, high + last
    inner = from_linear(rest)
    if low >= 0 and high < divisor:
        return from_linear(whole), inner
    quotient, remainder = ("floordiv", inner, divisor), ("mod", inner, divisor)
    return from_linear(combined({quotient: 1}, whole)), remainder


def extent(term: Term, sizes: Mapping[str, Any]) -> int | None:
    """A bound that a term from 0 on stays below; None where none is known."""
    if isinstance(term, str):
        size = sizes.get(term)
        return size if isinstance(size, int) else None
    if isinstance(term, tuple) and term[0] == "mod" and isinstance(term[2], int):
        return term[2]
    if isinstance(term, tuple) and term[0] == "floordiv" and isinstance(term[2], int):
        size = extent(term[1], sizes)
        return None if size is None else -(-size // term[2])
    return None


def bounds(term: Term, sizes: Mapping[str, Any]) -> tuple[float, float]:
    """The least and the largest value that an integer or a condition may have; names are as in `divided`.

    >>> bounds(("sub", "i0", ("mul", 2, "i1")), {"i0": 8, "i1": None})
    (-inf, 7)
    """
    if isinstance(term, int):
        return term, term
    if kind_of(term) == "bool":
        return 0, 1
    if isinstance(term, str):
        size = extent(term, sizes)
        return 0, math.inf if size is None else size - 1
    op, *parts = term
    if op == "where":
        (a, b), (c, d) = (bounds(p, sizes) for p in parts[1:])
        return min(a, c), max(b, d)
    if op == "cast" and kind_of(parts[1]) != "float":
        return bounds(parts[1], sizes)
    if op == "mod" and isinstance(parts[1], int) and parts[1] > 0:
        return 0, parts[1] - 1
    if op not in ("add", "sub", "neg", "mul", "abs", "min", "max"):
        return -math.inf, math.inf
    ranges = [bounds(p, sizes) for p in parts]
    ends = [_COMPUTE[op](*values) for values in itertools.product(*ranges)]
    ends = [0 if math.isnan(end) else end for end in ends]  # 0 * inf
    low = 0 if op == "abs" and ranges[0][0] <= 0 <= ranges[0][1] else min(ends)
    return low, max(ends)


def names_in(term: Term) -> set[str]:
    """The names of a term, those of tensors left out."""
    if isinstance(term, str):
        return set() if term in (TRUE, FALSE) else {term}
    return set().union(*map(names_in, children(term)))


def reads_in(term: Term) -> list[Term]:
    """The reads of tensors in a term, each once, outermost first."""
    found: dict[Term, None] = {}

    def visit(t: Term) -> None:
        if isinstance(t, tuple) and t[0] in ("read", "readf"):
            found[t] = None
        for child in children(t):
            visit(child)

    visit(term)
    return list(found)


def replaced(term: Term, old: Term, new: Term) -> Term:
    """The term with every occurrence of one subterm replaced."""
    if term == old and type(term) is type(old):
        return new
    if not isinstance(term, tuple) or term[0] == "f":
        return term
    kept = len(term) - len(children(term))
    return (*term[:kept], *(replaced(t, old, new) for t in term[kept:]))


def size_of(term: Term) -> int:
    """How many operations a term has, written out."""
    return 1 + sum(map(size_of, children(term)))


def is_minus_infinity(term: Term) -> bool:
    value = number(term)
    return isinstance(value, float) and math.isinf(value) and value < 0

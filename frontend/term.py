"""Terms: expressions as nested tuples, which is how the frontend keeps masks and score maps.

    term := int | name | ("f", hex) | (operation, term, ...) | ("read" | "readf", capture, term, ...)

Names are those of ir/expr.py (`b h q k q_len kv_len score p0 s0`) and "true", "false"; a capture is
"c0" or "t0". A term is hashable, equal exactly when its expression is written alike (floats are
spelled in hexadecimal because 1 == 1.0 == True in Python), made of primitives only and so the same
in every process, and it is built without sympy: it is the structural key of a kernel.
`frontend/term_expr.py` crosses over to the expressions of the IR.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

Term = Any  # int | str | tuple

TRUE, FALSE = "true", "false"
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
NEGATED = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
_INFIX = {
    **COMPARISONS,
    **{"add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "pow": "**"},
    **{"and": "and", "or": "or", "bitand": "&", "bitor": "|", "bitxor": "^", "shl": "<<", "shr": ">>"},
}


def constant(value: bool | int | float) -> Term:
    """The term of a Python number.

    >>> constant(1), constant(1.0), constant(True)
    (1, ('f', '0x1.0000000000000p+0'), 'true')
    """
    if isinstance(value, bool):
        return TRUE if value else FALSE
    return ("f", float(value).hex()) if isinstance(value, float) else int(value)


def float_of(term: Term) -> float:
    """The value of a float constant."""
    return float.fromhex(term[1])


def is_constant(term: Term) -> bool:
    return isinstance(term, int) or term in (TRUE, FALSE) or (isinstance(term, tuple) and term[0] == "f")


def both(a: Term, b: Term) -> Term:
    """a and b, with true and false folded away."""
    if FALSE in (a, b):
        return FALSE
    return b if a == TRUE else a if b == TRUE or a == b else ("and", a, b)


def either(a: Term, b: Term) -> Term:
    """a or b, with true and false folded away."""
    if TRUE in (a, b):
        return TRUE
    return b if a == FALSE else a if b == FALSE or a == b else ("or", a, b)


def negate(a: Term) -> Term:
    """not a, with constants and double negation folded away."""
    if a in (TRUE, FALSE):
        return FALSE if a == TRUE else TRUE
    return a[1] if isinstance(a, tuple) and a[0] == "not" else ("not", a)


def children(term: Term) -> tuple[Term, ...]:
    """The operands of a term; the tensor of a read and the dtype of a cast are none."""
    if not isinstance(term, tuple) or term[0] == "f":
        return ()
    return term[2:] if term[0] in ("read", "readf", "cast") else term[1:]


def rewrite(term: Term, leaf: Callable[[Term], Term]) -> Term:
    """The term with every name and captured tensor replaced by what `leaf` gives for it."""
    if isinstance(term, str):
        return leaf(term)
    if not isinstance(term, tuple) or term[0] == "f":
        return term
    kept = len(term) - len(children(term))
    head = (term[0], leaf(term[1])) if term[0] in ("read", "readf") else term[:kept]
    return (*head, *(rewrite(t, leaf) for t in term[kept:]))


def rename(term: Term, names: Mapping[str, Term]) -> Term:
    """The term with names replaced.

    >>> rename(("le", ("sub", "q", "k"), "p0"), {"p0": "p1"})
    ('le', ('sub', 'q', 'k'), 'p1')
    """
    return rewrite(term, lambda name: names.get(name, name))


@lru_cache(maxsize=1024)
def mentions(term: Term, name: str) -> bool:
    """Whether a term depends on a name.

    >>> mentions(("ge", ("read", "c0", "b"), "k"), "b"), mentions(("ge", "q", "k"), "b")
    (True, False)
    """
    return term == name or any(mentions(child, name) for child in children(term))


@lru_cache(maxsize=1024)
def reads_by_index(term: Term) -> bool:
    """Whether a tensor is read at an index that is no number, and so may be out of range."""
    by_index = (
        isinstance(term, tuple) and term[0] in ("read", "readf") and not all(map(is_constant, term[2:]))
    )
    return by_index or any(map(reads_by_index, children(term)))


def show(term: Term) -> str:
    """Short text for people, made without sympy.

    >>> show(("and", ("ge", "q", "k"), ("lt", ("sub", "q", "k"), "p0")))
    '(q >= k) and (q - k < p0)'
    """
    if not isinstance(term, tuple):
        return str(term)
    if term[0] == "f":
        return repr(float_of(term))
    if term[0] in ("read", "readf"):
        return f"{term[1]}[{', '.join(show(t) for t in term[2:])}]"
    if term[0] not in _INFIX:
        return f"{term[0]}({', '.join(str(t) if isinstance(t, str) else show(t) for t in term[1:])})"
    sides = [_bracketed(t, loose=term[0] in COMPARISONS) for t in term[1:]]
    return f" {_INFIX[term[0]]} ".join(sides)


def _bracketed(term: Term, *, loose: bool) -> str:
    inner = isinstance(term, tuple) and term[0] in _INFIX and not (loose and term[0] in ("add", "sub"))
    return f"({show(term)})" if inner else show(term)


_NUMBERED = re.compile(r"([a-z]+)(\d+)")


def shifted(term: Term, first: Mapping[str, int]) -> Term:
    """The term with names renumbered: {"p": 2} turns p0 into p2, p1 into p3."""

    def leaf(name: str) -> str:
        found = _NUMBERED.fullmatch(name)
        return f"{found[1]}{int(found[2]) + first[found[1]]}" if found and found[1] in first else name

    return rewrite(term, leaf)

"""Terms: expressions as nested tuples, which is how the frontend keeps masks and score maps.

    term := int | name | ("f", hex) | (operation, term, ...) | ("read" | "readf", capture, term, ...)

Names are those of ir/expr.py (`b h q k q_len kv_len score p0 s0`) and "true", "false"; a capture is
"c0" or "t0". A term is hashable, equal exactly when its expression is written alike (floats are
spelled in hexadecimal because 1 == 1.0 == True in Python), made of primitives only and so the same
in every process, and it is built without sympy: it is the structural key of a kernel.
`to_expr` and `from_expr` cross over to the expressions of the IR.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping
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


def walk(term: Term) -> Iterator[Term]:
    """Every node of a term, operands after their operation, left to right."""
    yield term
    for child in children(term):
        yield from walk(child)


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


# ---- terms and the expressions of the IR ----


def to_expr(term: Term, floats: frozenset[str] = frozenset()) -> Any:
    """The sympy expression of a term; the names in `floats` are floating-point symbols."""
    from ..ir import expr as E

    table = _operations()

    def build(t: Term) -> Any:
        if isinstance(t, int):
            return table["int"](t)
        if isinstance(t, str):
            return table[t] if t in (TRUE, FALSE) else E.real(t) if t in floats else E.integer(t)
        if t[0] == "f":
            return table["f"](float_of(t))
        if t[0] in ("read", "readf"):
            tensor = E.real(t[1]) if t[0] == "readf" else E.integer(t[1])
            return table[t[0]](tensor, *(build(c) for c in t[2:]))
        if t[0] == "cast":
            return E.cast(E.boolean(t[1]), build(t[2]))
        return table[t[0]](*(build(c) for c in t[1:]))

    return build(term)


_TABLE: dict[str, Any] = {}


def _operations() -> dict[str, Any]:
    if _TABLE:
        return _TABLE
    import sympy

    from ..ir import expr as E

    named = {name: E.FUNCTIONS[name] for name in E.FUNCTIONS if name != "cast"}
    _TABLE.update(
        {
            **named,
            "int": sympy.Integer,
            "f": lambda x: sympy.sympify(x) if math.isfinite(x) else sympy.oo * x if x == x else sympy.nan,
            TRUE: sympy.true,
            FALSE: sympy.false,
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul": lambda a, b: a * b,
            "div": lambda a, b: a / b,
            "neg": lambda a: -a,
            "floordiv": E.floordiv,
            "mod": E.floormod,
            "and": sympy.And,
            "or": sympy.Or,
            "not": sympy.Not,
            "eq": sympy.Eq,
            "ne": sympy.Ne,
            "lt": sympy.Lt,
            "le": sympy.Le,
            "gt": sympy.Gt,
            "ge": sympy.Ge,
        }
    )
    return _TABLE


def from_expr(expr: Any) -> Term:
    """The term of an expression of the IR, read from its text.

    >>> from gossamer.ir.expr import integer
    >>> from_expr(integer("q") - integer("k") <= 4)
    ('le', ('add', ('neg', 'k'), 'q'), 4)
    """
    from ..ir import expr as E

    tree = ast.parse(E.to_text(expr), mode="eval").body
    floats = {str(r.args[0]) for r in expr.atoms(E.readf)}
    return _from_tree(tree, floats)


_OPERATORS = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.And: "and",
    ast.Or: "or",
}


def _from_tree(node: ast.expr, floats: set[str]) -> Term:
    def build(*nodes: ast.expr) -> list[Term]:
        return [_from_tree(n, floats) for n in nodes]

    match node:
        case ast.Constant(value=value):
            return constant(value)
        case ast.Name(id="inf"):
            return constant(math.inf)
        case ast.Name(id=name):
            return name
        case ast.UnaryOp(op=op, operand=operand):
            (a,) = build(operand)
            if isinstance(op, ast.Not):
                return ("not", a)
            return -a if isinstance(a, int) else ("neg", a)
        case ast.BinOp(left=left, op=op, right=right):
            return (_OPERATORS[type(op)], *build(left, right))
        case ast.BoolOp(op=op, values=values):
            first, *rest = build(*values)
            for term in rest:
                first = (_OPERATORS[type(op)], first, term)
            return first
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return (_OPERATORS[type(op)], *build(left, right))
        case ast.Subscript(value=ast.Name(id=name), slice=index):
            items = index.elts if isinstance(index, ast.Tuple) else [index]
            return ("readf" if name in floats else "read", name, *build(*items))
        case ast.Call(func=ast.Name(id="cast"), args=[ast.Name(id=dtype), value]):
            return ("cast", dtype, *build(value))
        case ast.Call(func=ast.Name(id=name), args=args):
            return (name, *build(*args))
    raise AssertionError(f"text of an expression holds {ast.dump(node)}")


_NUMBERED = re.compile(r"([a-z]+)(\d+)")


def shifted(term: Term, first: Mapping[str, int]) -> Term:
    """The term with names renumbered: {"p": 2} turns p0 into p2, p1 into p3."""

    def leaf(name: str) -> str:
        found = _NUMBERED.fullmatch(name)
        return f"{found[1]}{int(found[2]) + first[found[1]]}" if found and found[1] in first else name

    return rewrite(term, leaf)

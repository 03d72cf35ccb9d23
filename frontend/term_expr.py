"""Terms and the expressions of the IR, in both directions. (These bring in sympy when they are called.)"""

from __future__ import annotations

import ast
import math
from typing import Any

from ..ir.syntax import parse_expression
from .term import FALSE, TRUE, Term, constant, float_of


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
            "abs": _absolute,
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


def _absolute(x: Any) -> Any:
    """|x|, without the ||y|| that sympy leaves in |2 |y||, which would not survive its text."""
    from sympy import Abs

    twice = [a for a in Abs(x).atoms(Abs) if isinstance(a.args[0], Abs)]
    return Abs(x).xreplace({a: a.args[0] for a in twice})


def from_expr(expr: Any) -> Term:
    """The term of an expression of the IR, read from its text.

    >>> from gossamer.ir.expr import integer
    >>> from_expr(integer("q") - integer("k") <= 4)
    ('le', ('sub', 'q', 'k'), 4)
    """
    from ..ir import expr as E

    tree = parse_expression(E.to_text(expr))
    floats = {str(r.args[0]) for r in expr.atoms(E.readf)}
    return _from_tree(tree, floats)


_OPERATORS = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
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
        case ast.Constant(value=bool() | int() | float() as value):
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

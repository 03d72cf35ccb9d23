"""Integer expressions and conditions read back from text without sympy: shapes, grid sizes, checks.

The text is what `ir.expr.to_text` prints, of which only integers and comparisons are understood.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ..ir.errors import ArtifactError
from ..ir.syntax import parse_expression

Formula = Callable[[Mapping[str, int]], int]

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs}
_CONSTANTS = {"true": 1, "false": 0}


def parse_formula(text: str) -> Formula:
    """A function from the values of the names to the value of the expression, an integer or a truth value.

    >>> parse_formula("B * ((S + 31) // 32)")({"B": 2, "S": 100})
    8
    >>> parse_formula("(S < B) or (S % 4 != 0)")({"B": 2, "S": 100})
    False

    Raises ArtifactError if the text is anything else. KeyError at the call: a name without a value.
    """
    try:
        return _build(parse_expression(text), text)
    except SyntaxError:
        raise _malformed(text) from None


def _malformed(text: str) -> ArtifactError:
    return ArtifactError(
        f"expected integer arithmetic on argument names; got {text!r}. Compile the kernel again"
    )


def _build(node: ast.expr, text: str) -> Formula:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return lambda names: value
        case ast.Name(id=name) if name in _CONSTANTS:
            return lambda names: _CONSTANTS[name]
        case ast.Name(id=name):
            return lambda names: names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _build(operand, text)
            return lambda names: -inner(names)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _build(operand, text)
            return lambda names: not inner(names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            apply, a, b = _BINARY[type(op)], _build(left, text), _build(right, text)
            return lambda names: apply(a(names), b(names))
        case ast.BoolOp(op=op, values=values):
            join, inners = all if isinstance(op, ast.And) else any, [_build(v, text) for v in values]
            return lambda names: join(inner(names) for inner in inners)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            compare, a, b = _COMPARE[type(op)], _build(left, text), _build(right, text)
            return lambda names: compare(a(names), b(names))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if name in _FUNCTIONS:
            function, inners = _FUNCTIONS[name], [_build(a, text) for a in args]
            return lambda names: function(*(inner(names) for inner in inners))
        case _:
            raise _malformed(text)

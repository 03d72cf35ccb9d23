"""Integer expressions read back from text without sympy: shapes of intermediates, sizes of grids.

The text is what `ir.expr.to_text` prints; only integer arithmetic is understood, which is all that
a shape may contain.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ..ir.errors import ArtifactError

Extent = Callable[[Mapping[str, int]], int]

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs}


def parse_extent(text: str) -> Extent:
    """A function from the values of the names to the value of the expression.

    >>> parse_extent("B * ((S + 31) // 32)")({"B": 2, "S": 100})
    8

    Raises ArtifactError if the text is anything but integer arithmetic.
    """
    try:
        return _build(ast.parse(text, mode="eval").body, text)
    except SyntaxError:
        raise _malformed(text) from None


def _malformed(text: str) -> ArtifactError:
    return ArtifactError(
        f"expected integer arithmetic over argument names; got {text!r}. Compile the kernel again"
    )


def _build(node: ast.expr, text: str) -> Extent:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return lambda names: value
        case ast.Name(id=name):
            return lambda names: names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _build(operand, text)
            return lambda names: -inner(names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            apply, a, b = _BINARY[type(op)], _build(left, text), _build(right, text)
            return lambda names: apply(a(names), b(names))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if name in _FUNCTIONS:
            function, inners = _FUNCTIONS[name], [_build(a, text) for a in args]
            return lambda names: function(*(inner(names) for inner in inners))
        case _:
            raise _malformed(text)

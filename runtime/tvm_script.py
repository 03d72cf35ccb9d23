"""TVMScript to TIR, for the part of it that codegen/tvm.py spells.

TVM's own parser reads the whole language, and compiles and runs each subexpression by itself: a third of the
time of a compile. Here a script is walked once; both call the same builder.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder

from ..ir.syntax import PARSER

T: Any = builder

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Expr]]] = {
    ast.Lt: (operator.lt, tirx.LT),
    ast.LtE: (operator.le, tirx.LE),
    ast.Gt: (operator.gt, tirx.GT),
    ast.GtE: (operator.ge, tirx.GE),
    ast.Eq: (operator.eq, tirx.EQ),
    ast.NotEq: (operator.ne, tirx.NE),
}


def read(source: str) -> Any:
    """The function of a script, as TVM's parser builds it. Raises SyntaxError for what is not read here."""
    with PARSER:
        (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    with IRBuilder() as function, T.prim_func():
        _Reader().define(definition)
    return function.get()


class _Reader:
    """Builds what it reads, in the builder of its thread. Names last to the end of their block."""

    def __init__(self) -> None:
        self._names: dict[str, Any] = {"T": T, "range": lambda stop: T.serial(0, stop)}

    def define(self, node: ast.FunctionDef) -> None:
        T.func_name(node.name)
        for argument in node.args.args:
            kind = self._value(argument.annotation)  # T.int64, or a variable: T.handle("float32")
            self._names[argument.arg] = T.arg(argument.arg, kind if isinstance(kind, Expr) else kind())
        self._block(node.body)

    # statements -----------------------------------------------------------------------------------

    def _block(self, body: Sequence[ast.stmt]) -> None:
        outside, self._names = self._names, dict(self._names)
        for node in body:
            self._statement(node)
        self._names = outside

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=value):  # name: T.let = value
                bound = self._value(value)
                bound = bound if isinstance(bound, Expr) else tirx.const(bound)
                self._names[name] = tirx.Var(name, bound.ty)
                T.bind(bound, var=self._names[name])
            case ast.Assign(targets=[ast.Subscript(value=buffer, slice=index)], value=value):
                stored, place = self._value(value), self._value(index)
                T.buffer_store(self._value(buffer), stored, list(place) if type(place) is tuple else [place])
            case ast.Assign(targets=[ast.Name(id=name)], value=value):  # name = T.match_buffer(...)
                self._name(name, self._value(value))
            case ast.For(target=ast.Name(id=name), iter=loop, body=body):
                with self._value(loop) as variable:
                    self._name(name, variable)
                    self._block(body)
            case ast.If(test=test, body=body, orelse=orelse):
                self._if(self._value(test), body, orelse)
            case ast.Expr(value=value):
                result = self._value(value)
                if result is not None:  # T.func_attr(...) has none
                    T.evaluate(result)
            case _:
                raise _unknown(node)

    def _name(self, name: str, value: Any) -> None:
        IRBuilder.name(name, value)
        self._names[name] = value

    def _if(self, test: Any, body: Sequence[ast.stmt], orelse: Sequence[ast.stmt]) -> None:
        if isinstance(test, bool):
            self._block(body if test else orelse)
            return
        with T.If(test):
            with T.Then():
                self._block(body)
            if orelse:
                with T.Else():
                    self._block(orelse)

    # expressions ----------------------------------------------------------------------------------

    def _value(self, node: ast.AST | None) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._names[name]
            case ast.Attribute(value=value, attr=attr):
                return getattr(self._value(value), attr)
            case ast.Call(func=function, args=args, keywords=keywords):
                named = {k.arg: self._value(k.value) for k in keywords if k.arg}
                return self._value(function)(*map(self._value, args), **named)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _BINARY[type(op)](self._value(left), self._value(right))
            case ast.Subscript(value=value, slice=index):
                return self._value(value)[self._value(index)]
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _compare(op, self._value(left), self._value(right))
            case ast.BoolOp(op=op, values=values):
                return self._logical(isinstance(op, ast.Or), values)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._value(operand)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                value = self._value(operand)
                return not value if isinstance(value, bool) else tirx.Not(value)
            case ast.Tuple(elts=items):
                return tuple(map(self._value, items))
            case ast.List(elts=items):
                return [*map(self._value, items)]
            case ast.Dict(keys=keys, values=values):
                return dict(zip(map(self._value, keys), map(self._value, values), strict=True))
            case ast.Slice(lower=lower, upper=upper, step=None):
                return slice(self._value(lower), self._value(upper))
        raise _unknown(node)

    def _logical(self, either: bool, nodes: Sequence[ast.expr]) -> Any:
        """`or` (either) or `and`: what Python knows is decided here."""
        join: Any = tirx.Or if either else tirx.And
        terms: list[Expr] = []
        for value in map(self._value, nodes):
            if not isinstance(value, bool):
                terms.append(value)
            elif value is either:
                return either
        return reduce(join, terms) if terms else not either


def _compare(op: ast.cmpop, a: Any, b: Any) -> Any:
    """A comparison; a number has the type of what it is compared to."""
    known, node = _COMPARE[type(op)]
    if not isinstance(a, Expr) and not isinstance(b, Expr):
        return known(a, b)
    return node(_number(a, b), _number(b, a))


def _number(value: Any, other: Any) -> Any:
    return value if isinstance(value, Expr) else tirx.const(value, other.ty.dtype)


def _unknown(node: ast.AST | None) -> SyntaxError:
    return SyntaxError(f"line {getattr(node, 'lineno', '?')}: no {type(node).__name__} in a generated kernel")

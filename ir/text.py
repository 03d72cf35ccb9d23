"""Attribute values as text and back, for the graph level: no eval, no pickle.

    value := integer | float | string | "True" | "False" | "None" | "inf" | "-inf" | "nan"
           | "(" [value ("," value)* [","]] ")"
           | "expr(" string ["," "floats=" names] ["," "bools=" names] ")"
           | class "(" string ")"                        classes with a text form of their own
           | class "(" [name "=" value ("," name "=" value)*] ")"

Only classes registered with `@register` can be named. Fields that equal their default are left
out. Names of an expression are integers but for those listed; in a field annotated `Expr` an
expression of integers is its text alone. `load(dump(v)) == v`.
"""

from __future__ import annotations

import ast
import math
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import sympy

from . import expr as E
from .errors import GossamerError, ParseError, UnsupportedError
from .syntax import parse_expression

C = TypeVar("C", bound=type)
REGISTRY: dict[str, type] = {}
_NAMES = {"True": True, "False": False, "None": None, "inf": math.inf, "nan": math.nan}


def register(cls: C) -> C:
    """Let attributes hold values of a frozen dataclass; its name must be new.

    A class with methods `to_text` and a static `parse` is written in that form, others field by field.
    """
    if not is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise UnsupportedError(f"{cls.__name__} is not a frozen dataclass; attributes hold values only")
    taken = REGISTRY.setdefault(cls.__name__, cls)
    if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UnsupportedError(
            f"the name {cls.__name__} is taken by {taken.__module__}; rename {cls.__module__}'s"
        )
    REGISTRY[cls.__name__] = cls
    return cls  # type: ignore[return-value]


def dump(value: Any) -> str:
    """The text of an attribute value. Raises UnsupportedError for a type that has none.

    >>> dump((1, 2.5, "two", None, E.integer("q") + 1))
    "(1, 2.5, 'two', None, expr('q + 1'))"
    """
    match value:
        case None | bool() | str():
            return repr(value)
        case int() | np.integer():
            return repr(int(value))
        case float() | np.floating():
            return repr(float(value))
        case tuple():
            return f"({', '.join(map(dump, value))}{',' if len(value) == 1 else ''})"
        case np.ndarray() if value.dtype.kind in "iu" and value.ndim == 1:
            return dump(tuple(value.tolist()))
        case sympy.Basic():
            return _expr(value)
    name = type(value).__name__
    if REGISTRY.get(name) is not type(value):
        known = ", ".join(sorted(REGISTRY))
        raise UnsupportedError(f"no text for {value!r} of {type(value)}; register its class (known: {known})")
    if _has_text(type(value)):
        return f"{name}({value.to_text()!r})"
    parts = [_field(f, value) for f in fields(value) if f.init and not _is_default(f, getattr(value, f.name))]
    return f"{name}({', '.join(parts)})"


def load(text: str, *, line: int = 1, column: int = 1) -> Any:
    """The value of a text. Raises ParseError; line and column tell where the text stands in its file.

    >>> load("(1, 2.5, 'two', None, expr('q + 1'))")
    (1, 2.5, 'two', None, q + 1)
    """
    try:
        tree = parse_expression(text.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ParseError(f"not a value: {text.strip()[:80]!r} ({error})", line, column) from None
    return _Reader(line, column).value(tree)


def _expr(value: sympy.Basic) -> str:
    floats, bools = _odd_names(value)
    parts = [repr(E.to_text(value))]
    parts += [f"{key}={dump(names)}" for key, names in (("floats", floats), ("bools", bools)) if names]
    return f"expr({', '.join(parts)})"


def _odd_names(value: sympy.Basic) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of an expression that are floats, and those that are truth values."""
    tensors = {r.args[0] for r in E.reads(value)}
    kinds = {s.name: E.kind(s) for s in {*E.symbols(value), *tensors}}
    floats, bools = (tuple(sorted(n for n, k in kinds.items() if k == kind)) for kind in ("float", "bool"))
    return floats, bools


def _field(field: Field[Any], owner: Any) -> str:
    value = getattr(owner, field.name)
    plain = isinstance(value, sympy.Basic) and _hints(type(owner))[field.name] is E.Expr
    if plain and _odd_names(value) == ((), ()):
        return f"{field.name}={E.to_text(value)!r}"
    return f"{field.name}={dump(value)}"


def _is_default(field: Field[Any], value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return False
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return default is not MISSING and type(default) is type(value) and bool(default == value)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _has_text(cls: type) -> bool:
    return hasattr(cls, "to_text") and hasattr(cls, "parse")


class _Reader:
    def __init__(self, line: int, column: int) -> None:
        self.line, self.column = line, column

    def fail(self, node: ast.AST, message: str) -> ParseError:
        at = (getattr(node, "lineno", 1), getattr(node, "col_offset", 0))
        return ParseError(message, self.line + at[0] - 1, (self.column if at[0] == 1 else 1) + at[1])

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return value
            case ast.Name(id=name) if name in _NAMES:
                return _NAMES[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self.value(operand)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    return -value
            case ast.Tuple(elts=items):
                return tuple(self.value(i) for i in items)
            case ast.Call(
                func=ast.Name(id="expr"), args=[ast.Constant(value=str() as text)], keywords=keywords
            ):
                return self.expr(node, text, self.named(node, keywords))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return self.make(node, name, args, keywords)
        raise self.fail(node, f"expected a value; got {ast.unparse(node)!r}")

    def named(self, node: ast.expr, keywords: list[ast.keyword]) -> dict[str, Any]:
        if any(k.arg is None for k in keywords):
            raise self.fail(node, f"expected name=value; got {ast.unparse(node)!r}")
        return {str(k.arg): self.value(k.value) for k in keywords}

    def expr(self, node: ast.expr, text: str, kinds: dict[str, Any]) -> sympy.Basic:
        if not set(kinds) <= {"floats", "bools"}:
            raise self.fail(node, f"expr takes floats and bools; got {', '.join(kinds)}")
        names = {n: E.real(n) for n in kinds.get("floats", ())}
        names |= {n: E.boolean(n) for n in kinds.get("bools", ())}
        try:
            return E.parse(text, names, unknown=E.integer)
        except ParseError as error:
            raise self.fail(node, f"in the expression {text!r}: {error}") from None

    def make(self, node: ast.expr, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Any:
        cls = REGISTRY.get(name)
        if cls is None:
            raise self.fail(node, f"unknown class {name!r}; known: {', '.join(sorted(REGISTRY))}")
        values = self.named(node, keywords)
        try:
            if _has_text(cls) and len(args) == 1 and not values:
                return cls.parse(self.value(args[0]))  # type: ignore[attr-defined]
            if args:
                raise self.fail(node, f"expected {name}(field=value, ...); got {ast.unparse(node)!r}")
            for key, value in values.items():
                if isinstance(value, str) and _hints(cls).get(key) is E.Expr:
                    values[key] = self.expr(node, value, {})
            return cls(**values)
        except ParseError:
            raise
        except (GossamerError, TypeError, ValueError) as error:
            raise self.fail(node, f"{name}: {error}") from None

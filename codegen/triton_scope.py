"""What an emitted kernel knows while it is spelled: dtypes, names, axes, signs and bounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import sympy

from ..ir import expr as ex
from ..ir.expr import Expr
from ..ir.kernel import Axis, Tensor

TL = {
    "f64": "tl.float64",
    "f32": "tl.float32",
    "f16": "tl.float16",
    "bf16": "tl.bfloat16",
    "f8e4m3": "tl.float8e4nv",
    "i64": "tl.int64",
    "i32": "tl.int32",
    "i16": "tl.int16",
    "i8": "tl.int8",
    "u8": "tl.uint8",
    "bool": "tl.int1",
}
BYTES = {
    "f64": 8,
    "f32": 4,
    "f16": 2,
    "bf16": 2,
    "f8e4m3": 1,
    "i64": 8,
    "i32": 4,
    "i16": 2,
    "i8": 1,
    "u8": 1,
    "bool": 1,
}
FLOATS = ("f64", "f32", "f16", "bf16", "f8e4m3")

# A tile's own offsets stay 32-bit up to this coordinate, so strides below 2**16 elements always fit.
NARROW = 1 << 15

# How tightly Python's operators bind.
COMPARE, OR, XOR, AND, SHIFT, SUM, PRODUCT, UNARY, ATOM = range(9)


@dataclass(frozen=True)
class Value:
    """Text of a value: its dtype, the axes it varies over, how tightly it binds, whether it is a literal."""

    text: str
    dtype: str
    axes: frozenset[str] = frozenset()
    level: int = ATOM
    literal: bool = False

    def at(self, level: int) -> str:
        """The text, in parentheses when it binds less tightly than level."""
        return self.text if self.level >= level else f"({self.text})"


@dataclass(frozen=True)
class Name:
    """What a name of the kernel is spelled as: a scalar (no axes) or a tile."""

    text: str
    dtype: str
    axes: tuple[str, ...] = ()


@dataclass
class Scope:
    """What is known while a kernel is spelled: its names, and what was used on the way.

    nonnegative: integer scalars that cannot be negative. definitions: integer tiles that are plain
    functions of scalars and coordinates. helpers: the helper functions used; fields:
    those that are made for a bit field (triton_fields.py), their text by name. narrow: for (tensor,
    dimension) the largest coordinate that is multiplied with the stride in 32 bits. boxes: for tensors
    with a descriptor, the extents of what it fetches; addressed: tensors with addresses."""

    axes: tuple[Axis, ...]
    tensors: Mapping[str, Tensor]
    names: dict[str, Name] = field(default_factory=dict)
    nonnegative: set[str] = field(default_factory=set)
    definitions: dict[str, Expr] = field(default_factory=dict)
    helpers: set[str] = field(default_factory=set)
    fields: dict[str, str] = field(default_factory=dict)
    narrow: dict[tuple[str, int], int] = field(default_factory=dict)
    boxes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addressed: set[str] = field(default_factory=set)

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        """Axes in the kernel's order, which is the order of every tile's dimensions."""
        wanted = set(names)
        return tuple(a.name for a in self.axes if a.name in wanted)

    def axis(self, name: str) -> Axis:
        return next(a for a in self.axes if a.name == name)

    def varies(self, expr: Expr) -> bool:
        """Whether an expression differs within a tile."""
        names = {str(s) for s in expr.free_symbols}
        tiles = (n for n, name in self.names.items() if name.axes)
        return not names.isdisjoint([*(a.name for a in self.axes), *tiles])

    def is_nonnegative(self, expr: Expr) -> bool:
        """Whether an integer expression is known to be >= 0; False when in doubt."""
        match expr:
            case sympy.Symbol():
                return expr.name in self.nonnegative or any(a.name == expr.name for a in self.axes)
            case sympy.Integer():
                return int(expr) >= 0
            case sympy.Add() | sympy.Mul() | ex.minimum() | ex.floordiv() | ex.bitor() | ex.shr() | ex.shl():
                return all(self.is_nonnegative(a) for a in expr.args)
            case ex.maximum() | ex.bitand():
                return any(self.is_nonnegative(a) for a in expr.args)
            case ex.floormod():
                return self.is_nonnegative(expr.args[1])
            case ex.where():
                return all(self.is_nonnegative(a) for a in expr.args[1:])
            case _:
                return isinstance(expr, sympy.Abs)

    def bound(self, expr: Expr) -> int | None:
        """The largest absolute value of an expression of coordinates and numbers; None when unknown."""
        match expr:
            case sympy.Integer():
                return abs(int(expr))
            case sympy.Symbol():
                return next((a.size - 1 for a in self.axes if a.name == expr.name), None)
            case sympy.Add() | sympy.Mul():
                parts = [self.bound(a) for a in expr.args]
                known = [p for p in parts if p is not None]
                if len(known) < len(parts):
                    return None
                return sum(known) if isinstance(expr, sympy.Add) else int(sympy.prod(known))
            case ex.floordiv(args=(a, sympy.Integer() as b)) if self.is_nonnegative(a) and b > 0:
                whole = self.bound(a)
                return None if whole is None else whole // int(b)
            case ex.floormod(args=(_, sympy.Integer() as b)) if b > 0:
                return int(b) - 1
            case _:
                return None

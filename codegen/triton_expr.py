"""Scalar expressions as Triton text, with the types and axes that a statement needs to know.

Rules, in one place:

- floats are computed in f32, or in f64 where an operand or the result is f64; 16-bit tiles widen when used;
- integers are computed in 32 bits (in 64 where a tile holds i64), addresses in 64 (see `Speller.pointer`);
- `//` and `%` of Triton round towards zero, ours round down: the plain operator is used where both operands
  cannot be negative, shifts and masks for powers of two, helpers otherwise;
- tiles and axis coordinates get the axes they lack (`b_m[:, None]`), so every operation broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy

from ..ir import expr as ex
from ..ir.errors import BackendError
from ..ir.expr import Expr
from ..ir.kernel import Axis, Tensor

TL = {
    "f64": "tl.float64",
    "f32": "tl.float32",
    "f16": "tl.float16",
    "bf16": "tl.bfloat16",
    "i64": "tl.int64",
    "i32": "tl.int32",
    "i16": "tl.int16",
    "i8": "tl.int8",
    "u8": "tl.uint8",
    "bool": "tl.int1",
}
FLOATS = ("f64", "f32", "f16", "bf16")

# A tile's own offsets stay 32-bit up to this coordinate, so strides below 2**16 elements always fit.
NARROW = 1 << 15

# How tightly Python's operators bind.
COMPARE, OR, XOR, AND, SHIFT, SUM, PRODUCT, UNARY, ATOM = range(9)

HELPERS = {
    "floor_div": '''\
@triton.jit
def floor_div(a, b):
    """a / b rounded down; Triton's // rounds towards zero."""
    return (a - (a % b + b) % b) // b
''',
    "floor_mod": '''\
@triton.jit
def floor_mod(a, b):
    """The remainder with the sign of b; Triton's % takes the sign of a."""
    return (a % b + b) % b
''',
    "tanh": '''\
@triton.jit
def tanh(x, small):
    """tanh; below `small` by its series, because 1 - exp cancels there."""
    a = tl.abs(x)
    t = tl.exp(-2.0 * a)
    a2 = a * a
    series = a * (1.0 - a2 * (1.0 / 3 - a2 * (2.0 / 15 - a2 * (17.0 / 315 - a2 * (62.0 / 2835)))))
    y = tl.where(a < small, series, (1.0 - t) / (1.0 + t))
    return tl.where(x < 0, -y, y)
''',
    "trunc": '''\
@triton.jit
def trunc(x):
    """x rounded towards zero."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))
''',
    "power": '''\
@triton.jit
def power(x, y):
    """x ** y as C's pow: negative bases for whole exponents, 1 for y = 0."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    odd = tl.floor(y * 0.5) * 2.0 != y
    whole = tl.floor(y) == y
    signed = tl.where(whole, tl.where(odd, -size, size), float("nan"))
    return tl.where(y == 0, 1.0, tl.where(x < 0, signed, size))
''',
}

_UNARY = {
    ex.exp2: "tl.exp2({})",
    ex.log2: "tl.log2({})",
    ex.erf: "tl.erf({})",
    sympy.exp: "tl.exp({})",
    sympy.log: "tl.log({})",
    sympy.sin: "tl.sin({})",
    sympy.cos: "tl.cos({})",
    sympy.floor: "tl.floor({})",
}
_COMPARISONS = {
    sympy.StrictLessThan: ("<", ">"),
    sympy.LessThan: ("<=", ">="),
    sympy.StrictGreaterThan: (">", "<"),
    sympy.GreaterThan: (">=", "<="),
    sympy.Equality: ("==", "=="),
    sympy.Unequality: ("!=", "!="),
}
_BITWISE = {
    ex.bitand: ("&", AND),
    ex.bitor: ("|", OR),
    ex.bitxor: ("^", XOR),
    ex.shl: ("<<", SHIFT),
    ex.shr: (">>", SHIFT),
}


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
    functions of scalars and coordinates. helpers: the helper functions used. narrow: for (tensor,
    dimension) the largest coordinate that is multiplied with the stride in 32 bits."""

    axes: tuple[Axis, ...]
    tensors: Mapping[str, Tensor]
    names: dict[str, Name] = field(default_factory=dict)
    nonnegative: set[str] = field(default_factory=set)
    definitions: dict[str, Expr] = field(default_factory=dict)
    helpers: set[str] = field(default_factory=set)
    narrow: dict[tuple[str, int], int] = field(default_factory=dict)

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


def literal(value: float, floats: str) -> Value:
    """A float literal. Triton reads bare ones as f32, so f64 ones that need more digits say so."""
    if value != value or value in (float("inf"), -float("inf")):
        return Value(f'float("{value}")', floats, literal=True)
    if floats == "f64" and sympy.Float(value).num._mpf_[3] > 24:
        return Value(f"tl.full([], {value!r}, tl.float64)", floats, literal=True)
    return Value(repr(value), floats, level=ATOM if value >= 0 else UNARY, literal=True)


class Speller:
    """Spells expressions for one statement whose tile has the given axes (in the kernel's order)."""

    def __init__(self, scope: Scope, axes: tuple[str, ...], floats: str = "f32") -> None:
        self.scope, self.axes, self.floats = scope, axes, floats

    @classmethod
    def of(cls, scope: Scope, axes: tuple[str, ...], exprs: Iterable[Expr], dtype: str = "f32") -> Speller:
        """A speller that computes floats in f64 if the result or any operand is f64, else in f32."""
        names = {str(s) for e in exprs for s in e.free_symbols}
        used = {scope.names[n].dtype for n in names if n in scope.names}
        used |= {scope.tensors[n].dtype for n in names if n in scope.tensors}
        return cls(scope, axes, "f64" if "f64" in used | {dtype} else "f32")

    # typed access -----------------------------------------------------------------------------------

    def convert(self, value: Value, dtype: str) -> Value:
        """The value in another dtype; literals become literals of it."""
        if value.dtype == dtype:
            return value
        if value.literal and value.dtype == "i32" and dtype in FLOATS:
            return literal(float(int(value.text)), self.floats)
        if value.literal and (dtype in ("i64", "i32") or (value.dtype in FLOATS and dtype in FLOATS)):
            return value
        if dtype == "bool":
            return Value(f"{value.at(OR)} != 0", "bool", value.axes, COMPARE)
        if value.axes:
            return Value(f"{value.at(ATOM)}.to({TL[dtype]})", dtype, value.axes)
        return Value(f"tl.cast({value.text}, {TL[dtype]})", dtype)

    def number(self, expr: Expr, *, floating: bool) -> Value:
        """An operand: in the computing float type, or an integer of at least 32 bits."""
        value = self.spell(expr)
        if floating:
            return self.convert(value, self.floats)
        return value if value.dtype in ("i32", "i64") else self.convert(value, "i32")

    def integer(self, expr: Expr) -> Value:
        return self.number(expr, floating=False)

    def condition(self, expr: Expr) -> Value:
        return self.convert(self.spell(expr), "bool")

    # expressions ------------------------------------------------------------------------------------

    def spell(self, expr: Expr) -> Value:
        """Text, dtype and axes of an expression. Raises BackendError for what Triton cannot say."""
        for types, rule in self._RULES:
            if isinstance(expr, types):
                return rule(self, expr)
        raise BackendError(f"triton: no spelling for {type(expr).__name__} in {ex.to_text(expr)}")

    def _symbol(self, expr: sympy.Symbol) -> Value:
        if any(a.name == expr.name for a in self.scope.axes):
            return self._placed(Name(f"i_{expr.name}", "i32", (expr.name,)))
        if expr.name not in self.scope.names:
            raise BackendError(f"triton: {expr.name} is used before it is defined")
        return self._placed(self.scope.names[expr.name])

    def _placed(self, name: Name) -> Value:
        """A tile with the axes of the statement that it lacks added."""
        if not set(name.axes) <= set(self.axes):
            raise BackendError(f"triton: {name.text} has axes {name.axes}, its statement only {self.axes}")
        if not name.axes or name.axes == self.axes:
            return Value(name.text, name.dtype, frozenset(name.axes))
        index = ", ".join(":" if a in name.axes else "None" for a in self.axes)
        return Value(f"{name.text}[{index}]", name.dtype, frozenset(name.axes))

    def _integer(self, expr: sympy.Integer) -> Value:
        return Value(str(int(expr)), "i32", level=ATOM if expr >= 0 else UNARY, literal=True)

    def _float(self, expr: Any) -> Value:
        return literal(float(expr), self.floats)

    def _truth(self, expr: Expr) -> Value:
        return Value("True" if expr == sympy.true else "False", "bool", literal=True)

    def _add(self, expr: Any) -> Value:
        floating = ex.kind(expr) == "float"
        plus, minus = [], []
        for term in expr.args:
            factor = term.args[0] if term.is_Mul else term
            negative = factor.is_Number and bool(factor < 0)
            (minus if negative else plus).append(self.number(-term if negative else term, floating=floating))
        # Scalars first: what does not vary within the tile is added once.
        plus.sort(key=lambda v: (bool(v.axes), v.literal))
        minus.sort(key=lambda v: bool(v.axes))
        text = " + ".join(v.at(SUM) for v in plus)
        text = text or f"-{minus.pop(0).at(UNARY)}"
        text += "".join(f" - {v.at(PRODUCT)}" for v in minus)
        return self._joined(text, [*plus, *minus], SUM)

    def _mul(self, expr: sympy.Mul) -> Value:
        floating = ex.kind(expr) == "float"
        over = [a.args[0] for a in expr.args if a.is_Pow and a.args[1] == -1]
        factors = [a for a in expr.args if not (a.is_Pow and a.args[1] == -1)]
        negative = bool(factors) and factors[0] == -1
        values = [self.number(a, floating=floating) for a in (factors[1:] if negative else factors)]
        values.sort(key=lambda v: bool(v.axes))
        below = [self.number(a, floating=True) for a in over]
        # Only the first factor may be a quotient: x * (a // b) is not x * a // b.
        text = " * ".join(v.at(PRODUCT if n == 0 else UNARY) for n, v in enumerate(values)) or "1.0"
        text = "".join([text, *(f" / {v.at(UNARY)}" for v in below)])
        level = PRODUCT if len(values) + len(below) > 1 or below else values[0].level if values else ATOM
        if negative:
            text = f"-{text}" if level >= PRODUCT else f"-({text})"
            level = UNARY if level == ATOM else PRODUCT
        return self._joined(text, [*values, *below], level)

    def _joined(self, text: str, parts: list[Value], level: int) -> Value:
        dtypes = {p.dtype for p in parts}
        dtype = next((d for d in (*FLOATS, "i64", "i32", "bool") if d in dtypes), self.floats)
        return Value(text, dtype, frozenset().union(*(p.axes for p in parts)), level)

    def _power(self, expr: sympy.Pow) -> Value:
        base, exponent = expr.args
        if exponent in (sympy.Rational(1, 2), sympy.Rational(-1, 2)):
            return self._call("tl.sqrt({})" if exponent > 0 else "tl.rsqrt({})", base)
        if exponent == -1:
            value = self.number(base, floating=True)
            return Value(f"1.0 / {value.at(UNARY)}", value.dtype, value.axes, PRODUCT)
        if exponent in (2, 3, 4):
            value = self.number(base, floating=ex.kind(base) == "float")
            return Value(" * ".join([value.at(UNARY)] * int(exponent)), value.dtype, value.axes, PRODUCT)
        return self._helper("power", [self.number(a, floating=True) for a in expr.args])

    def _call(self, form: str, *args: Expr) -> Value:
        values = [self.number(a, floating=True) for a in args]
        return self._joined(form.format(*(v.text for v in values)), values, ATOM)

    def _helper(self, name: str, values: list[Value], *more: str) -> Value:
        self.scope.helpers.add(name)
        return self._joined(f"{name}({', '.join([*(v.text for v in values), *more])})", values, ATOM)

    def _unary(self, expr: Expr) -> Value:
        return self._call(_UNARY[type(expr)], expr.args[0])

    def _abs(self, expr: Expr) -> Value:
        value = self.number(expr.args[0], floating=ex.kind(expr.args[0]) == "float")
        return self._joined(f"tl.abs({value.text})", [value], ATOM)

    def _sigmoid(self, expr: Expr) -> Value:
        value = self.number(expr.args[0], floating=True)
        return self._joined(f"1.0 / (1.0 + tl.exp(-{value.at(UNARY)}))", [value], PRODUCT)

    def _tan(self, expr: Expr) -> Value:
        return self._call("tl.sin({0}) / tl.cos({0})", expr.args[0])

    def _tanh(self, expr: Expr) -> Value:
        small = "0.25" if self.floats == "f32" else "0.001"
        return self._helper("tanh", [self.number(expr.args[0], floating=True)], small)

    def _trunc(self, expr: Expr) -> Value:
        return self._helper("trunc", [self.number(expr.args[0], floating=True)])

    def _divide(self, expr: Any) -> Value:
        a, b = expr.args
        remainder = isinstance(expr, ex.floormod)
        left, right = self.integer(a), self.integer(b)
        if self.scope.is_nonnegative(a) and self.scope.is_nonnegative(b):
            operator = "%" if remainder else "//"
            return self._joined(f"{left.at(PRODUCT)} {operator} {right.at(UNARY)}", [left, right], PRODUCT)
        if b.is_Integer and b > 0 and int(b) & (int(b) - 1) == 0:
            if remainder:
                return self._joined(f"{left.at(SHIFT)} & {int(b) - 1}", [left], AND)
            return self._joined(f"{left.at(SUM)} >> {int(b).bit_length() - 1}", [left], SHIFT)
        return self._helper("floor_mod" if remainder else "floor_div", [left, right])

    def _bits(self, expr: Any) -> Value:
        operator, level = _BITWISE[type(expr)]
        left, right = (self.integer(a) for a in expr.args)
        return self._joined(f"{left.at(level)} {operator} {right.at(level + 1)}", [left, right], level)

    def _extreme(self, expr: Expr) -> Value:
        floating = ex.kind(expr) == "float"
        name = "tl.minimum" if isinstance(expr, (ex.minimum, sympy.Min)) else "tl.maximum"
        first, *rest = (self.number(a, floating=floating) for a in expr.args)
        for value in rest:
            first = self._joined(f"{name}({first.text}, {value.text})", [first, value], ATOM)
        return first

    def _where(self, expr: Expr) -> Value:
        condition = self.condition(expr.args[0])
        floating = ex.kind(expr) == "float"
        yes, no = (self.number(a, floating=floating) for a in expr.args[1:])
        value = self._joined(f"tl.where({condition.text}, {yes.text}, {no.text})", [yes, no], ATOM)
        return Value(value.text, value.dtype, value.axes | condition.axes)

    def _compare(self, expr: Expr) -> Value:
        floating = any(ex.kind(a) == "float" for a in expr.args)
        left, right = (self.number(a, floating=floating) for a in expr.args)
        operator, mirrored = _COMPARISONS[type(expr)]
        if left.literal and not right.literal:
            left, right, operator = right, left, mirrored
        joined = self._joined(f"{left.at(OR)} {operator} {right.at(OR)}", [left, right], COMPARE)
        return Value(joined.text, "bool", joined.axes, COMPARE)

    def _logic(self, expr: Expr) -> Value:
        operator, level = {sympy.And: ("&", AND), sympy.Or: ("|", OR), sympy.Xor: ("^", XOR)}[type(expr)]
        # Scalar conditions first, then by text: sympy keeps these arguments as a set.
        parts = sorted((self.condition(a) for a in expr.args), key=lambda v: (bool(v.axes), v.text))
        joined = self._joined(f" {operator} ".join(p.at(level + 1) for p in parts), parts, level)
        return Value(joined.text, "bool", joined.axes, level)

    def _not(self, expr: Expr) -> Value:
        (inner,) = expr.args
        if isinstance(inner, (sympy.And, sympy.Or)):
            other = sympy.Or if isinstance(inner, sympy.And) else sympy.And
            return self.spell(other(*(sympy.Not(a) for a in inner.args)))
        value = self.condition(inner)
        return Value(f"{value.at(OR)} == 0", "bool", value.axes, COMPARE)

    def _cast(self, expr: Expr) -> Value:
        dtype, inner = str(expr.args[0]), self.spell(expr.args[1])
        if inner.literal and inner.dtype != dtype:
            return Value(f"tl.full([], {inner.text}, {TL[dtype]})", dtype)
        return self.convert(inner, dtype)

    def _read(self, expr: Expr) -> Value:
        """A gather. What lies outside the tensor reads as 0, so padded and overhanging rows are safe."""
        tensor = self.scope.tensors[str(expr.args[0])]
        index = expr.args[1:]
        inside = []
        for i, size in zip(index, tensor.shape, strict=True):
            limit = sympy.sympify(size) if isinstance(size, int) else ex.integer(size)
            inside += [sympy.Lt(i, limit, evaluate=False)]
            inside += [] if self.scope.is_nonnegative(i) else [sympy.Ge(i, 0, evaluate=False)]
        mask = [self.condition(c) for c in inside]
        pointer = self.pointer(tensor, index)
        other = "0.0" if tensor.dtype in FLOATS else "0"
        text = f"tl.load({pointer.text}, mask={' & '.join(m.at(AND + 1) for m in mask)}, other={other})"
        return Value(text, tensor.dtype, pointer.axes)

    # addresses --------------------------------------------------------------------------------------

    def pointer(self, tensor: Tensor, index: Iterable[Expr]) -> Value:
        """The address of an element: a 64-bit offset for the tile plus 32-bit offsets within it.

        An index is a sum of scalars and of terms that vary within the tile. Strides are 64-bit, so
        the scalars' products are. A varying part that is bounded by the axis sizes is multiplied in
        32 bits with the narrowed stride `r_*`; any other (a gather, a clamp) in 64."""
        base, inner = [], []
        for dim, entry in enumerate(index):
            scalar, varying = self._split(entry)
            stride = None if tensor.unit == dim else f"s_{tensor.name}_{dim}"
            if scalar != 0:
                value = self.integer(scalar)
                base.append(value.at(SUM) if stride is None else f"{value.at(PRODUCT)} * {stride}")
            if varying == 0:
                continue
            value, bound = self.integer(varying), self.scope.bound(varying)
            if stride is None:
                inner.append((value, value.at(SUM)))
            elif bound is not None and bound < NARROW:
                key = (tensor.name, dim)
                self.scope.narrow[key] = max(bound, self.scope.narrow.get(key, 0))
                inner.append((value, f"{value.at(PRODUCT)} * r_{tensor.name}_{dim}"))
            else:
                inner.append((value, f"{self.convert(value, 'i64').at(PRODUCT)} * {stride}"))
        text = " + ".join([f"p_{tensor.name}", *base])
        if inner:
            within = " + ".join(part for _, part in inner)
            text += f" + ({within})" if len(inner) > 1 else f" + {within}"
        axes = frozenset().union(*(value.axes for value, _ in inner))
        return Value(text, "i64", axes, SUM)

    def _split(self, index: Expr) -> tuple[Expr, Expr]:
        """An index as scalar part + part that varies within the tile, the latter bounded if it can be."""
        for candidate in (index.xreplace(self._definitions()), index):
            terms = sympy.Add.make_args(sympy.expand(candidate))
            varying = ex.sum_of([t for t in terms if self.scope.varies(t)])
            if self.scope.bound(varying) is not None or candidate is index:
                break
        return ex.sum_of([t for t in terms if not self.scope.varies(t)]), varying

    def _definitions(self) -> dict[Expr, Expr]:
        return {ex.integer(name): value for name, value in self.scope.definitions.items()}

    _RULES: ClassVar[tuple[tuple[Any, Callable[..., Value]], ...]] = (
        (sympy.Symbol, _symbol),
        (sympy.Integer, _integer),
        ((sympy.Number, sympy.NumberSymbol), _float),
        ((sympy.logic.boolalg.BooleanTrue, sympy.logic.boolalg.BooleanFalse), _truth),
        (sympy.Add, _add),
        (sympy.Mul, _mul),
        (sympy.Pow, _power),
        (sympy.Abs, _abs),
        (ex.sigmoid, _sigmoid),
        (sympy.tan, _tan),
        (sympy.tanh, _tanh),
        (ex.trunc, _trunc),
        (tuple(_UNARY), _unary),
        ((ex.floordiv, ex.floormod), _divide),
        (tuple(_BITWISE), _bits),
        ((ex.minimum, ex.maximum, sympy.Min, sympy.Max), _extreme),
        (ex.where, _where),
        (tuple(_COMPARISONS), _compare),
        ((sympy.And, sympy.Or, sympy.Xor), _logic),
        (sympy.Not, _not),
        (ex.cast, _cast),
        ((ex.read, ex.readf), _read),
    )

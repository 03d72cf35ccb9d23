"""Scalar expressions as Triton text, with the types and axes that a statement needs to know.

Rules, in one place:

- floats are computed in f32, or in f64 where an operand or the result is f64; 16-bit tiles widen when used;
- integers are computed in 32 bits (in 64 where a tile holds i64), addresses in 64 (see `Speller.pointer`);
- `//` and `%` of Triton round towards zero, ours round down: the plain operator is used where both operands
  cannot be negative, shifts and masks for powers of two, helpers otherwise;
- tiles and axis coordinates get the axes they lack (`b_m[:, None]`), so every operation broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import sympy

from ..ir import expr as ex
from ..ir.errors import BackendError
from ..ir.expr import Expr
from ..ir.kernel import Tensor
from .triton_scope import (
    AND,
    ATOM,
    COMPARE,
    FLOATS,
    NARROW,
    OR,
    PRODUCT,
    SHIFT,
    SUM,
    TL,
    UNARY,
    XOR,
    Name,
    Scope,
    Value,
)

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

    def _float_of_bits(self, expr: Expr) -> Value:
        value = self.convert(self.integer(expr.args[0]), "i32")
        bits = f"{value.at(ATOM)}.to(tl.float32, bitcast=True)"
        return self.convert(Value(bits, "f32", value.axes), self.floats)

    def _random_bits(self, expr: Expr) -> Value:
        value = self._helper("random_bits", [self.integer(a) for a in expr.args])
        return replace(value, dtype="i32")

    def _bits_of_float(self, expr: Expr) -> Value:
        value = self.convert(self.number(expr.args[0], floating=True), "f32")
        return replace(value, text=f"tl.cast({value.text}, tl.int32, bitcast=True)", dtype="i32", level=ATOM)

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
        self.scope.addressed.add(tensor.name)
        base, inner = [], []
        for dim, entry in enumerate(index):
            scalar, varying = self.split(entry)
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

    def split(self, index: Expr) -> tuple[Expr, Expr]:
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
        (ex.stop_gradient, lambda self, expr: self.number(expr.args[0], floating=True)),
        (ex.float_of_bits, _float_of_bits),
        (ex.random_bits, _random_bits),
        (ex.bits_of_float, _bits_of_float),
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

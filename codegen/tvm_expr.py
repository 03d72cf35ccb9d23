"""Expressions of the Kernel IR as TVMScript text, typed as they are written.

Integers that vary inside a tile are computed in 32 bits, so that a vector holds as many of them as
of floats; scalars and products that may be larger in 64. Floats are computed in the precision of the
tile that is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import sympy

from ..ir.errors import UnsupportedError
from ..ir.expr import Expr
from .tvm_layout import TENSOR_DTYPES, TILE_DTYPES
from .tvm_math import VECTOR, literal
from .tvm_names import Names, safe
from .tvm_random import random_bits
from .tvm_value import (
    AND,
    ATOM,
    NOT,
    OR,
    PRODUCT,
    RANK,
    RELATION,
    SUM,
    Text,
    Typing,
    bf16_rounded,
    bf16_widened,
    nan_aware,
    widest,
)

SMALL = 64  # 32 bits hold a coordinate times this much
SCALAR_CALLS = {"erf": "T.erf"}  # TVM has them for scalars only
VECTOR_CALLS = {"sin": "T.sin", "cos": "T.cos", "tan": "T.tan", "floor": "T.floor", "trunc": "T.trunc"}
COMPARE = {
    sympy.StrictLessThan: "<",
    sympy.LessThan: "<=",
    sympy.StrictGreaterThan: ">",
    sympy.GreaterThan: ">=",
    sympy.Equality: "==",
    sympy.Unequality: "!=",
}


def contains(expr: Expr, functions: tuple[str, ...] | dict[str, str]) -> bool:
    """Whether an expression calls one of these functions."""
    return any(type(node).__name__ in functions for node in sympy.preorder_traversal(expr))


class Printer(Typing):
    """Prints one statement's expressions; what stands for its names is looked up at the time."""

    def __init__(
        self, names: Names, let: Callable[[str, str], str], floats: str, *, address: bool = False
    ) -> None:
        super().__init__(let, floats, address=address)
        self.names = names
        self.shared: dict[Expr, Text] = {}
        self.often: Counter[Expr] = Counter()

    def text(self, expr: Expr, dtype: str) -> str:
        """The value of an expression as a dtype of TVM."""
        return self._to(self.print(expr), dtype).text

    def operand(self, expr: Expr, dtype: str) -> str:
        """The same as an operand of a sum."""
        return self._to(self.print(expr), dtype).inside(PRODUCT)

    def print(self, expr: Expr) -> Text:
        """An expression; what it repeats is computed once."""
        self.often = _repeats(expr)
        return self._print(expr)

    def _print(self, expr: Expr) -> Text:
        if expr in self.shared:
            return self.shared[expr]
        value = self._node(expr)
        # TVM cannot bind a vector of booleans to a name.
        if self.often[expr] > 1 and not value.text.isidentifier() and value.dtype != "bool":
            value = Text(self.let("c", value.text), value.dtype, value.varying)
            self.shared[expr] = value
        return value

    def _node(self, expr: Expr) -> Text:
        if expr in (sympy.true, sympy.false):
            return Text(f"T.bool({expr})", "bool")
        if expr.is_Integer:
            return self._integer(int(expr))
        if expr in (sympy.oo, -sympy.oo, sympy.nan):
            return Text(literal(str(expr).replace("oo", "inf"), self.floats), self.floats)
        if expr.is_number and (expr.is_Float or expr.is_Rational or expr.is_NumberSymbol):
            return Text(literal(float(expr), self.floats), self.floats)
        if expr.is_Symbol:
            return self._symbol(str(expr))
        if type(expr) in COMPARE:
            a, b = self._join(*(self._print(a) for a in expr.args))
            text = f"{a.inside(SUM)} {COMPARE[type(expr)]} {b.inside(SUM)}"
            return Text(text, "bool", a.varying or b.varying, RELATION)
        method = getattr(self, f"_{type(expr).__name__}", None)
        if method is not None:
            return method(expr)
        name = type(expr).__name__
        if name in VECTOR or name in VECTOR_CALLS or name in SCALAR_CALLS:
            return self._call(name, expr.args[0])
        raise UnsupportedError(f"CPU kernels cannot compute {name} in {expr}")

    # leaves ---------------------------------------------------------------------------------------

    def _integer(self, value: int) -> Text:
        if -(2**31) <= value < 2**31:
            return Text(str(value), "int32", binding=ATOM if value >= 0 else SUM, number=True)
        return Text(f"T.int64({value})", "int64", varying=True)  # what meets it must be as wide

    def _symbol(self, name: str) -> Text:
        names = self.names
        if name in names.coordinates:
            text = names.coordinates[name]
            return Text(text, "int32", True, ATOM if text.isidentifier() or text.isdigit() else SUM)
        if name in names.tiles:
            tile = names.tiles[name]
            return Text(names.element(tile), tile.storage, bool(tile.axes))
        if name in names.floats:
            return self._to(Text(safe(name), names.floats[name]), self.floats)
        return Text(safe(name), "bool" if name in names.truths else "int64")

    def _read(self, expr: Expr) -> Text:
        tensor = self.names.tensors[str(expr.args[0])]
        index, varying = [], False
        for size, i in zip(tensor.shape, expr.args[1:], strict=True):
            value = self._print(i)
            varying |= value.varying or tensor.dtype == "i64"  # its values may need all 64 bits
            last = safe(size) if isinstance(size, str) else str(size)
            last = f'T.Cast("int32", {last} - 1)' if value.dtype == "int32" else f"{last} - 1"
            index.append(value.text if value.number else f"T.max(T.min({value.text}, {last}), 0)")
        text = f"{safe(tensor.name)}[{', '.join(index)}]"
        return self._element(Text(text, TENSOR_DTYPES[tensor.dtype], varying), tensor.dtype)

    _readf = _read

    def _element(self, value: Text, dtype: str) -> Text:
        """An element of a tensor in the dtype of a tile."""
        wide = TILE_DTYPES[dtype]
        if wide == value.dtype:
            return value
        text = bf16_widened(value.text) if dtype == "bf16" else f'T.Cast("{wide}", {value.text})'
        return Text(text, wide, value.varying)

    # arithmetic -----------------------------------------------------------------------------------

    def _Add(self, expr: Expr) -> Text:
        # Terms that are subtracted come last.
        signed = sorted(((_negative(a), a) for a in expr.as_ordered_terms()), key=lambda t: t[0])
        terms = [(minus, self._print(-a if minus else a)) for minus, a in signed]
        fixed = [t for t in terms if not t[1].varying]
        moving = [t for t in terms if t[1].varying]
        integers = all(RANK[v.dtype] < RANK["float32"] for _, v in terms)
        if integers and moving and not self.address and not all(minus for minus, _ in fixed):
            # The scalar part first, in 64 bits; it is the same for the whole tile.
            terms = [(False, self._sum(fixed)), *moving]
        return self._sum(terms)

    def _sum(self, terms: list[tuple[bool, Text]]) -> Text:
        if len(terms) == 1 and not terms[0][0]:
            return terms[0][1]
        parts = self._join(*(v for _, v in terms), widening=True)
        if terms[0][0]:
            zero = self._to(Text("0", "int32", number=True), widest(parts))
            terms, parts = [(False, zero), *terms], [zero, *parts]
        text = parts[0].inside(SUM)
        for (minus, _), p in zip(terms[1:], parts[1:], strict=True):
            text += f" - {p.inside(PRODUCT)}" if minus else f" + {p.inside(PRODUCT)}"
        return Text(text, widest(parts), any(p.varying for p in parts), SUM)

    def _Mul(self, expr: Expr) -> Text:
        if expr.as_coeff_Mul()[0] == -1:
            return self._sum([(True, self._print(-expr))])
        above, below = [], []
        coefficient, rest = expr.as_coeff_Mul()
        factors = [] if coefficient == 1 else [coefficient]
        for factor in [*factors, *sympy.Mul.make_args(rest)]:
            if factor.is_Pow and factor.exp.is_number and factor.exp.is_negative:
                below.append(self._print(1 / factor))
            elif factor.is_Rational and not factor.is_Integer and factor.p == 1:
                below.append(self._print(sympy.Integer(factor.q)))
            else:
                above.append(self._print(factor))
        parts = self._join(*(above or [self._print(sympy.Integer(1))]), *below, widening=True)
        if (below and parts[0].dtype[0] != "f") or (parts[0].number and below):
            parts = [self._to(p, self.floats) for p in parts]
        top, bottom = parts[: len(parts) - len(below)], parts[len(parts) - len(below) :]
        top = self._wide(top)
        text = " * ".join([top[0].inside(PRODUCT), *(p.inside(ATOM) for p in top[1:])])
        for p in bottom:
            text += f" / {p.inside(ATOM)}"
        return Text(text, widest([*top, *bottom]), any(p.varying for p in parts), PRODUCT)

    def _wide(self, factors: list[Text]) -> list[Text]:
        """Products of 32-bit integers that may not fit are taken in 64 bits."""
        if widest(factors) != "int32" or all(f.number for f in factors):
            return factors
        small = all(abs(int(f.text)) <= SMALL for f in factors if f.number)
        if small and sum(not f.number for f in factors) == 1:
            return factors
        return [f if f.number else Text(f'T.Cast("int64", {f.text})', "int64", f.varying) for f in factors]

    def _Pow(self, expr: Expr) -> Text:
        base, exponent = expr.args
        if exponent.is_Integer and 2 <= int(exponent) <= 16:
            return self._power(self._named(self._print(base)), int(exponent))
        if exponent.is_number and exponent.is_negative:
            one, bottom = self._join(Text(literal(1.0, self.floats), self.floats), self._print(1 / expr))
            return Text(f"{one.text} / {bottom.inside(ATOM)}", one.dtype, bottom.varying, PRODUCT)
        value = self._float(self._print(base))
        if exponent == sympy.Rational(1, 2):
            return Text(f"T.sqrt({value.text})", value.dtype, value.varying)
        value, power = self._join(value, self._float(self._print(exponent)))
        return Text(f"T.pow({value.text}, {power.text})", value.dtype, value.varying or power.varying)

    def _power(self, base: Text, n: int) -> Text:
        if base.dtype == "int32":
            base = self._to(base, "int64")
        if n == 1:
            return base
        half = self._named(self._power(base, n // 2))
        text = f"{half.text} * {half.text}" + (f" * {base.text}" if n % 2 else "")
        return Text(text, base.dtype, base.varying, PRODUCT)

    def _call(self, name: str, argument: Expr) -> Text:
        value = self._float(self._print(argument))
        if name in VECTOR:
            return Text(
                VECTOR[name](value.inside(ATOM), value.dtype, self.let), value.dtype, value.varying, SUM
            )
        function = VECTOR_CALLS.get(name) or SCALAR_CALLS[name]
        return Text(f"{function}({value.text})", value.dtype, value.varying)

    def _stop_gradient(self, expr: Expr) -> Text:
        return self._float(self._print(expr.args[0]))

    def _Abs(self, expr: Expr) -> Text:
        value = self._print(expr.args[0])
        return Text(f"T.abs({value.text})", value.dtype, value.varying)

    # integers -------------------------------------------------------------------------------------

    def _operator(self, expr: Expr, symbol: str, binding: int = PRODUCT) -> Text:
        a, b = self._join(*(self._print(x) for x in expr.args))
        if a.number and not b.number:
            a = self._to(a, b.dtype)
        text = f"{a.inside(PRODUCT)} {symbol} {b.inside(ATOM)}"
        return Text(text, widest([a, b]), a.varying or b.varying, binding)

    def _floordiv(self, expr: Expr) -> Text:
        return self._quotient(expr, "//", "truncdiv")

    def _floormod(self, expr: Expr) -> Text:
        return self._quotient(expr, "%", "truncmod")

    def _quotient(self, expr: Expr, symbol: str, plain: str) -> Text:
        """Rounded towards negative infinity only where needed: for that TVM repeats the operands."""
        if not all(self.names.natural(a) for a in expr.args):
            return self._operator(expr, symbol)
        a, b = self._join(*(self._print(x) for x in expr.args))
        if a.number:
            a = self._to(a, b.dtype)
        return Text(f"T.{plain}({a.text}, {b.text})", widest([a, b]), a.varying or b.varying)

    def _bitwise(self, expr: Expr, function: str, *, wide: bool = False) -> Text:
        a, b = self._join(*(self._print(x) for x in expr.args))
        if wide or a.number:
            a, b = (self._to(v, "int64" if wide else b.dtype) for v in (a, b))
        elif b.number:
            b = self._to(b, a.dtype)
        return Text(f"T.{function}({a.text}, {b.text})", a.dtype, a.varying or b.varying)

    def _bitand(self, expr: Expr) -> Text:
        return self._bitwise(expr, "bitwise_and")

    def _bitor(self, expr: Expr) -> Text:
        return self._bitwise(expr, "bitwise_or")

    def _bitxor(self, expr: Expr) -> Text:
        return self._bitwise(expr, "bitwise_xor")

    def _shl(self, expr: Expr) -> Text:
        return self._bitwise(expr, "shift_left", wide=True)

    def _shr(self, expr: Expr) -> Text:
        return self._bitwise(expr, "shift_right")

    def _float_of_bits(self, expr: Expr) -> Text:
        value = self._to(self._print(expr.args[0]), "int32")
        return self._float(Text(f'T.reinterpret("float32", {value.text})', "float32", value.varying))

    def _random_bits(self, expr: Expr) -> Text:
        words = [self._print(a) for a in expr.args]
        key, x, y = (self._to(w, "uint32").text for w in words)
        return Text(random_bits(key, x, y, self.let), "int32", any(w.varying for w in words))

    def _bits_of_float(self, expr: Expr) -> Text:
        value = self._to(self._float(self._print(expr.args[0])), "float32")
        return Text(f'T.reinterpret("int32", {value.text})', "int32", value.varying)

    # choice ---------------------------------------------------------------------------------------

    def _minimum(self, expr: Expr) -> Text:
        return self._extreme(expr, "T.min")

    def _maximum(self, expr: Expr) -> Text:
        return self._extreme(expr, "T.max")

    def _extreme(self, expr: Expr, function: str) -> Text:
        """The better of two numbers; a NaN on either side stays."""
        constant = [x.is_number for x in expr.args]
        a, b = self._join(*(self._print(x) for x in expr.args))
        varying = a.varying or b.varying
        if a.dtype[0] != "f":
            return Text(f"{function}({a.text}, {b.text})", widest([a, b]), varying)
        if constant[1]:
            a, b, constant = b, a, [True, False]
        if not constant[0]:
            a, b = self._named(a), self._named(b)
        return Text(nan_aware(a.text, b.text, function, a.dtype, constant[0]), a.dtype, varying)

    def _where(self, expr: Expr) -> Text:
        c = self._print(expr.args[0])
        a, b = self._join(*(self._print(x) for x in expr.args[1:]))
        if a.number and b.number:
            a, b = self._to(a, "int64"), self._to(b, "int64")
        elif a.number or b.number:
            dtype = b.dtype if a.number else a.dtype
            a, b = self._to(a, dtype), self._to(b, dtype)
        varying = c.varying or a.varying or b.varying
        return Text(f"T.Select({c.text}, {a.text}, {b.text})", a.dtype, varying)

    def _cast(self, expr: Expr) -> Text:
        dtype, value = str(expr.args[0]), self._print(expr.args[1])
        if dtype in ("f16", "bf16"):
            value = self._named(self._to(self._float(value), "float32"))
            return replace(value, text=self.rounded(value.text, dtype))
        return self._element(self._to(value, TENSOR_DTYPES[dtype]), dtype)

    def rounded(self, value: str, dtype: str) -> str:
        """A value of a tile's storage dtype, rounded to the tile's own dtype."""
        if dtype == "bf16":
            return bf16_rounded(value)
        if TENSOR_DTYPES[dtype] == TILE_DTYPES[dtype]:
            return value
        return f'T.Cast("{TILE_DTYPES[dtype]}", T.Cast("{TENSOR_DTYPES[dtype]}", {value}))'

    # truth ----------------------------------------------------------------------------------------

    def _And(self, expr: Expr) -> Text:
        return self._logical(expr, " and ", AND)

    def _Or(self, expr: Expr) -> Text:
        return self._logical(expr, " or ", OR)

    def _logical(self, expr: Expr, word: str, binding: int) -> Text:
        parts = [self._print(a) for a in sorted(expr.args, key=sympy.default_sort_key)]
        text = word.join(p.inside(RELATION) for p in parts)
        return Text(text, "bool", any(p.varying for p in parts), binding)

    def _Not(self, expr: Expr) -> Text:
        value = self._print(expr.args[0])
        return Text(f"not {value.inside(ATOM)}", "bool", value.varying, NOT)

    def _Xor(self, expr: Expr) -> Text:
        return self._print(expr.to_nnf())

    def _ITE(self, expr: Expr) -> Text:
        return self._print(expr.to_nnf())


def _negative(term: Expr) -> bool:
    return bool(term.as_coeff_Mul()[0].is_negative)


def _repeats(expr: Expr) -> Counter[Expr]:
    """How often each compound subexpression is needed; the inside of a repeated one counts once."""
    often: Counter[Expr] = Counter()
    todo = [expr]
    while todo:
        node = todo.pop()
        if not node.args:
            continue
        often[node] += 1
        if often[node] == 1:
            todo += node.args
    return often

"""The stand-ins a traced function computes with: expressions of the indices and captured numbers.

`Value` is an expression of the indices; operators on it write terms (frontend/term.py). `Number` is
a captured Python number: arithmetic among captured numbers is recorded as a *recipe*, run again at
every call, so that a number that is only added, subtracted or compared becomes a parameter. Where a
number has to be known it *bakes*: its value enters the term, and so the key.
"""

from __future__ import annotations

import math
import operator
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..term import Term
from .error import trace_error
from .gradient import stopped

if TYPE_CHECKING:
    from .captures import Trace

NO_BRANCH = (
    "Write torch.where(condition, a, b), or join conditions with & | ~ in place of 'if', 'and', 'or', "
    "'not' and chained comparisons"
)


def _pair(op: str) -> Any:
    """The methods of a binary operator: with self on the left, with self on the right."""

    def left(self: Operators, other: Any) -> Any:
        return self.trace.operate(op, self, other)

    def right(self: Operators, other: Any) -> Any:
        return self.trace.operate(op, other, self)

    return left, right


class Operators:
    """Python's operators, on anything a traced function computes with; `trace.operate` carries them out."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]
    __array_priority__ = 1000
    trace: Trace

    __add__, __radd__ = _pair("add")
    __sub__, __rsub__ = _pair("sub")
    __mul__, __rmul__ = _pair("mul")
    __truediv__, __rtruediv__ = _pair("div")
    __floordiv__, __rfloordiv__ = _pair("floordiv")
    __mod__, __rmod__ = _pair("mod")
    __pow__, __rpow__ = _pair("pow")
    __and__, __rand__ = _pair("bitand")
    __or__, __ror__ = _pair("bitor")
    __xor__, __rxor__ = _pair("bitxor")
    __lshift__, __rlshift__ = _pair("shl")
    __rshift__, __rrshift__ = _pair("shr")
    __lt__, __le__, __gt__, __ge__ = (_pair(op)[0] for op in ("lt", "le", "gt", "ge"))
    __eq__, __ne__ = _pair("eq")[0], _pair("ne")[0]  # type: ignore[assignment]

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __neg__(self) -> Any:
        return self.trace.operate("neg", self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return self.trace.operate("abs", self)

    def __invert__(self) -> Any:
        return self.trace.operate("invert", self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .torch_functions import call

        return call(function, args, kwargs or {})

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        from .torch_functions import call

        return call(function, args, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from .torch_functions import call

        return call(function, args, kwargs)


class Value(Operators):
    """An expression of the indices, of kind 'bool', 'int' or 'float'; it has no value while tracing."""

    __slots__ = ("kind", "term", "trace")

    def __init__(self, trace: Trace, term: Term, kind: str) -> None:
        if kind == "float" and trace.detaches():
            term = stopped(term)
        self.trace, self.term, self.kind = trace, term, kind

    def __repr__(self) -> str:
        from ..term import show

        return f"<{self.kind} {show(self.term)}>"

    def __getattr__(self, name: str) -> Any:
        from .torch_functions import method

        return method(self, name)

    def __bool__(self) -> bool:
        raise self._no_value("branches on an index", NO_BRANCH)

    def __index__(self) -> int:
        raise self._no_value(
            "needs an index as a Python integer",
            "Capture a tensor to look values up by an index; range() and lists take Python integers only",
        )

    def __int__(self) -> int:
        raise self._no_value("turns an index into a Python integer", "Use .to(torch.int32)")

    def __float__(self) -> float:
        raise self._no_value("turns an index into a Python float", "Use .float() and torch functions")

    def __len__(self) -> int:
        raise self._no_value("takes the length of an index", "An index is a scalar")

    def __iter__(self) -> Any:
        raise self._no_value("iterates over an index", "An index is a scalar")

    def __contains__(self, item: object) -> bool:
        raise self._no_value("looks for a member of an index", "An index is a scalar")

    def __getitem__(self, item: object) -> Any:
        raise self._no_value("subscripts an index", "An index is a scalar")

    def _no_value(self, does: str, fix: str) -> Exception:
        said = f"{self.trace.role} {does}; expected operators only, for an index has no value while tracing"
        return trace_error(said, fix)


_PYTHON = {
    **{n: getattr(operator, n) for n in ("add", "sub", "mul", "floordiv", "mod", "pow", "neg", "abs")},
    **{n: getattr(operator, n) for n in ("lt", "le", "gt", "ge", "eq", "ne", "invert")},
    **{"div": operator.truediv, "bitand": operator.and_, "bitor": operator.or_, "bitxor": operator.xor},
    **{"shl": operator.lshift, "shr": operator.rshift, "min": min, "max": max},
    **{"floor": math.floor, "ceil": math.ceil},
}
COMPARISONS = frozenset(("lt", "le", "gt", "ge", "eq", "ne"))


def run_recipe(recipe: Any, slots: Any) -> Any:
    """The value of a recipe: a slot, a number, or an operation on recipes."""
    if not isinstance(recipe, tuple):
        return recipe
    if recipe[0] == "slot":
        return slots[recipe[1]]
    return _PYTHON[recipe[0]](*(run_recipe(r, slots) for r in recipe[1:]))


def is_symbolic(value: Any) -> bool:
    """Whether value is a number that torch's tracers know as an expression: a SymInt or a SymFloat."""
    return type(value).__name__ in ("SymInt", "SymFloat") and type(value).__module__ == "torch"


def kind_of(value: Any) -> str:
    """'int' or 'float' of a Python number, or of one of torch's tracers."""
    return "float" if isinstance(value, float) or type(value).__name__ == "SymFloat" else "int"


def settled(value: Any) -> int | float:
    """The number that a symbolic one stands for, and has to be from now on; others as they are."""
    return (float if kind_of(value) == "float" else int)(value) if is_symbolic(value) else value


def plain_number(value: Any) -> Any:
    """A number as int or float; a symbolic one as it is."""
    if is_symbolic(value):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


class Number(Operators):
    """A captured Python number, or one computed from captured numbers."""

    __slots__ = ("recipe", "trace", "value")

    def __init__(self, trace: Trace, recipe: Any, value: int | float) -> None:
        self.trace, self.recipe, self.value = trace, recipe, value

    @property
    def __class__(self) -> type:  # type: ignore[override]
        if is_symbolic(self.value):
            return float if kind_of(self.value) == "float" else int
        return type(self.value)  # isinstance(captured, int) answers as it would for the number

    def bake(self) -> int | float:
        """The number itself; from here on it is part of the key."""
        self.trace.bake(self.recipe)
        return settled(self.value)

    def __bool__(self) -> bool:
        self.trace.expect(("ne", self.recipe, 0), bool(self.value))
        return bool(self.value)

    def __index__(self) -> int:
        return operator.index(self.bake())  # type: ignore[arg-type]

    def __int__(self) -> int:
        return int(self.bake())

    def __float__(self) -> float:
        return float(self.bake())

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self.bake())

    def __str__(self) -> str:
        return str(self.bake())

    def __repr__(self) -> str:
        return repr(self.bake())

    def __format__(self, spec: str) -> str:
        return format(self.bake(), spec)

    def __round__(self, *digits: int) -> Any:
        return round(self.bake(), *digits)

    def __floor__(self) -> int:
        return self.bake().__floor__()

    def __ceil__(self) -> int:
        return self.bake().__ceil__()

    def __trunc__(self) -> int:
        return self.bake().__trunc__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bake(), name)


def is_number(value: object) -> bool:
    """Whether value is a captured or plain Python number (or truth value)."""
    return type(value) in (Number, int, float, bool)


def numbers(op: str, *args: Any) -> Any:
    """An operation on captured numbers: recorded, and done at once."""
    trace = next(a.trace for a in args if type(a) is Number)
    recipe = (op, *(a.recipe if type(a) is Number else a for a in args))
    value = _PYTHON[op](*(a.value if type(a) is Number else a for a in args))
    if op in COMPARISONS:
        trace.expect(recipe, value)
        return value
    return Number(trace, recipe, value)

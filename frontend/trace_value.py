"""The stand-ins a traced function computes with: expressions, captured numbers, captured tensors.

`Value` is an expression of the indices; operators on it write terms (frontend/term.py). `Number` is
a captured Python number: arithmetic among captured numbers is recorded as a *recipe*, run again at
every call, so that a number that is only added, subtracted or compared becomes a parameter. Where a
number has to be known it *bakes*: its value enters the term, and so the key. `Captured` is a captured
tensor: indexing it writes a read, its contents are never looked at.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from .term import FALSE, TRUE, Term, both, constant, either, negate
from .trace_error import trace_error

if TYPE_CHECKING:
    from .trace_capture import Trace

NO_BRANCH = (
    "Write torch.where(condition, a, b), or join conditions with & | ~ in place of 'if', 'and', 'or', "
    "'not' and chained comparisons"
)


class Operators:
    """Python's operators, on anything a traced function computes with."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]
    __array_priority__ = 1000

    def __add__(self, other: Any) -> Any:
        return operate("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return operate("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return operate("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return operate("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return operate("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return operate("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return operate("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return operate("div", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return operate("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return operate("floordiv", other, self)

    def __mod__(self, other: Any) -> Any:
        return operate("mod", self, other)

    def __rmod__(self, other: Any) -> Any:
        return operate("mod", other, self)

    def __divmod__(self, other: Any) -> Any:
        return operate("floordiv", self, other), operate("mod", self, other)

    def __rdivmod__(self, other: Any) -> Any:
        return operate("floordiv", other, self), operate("mod", other, self)

    def __pow__(self, other: Any) -> Any:
        return operate("pow", self, other)

    def __rpow__(self, other: Any) -> Any:
        return operate("pow", other, self)

    def __and__(self, other: Any) -> Any:
        return operate("bitand", self, other)

    def __rand__(self, other: Any) -> Any:
        return operate("bitand", other, self)

    def __or__(self, other: Any) -> Any:
        return operate("bitor", self, other)

    def __ror__(self, other: Any) -> Any:
        return operate("bitor", other, self)

    def __xor__(self, other: Any) -> Any:
        return operate("bitxor", self, other)

    def __rxor__(self, other: Any) -> Any:
        return operate("bitxor", other, self)

    def __lshift__(self, other: Any) -> Any:
        return operate("shl", self, other)

    def __rlshift__(self, other: Any) -> Any:
        return operate("shl", other, self)

    def __rshift__(self, other: Any) -> Any:
        return operate("shr", self, other)

    def __rrshift__(self, other: Any) -> Any:
        return operate("shr", other, self)

    def __lt__(self, other: Any) -> Any:
        return operate("lt", self, other)

    def __le__(self, other: Any) -> Any:
        return operate("le", self, other)

    def __gt__(self, other: Any) -> Any:
        return operate("gt", self, other)

    def __ge__(self, other: Any) -> Any:
        return operate("ge", self, other)

    def __eq__(self, other: Any) -> Any:
        return operate("eq", self, other)

    def __ne__(self, other: Any) -> Any:
        return operate("ne", self, other)

    def __neg__(self) -> Any:
        return operate("neg", self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return operate("abs", self)

    def __invert__(self) -> Any:
        return operate("invert", self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .trace_torch import call

        return call(function, args, kwargs or {})

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        from .trace_torch import call

        return call(function, args, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from .trace_torch import call

        return call(function, args, kwargs)


class Value(Operators):
    """An expression of the indices, of kind 'bool', 'int' or 'float'; it has no value while tracing."""

    __slots__ = ("kind", "term", "trace")

    def __init__(self, trace: Trace, term: Term, kind: str) -> None:
        self.trace, self.term, self.kind = trace, term, kind

    def __repr__(self) -> str:
        from .term import show

        return f"<{self.kind} {show(self.term)}>"

    def __getattr__(self, name: str) -> Any:
        from .trace_torch import method

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
}
_COMPARE = frozenset(("lt", "le", "gt", "ge", "eq", "ne"))


def run_recipe(recipe: Any, slots: Any) -> Any:
    """The value of a recipe: a slot, a number, or an operation on recipes."""
    if not isinstance(recipe, tuple):
        return recipe
    if recipe[0] == "slot":
        return slots[recipe[1]]
    return _PYTHON[recipe[0]](*(run_recipe(r, slots) for r in recipe[1:]))


class Number(Operators):
    """A captured Python number, or one computed from captured numbers."""

    __slots__ = ("recipe", "trace", "value")

    def __init__(self, trace: Trace, recipe: Any, value: int | float) -> None:
        self.trace, self.recipe, self.value = trace, recipe, value

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.value)  # isinstance(captured, int) answers as it would for the number

    def bake(self) -> int | float:
        """The number itself; from here on it is part of the key."""
        self.trace.bake(self.recipe)
        return self.value

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
    if op in _COMPARE:
        trace.expect(recipe, value)
        return value
    return Number(trace, recipe, value)


# ---- operations on values ----

_BAKES_RIGHT = frozenset(("floordiv", "mod", "shl", "shr", "pow"))
_BAKES = frozenset(("mul", "div", "bitand"))


def operate(op: str, *args: Any) -> Any:
    """One operation on stand-ins and numbers, by its name in terms (bitand serves `&` on truth values)."""
    if all(map(is_number, args)):
        return numbers(op, *args)
    trace = next(a.trace for a in args if type(a) in (Value, Number, Captured))
    if op in _BAKES_RIGHT or (op in _BAKES and not trace.float_params):
        bakes_left = op in _BAKES
        args = tuple(a.bake() if type(a) is Number and (i or bakes_left) else a for i, a in enumerate(args))
    values = [value_of(trace, a) for a in args]
    return _OPERATE[op](op, *values)


def value_of(trace: Trace, x: Any) -> Value:
    """x as an expression."""
    if type(x) is Value:
        return x
    if type(x) is Number:
        return trace.number(x)
    if isinstance(x, (bool, int, float)):
        kind = "bool" if isinstance(x, bool) else "int" if isinstance(x, int) else "float"
        return Value(trace, constant(x), kind)
    if type(x) is Captured:
        return x.element()
    if getattr(x, "shape", None) == () and hasattr(x, "item"):
        trace.memo = False  # made inside the function: what it holds was read just now
        return value_of(trace, x.item())
    shape = f" of shape {tuple(x.shape)}" if hasattr(x, "shape") else ""
    raise trace_error(
        f"{trace.role}: expected an index, a number or an element of a captured tensor; "
        f"got {type(x).__name__}{shape}"
    )


def as_int(x: Value) -> Value:
    """A truth value as 0 or 1; anything else as it is."""
    return x if x.kind != "bool" else Value(x.trace, ("where", x.term, 1, 0), "int")


def as_float(x: Value) -> Value:
    """An integer as torch's default float, float32; a float as it is."""
    return x if x.kind == "float" else Value(x.trace, ("cast", "f32", as_int(x).term), "float")


def as_bool(x: Value) -> Value:
    """x != 0."""
    return x if x.kind == "bool" else Value(x.trace, ("ne", x.term, 0), "bool")


def _make(op: str, *args: Value) -> Value:
    kind = "float" if any(a.kind == "float" for a in args) else "int"
    return Value(args[0].trace, (op, *(as_int(a).term for a in args)), kind)


def _arithmetic(op: str, a: Value, b: Value) -> Value:
    if a.kind == b.kind == "bool":
        if op == "sub":
            raise trace_error(f"{a.trace.role} subtracts truth values", "Use a ^ b, or a & ~b")
        return Value(a.trace, (both if op == "mul" else either)(a.term, b.term), "bool")
    return _make(op, a, b)


def _divide(op: str, a: Value, b: Value) -> Value:
    return _make("div", as_float(a), as_float(b))


def _whole(op: str, a: Value, b: Value) -> Value:
    if b.term in (0, FALSE):
        raise trace_error(f"{a.trace.role} divides by zero")
    if "float" not in (a.kind, b.kind):
        return _make(op, a, b) if b.term != 1 else a if op == "floordiv" else a.trace.constant(0)
    quotient = _make("floor", _make("div", as_float(a), as_float(b)))
    return quotient if op == "floordiv" else a - quotient * b


def _power(op: str, a: Value, b: Value) -> Value:
    exponent = b.term if isinstance(b.term, int) else None
    if isinstance(b.term, tuple) and b.term[0] == "f":
        exponent = float.fromhex(b.term[1])
        if exponent == 0.5 or exponent == -0.5:
            root = _make("sqrt", as_float(a))
            return root if exponent > 0 else 1.0 / root
        a = as_float(a)
    if exponent is not None and exponent in (1, 2, 3, 4):
        out = a
        for _ in range(int(exponent) - 1):
            out = _make("mul", out, a)
        return out
    if a.term == 2 and b.kind == "int":
        return _make("shl", a.trace.constant(1), b)
    if a.kind == "int" and b.kind == "int":
        raise trace_error(
            f"{a.trace.role} raises an integer to an integer power; expected a constant power of 1 to 4, "
            "or 2 as the base",
            "Use .float() for a power of floats",
        )
    if exponent == -1:
        return 1.0 / a
    if a.term == 2 or a.term == constant(2.0):
        return _make("exp2", as_float(b))
    return _make("pow", as_float(a), as_float(b))


def _bits(op: str, a: Value, b: Value) -> Value:
    if "float" in (a.kind, b.kind):
        raise trace_error(f"{a.trace.role}: bit operations expect truth values or integers; got a float")
    if not a.kind == b.kind == "bool":
        return _make(op, a, b)
    if op == "bitxor":
        return Value(a.trace, _differ(a.term, b.term), "bool")
    return Value(a.trace, (both if op == "bitand" else either)(a.term, b.term), "bool")


def _differ(a: Term, b: Term) -> Term:
    return either(both(a, negate(b)), both(negate(a), b))


def _shift(op: str, a: Value, b: Value) -> Value:
    if "float" in (a.kind, b.kind):
        raise trace_error(f"{a.trace.role}: a shift expects integers; got a float")
    return _make(op, a, b)


def _compare(op: str, a: Value, b: Value) -> Value:
    if a.kind == b.kind == "bool" and op in ("eq", "ne"):
        differ = _differ(a.term, b.term)
        return Value(a.trace, differ if op == "ne" else negate(differ), "bool")
    return Value(a.trace, (op, as_int(a).term, as_int(b).term), "bool")


def _extreme(op: str, a: Value, b: Value) -> Value:
    if a.kind == b.kind == "bool":
        return Value(a.trace, (both if op == "min" else either)(a.term, b.term), "bool")
    return _make(op, a, b)


def _unary(op: str, a: Value) -> Value:
    if a.kind == "bool":
        raise trace_error(f"{a.trace.role}: {op} expects a number; got a truth value", "Use ~ to negate it")
    return _make(op, a)


def _invert(op: str, a: Value) -> Value:
    if a.kind == "float":
        raise trace_error(f"{a.trace.role}: ~ expects a truth value or an integer; got a float")
    return Value(a.trace, negate(a.term), "bool") if a.kind == "bool" else -a - 1


def select(c: Value, a: Value, b: Value) -> Value:
    """`a` where the condition holds, else `b`."""
    if c.kind != "bool":
        raise trace_error(f"{c.trace.role}: where expects a truth value as its condition; got {c.kind}")
    if c.term in (TRUE, FALSE):
        return a if c.term == TRUE else b
    if a.kind == b.kind == "bool":
        return Value(c.trace, either(both(c.term, a.term), both(negate(c.term), b.term)), "bool")
    kind = "float" if "float" in (a.kind, b.kind) else "int"
    return Value(c.trace, ("where", c.term, as_int(a).term, as_int(b).term), kind)


_OPERATE = {
    **dict.fromkeys(("add", "sub", "mul"), _arithmetic),
    **dict.fromkeys(("floordiv", "mod"), _whole),
    **dict.fromkeys(("bitand", "bitor", "bitxor"), _bits),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(_COMPARE, _compare),
    **dict.fromkeys(("min", "max"), _extreme),
    **dict.fromkeys(("neg", "abs"), _unary),
    "div": _divide,
    "pow": _power,
    "invert": _invert,
}

# ---- captured tensors ----

DTYPES = {
    **{f"int{n}": f"i{n}" for n in (8, 16, 32, 64)},
    **{f"float{n}": f"f{n}" for n in (16, 32, 64)},
    **{"uint8": "u8", "bfloat16": "bf16", "bool": "bool"},
}


def dtype_name(dtype: object) -> str | None:
    """'i32' for torch.int32 and NumPy's int32; None for a dtype that kernels cannot read."""
    return DTYPES.get(str(dtype).removeprefix("torch."))


class Captured(Operators):
    """A captured tensor, possibly indexed in part: `indices` holds a term for each dimension, or None."""

    __slots__ = ("indices", "number", "tensor", "trace")

    def __init__(self, trace: Trace, number: int, tensor: Any, indices: tuple[Term | None, ...]) -> None:
        self.trace, self.number, self.tensor, self.indices = trace, number, tensor, indices

    def __repr__(self) -> str:
        return f"<captured {self.tensor.dtype} tensor of shape {tuple(self.tensor.shape)}>"

    def __getitem__(self, items: Any) -> Any:
        free = [d for d, i in enumerate(self.indices) if i is None]
        items = list(items) if isinstance(items, tuple) else [items]
        if any(i is Ellipsis for i in items):
            at = next(n for n, i in enumerate(items) if i is Ellipsis)
            items[at : at + 1] = [slice(None)] * (len(free) - len(items) + 1)
        if len(items) > len(free):
            raise trace_error(
                f"{self.trace.role} reads a captured tensor of shape {tuple(self.tensor.shape)} with too many "
                f"indices: expected at most {len(free)}; got {len(items)}"
            )
        indices = list(self.indices)
        for d, item in zip(free, items, strict=False):
            if not (isinstance(item, slice) and item == slice(None)):
                indices[d] = self._index(d, item)
        rest = Captured(self.trace, self.number, self.tensor, tuple(indices))
        return rest if None in indices else rest.element()

    def _index(self, d: int, item: Any) -> Term:
        """The term of one index. A constant one counts from the end when negative, as in torch."""
        if item is None or isinstance(item, (slice, list, tuple)):
            raise trace_error(
                f"{self.trace.role} reads a captured tensor at {item!r}; expected an integer expression"
            )
        if is_number(item) and item < 0:
            item = self._size(d) + item
        index = value_of(self.trace, item)
        if index.kind != "int":
            raise trace_error(
                f"{self.trace.role} reads a captured tensor at a {index.kind}; expected an integer expression",
                "Convert it with .to(torch.int32)",
            )
        return index.term

    def element(self) -> Value:
        """What is read once every dimension has its index."""
        if None in self.indices:
            shape = tuple(self.tensor.shape)
            raise trace_error(
                f"{self.trace.role} computes with a whole captured tensor of shape {shape}; expected one "
                f"element, by {len(shape)} indices",
                "Index it by b, h, q, kv or expressions of them first, then compute",
            )
        kind = dtype_name(self.tensor.dtype) or ""
        floating = kind[0] == "f" or kind == "bf16"
        read = ("readf" if floating else "read", self.number, *self.indices)
        value = Value(self.trace, read, "float" if floating else "int")
        return as_bool(value) if kind == "bool" else value

    def _size(self, d: int) -> Number:
        return self.trace.size(self.number, d)

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self._size(d) for d, i in enumerate(self.indices) if i is None)

    def size(self, d: int | None = None) -> Any:
        return self.shape if d is None else self.shape[d]

    def __len__(self) -> int:
        return self.shape[0].bake()

    @property
    def ndim(self) -> int:
        return self.indices.count(None)

    def dim(self) -> int:
        return self.ndim

    @property
    def dtype(self) -> Any:
        return self.tensor.dtype

    @property
    def device(self) -> Any:
        return self.tensor.device

    def detach(self) -> Captured:
        return self

    def contiguous(self) -> Captured:
        return self

    def __getattr__(self, name: str) -> Any:
        from .trace_torch import method

        return method(self.element() if None not in self.indices else self, name)

    def __bool__(self) -> bool:
        raise trace_error(
            f"{self.trace.role} branches on a captured tensor, whose contents are read at each call", NO_BRANCH
        )

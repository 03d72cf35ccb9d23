"""Arrays of a JAX program as functions of their indices.

`Reader.of(value)` gives the term of element [i0, i1, ...] of an array. Pointwise operations act on terms,
those that move elements act on indices, `iota` is an index; anything else is a *leaf*, read as it is:
`readf("%7", i0, i1)`. So all ways to write a mask or a score end in one term, and nothing is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ...ir.errors import GossamerError
from ..capture.terms import divided, kind_of, linear, number, size_of, tidy
from ..term import Term, constant, rename
from ..term_expr import from_expr
from ..trace.captures import Trace
from ..trace.gradient import stopped
from ..trace.operate import as_bool, as_float, as_int, operate
from ..trace.tensor import dtype_name
from ..trace.torch_functions import FUNCTIONS
from ..trace.value import Value as Stand
from .program import Op, Value, apply

MAX_SIZE = 2000  # operations of a term
LARGE = 1e4  # a factor whose products with the parts of a sum may lose what the sum has
MAX_ENTRIES = 1 << 26  # of a constant that is still worth looking at


class LeftAlone(Exception):
    """Why a part of a program is left to XLA."""


@dataclass(frozen=True)
class Array:
    """term: of element [i0, i1, ...]; kind: 'bool', 'int' or 'float'."""

    shape: tuple[int, ...]
    term: Term
    kind: str

    def at(self, indices: Sequence[Term]) -> Term:
        """The element at other indices."""
        return rename(self.term, {f"i{d}": index for d, index in enumerate(indices)})

    @property
    def sizes(self) -> dict[str, int]:
        return {f"i{d}": n for d, n in enumerate(self.shape)}


def kind_of_dtype(dtype: Any) -> str:
    name = np.dtype(dtype).kind if np.dtype(dtype).kind in "biu" else "f"
    return {"b": "bool", "i": "int", "u": "int", "f": "float"}[name]


class Reader:
    """The terms of one program's arrays. leaves: the arrays that terms read, by name."""

    def __init__(self) -> None:
        self.trace = Trace("program", float_params=True)
        self.leaves: dict[str, Value] = {}
        self._names: dict[Value, str] = {}
        self._known: dict[Value, Array] = {}

    def of(self, value: Value) -> Array:
        """Raises LeftAlone for what kernels cannot read."""
        if value not in self._known:
            self._known[value] = self._read(value)
        return self._known[value]

    def leaf(self, value: Value) -> Array:
        """The array itself, as it is."""
        dtype = dtype_name(value.dtype)
        if dtype is None:
            raise LeftAlone(f"it reads an array of {value.dtype}, which kernels do not")
        name = self._names.setdefault(value, f"%{len(self._names)}")
        self.leaves[name] = value
        indices = [0 if n == 1 else f"i{d}" for d, n in enumerate(value.shape)] or [0]
        kind = kind_of_dtype(value.dtype)
        read = ("readf" if kind == "float" else "read", name, *indices)
        return Array(value.shape, ("ne", read, 0) if kind == "bool" else read, kind)

    def hold(self, value: Value) -> None:
        """Let a value be a leaf, whatever it is computed from."""
        self._known[value] = self.leaf(value)

    def stand(self, value: Value) -> Stand:
        """The element of an operand, for the rules that masks are traced by."""
        array = self.of(value)
        return Stand(self.trace, array.term, array.kind)

    def _read(self, value: Value) -> Array:
        found = None
        try:
            if value.op is not None and value.op.name == "split":
                found = self._split(value, value.op)
            elif value.op is not None and value is value.op.outputs[0]:
                found = self._operate(value, value.op)
            elif value.const is not None:
                found = _constant(np.asarray(value.const))
        except (GossamerError, TypeError, ValueError, IndexError):
            found = None  # no rule for it: read what it computes
        if found is not None and size_of(found) <= MAX_SIZE:
            found = tidy(found)
            if not _cancels(found):
                return Array(value.shape, found, kind_of_dtype(value.dtype))
        return self.leaf(value)

    def _operate(self, value: Value, op: Op) -> Term | None:
        if op.name in MOVES:
            return MOVES[op.name](self.of(op.inputs[0]), op)
        if value.shape == () and op.inputs and all(x.const is not None and x.shape == () for x in op.inputs):
            with jax.ensure_compile_time_eval():
                return _constant(np.asarray(apply(op.eqn, op.params, [x.const for x in op.inputs])[0]))
        if op.name == "iota":
            index = Stand(self.trace, f"i{op.params['dimension']}", "int")
            return (as_float(index) if kind_of_dtype(value.dtype) == "float" else index).term
        if op.name == "convert_element_type":
            return self._converted(op.inputs[0], value)
        rule = POINTWISE.get(op.name)
        return None if rule is None else rule(self, op)

    def _split(self, value: Value, op: Op) -> Term:
        axis, sizes = op.params["axis"], op.params["sizes"]
        first = sum(int(n) for n in sizes[: op.outputs.index(value)])
        array = self.of(op.inputs[0])
        at: list[Term] = [f"i{d}" for d in range(len(array.shape))]
        at[axis] = ("add", f"i{axis}", first)
        return array.at(at)

    def _converted(self, given: Value, value: Value) -> Term | None:
        """Roundings of floats are left out: kernels compute in float32 or wider, and round at the end."""
        x, kind = self.stand(given), kind_of_dtype(value.dtype)
        if kind == "int" and x.kind != "bool":
            wider = x.kind == "int" and np.dtype(value.dtype).itemsize >= np.dtype(given.dtype).itemsize
            return x.term if wider or _fits(x.term, self.of(given).sizes) else None
        return {"bool": as_bool, "int": as_int, "float": as_float}[kind](x).term


def _cancels(term: Term) -> bool:
    """Whether a term multiplies a sum by a large number, which expressions would distribute: parts cancel."""
    if not isinstance(term, tuple) or term[0] != "mul" or kind_of(term) != "float":
        return False
    factors = [number(part) for part in term[1:]]
    sums = [isinstance(part, tuple) and part[0] in ("add", "sub") for part in term[1:]]
    return any(f is not None and abs(f) >= LARGE for f in factors) and any(sums)


def _fits(term: Term, sizes: dict[str, int]) -> bool:
    """Whether an integer is an index, or a small number of them."""
    return all(t == 1 or (isinstance(t, str) and t in sizes) for t in linear(term))


def _constant(array: np.ndarray) -> Term | None:
    """The element of a constant: a number, a progression, or a matrix of two values in closed form."""
    if array.size == 0 or array.size > MAX_ENTRIES:
        return None
    first = array.flat[0]
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        return None
    if array.size == 1 or (array == first).all():
        return constant(first.item() if array.dtype.kind in "biu" else float(first))
    at = [d for d, n in enumerate(array.shape) if n > 1]
    flat = array.reshape([array.shape[d] for d in at])
    if len(at) == 1 and array.dtype.kind in "iu":
        step = int(flat[1]) - int(flat[0])
        if (np.diff(flat.astype(np.int64)) == step).all():
            return ("add", ("mul", step, f"i{at[0]}"), int(first))
    return _matrix(flat, f"i{at[0]}", f"i{at[1]}") if len(at) == 2 else None


def _matrix(array: np.ndarray, row: Term, column: Term) -> Term | None:
    from ...passes.recover import recover

    low, high = array.min(), array.max()
    chosen = array == high
    if not (chosen | (array == low)).all():
        return None
    mask, tables = recover(chosen)
    if tables:
        return None
    condition = rename(from_expr(mask.predicate), {"q": row, "k": column})
    if array.dtype == np.bool_:
        return condition
    number = float if array.dtype.kind not in "iu" else int
    return ("where", condition, constant(number(high)), constant(number(low)))


# elements that move ---------------------------------------------------------------------------------


def _broadcast(array: Array, op: Op) -> Term:
    places = op.params["broadcast_dimensions"]
    return array.at([0 if n == 1 else f"i{int(d)}" for n, d in zip(array.shape, places, strict=True)])


def _transpose(array: Array, op: Op) -> Term:
    order = [int(d) for d in op.params["permutation"]]
    return array.at([f"i{order.index(d)}" for d in range(len(order))])


def _squeeze(array: Array, op: Op) -> Term:
    gone = {int(d) % len(array.shape) for d in op.params["dimensions"]}
    left = iter(range(len(array.shape)))
    return array.at([0 if d in gone else f"i{next(left)}" for d in range(len(array.shape))])


def _slice(array: Array, op: Op) -> Term:
    steps = op.params["strides"] or (1,) * len(array.shape)
    pairs = zip(op.params["start_indices"], steps, strict=True)
    return array.at([("add", ("mul", int(step), f"i{d}"), int(lo)) for d, (lo, step) in enumerate(pairs)])


def _reverse(array: Array, op: Op) -> Term:
    gone = {int(d) for d in op.params["dimensions"]}
    return array.at([("sub", n - 1, f"i{d}") if d in gone else f"i{d}" for d, n in enumerate(array.shape)])


def _reshape(array: Array, op: Op) -> Term | None:
    if op.params.get("dimensions") is not None:
        return None
    shape = op.outputs[0].shape
    return array.at(reshaped(array.shape, shape))


def reshaped(old: tuple[int, ...], new: tuple[int, ...]) -> list[Term]:
    """The indices into an array of shape `old` of the element [i0, i1, ...] of its reshape to `new`.

    >>> reshaped((6, 4), (2, 3, 1, 4))
    [('add', ('mul', 3, 'i0'), 'i1'), 'i3']
    """
    sizes = {f"i{d}": n for d, n in enumerate(new)}
    found: list[Term] = [0] * len(old)
    outer, inner = len(new), len(old)
    while inner > 0 and outer > 0:
        # The shortest trailing groups of both shapes with as many elements.
        first, last = inner - 1, outer - 1
        while math.prod(old[first:inner]) != math.prod(new[last:outer]):
            if math.prod(old[first:inner]) < math.prod(new[last:outer]):
                first -= 1
            else:
                last -= 1
            if first < 0 or last < 0:
                raise ValueError("shapes of different sizes")
        place: Term = 0
        for d in range(last, outer):
            if new[d] != 1:
                place = tidy(("add", ("mul", new[d], place), f"i{d}"))
        for d in reversed(range(first, inner)):
            if d == first:
                found[d] = place if old[d] != 1 else 0
            elif old[d] != 1:
                place, found[d] = divided(place, old[d], sizes)
        inner, outer = first, last
    return found


MOVES: dict[str, Callable[[Array, Op], Term | None]] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _slice,
    "rev": _reverse,
    "reshape": _reshape,
    "stop_gradient": lambda array, op: stopped(array.term) if array.kind == "float" else array.term,
    **dict.fromkeys(("copy", "copy_p", "reduce_precision", "pvary", "pcast"), lambda array, op: array.term),
}


# pointwise ------------------------------------------------------------------------------------------

Rule = Callable[[Reader, Op], Term | None]


def _function(name: str) -> Rule:
    def rule(reader: Reader, op: Op) -> Term | None:
        found = FUNCTIONS[name](*map(reader.stand, op.inputs))
        return found.term if isinstance(found, Stand) else None

    return rule


def _natural(term: Term) -> bool:
    """Whether an integer is certainly 0 or more: indices, and what keeps them so."""
    if isinstance(term, int):
        return term >= 0
    if isinstance(term, str):
        return term[0] == "i"
    if term[0] == "sub":
        return False
    return term[0] in ("add", "mul", "floordiv", "mod", "min", "max") and all(map(_natural, term[1:]))


def _towards_zero(whole: str) -> Rule:
    """Division of integers that rounds towards 0, where that is down."""

    def rule(reader: Reader, op: Op) -> Term | None:
        a, b = map(reader.stand, op.inputs)
        if a.kind == "float":
            return operate("div", a, b).term if whole == "floordiv" else None
        positive = isinstance(b.term, int) and b.term > 0
        return operate(whole, a, b).term if positive and _natural(a.term) else None

    return rule


def _select(reader: Reader, op: Op) -> Term | None:
    if len(op.inputs) != 3:
        return None
    which, no, yes = map(reader.stand, op.inputs)
    return FUNCTIONS["where"](as_bool(which), yes, no).term


def _clamp(reader: Reader, op: Op) -> Term:
    low, x, high = map(reader.stand, op.inputs)
    return operate("min", operate("max", x, low), high).term


def _power(reader: Reader, op: Op) -> Term | None:
    found = operate("pow", reader.stand(op.inputs[0]), op.params["y"])
    return found.term if isinstance(found, Stand) else None


def _complement(reader: Reader, op: Op) -> Term | None:
    """erfc(x) = 1 - erf(x)."""
    found = FUNCTIONS["erf"](reader.stand(op.inputs[0]))
    return operate("sub", 1.0, found).term if isinstance(found, Stand) else None


_NAMES = {
    **{
        name: name for name in ("add", "sub", "mul", "neg", "abs", "exp", "exp2", "log", "tanh", "sin", "cos")
    },
    **{
        name: name
        for name in ("sqrt", "rsqrt", "erf", "floor", "eq", "ne", "lt", "le", "gt", "ge", "sign", "pow")
    },
    **{"max": "maximum", "min": "minimum", "logistic": "sigmoid", "not": "bitwise_not", "square": "square"},
    **{"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"},
    **{name: name for name in ("floor_divide", "remainder")},
}
POINTWISE: dict[str, Rule] = {
    **{name: _function(function) for name, function in _NAMES.items()},
    "div": _towards_zero("floordiv"),
    "rem": _towards_zero("mod"),
    "select_n": _select,
    "clamp": _clamp,
    "integer_pow": _power,
    "erfc": _complement,
}

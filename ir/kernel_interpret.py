"""Reference semantics of tile programs: NumPy, a grid cell after another, a tile at a time.

Floats are computed in float32, in float64 where a float64 takes part, and rounded to the tile's
dtype at each statement (bf16 is held as float32 rounded to nearest even). Tiles hold the
coordinates below `extent` only, for padded ones are never seen. What real code must not do raises
InterpretError with the statement: reading or storing outside a tensor where no guard forbids it,
two grid cells or two coordinates that write one element, spans that overlap, division by zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import sympy

from . import expr as E
from . import kernel as K
from .errors import InputError, InterpretError
from .evaluate import NUMPY, Compiled, compiled, evaluate, round_to
from .kernel_text import statement_text
from .kernel_verify import dtype_kind, verify

Arguments = Mapping[str, Any]


def interpret(value: K.Kernel | K.Program, arguments: Arguments) -> dict[str, np.ndarray]:
    """Run a kernel or a program; the tensors it writes, by name.

    arguments: an array for every tensor of role in or inout (bf16 as float32) and a number for
    every scalar. Tensors of role out are made here, filled with NaN (integers with 0); pass one to
    start from its values. Nothing given is modified. Raises VerifyError, InputError, InterpretError.
    """
    verify(value)
    with np.errstate(all="ignore"):
        if isinstance(value, K.Kernel):
            machine = _Machine(value, arguments)
            machine.run()
            return machine.outputs()
        return _program(value, dict(arguments))


def _program(program: K.Program, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    made = {t.name for t in program.intermediates}
    names = {a.name for k in program.kernels for a in k.args}
    if set(arguments) - names:
        raise InputError(
            "program", f"arguments {', '.join(sorted(names - made))}", sorted(set(arguments) - names)
        )
    written: dict[str, np.ndarray] = {}
    arguments |= intermediates(program, arguments)
    for kernel in program.kernels:
        given = {a.name: arguments[a.name] for a in kernel.args if a.name in arguments}
        machine = _Machine(kernel, given)
        machine.run()
        written |= machine.outputs()
        arguments |= machine.outputs()
    return {name: array for name, array in written.items() if name not in made}


def intermediates(program: K.Program, arguments: Arguments) -> dict[str, np.ndarray]:
    """What the kernels of a program leave to each other, uninitialised, of the sizes of a call."""
    integers = _integers(program, arguments)
    return {tensor.name: _uninitialised(tensor, integers) for tensor in program.intermediates}


def _integers(program: K.Program, arguments: Arguments) -> dict[str, int]:
    """The integers that extents of intermediates are made of: dimensions of the arguments given, scalars."""
    found: dict[str, int] = {}
    for argument in (a for k in program.kernels for a in k.args if a.name in arguments):
        value = arguments[argument.name]
        if isinstance(argument, K.Scalar):
            found |= {argument.name: int(value)} if argument.dtype[0] == "i" else {}
        elif np.ndim(value) == len(argument.shape):
            found |= {
                n: s for n, s in zip(argument.shape, np.shape(value), strict=True) if isinstance(n, str)
            }
    return found


def _uninitialised(tensor: K.Tensor, integers: dict[str, int]) -> np.ndarray:
    """NaN, or the least integer: what no kernel may read before it is written."""
    extents = [E.integer(n) if isinstance(n, str) else sympy.sympify(n) for n in tensor.shape]
    shape = tuple(int(evaluate(n, integers)) for n in extents)
    kind = NUMPY[tensor.dtype]
    return np.full(shape, np.nan if dtype_kind(tensor.dtype) == "float" else np.iinfo(kind).min, kind)


@dataclass(frozen=True)
class _Plan:
    """How to evaluate one expression over given axes."""

    function: Compiled
    scalars: tuple[str, ...]
    tiles: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    tensors: tuple[str, ...]


class _Machine:
    def __init__(self, kernel: K.Kernel, arguments: Arguments) -> None:
        self.kernel = kernel
        self.scalars: dict[str, Any] = {}
        self.tensors: dict[str, np.ndarray] = {}
        self.writers: dict[str, np.ndarray] = {}
        self.tiles: dict[str, tuple[str, tuple[str, ...], np.ndarray]] = {}
        self.extents = {a.name: a.extent for a in kernel.axes}
        self.plans: dict[tuple[E.Expr, tuple[str, ...], str], _Plan] = {}
        self.dtypes = {s.name: s.dtype for s in kernel.scalars}
        self.cell = 0
        self.where = f"kernel @{kernel.name}"
        for axis in kernel.axes:
            self.tiles[axis.name] = ("i64", (axis.name,), np.arange(axis.extent))
        self._bind(arguments)

    def fail(self, message: str) -> NoReturn:
        raise InterpretError(f"{message}\n  in {self.where}")

    # arguments ---------------------------------------------------------------------------------

    def _bind(self, arguments: Arguments) -> None:
        known = {a.name for a in self.kernel.args}
        if set(arguments) - known:
            raise InputError(
                self.where, f"arguments {', '.join(sorted(known))}", sorted(set(arguments) - known)
            )
        for scalar in self.kernel.scalars:
            if scalar.name not in arguments:
                raise InputError(self.where, f"a number for {scalar.name!r}", "none")
            self.scalars[scalar.name] = round_to(arguments[scalar.name], scalar.dtype)
        given = [t for t in self.kernel.tensors if t.name in arguments]
        for tensor in given:
            self._extents(tensor, np.shape(arguments[tensor.name]))
            self.tensors[tensor.name] = np.array(round_to(arguments[tensor.name], tensor.dtype))
        for tensor in self.kernel.tensors:
            if tensor.name not in self.tensors:
                if tensor.role != "out":
                    raise InputError(self.where, f"an array for {tensor.name!r}", "none")
                self.tensors[tensor.name] = self._fresh(tensor)
            if tensor.role != "in":
                self.writers[tensor.name] = np.full(self.tensors[tensor.name].shape, -1, np.int64)

    def _extents(self, tensor: K.Tensor, shape: tuple[int, ...]) -> None:
        expected = tuple(self.scalars.get(n, n) if isinstance(n, str) else n for n in tensor.shape)
        if len(shape) != len(expected) or any(
            not isinstance(e, str) and e != n for e, n in zip(expected, shape, strict=True)
        ):
            raise InputError(
                f"{self.where}: {tensor.name}", f"shape ({', '.join(map(str, expected))})", shape
            )
        self.scalars |= {
            n: np.int64(s) for n, s in zip(tensor.shape, shape, strict=True) if isinstance(n, str)
        }

    def _fresh(self, tensor: K.Tensor) -> np.ndarray:
        unbound = [n for n in tensor.shape if isinstance(n, str) and n not in self.scalars]
        if unbound:
            raise InputError(
                f"{self.where}: {tensor.name}", f"an array, to tell {', '.join(unbound)}", "none"
            )
        shape = tuple(int(self.scalars[n]) if isinstance(n, str) else n for n in tensor.shape)
        return np.full(shape, np.nan if dtype_kind(tensor.dtype) == "float" else 0, NUMPY[tensor.dtype])

    def outputs(self) -> dict[str, np.ndarray]:
        return {t.name: self.tensors[t.name] for t in self.kernel.tensors if t.role != "in"}

    # expressions -------------------------------------------------------------------------------

    def value(self, expr: E.Expr, axes: tuple[str, ...], dtype: str = "i64") -> Any:
        """The value of an expression, broadcastable over `axes` in their order."""
        plan = self.plans.get((expr, axes, dtype))
        if plan is None:
            plan = self.plans[expr, axes, dtype] = self._plan(expr, axes, dtype)
        values = {name: self.scalars[name] for name in plan.scalars}
        for name, order, shape in plan.tiles:
            values[name] = self.tiles[name][2].transpose(order).reshape(shape)
        for name in plan.tensors:
            values[name] = self.tensors[name]
        try:
            return plan.function(values)
        except InterpretError as error:
            self.fail(str(error))

    def _plan(self, expr: E.Expr, axes: tuple[str, ...], dtype: str) -> _Plan:
        names = {s.name for s in E.symbols(expr)}
        tiles, dtypes = [], {dtype, *(self.dtypes.get(n, "") for n in names)}
        for name in sorted(names & set(self.tiles)):
            tile_dtype, own, _ = self.tiles[name]
            dtypes.add(tile_dtype)
            order = tuple(own.index(a) for a in axes if a in own)
            tiles.append((name, order, tuple(self.extents[a] if a in own else 1 for a in axes)))
        tensors = {str(r.args[0]) for r in E.reads(expr)}
        dtypes |= {t.dtype for t in self.kernel.tensors if t.name in tensors}
        floats = np.float64 if "f64" in dtypes else np.float32
        scalars = tuple(sorted(names - set(self.tiles)))
        return _Plan(compiled(expr, floats), scalars, tuple(tiles), tuple(sorted(tensors)))

    def full(self, expr: E.Expr, axes: tuple[str, ...], dtype: str = "i64") -> np.ndarray:
        """The value of an expression as an array over all of `axes`."""
        return np.broadcast_to(self.value(expr, axes, dtype), self.shape(axes))

    def shape(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.extents[a] for a in axes)

    # statements --------------------------------------------------------------------------------

    def run(self) -> None:
        """Every grid cell in turn, the first dimension fastest."""
        ranges = [range(int(self.value(g.extent, ()))) for g in reversed(self.kernel.grid)]
        for cell, at in enumerate(itertools.product(*ranges)):
            self.cell = cell
            self.scalars |= {g.name: np.int64(x) for g, x in zip(reversed(self.kernel.grid), at, strict=True)}
            self.block(self.kernel.body)

    def block(self, body: tuple[K.Stmt, ...]) -> None:
        for statement in body:
            self.where = f"`{statement_text(statement).strip()}` of kernel @{self.kernel.name}"
            getattr(self, f"_{type(statement).__name__.lower()}")(statement)

    def write(self, s: K.Compute | K.Load | K.Dot | K.Reduce | K.Scan, value: Any) -> None:
        array = np.broadcast_to(round_to(value, s.dtype), self.shape(s.axes))
        self.tiles[s.dst] = (s.dtype, s.axes, array)

    def _let(self, s: K.Let) -> None:
        self.scalars[s.name] = self.value(s.expr, ())
        for axis in self.kernel.axes:
            if axis.live == s.name:
                self._cut(axis)

    def _cut(self, axis: K.Axis) -> None:
        """From here on an axis has as many coordinates as a `let` says."""
        count = int(self.scalars[str(axis.live)])
        if not 1 <= count <= axis.extent:
            self.fail(f"expected 1 to {axis.extent} coordinates of axis {axis.name}; got {count}")
        if count == self.extents[axis.name]:
            return
        self.extents[axis.name] = count
        self.tiles[axis.name] = ("i64", (axis.name,), np.arange(count))
        self.plans.clear()  # they hold the shapes of tiles

    def _compute(self, s: K.Compute) -> None:
        self.write(s, self.value(s.expr, s.axes, s.dtype))

    def _load(self, s: K.Load) -> None:
        index, allowed = self.place(s.tensor, s.index, s.guard, s.axes)
        other = self.full(s.other, s.axes, s.dtype)
        if not allowed.any():
            self.write(s, other)
            return
        found = self.tensors[s.tensor][tuple(np.where(allowed, i, 0) for i in index)]
        self.write(s, np.where(allowed, found, other))

    def _store(self, s: K.Store) -> None:
        index, allowed = self.place(s.tensor, s.index, s.guard, s.axes)
        tensor, writers = self.tensors[s.tensor], self.writers[s.tensor]
        dtype = next(t.dtype for t in self.kernel.tensors if t.name == s.tensor)
        value = np.broadcast_to(round_to(self.full(s.value, s.axes, dtype), dtype), self.shape(s.axes))
        at = tuple(i[allowed] for i in index)
        if s.adds:
            np.add.at(tensor, at, value[allowed])
            return
        flat = sum(i * stride for i, stride in zip(at, _strides(tensor.shape), strict=True))
        if np.unique(flat).size < np.size(flat):
            self.fail(f"two coordinates of one tile write the same element of {s.tensor}")
        others = writers[at][(writers[at] != -1) & (writers[at] != self.cell)]
        if others.size:
            self.fail(f"grid cells {others[0]} and {self.cell} both write an element of {s.tensor}")
        tensor[at] = value[allowed]
        writers[at] = self.cell

    def place(
        self, name: str, index: tuple[E.Expr, ...], guard: E.Expr, axes: tuple[str, ...]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Indices and guard over `axes`; every index that the guard admits lies inside the tensor."""
        allowed = self.full(guard, axes)
        places = [self.full(i, axes) for i in index]
        for d, (at, extent) in enumerate(zip(places, self.tensors[name].shape, strict=True)):
            outside = allowed & ((at < 0) | (at >= extent))
            if outside.any():
                first = tuple(int(x) for x in np.argwhere(outside)[0])
                where = ", ".join(f"{a} = {x}" for a, x in zip(axes, first, strict=True)) or "the scalar"
                scalars = ", ".join(f"{n} = {v}" for n, v in sorted(self.scalars.items()))
                expected = f"expected an index into the {extent} entries of dimension {d} of {name}"
                self.fail(f"{expected}; got {at[outside][0]} at {where} ({scalars})")
        return places, allowed

    def _dot(self, s: K.Dot) -> None:
        a, b = (self.operand(name, axis, s) for name, axis in zip((s.a, s.b), s.axes, strict=True))
        product = a @ b.T
        if s.accumulate:
            product = product + self.tiles[s.dst][2].astype(product.dtype)
        self.write(s, product)

    def operand(self, name: str, axis: str, s: K.Dot) -> np.ndarray:
        """A tile as a matrix (axis, over) in the dtype of the sum."""
        dtype, axes, array = self.tiles[name]
        matrix = array if axes == (axis, s.over) else array.T
        if dtype_kind(s.dtype) == "int":
            return matrix.astype(np.int64)
        if s.precision == "tf32" and dtype == "f32":
            matrix = _tf32(matrix)
        return matrix.astype(np.float64 if s.dtype == "f64" else np.float32)

    def _reduce(self, s: K.Reduce) -> None:
        value = self.full(s.expr, (*s.axes, *s.over), s.dtype)
        over = tuple(range(len(s.axes), value.ndim))
        reduce = {"sum": np.sum, "max": np.max, "min": np.min, "any": np.any}[s.op]
        self.write(s, reduce(value, axis=over))

    def _scan(self, s: K.Scan) -> None:
        self.write(s, np.cumsum(self.full(s.expr, s.axes, s.dtype), axis=s.axes.index(s.over)))

    def _for(self, s: K.For) -> None:
        bounds = [(int(self.value(x.lo, ())), int(self.value(x.hi, ()))) for x in s.spans]
        ranges = [range(lo, hi) for lo, hi in bounds if hi > lo]
        for one, two in itertools.combinations(ranges, 2):
            if one.start < two.stop and two.start < one.stop:
                self.fail(f"spans overlap: {one.start} .. {one.stop} and {two.start} .. {two.stop}")
        for x in itertools.chain(*ranges):
            self.scalars[s.var] = np.int64(x)
            self.block(s.body)

    def _if(self, s: K.If) -> None:
        if bool(self.value(s.cond, ())):
            self.block(s.body)


def _strides(shape: tuple[int, ...]) -> list[int]:
    """How far apart in row-major order neighbours along each dimension lie."""
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _tf32(matrix: np.ndarray) -> np.ndarray:
    """float32 rounded to the 10 mantissa bits that tensor cores keep."""
    bits = np.ascontiguousarray(matrix, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

"""The rules of tile programs. `verify` raises VerifyError that names the rule and the statement.

Rules, in the order of a kernel: argument, name, axis, meta (headers); scope, kind, axes, scalar
(every expression); declare, assign, load, store, dot, reduce, scan, loop (statements).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from . import expr as E
from . import kernel as K
from .errors import VerifyError
from .kernel_parse import REDUCTIONS, symbol_of
from .kernel_text import statement_text
from .scanner import RESERVED

SCALARS = ("i64", "i32", "f32", "f64")
PRECISIONS = ("ieee", "tf32")


@dataclass(frozen=True)
class _Value:
    """What a name in scope stands for: a scalar (axes == ()), an axis coordinate or a tile."""

    what: str
    dtype: str
    axes: tuple[str, ...] = ()


def verify(value: K.Kernel | K.Program) -> None:
    """Check a kernel, or every kernel of a program and how they share arguments. Raises VerifyError."""
    if isinstance(value, K.Kernel):
        _Verifier(value).run()
        return
    seen: dict[str, K.Tensor] = {}
    for kernel in value.kernels:
        verify(kernel)
        for tensor in kernel.tensors:
            first = seen.setdefault(tensor.name, tensor)
            if (first.dtype, first.shape) != (tensor.dtype, tensor.shape):
                raise VerifyError(f"program: kernels disagree on {tensor.name!r}: {first} and {tensor}")
    if len({k.name for k in value.kernels}) < len(value.kernels):
        raise VerifyError(
            f"program: expected kernels of different names; got {[k.name for k in value.kernels]}"
        )
    for tensor in value.intermediates:
        if tensor.name not in seen:
            raise VerifyError(f"program: the intermediate {tensor.name!r} is an argument of no kernel")
        got = seen[tensor.name]
        if (tensor.dtype, len(tensor.shape)) != (got.dtype, len(got.shape)):
            raise VerifyError(f"program: the intermediate {tensor.name!r} is {tensor}, its argument {got}")


class _Verifier:
    def __init__(self, kernel: K.Kernel) -> None:
        self.kernel = kernel
        self.scope: dict[str, _Value] = {}
        self.tensors = {t.name: t for t in kernel.tensors}
        self.axes = {a.name for a in kernel.axes}
        self.live = {a.name: a.live for a in kernel.axes if a.live is not None}
        self.tiles: dict[str, _Value] = {}
        self.where = f"kernel @{kernel.name}"

    def run(self) -> None:
        self.arguments()
        self.headers()
        self.block(self.kernel.body)

    def fail(self, rule: str, message: str) -> NoReturn:
        raise VerifyError(f"{rule}: {message}\n  in {self.where}")

    # headers -----------------------------------------------------------------------------------

    def name(self, name: str) -> None:
        if not name.isidentifier() or name in RESERVED:
            self.fail("name", f"expected a name that is not a word of the language; got {name!r}")
        if name in self.scope or name in self.tensors:
            self.fail("name", f"{name!r} is taken")

    def bind(self, name: str, value: _Value) -> None:
        self.name(name)
        self.scope[name] = value

    def arguments(self) -> None:
        names = [a.name for a in self.kernel.args]
        for name in names:
            if names.count(name) > 1:
                self.fail("name", f"{name!r} is taken")
        self.tensors = {}
        for argument in self.kernel.args:
            if isinstance(argument, K.Scalar):
                self.choice("argument", f"dtype of {argument.name}", argument.dtype, SCALARS)
                self.bind(argument.name, _Value("scalar", argument.dtype))
                continue
            self.name(argument.name)
            self.tensors[argument.name] = argument
            self.tensor(argument)

    def tensor(self, tensor: K.Tensor) -> None:
        self.choice("argument", f"dtype of {tensor.name}", tensor.dtype, E.DTYPES)
        self.choice("argument", f"role of {tensor.name}", tensor.role, ("in", "out", "inout"))
        if tensor.unit is not None and not 0 <= tensor.unit < len(tensor.shape):
            rank = len(tensor.shape)
            self.fail(
                "argument", f"unit of {tensor.name}: expected a dimension below {rank}; got {tensor.unit}"
            )
        if tensor.align < 1 or tensor.align & (tensor.align - 1):
            expected = f"align of {tensor.name}: expected a power of two of bytes"
            self.fail("argument", f"{expected}; got {tensor.align}")
        for extent in tensor.shape:
            if isinstance(extent, E.Expr):
                self.fail("argument", f"shape of {tensor.name}: expected numbers and names; got {extent}")
            elif isinstance(extent, int):
                if extent < 1:
                    self.fail(
                        "argument", f"shape of {tensor.name}: expected extents of at least 1; got {extent}"
                    )
            elif self.scope.get(extent) != _Value("extent", "i64"):
                self.bind(extent, _Value("extent", "i64"))

    def choice(self, rule: str, what: str, got: str, choices: Iterable[str]) -> None:
        if got not in choices:
            self.fail(rule, f"{what}: expected one of {', '.join(choices)}; got {got!r}")

    def headers(self) -> None:
        for dim in self.kernel.grid:
            self.expression(dim.extent, "int", ())
        for dim in self.kernel.grid:
            self.bind(dim.name, _Value("scalar", "i64"))
        for axis in self.kernel.axes:
            self.bind(axis.name, _Value("axis", "i64", (axis.name,)))
            if not 1 <= axis.extent <= axis.size:
                self.fail(
                    "axis",
                    f"{axis.name}: expected 1 <= extent <= size; got extent {axis.extent}, size {axis.size}",
                )
        if self.kernel.lanes is not None and self.kernel.lanes not in self.axes:
            self.fail(
                "axis", f"lanes: expected an axis ({', '.join(sorted(self.axes))}); got {self.kernel.lanes!r}"
            )
        names = [name for name, _ in self.kernel.meta]
        if names != sorted(set(names)):
            self.fail("meta", f"expected different names, sorted; got {names}")
        for line in self.kernel.comment:
            if "\n" in line or line != line.rstrip():
                self.fail(
                    "meta", f"expected comment lines without line ends or trailing blanks; got {line!r}"
                )

    # expressions -------------------------------------------------------------------------------

    def expression(self, expr: E.Expr, kind: str, axes: tuple[str, ...]) -> None:
        """Names in scope, of their declared kinds, over no other axes; and the kind of the whole."""
        for read in E.reads(expr):
            self.read(read)
        for symbol in sorted(E.symbols(expr), key=lambda s: s.name):
            value = self.scope.get(symbol.name)
            if value is None:
                self.fail(
                    "scope",
                    f"{symbol.name!r} is not declared here; in scope: {', '.join(sorted(self.scope))}",
                )
            if symbol != symbol_of(symbol.name, value.dtype):
                declared = f"{symbol.name!r} is a {value.what} of dtype {value.dtype}"
                self.fail("kind", f"{declared}; got a {E.kind(symbol)} symbol in {E.to_text(expr)}")
            if not set(value.axes) <= set(axes):
                self.stray(symbol.name, value, axes, expr)
        got = E.kind(expr)
        if got != kind and not (kind == "float" and got == "int") and kind != "any":
            self.fail("kind", f"expected a value of kind {kind!r}; got {got!r}: {E.to_text(expr)}")

    def stray(self, name: str, value: _Value, axes: tuple[str, ...], expr: E.Expr) -> NoReturn:
        over = f"{value.what} {name!r} over ({', '.join(value.axes)})"
        if not axes:
            self.fail("scalar", f"expected scalars only; got the {over} in {E.to_text(expr)}")
        self.fail("axes", f"expected values over ({', '.join(axes)}); got the {over} in {E.to_text(expr)}")

    def read(self, read: E.Expr) -> None:
        name, rank = str(read.args[0]), len(read.args) - 1
        tensor = self.tensors.get(name)
        if tensor is None or tensor.role == "out":
            self.fail("scope", f"expected a tensor argument to read; got {name!r}")
        if rank != len(tensor.shape):
            self.fail("load", f"{name} has {len(tensor.shape)} dimensions; got {rank} in {E.to_text(read)}")
        float_ = dtype_kind(tensor.dtype) == "float"
        if isinstance(read, E.readf) != float_ or (E.kind(read.args[0]) == "float") != float_:
            self.fail(
                "kind",
                f"{name} holds {tensor.dtype}; got {type(read).__name__} of a {E.kind(read.args[0])} symbol",
            )
        for index in read.args[1:]:
            if E.kind(index) != "int":
                self.fail("kind", f"expected integer indices; got {E.to_text(index)} in {E.to_text(read)}")

    # statements --------------------------------------------------------------------------------

    def block(self, body: tuple[K.Stmt, ...]) -> None:
        outer = dict(self.scope)
        for statement in body:
            self.where = f"`{statement_text(statement).strip()}` of kernel @{self.kernel.name}"
            getattr(self, f"_{type(statement).__name__.lower()}")(statement)
        self.scope = outer

    def target(self, s: K.Compute | K.Load | K.Dot | K.Reduce | K.Scan, declares: bool) -> None:
        """The tile a statement writes is new, or is there with the dtype and axes stated."""
        value = _Value("tile", s.dtype, tuple(s.axes))
        if not declares:
            if self.scope.get(s.dst) != value:
                got = self.scope.get(s.dst, "nothing of that name in scope")
                self.fail(
                    "assign", f"expected a declared tile {s.dst!r}: {s.dtype}[{', '.join(s.axes)}]; got {got}"
                )
            return
        self.choice("declare", f"dtype of {s.dst}", s.dtype, E.DTYPES)
        self.over_axes("declare", s.axes)
        if s.dst in self.scope:
            self.fail(
                "declare",
                f"{s.dst!r} is declared already; a later write says `{s.dst} = ...` (declares=False)",
            )
        if self.tiles.setdefault(s.dst, value) != value:
            self.fail("declare", f"{s.dst!r} has another dtype or other axes elsewhere: {self.tiles[s.dst]}")
        self.bind(s.dst, value)

    def over_axes(self, rule: str, axes: tuple[str, ...]) -> None:
        if len(set(axes)) < len(axes) or not set(axes) <= self.axes:
            self.fail(
                rule, f"expected different axes of the kernel ({', '.join(sorted(self.axes))}); got {axes}"
            )
        for axis in axes:
            if axis in self.live and self.scope.get(self.live[axis]) != _Value("scalar", "i64"):
                self.fail("axis", f"{axis}: expected `let {self.live[axis]}` before what is over it")

    def summed(self, rule: str, axes: Iterable[str]) -> None:
        for axis in set(axes) & set(self.live):
            self.fail(rule, f"expected no sum along {axis!r}, of which only `{self.live[axis]}` are there")

    def place(self, tensor: str, index: tuple[E.Expr, ...], axes: tuple[str, ...], rule: str) -> K.Tensor:
        found = self.tensors.get(tensor)
        if found is None:
            self.fail(rule, f"expected a tensor argument ({', '.join(self.tensors)}); got {tensor!r}")
        if len(index) != len(found.shape):
            self.fail(rule, f"{tensor} has {len(found.shape)} dimensions; got {len(index)} indices")
        for i in index:
            self.expression(i, "int", axes)
        return found

    def _let(self, s: K.Let) -> None:
        kind = E.kind(s.expr)
        if kind == "float":
            self.fail("kind", f"expected an integer or a condition; got the float {E.to_text(s.expr)}")
        self.expression(s.expr, kind, ())
        self.bind(s.name, _Value("scalar", "bool" if kind == "bool" else "i64"))

    def _compute(self, s: K.Compute) -> None:
        self.expression(s.expr, dtype_kind(s.dtype), s.axes)
        self.target(s, s.declares)

    def _load(self, s: K.Load) -> None:
        tensor = self.place(s.tensor, s.index, s.axes, "load")
        if tensor.role == "out":
            self.fail("load", f"expected a tensor of role in or inout; got {s.tensor!r} of role out")
        self.expression(s.guard, "bool", s.axes)
        self.expression(s.other, "any" if s.dtype == "bool" else dtype_kind(s.dtype), s.axes)
        self.target(s, True)

    def _store(self, s: K.Store) -> None:
        self.over_axes("store", s.axes)
        tensor = self.place(s.tensor, s.index, s.axes, "store")
        if tensor.role == "in":
            self.fail("store", f"expected a tensor of role out or inout; got {s.tensor!r} of role in")
        self.expression(s.value, dtype_kind(tensor.dtype), s.axes)
        self.expression(s.guard, "bool", s.axes)
        reached = {a for i in s.index for symbol in E.symbols(i) for a in self.scope[symbol.name].axes}
        if s.adds and tensor.role != "inout":
            self.fail("store", f"expected a tensor of role inout to add to; got {s.tensor!r} of role out")
        if set(s.axes) - reached and not s.adds:
            lost = ", ".join(sorted(set(s.axes) - reached))
            self.fail(
                "store", f"the index does not depend on {lost}: several coordinates would write one element"
            )

    def _dot(self, s: K.Dot) -> None:
        self.choice("dot", "precision", s.precision, PRECISIONS)
        if len(s.axes) != 2 or s.over in s.axes:
            self.fail("dot", f"expected a result over two axes other than {s.over!r}; got {s.axes}")
        self.over_axes("dot", (*s.axes, s.over))
        self.summed("dot", (s.over,))
        if s.over == self.kernel.lanes:
            self.fail("dot", f"expected to sum over another axis than the lanes; got {s.over!r}")
        operands = [self.operand(name, {axis, s.over}) for name, axis in zip((s.a, s.b), s.axes, strict=True)]
        if operands[0].dtype != operands[1].dtype:
            self.fail(
                "dot", f"expected operands of one dtype; got {operands[0].dtype} and {operands[1].dtype}"
            )
        if dtype_kind(operands[0].dtype) != dtype_kind(s.dtype) or s.dtype == "bool":
            self.fail("dot", f"expected a result of kind {dtype_kind(operands[0].dtype)!r}; got {s.dtype}")
        if s.accumulate and s.declares:
            self.fail("dot", f"expected `{s.dst}` to be declared before it accumulates")
        self.target(s, s.declares)

    def operand(self, name: str, axes: set[str]) -> _Value:
        value = self.scope.get(name)
        if value is None or value.what != "tile":
            self.fail("dot", f"expected a tile in scope; got {name!r}")
        if set(value.axes) != axes:
            self.fail(
                "dot", f"expected {name!r} over {{{', '.join(sorted(axes))}}}; got ({', '.join(value.axes)})"
            )
        return value

    def _reduce(self, s: K.Reduce) -> None:
        self.choice("reduce", "operation", s.op, REDUCTIONS)
        if not s.over:
            self.fail("reduce", "expected at least one axis to reduce over")
        self.over_axes("reduce", (*s.axes, *s.over))
        self.summed("reduce", s.over)
        if (s.op == "any") != (s.dtype == "bool"):
            self.fail(
                "reduce", f"expected bool for 'any' and a number for others; got {s.dtype} for {s.op!r}"
            )
        self.expression(s.expr, dtype_kind(s.dtype), (*s.axes, *s.over))
        self.target(s, s.declares)

    def _scan(self, s: K.Scan) -> None:
        if s.over not in s.axes:
            self.fail("scan", f"expected to sum along one of ({', '.join(s.axes)}); got {s.over!r}")
        if s.dtype == "bool":
            self.fail("scan", "expected sums of numbers; got bool")
        self.summed("scan", (s.over,))
        self.expression(s.expr, dtype_kind(s.dtype), s.axes)
        self.target(s, s.declares)

    def _for(self, s: K.For) -> None:
        if not s.spans:
            self.fail("loop", "expected at least one span")
        for span in s.spans:
            self.expression(span.lo, "int", ())
            self.expression(span.hi, "int", ())
        outer = dict(self.scope)
        self.bind(s.var, _Value("scalar", "i64"))
        self.block(s.body)
        self.scope = outer

    def _if(self, s: K.If) -> None:
        self.expression(s.cond, "bool", ())
        self.block(s.body)


def dtype_kind(dtype: str) -> str:
    """'bool', 'int' or 'float': the kind of the values of a dtype."""
    return E.kind(symbol_of("x", dtype))

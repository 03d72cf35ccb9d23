"""Text of tile programs. `parse(to_text(kernel)) == kernel`; the grammar is in ir/README.md."""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from . import kernel as K
from .expr import to_text as text_of
from .kernel_parse import parse, parse_program

__all__ = ["parse", "parse_program", "statement_text", "to_text"]

INDENT = "  "


def to_text(value: K.Kernel | K.Program) -> str:
    """The text of a kernel or of a program of kernels; ends with a newline.

    >>> from .expr import real
    >>> i = K.Axis("i", 4, 4)
    >>> x, y = K.Tensor("x", "f32", ("n",)), K.Tensor("y", "f32", ("n",), "out")
    >>> at = (i.symbol,)
    >>> body = (K.Load("X", "f32", ("i",), "x", at), K.Store("y", at, real("X"), ("i",)))
    >>> print(to_text(K.Kernel("copy", (x, y), (), (i,), None, body)))
    kernel @copy(
      x: f32[n] in,
      y: f32[n] out
    ) grid() axes(i: 4) {
      tile X: f32[i] = load x[i]
      store y[i] = X over i
    }
    <BLANKLINE>
    """
    if isinstance(value, K.Kernel):
        return "\n".join(_kernel(value)) + "\n"
    lines = [f"{INDENT}text {value.text!r}"] if value.text else []
    lines += [f"{INDENT}check {fails!r}: {message!r}" for fails, message in value.checks]
    lines += [f"{INDENT}intermediate {_tensor(t)}" for t in value.intermediates]
    for kernel in value.kernels:
        lines += ["", *(f"{INDENT}{line}".rstrip() for line in _kernel(kernel))]
    return "\n".join(["program {", *lines, "}"]) + "\n"


def statement_text(statement: K.Stmt) -> str:
    """The first line of a statement, for messages."""
    return next(_statement(statement, ""))


def _kernel(kernel: K.Kernel) -> Iterator[str]:
    yield from (f"# {line}".rstrip() for line in kernel.comment)
    yield f"kernel @{kernel.name}("
    last = len(kernel.args) - 1
    yield from (f"{INDENT}{_argument(a)}{',' if n < last else ''}" for n, a in enumerate(kernel.args))
    grid = ", ".join(f"{g.name}: {text_of(g.extent)}" for g in kernel.grid)
    axes = ", ".join(_axis(a) for a in kernel.axes)
    lanes = f" lanes {kernel.lanes}" if kernel.lanes is not None else ""
    meta = f" meta({', '.join(f'{k}={v}' for k, v in kernel.meta)})" if kernel.meta else ""
    yield f") grid({grid}) axes({axes}){lanes}{meta} {{"
    for statement in kernel.body:
        yield from _statement(statement, INDENT)
    yield "}"


def _argument(argument: K.Tensor | K.Scalar) -> str:
    if isinstance(argument, K.Tensor):
        return _tensor(argument)
    return f"{argument.name}: {argument.dtype}"


def _tensor(tensor: K.Tensor) -> str:
    unit = "" if tensor.unit is None else f" unit {tensor.unit}"
    align = "" if tensor.align == 1 else f" align {tensor.align}"
    shape = ", ".join(map(_extent, tensor.shape))
    return f"{tensor.name}: {tensor.dtype}[{shape}] {tensor.role}{unit}{align}"


def _extent(extent: int | str | K.Expr) -> str:
    return text_of(extent) if isinstance(extent, sympy.Basic) else str(extent)


def _axis(axis: K.Axis) -> str:
    size = f" of {axis.size}" if axis.size != axis.extent else ""
    return f"{axis.name}: {axis.extent}{size}" + (f" live {axis.live}" if axis.live else "")


def _target(statement: K.Compute | K.Dot | K.Reduce | K.Scan, equals: str = "=") -> str:
    if not statement.declares:
        return f"{statement.dst} {equals} "
    return f"tile {statement.dst}: {statement.dtype}[{', '.join(statement.axes)}] {equals} "


def _index(tensor: str, index: tuple[K.Expr, ...]) -> str:
    return f"{tensor}[{', '.join(map(text_of, index))}]"


def _over(axes: tuple[str, ...]) -> str:
    return f" over {axes[0]}" if len(axes) == 1 else f" over ({', '.join(axes)})"


def _statement(statement: K.Stmt, indent: str) -> Iterator[str]:
    match statement:
        case K.Let():
            yield f"{indent}let {statement.name} = {text_of(statement.expr)}"
        case K.Compute():
            yield f"{indent}{_target(statement)}{text_of(statement.expr)}"
        case K.Load():
            head = f"tile {statement.dst}: {statement.dtype}[{', '.join(statement.axes)}] = load "
            yield f"{indent}{head}{_index(statement.tensor, statement.index)}{_guard(statement)}"
        case K.Store():
            sign = "+=" if statement.adds else "="
            head = f"store {_index(statement.tensor, statement.index)} {sign} {text_of(statement.value)}"
            guard = f" where {text_of(statement.guard)}" if statement.guard != sympy.true else ""
            yield f"{indent}{head}{_over(statement.axes)}{guard}"
        case K.Dot():
            head = _target(statement, "+=" if statement.accumulate else "=")
            precision = f" precision {statement.precision}" if statement.precision != "ieee" else ""
            yield f"{indent}{head}dot({statement.a}, {statement.b}) over {statement.over}{precision}"
        case K.Reduce():
            value = f"{statement.op} {text_of(statement.expr)}{_over(statement.over)}"
            yield f"{indent}{_target(statement)}{value}"
        case K.Scan():
            value = f"cumsum {text_of(statement.expr)} over {statement.over}"
            yield f"{indent}{_target(statement)}{value}"
        case K.For():
            spans = " | ".join(f"{text_of(s.lo)} .. {text_of(s.hi)}" for s in statement.spans)
            yield f"{indent}for {statement.var} in {spans} {{"
            yield from _block(statement.body, indent)
        case K.If():
            yield f"{indent}if {text_of(statement.cond)} {{"
            yield from _block(statement.body, indent)


def _block(body: tuple[K.Stmt, ...], indent: str) -> Iterator[str]:
    for statement in body:
        yield from _statement(statement, indent + INDENT)
    yield f"{indent}}}"


def _guard(load: K.Load) -> str:
    if load.guard == sympy.true and sympy.sympify(load.other) is sympy.S.Zero:
        return ""
    return f" where {text_of(load.guard)} else {text_of(load.other)}"

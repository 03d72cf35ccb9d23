"""Canonical names: graphs and kernels that differ in the names they bind become equal.

Graph values are called v0, v1, ... in order of appearance. In kernels, grid dimensions become g0,
...; axes a0, ...; tiles t0, ...; scalars and loop variables x0, ...; arguments and extents keep their
names, for callers use them.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from itertools import count
from typing import Any, TypeVar

import sympy

from . import kernel as K
from .expr import Expr, symbols
from .graph import Graph
from .kernel_parse import symbol_of

T = TypeVar("T", Graph, K.Kernel, K.Program)


def canonical(value: T) -> T:
    """The same program under canonical names. Expects a verified value."""
    if isinstance(value, Graph):
        return value.renamed({name: f"v{i}" for i, name in enumerate(value.values)})
    if isinstance(value, K.Program):
        return replace(value, kernels=tuple(map(canonical, value.kernels)))
    return _Renamer(value).kernel()


def exchange(kernel: K.Kernel, *pairs: tuple[str, str]) -> K.Kernel:
    """The kernel with the two names of each pair, of extents or tensors of integers, exchanged everywhere."""
    names = {old: new for a, b in pairs for old, new in ((a, b), (b, a))}
    symbols = {symbol_of(old, "i64"): symbol_of(new, "i64") for old, new in names.items()}

    def change(value: Any) -> Any:
        if isinstance(value, sympy.Basic):
            return value.xreplace(symbols)
        if isinstance(value, K.Tensor):
            shape = tuple(names.get(n, n) if isinstance(n, str) else n for n in value.shape)
            return replace(value, name=names.get(value.name, value.name), shape=shape)
        if isinstance(value, K.Let):
            value = replace(value, name=names.get(value.name, value.name))
        if isinstance(value, K.Load):
            value = replace(value, tensor=names.get(value.tensor, value.tensor))
        if isinstance(value, tuple):
            return tuple(map(change, value))
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: change(getattr(value, f.name)) for f in fields(value)})
        return value

    return change(kernel)


def apart(body: tuple[K.Stmt, ...], axes: dict[str, str], mark: str) -> tuple[K.Stmt, ...]:
    """The same statements over other axes, with `mark` behind every name that they bind: a kernel can hold
    both. What they use from outside keeps its name.

    >>> i = sympy.Symbol("i", integer=True)
    >>> (load,) = apart((K.Load("A", "f32", ("i",), "x", (i,)),), {"i": "r"}, "_rest")
    >>> load.dst, load.axes, load.index
    ('A_rest', ('r',), (r,))
    """
    return _Marker(axes, mark).block(body)


class _Renamer:
    def __init__(self, kernel: K.Kernel) -> None:
        self.source = kernel
        self.numbers = {stem: count() for stem in "gatx"}
        self.names: dict[str, str] = {}
        self.taken = {a.name for a in kernel.args} | {n for t in kernel.tensors for n in t.shape}

    def bind(self, name: str, stem: str) -> str:
        """The new name of one that a statement binds: a grid dimension, an axis, a tile or a scalar."""
        fresh = (f"{stem}{i}" for i in self.numbers[stem])
        self.names[name] = next(n for n in fresh if n not in self.taken)
        return self.names[name]

    def kernel(self) -> K.Kernel:
        k = self.source
        grid = tuple(K.GridDim(self.bind(g.name, "g"), g.extent) for g in k.grid)
        axes = tuple(replace(a, name=self.bind(a.name, "a")) for a in k.axes)
        lanes = None if k.lanes is None else self.names[k.lanes]
        return replace(k, grid=grid, axes=axes, lanes=lanes, body=self.block(k.body))

    def block(self, body: tuple[K.Stmt, ...]) -> tuple[K.Stmt, ...]:
        outer = dict(self.names)
        renamed = tuple(self.statement(s) for s in body)
        self.names = outer
        return renamed

    def expr(self, expr: Expr) -> Expr:
        """Every symbol by its new name, all at once."""
        changed = {s: _like(s, self.names[s.name]) for s in symbols(expr) if s.name in self.names}
        return expr.xreplace(changed)

    def exprs(self, exprs: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(map(self.expr, exprs))

    def known(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self.names.get(n, n) for n in names)

    def statement(self, s: K.Stmt) -> K.Stmt:
        match s:
            case K.Let():
                expr = self.expr(s.expr)
                return K.Let(self.bind(s.name, "x"), expr)
            case K.Store():
                return replace(
                    s,
                    index=self.exprs(s.index),
                    value=self.expr(s.value),
                    axes=self.known(s.axes),
                    guard=self.expr(s.guard),
                )
            case K.If():
                return K.If(self.expr(s.cond), self.block(s.body))
            case K.For():
                spans = tuple(K.Span(self.expr(x.lo), self.expr(x.hi)) for x in s.spans)
                outer = dict(self.names)
                made = K.For(self.bind(s.var, "x"), spans, self.block(s.body))
                self.names = outer
                return made
            case K.Compute():
                s = replace(s, axes=self.known(s.axes), expr=self.expr(s.expr))
            case K.Load():
                index, guard = self.exprs(s.index), self.expr(s.guard)
                s = replace(s, axes=self.known(s.axes), index=index, guard=guard, other=self.expr(s.other))
                return replace(s, dst=self.bind(s.dst, "t"))
            case K.Dot():
                a, b, over = self.known((s.a, s.b, s.over))
                s = replace(s, axes=self.known(s.axes), a=a, b=b, over=over)
            case K.Reduce():
                s = replace(s, axes=self.known(s.axes), expr=self.expr(s.expr), over=self.known(s.over))
            case K.Scan():
                s = replace(s, axes=self.known(s.axes), expr=self.expr(s.expr), over=self.known((s.over,))[0])
        return replace(s, dst=self.bind(s.dst, "t") if s.declares else self.known((s.dst,))[0])


class _Marker(_Renamer):
    """Statements apart from a kernel, whose axes are given other names and whose own names are marked."""

    def __init__(self, axes: dict[str, str], mark: str) -> None:
        self.names, self.mark = dict(axes), mark

    def bind(self, name: str, stem: str) -> str:
        self.names[name] = name + self.mark
        return self.names[name]


def _like(symbol: Expr, name: str) -> Expr:
    """A symbol of the same kind by another name."""
    dtype = "i64" if symbol.is_integer else "f32" if symbol.is_extended_real else "bool"
    return symbol_of(name, dtype)

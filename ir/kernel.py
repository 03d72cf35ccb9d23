"""Kernel IR: a tile program. General, not an attention template; codegen only spells it.

Tiles have *named axes*: `S[i, j] = dot(Q, K) over d` with Q[i, d] and K[j, d]. Values of different
axes broadcast by name, so there are no transposes or reshapes at this level. Every axis has a
static extent; `size` is its padded extent for backends that need powers of two (coordinates at or
beyond `extent` load the fill value, are never stored and count as the neutral element in
reductions). Scalars (grid coordinates, loop variables, `let` names, tensor extents, integer
arguments) are 64-bit integers that fit 32 bits unless they address memory.

Elementwise code computes in f32, in f64 where an f64 takes part, and rounds to the tile's dtype at
each statement. Reads in expressions (`read`, `readf` of a tensor argument) must be in bounds everywhere.

`lanes` names the axis along which a CPU vectorises (each tile is stored with that axis innermost);
GPU backends ignore it. Grammar: ir/README.md. Text: `to_text`, `parse`; checks: `verify`;
reference semantics: `interpret`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from .expr import Expr


@dataclass(frozen=True)
class Axis:
    """A tile axis: coordinates 0 <= name < extent, stored padded to size (extent on a CPU).

    live: the `let` that says how many coordinates there are, 1 to extent, from that statement on; tiles over
    the axis come after it, and nothing is summed along it. A backend computes those beyond, or not."""

    name: str
    extent: int
    size: int
    live: str | None = None

    @property
    def symbol(self) -> sympy.Symbol:
        return sympy.Symbol(self.name, integer=True)


@dataclass(frozen=True)
class Tensor:
    """A tensor argument in global memory.

    shape: each entry an integer or a name; names are bound from the tensor at the call and are
    visible as integer scalars in the kernel. Only the intermediates of a program have expressions there
    (see Program). unit: the position of the dimension whose stride is 1 (None: all strides are read at
    run time). role: 'in', 'out' or 'inout'. align: a power of two of bytes that divides the address and
    every stride but the unit one; it changes speed, never results, and whoever passes a tensor sees to it.
    """

    name: str
    dtype: str
    shape: tuple[int | str | Expr, ...]
    role: str = "in"
    unit: int | None = None
    align: int = 1


@dataclass(frozen=True)
class Scalar:
    """A scalar argument: dtype i64, i32, f32 or f64."""

    name: str
    dtype: str


@dataclass(frozen=True)
class GridDim:
    """One dimension of the launch grid: name runs over 0 <= name < extent (an expression of scalars)."""

    name: str
    extent: Expr


@dataclass(frozen=True)
class Let:
    """`let name = expr`: an immutable integer (or boolean) scalar."""

    name: str
    expr: Expr


@dataclass(frozen=True)
class Compute:
    """`tile dst: dtype[axes] = expr` or, for a tile already declared, `dst = expr`.

    expr ranges over tiles (by name, broadcast by axis names), axis coordinates and scalars. The
    first statement that writes a tile in program order declares it (declares=True)."""

    dst: str
    dtype: str
    axes: tuple[str, ...]
    expr: Expr
    declares: bool = True


@dataclass(frozen=True)
class Load:
    """`tile dst: dtype[axes] = load tensor[index] where guard else other`.

    index: one integer expression per tensor dimension over scalars, axis coordinates and integer
    tiles. Where the guard is false nothing is read and the element is `other`. The value is
    converted to the tile's dtype."""

    dst: str
    dtype: str
    axes: tuple[str, ...]
    tensor: str
    index: tuple[Expr, ...]
    guard: Expr = sympy.true
    other: Expr = sympy.S.Zero


@dataclass(frozen=True)
class Store:
    """`store tensor[index] = value over axes where guard`; value is converted to the tensor's dtype.

    adds (`+=`): the value is added to the element. Coordinates of a tile may then meet at one element, and
    on a GPU grid cells too: the order of additions is open. On a CPU cells add to elements of their own."""

    tensor: str
    index: tuple[Expr, ...]
    value: Expr
    axes: tuple[str, ...]
    guard: Expr = sympy.true
    adds: bool = False


@dataclass(frozen=True)
class Dot:
    """`tile dst: dtype[axes] = dot(a, b) over axis` (+ dst when accumulate).

    dst[x.., y..] = sum over `over` of a[.., over] * b[.., over]; a holds dst's first axis, b its
    second. Products accumulate in dst's dtype. precision: 'ieee' or 'tf32' (GPU, f32 operands)."""

    dst: str
    dtype: str
    axes: tuple[str, str]
    a: str
    b: str
    over: str
    accumulate: bool = False
    declares: bool = True
    precision: str = "ieee"


@dataclass(frozen=True)
class Reduce:
    """`tile dst: dtype[axes] = op expr over axis`, op in 'sum', 'max', 'min', 'any'.

    expr is elementwise over axes + (over,). 'any' takes a boolean expression and yields bool. With
    axes == () the result is a scalar usable in conditions."""

    dst: str
    dtype: str
    axes: tuple[str, ...]
    op: str
    expr: Expr
    over: tuple[str, ...]
    declares: bool = True


@dataclass(frozen=True)
class Scan:
    """`tile dst: dtype[axes] = cumsum expr over axis`: inclusive prefix sums along one axis of the tile.

    dst[.., n] = sum of expr[.., 0] to expr[.., n]; expr is elementwise over axes, `over` is one of them."""

    dst: str
    dtype: str
    axes: tuple[str, ...]
    expr: Expr
    over: str
    declares: bool = True


@dataclass(frozen=True)
class Span:
    """A half-open interval of a loop: lo <= x < hi, empty when hi <= lo."""

    lo: Expr
    hi: Expr


@dataclass(frozen=True)
class For:
    """`for var in lo .. hi | lo2 .. hi2 { body }`: runs over the disjoint spans in order."""

    var: str
    spans: tuple[Span, ...]
    body: tuple[Stmt, ...]


@dataclass(frozen=True)
class If:
    """`if cond { body }`: cond is a scalar boolean (never a tile)."""

    cond: Expr
    body: tuple[Stmt, ...]


Stmt = Let | Compute | Load | Store | Dot | Reduce | Scan | For | If


@dataclass(frozen=True)
class Kernel:
    """A kernel: its arguments, launch grid, tile axes, body and schedule notes.

    meta: backend hints that change speed, never results (warps, stages, register block), sorted by
    name. comment: lines for the header of the emitted source (mask, schedule)."""

    name: str
    args: tuple[Tensor | Scalar, ...]
    grid: tuple[GridDim, ...]
    axes: tuple[Axis, ...]
    lanes: str | None
    body: tuple[Stmt, ...]
    meta: tuple[tuple[str, int], ...] = ()
    comment: tuple[str, ...] = field(default=())

    def axis(self, name: str) -> Axis:
        """The axis called name. Raises KeyError."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise KeyError(name)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(a for a in self.args if isinstance(a, Tensor))

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        return tuple(a for a in self.args if isinstance(a, Scalar))


@dataclass(frozen=True)
class Program:
    """Kernels in launch order. Arguments of one name are one tensor or scalar.

    intermediates: tensors that live between kernels and start uninitialised; an extent may be an
    expression of dimension names and integer arguments, and kernels give it a name of their own.
    text: the IR text that the kernels were lowered from. checks: (condition, message) pairs, as text
    over dimension names and integer arguments; a call for which a condition holds is an error."""

    kernels: tuple[Kernel, ...]
    intermediates: tuple[Tensor, ...] = ()
    text: str = ""
    checks: tuple[tuple[str, str], ...] = ()

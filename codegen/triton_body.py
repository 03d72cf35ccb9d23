"""Statements of a kernel as the lines of a Triton function's body."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import sympy

from ..ir import expr as ex
from ..ir.expr import Expr
from ..ir.kernel import Compute, Dot, For, If, Kernel, Let, Load, Reduce, Scan, Stmt, Store
from .layout import INDENT, WIDTH, wrap
from .triton_boxes import box_of
from .triton_e2m1 import e2m1_of
from .triton_expr import Speller
from .triton_fields import field_of
from .triton_helpers import HELPERS
from .triton_scope import AND, ATOM, FLOATS, PRODUCT, SUM, TL, Name, Scope, Value

# The least extent of the summed axis that tl.dot takes on every target; shorter sums are spelled out.
DOT_MIN = 16

# The start of a call and its arguments.
_Call = tuple[str, list[str]]

# Names that scalars of a kernel cannot keep.
RESERVED = {"tl", "triton", "float", "grid", "bind", "pid", *HELPERS}


class Body:
    """Spells the statements of one kernel. `scope` says afterwards which strides and helpers they use.

    Tiles are Triton tensors whose dimensions follow the kernel's list of axes, whatever the order in
    which a statement names them, so values meet by adding dimensions and never by permuting them.

    Padding (coordinates from an axis' extent to its size): loads and stores mask it; `zeros` records
    the axes along which a tile is known to hold 0 there, and only other tiles are masked again before
    they are reduced."""

    def __init__(self, kernel: Kernel, scope: Scope) -> None:
        self.kernel, self.scope = kernel, scope
        self.assigned = {
            s.dst
            for s in _walk(kernel.body)
            if isinstance(s, (Compute, Dot, Reduce, Scan)) and not s.declares
        }
        self.zeros: dict[str, frozenset[str]] = {}
        self.padded = {a.name for a in kernel.axes if a.size != a.extent}
        self.described = bool(dict(kernel.meta).get("descriptors"))
        self.packs = bool(dict(kernel.meta).get("fields"))
        self.lines: list[str] = []
        self.depth = 1

    def spell(self, body: tuple[Stmt, ...]) -> list[str]:
        """The lines of the body, indented for a function."""
        for stmt in body:
            self._RULES[type(stmt)](self, stmt)
        return self.lines

    # lines ------------------------------------------------------------------------------------------

    def _line(self, text: str) -> None:
        self.lines += wrap(text, self.depth)

    def _block(self, body: tuple[Stmt, ...], *first: str) -> None:
        self.depth += 1
        for line in first if body else ("pass",):
            self._line(line)
        self.spell(body)
        self.depth -= 1

    # names ------------------------------------------------------------------------------------------

    def _tile(self, dst: str, dtype: str, axes: tuple[str, ...], declares: bool) -> Name:
        """The name a tile is assigned to; a declaration gets its shape as a comment."""
        if not declares:
            return self.scope.names[dst]
        name = Name(f"b_{dst}", dtype, axes)
        self.scope.names[dst] = name
        self.scope.definitions.pop(dst, None)
        shape = ", ".join(f"{a} {self.scope.axis(a).size}" for a in axes)
        self._line(f"# {name.text}: {dtype}[{shape}]" if axes else f"# {name.text}: {dtype}")
        return name

    def _shape(self, axes: tuple[str, ...]) -> str:
        return f"[{', '.join(str(self.scope.axis(a).size) for a in axes)}]"

    def _full(self, value: Value, dtype: str, axes: tuple[str, ...]) -> str:
        """A value as a tile of exactly these axes."""
        if not axes:
            return f"tl.cast({value.text}, {TL[dtype]})" if value.literal else value.text
        if value.axes == frozenset(axes):
            return value.text
        if not value.axes:
            return f"tl.full({self._shape(axes)}, {value.text}, {TL[dtype]})"
        return f"tl.broadcast_to({value.text}, {self._shape(axes)})"

    def _inside(self, speller: Speller, axes: tuple[str, ...]) -> list[str]:
        """The masks of the padded ones among some axes."""
        return [speller._placed(Name(f"m_{a}", "bool", (a,))).text for a in axes if a in self.padded]

    # statements -------------------------------------------------------------------------------------

    def _let(self, stmt: Let) -> None:
        value = Speller.of(self.scope, (), [stmt.expr]).spell(stmt.expr)
        name = scalar_name(stmt.name)
        dtype = value.dtype if value.dtype in ("bool", "i64", *FLOATS) else "i32"
        self.scope.names[stmt.name] = Name(name, dtype)
        self.scope.nonnegative.discard(stmt.name)
        if dtype in ("i32", "i64") and self.scope.is_nonnegative(stmt.expr):
            self.scope.nonnegative.add(stmt.name)
        self._line(f"{name} = {value.text}")

    def _compute(self, stmt: Compute) -> None:
        axes = self.scope.order(stmt.axes)
        field = (field_of(stmt, self.scope) or e2m1_of(stmt, self.scope)) if self.packs else None
        if field is not None:
            self.scope.fields[field.name] = field.source
            name = self._tile(stmt.dst, stmt.dtype, axes, stmt.declares)
            self._line(f"{name.text} = {field.name}({self.scope.names[field.tile].text})")
            self.zeros[stmt.dst] = frozenset()
            return
        speller = Speller.of(self.scope, axes, [stmt.expr], stmt.dtype)
        value = speller.convert(speller.spell(stmt.expr), stmt.dtype)
        zero = self._zeros(stmt.expr)
        name = self._tile(stmt.dst, stmt.dtype, axes, stmt.declares)
        self._line(f"{name.text} = {self._full(value, stmt.dtype, axes)}")
        self.zeros[stmt.dst] = zero & frozenset(axes)
        if stmt.declares and stmt.dst not in self.assigned and ex.kind(stmt.expr) == "int":
            self._define(stmt.dst, stmt.expr)

    def _define(self, tile: str, expr: Expr) -> None:
        """Remember a tile that is a plain function of coordinates and scalars, for addresses made of it."""
        known = {ex.integer(name): value for name, value in self.scope.definitions.items()}
        expr = expr.xreplace(known)
        names = {str(s) for s in expr.free_symbols}
        tiles = [n for n in names if n in self.scope.names and self.scope.names[n].axes]
        if not tiles and not names & self.assigned and not expr.has(ex.read, ex.readf):
            self.scope.definitions[tile] = expr

    def _zeros(self, expr: Expr) -> frozenset[str]:
        """Axes along which an expression is known to be 0 in the padding."""
        if expr == 0:
            return frozenset(self.padded)
        if isinstance(expr, ex.cast):
            return self._zeros(expr.args[1])
        return self.zeros.get(expr.name, frozenset()) if isinstance(expr, sympy.Symbol) else frozenset()

    def _load(self, stmt: Load) -> None:
        axes = self.scope.order(stmt.axes)
        tensor = self.scope.tensors[stmt.tensor]
        speller = Speller.of(self.scope, axes, [*stmt.index, stmt.guard, stmt.other], tensor.dtype)
        box = box_of(stmt, axes, speller, self.scope) if self.described else None
        if box is not None and self.scope.boxes.setdefault(stmt.tensor, box.extents) == box.extents:
            # The copy engine counts in 32 bits; the box lies in the tensor, whatever its loop counts in.
            start = ", ".join(speller.convert(speller.integer(entry), "i32").text for entry in box.start)
            shape = ", ".join(map(str, box.shape))
            name = self._tile(stmt.dst, stmt.dtype, axes, True)
            turned = f".permute({list(box.order)})" if box.order != tuple(sorted(box.order)) else ""
            self._line(f"{name.text} = d_{stmt.tensor}.load([{start}]).reshape([{shape}]){turned}")
            self.zeros[stmt.dst] = frozenset(self.padded & set(axes))
            return
        pointer = self._address(speller, stmt.tensor, stmt.index, axes)
        guard, masks = self._mask(speller, stmt.guard, axes)
        floating = tensor.dtype in FLOATS
        other = speller.convert(speller.spell(stmt.other), speller.floats if floating else "i32")
        arguments = [pointer, f"mask={masks}", f"other={other.text}"] if guard else [pointer]
        name = self._tile(stmt.dst, stmt.dtype, axes, True)
        cast = "" if tensor.dtype == stmt.dtype else f".to({TL[stmt.dtype]})"
        self._line(f"{name.text} = tl.load({', '.join(arguments)}){cast}")
        self.zeros[stmt.dst] = frozenset(self.padded & set(axes)) if stmt.other == 0 else frozenset()

    def _store(self, stmt: Store) -> None:
        axes = self.scope.order(stmt.axes)
        dtype = self.scope.tensors[stmt.tensor].dtype
        speller = Speller.of(self.scope, axes, [*stmt.index, stmt.guard, stmt.value], dtype)
        pointer = self._address(speller, stmt.tensor, stmt.index, axes)
        value = speller.convert(speller.spell(stmt.value), dtype)
        guard, masks = self._mask(speller, stmt.guard, axes)
        arguments = [pointer, self._full(value, dtype, axes)]
        arguments += [f"mask={masks}"] if guard else []
        arguments += ['sem="relaxed"'] if stmt.adds else []
        self._line(f"tl.{'atomic_add' if stmt.adds else 'store'}({', '.join(arguments)})")

    def _address(self, speller: Speller, tensor: str, index: tuple[Expr, ...], axes: tuple[str, ...]) -> str:
        pointer = speller.pointer(self.scope.tensors[tensor], index)
        if pointer.axes == frozenset(axes):
            return pointer.text
        if not pointer.axes:
            return f"{pointer.text} + tl.zeros({self._shape(axes)}, tl.int32)"
        return f"tl.broadcast_to({pointer.text}, {self._shape(axes)})"

    def _mask(self, speller: Speller, guard: Expr, axes: tuple[str, ...]) -> tuple[bool, str]:
        """Whether anything is masked, and the mask: the guard and the padding."""
        parts = self._inside(speller, axes)
        if guard != sympy.true:
            value = speller.condition(guard)
            parts.insert(0, value.at(AND) if parts else value.text)
        return bool(parts), " & ".join(parts)

    def _dot(self, stmt: Dot) -> None:
        """tl.dot with the operands, and their dimensions, in the order it wants them.

        Sums shorter than 16 and integers are spelled as a sum of products. f64 goes to tl.dot."""
        axes = self.scope.order(stmt.axes)
        holding = {stmt.axes[0]: stmt.a, stmt.axes[1]: stmt.b}
        tiles = [holding[a] for a in axes]
        dtype = stmt.dtype if stmt.dtype in ("f64", "i32", "i64") else "f32"
        short = self.scope.axis(stmt.over).size < DOT_MIN or self.scope.names[tiles[0]].dtype not in FLOATS
        spelled = self._sum_of_products if short else self._tensor_core
        head, arguments = spelled(stmt, axes, tiles, dtype)
        target = self._tile(stmt.dst, stmt.dtype, axes, stmt.declares)
        tail = ")" if dtype == stmt.dtype else f").to({TL[stmt.dtype]})"
        if stmt.accumulate and not short and dtype == stmt.dtype:
            arguments.insert(2, f"acc={target.text}")
        elif stmt.accumulate:
            head, tail = f"({target.text} + {head}", f"){tail}"
        self._line(f"{target.text} = {head}{', '.join(arguments)}{tail}")
        self.zeros[stmt.dst] = frozenset()

    def _tensor_core(self, stmt: Dot, axes: tuple[str, ...], tiles: list[str], dtype: str) -> _Call:
        names = [self.scope.names[t] for t in tiles]
        wanted = ((axes[0], stmt.over), (stmt.over, axes[1]))
        common = names[0].dtype if names[0].dtype == names[1].dtype else dtype
        operands = []
        for tile, name, order in zip(tiles, names, wanted, strict=True):
            text = self._neutral(tile, name, stmt.over)
            text += "" if name.dtype == common else f".to({TL[common]})"
            operands.append(text if name.axes == order else f"tl.trans({text})")
        precision = [f'input_precision="{stmt.precision}"'] if common == "f32" else []
        out = [f"out_dtype={TL[dtype]}"] if dtype == "f64" else []
        return "tl.dot(", [*operands, *precision, *out]

    def _neutral(self, tile: str, name: Name, over: str) -> str:
        """A dot operand whose padding along the summed axis is 0."""
        if over not in self.padded or over in self.zeros[tile]:
            return name.text
        mask = Speller(self.scope, name.axes)._placed(Name(f"m_{over}", "bool", (over,))).text
        return f"tl.where({mask}, {name.text}, 0)"

    def _sum_of_products(self, stmt: Dot, axes: tuple[str, ...], tiles: list[str], dtype: str) -> _Call:
        box = self.scope.order((*axes, stmt.over))
        speller = Speller(self.scope, box)
        factors = []
        for tile in tiles:
            name = self.scope.names[tile]
            value = speller._placed(Name(self._neutral(tile, name, stmt.over), name.dtype, name.axes))
            factors.append(speller.convert(value, dtype).text)
        return "tl.sum(", [" * ".join(factors), f"axis={box.index(stmt.over)}"]

    def _reduce(self, stmt: Reduce) -> None:
        axes = self.scope.order(stmt.axes)
        box = self.scope.order((*axes, *stmt.over))
        dtype = {"f16": "f32", "bf16": "f32"}.get(stmt.dtype, stmt.dtype)
        logical = stmt.op == "any"
        speller = Speller.of(self.scope, box, [stmt.expr], dtype)
        value = speller.spell(stmt.expr)
        value = (
            speller.convert(speller.convert(value, "bool"), "i32")
            if logical
            else speller.convert(value, dtype)
        )
        text = self._full(value, "i32" if logical else dtype, box)
        known = self._zeros(stmt.expr) if stmt.op == "sum" else frozenset()
        masks = self._inside(speller, tuple(a for a in stmt.over if a not in known))
        if masks:
            text = f"tl.where({' & '.join(masks)}, {text}, {_neutral_element(stmt.op, dtype)})"
        function = f"tl.{'max' if logical else stmt.op}"
        for axis in reversed(self.scope.order(stmt.over)):
            if box == (axis,):
                # By way of [1]: Triton 3.6 fails on sm_100 where what a dot gave is reduced from 1-d.
                text = f"{function}({text if text.isidentifier() else f'({text})'}[:, None], axis=0).item()"
            else:
                text = f"{function}({text}, axis={box.index(axis)})"
            box = tuple(a for a in box if a != axis)
        text = f"{text} > 0" if logical else text if dtype == stmt.dtype else f"{text}.to({TL[stmt.dtype]})"
        name = self._tile(stmt.dst, stmt.dtype, axes, stmt.declares)
        self._line(f"{name.text} = {text}")
        self.zeros[stmt.dst] = frozenset()

    def _scan(self, stmt: Scan) -> None:
        """Padding lies behind every coordinate, so no sum that is used holds any."""
        axes = self.scope.order(stmt.axes)
        dtype = (
            stmt.dtype if stmt.dtype in ("f64", "i64", "i32") else "f32" if stmt.dtype in FLOATS else "i32"
        )
        speller = Speller.of(self.scope, axes, [stmt.expr], dtype)
        text = self._full(speller.convert(speller.spell(stmt.expr), dtype), dtype, axes)
        name = self._tile(stmt.dst, stmt.dtype, axes, stmt.declares)
        cast = "" if dtype == stmt.dtype else f".to({TL[stmt.dtype]})"
        self._line(f"{name.text} = tl.cumsum({text}, axis={axes.index(stmt.over)}){cast}")
        self.zeros[stmt.dst] = frozenset()

    def _for(self, stmt: For) -> None:
        """One loop, however many spans: a counter runs over all of them and picks the span it is in,
        so that the loads of the next span are under way before the last one ends."""
        speller = Speller.of(self.scope, (), [b for s in stmt.spans for b in (s.lo, s.hi)])
        bounds = [(speller.integer(s.lo), speller.integer(s.hi)) for s in stmt.spans]
        var = scalar_name(stmt.var)
        wide = any(v.dtype == "i64" for pair in bounds for v in pair)
        self.scope.names[stmt.var] = Name(var, "i64" if wide else "i32")
        self.scope.nonnegative.discard(stmt.var)
        if all(self.scope.is_nonnegative(s.lo) for s in stmt.spans):
            self.scope.nonnegative.add(stmt.var)
        if len(bounds) == 1:
            ((lo, hi),) = bounds
            self._line(f"for {var} in tl.range({lo.text}, {hi.text}):")
            self._block(stmt.body)
            return
        self._line(f"# {var}: " + ", then ".join(f"{lo.text} .. {hi.text}" for lo, hi in bounds))
        total = ""
        for n, (lo, hi) in enumerate(bounds):
            length = f"tl.maximum({_difference(hi, lo)}, 0)"
            self._line(f"n_{var}_{n} = {total}{length}")
            total = f"n_{var}_{n} + "
        shift = _shift(var, bounds, len(bounds) - 1)
        for n in reversed(range(len(bounds) - 1)):
            shift = f"tl.where(n_{var} < n_{var}_{n}, {_shift(var, bounds, n)}, {shift})"
        self._line(f"for n_{var} in tl.range(0, n_{var}_{len(bounds) - 1}):")
        self._block(stmt.body, f"{var} = n_{var} + {shift}")

    def _if(self, stmt: If) -> None:
        condition = Speller.of(self.scope, (), [stmt.cond]).condition(stmt.cond)
        long = condition.level < ATOM and len(condition.text) + len(INDENT) * self.depth + 4 > WIDTH
        self._line(f"if ({condition.text}):" if long else f"if {condition.text}:")
        self._block(stmt.body)

    _RULES: ClassVar[dict[type[Stmt], Callable[..., None]]] = {
        Let: _let,
        Compute: _compute,
        Load: _load,
        Store: _store,
        Dot: _dot,
        Reduce: _reduce,
        Scan: _scan,
        For: _for,
        If: _if,
    }


def scalar_name(name: str) -> str:
    """A scalar's own name, with an underscore where it would hide one of ours."""
    taken = name in RESERVED or (name[1:2] == "_" and name[0] in "bpsrmind")
    return f"{name}_" if taken else name


def _difference(hi: Value, lo: Value) -> str:
    return hi.text if lo.text == "0" else f"{hi.at(SUM)} - {lo.at(PRODUCT)}"


def _shift(var: str, bounds: list[tuple[Value, Value]], n: int) -> str:
    """What the counter is moved by in span n."""
    lo = bounds[n][0]
    return lo.text if n == 0 else f"{lo.at(SUM)} - n_{var}_{n - 1}"


def _neutral_element(op: str, dtype: str) -> str:
    if op in ("sum", "any"):
        return "0"
    if dtype in FLOATS:
        return f'float("{"-inf" if op == "max" else "inf"}")'
    bits = int(dtype[1:])
    return str(-(1 << bits - 1) if op == "max" else (1 << bits - 1) - 1)


def _walk(body: Iterable[Stmt]) -> Iterator[Stmt]:
    for stmt in body:
        yield stmt
        if isinstance(stmt, (For, If)):
            yield from _walk(stmt.body)

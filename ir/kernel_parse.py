"""Reads the text of tile programs: recursive descent, one method a rule of the grammar in ir/README.md.

Names are resolved while reading, because expressions need the kinds of theirs: a name that is not in
scope is an error with its position. Everything else that can be wrong is `verify`'s to say.
"""

from __future__ import annotations

import sympy

from . import kernel as K
from .expr import DTYPES, Expr, boolean, integer, kind, real
from .scanner import Cursor

REDUCTIONS = ("sum", "max", "min", "any")
Scope = dict[str, Expr]
Tiles = dict[str, tuple[str, tuple[str, ...]]]


def parse(text: str) -> K.Kernel:
    """The kernel a text spells. Raises ParseError with line and column."""
    reader = _Reader(text)
    kernel = reader.kernel()
    reader.end()
    return kernel


def parse_program(text: str) -> K.Program:
    """The program (kernels in launch order and what they share) a text spells. Raises ParseError."""
    reader = _Reader(text)
    program = reader.program()
    reader.end()
    return program


def symbol_of(name: str, dtype: str) -> Expr:
    """The symbol that stands for a value of a dtype."""
    if dtype == "bool":
        return boolean(name)
    return real(name) if dtype[0] == "f" or dtype == "bf16" else integer(name)


def _plain(extent: Expr) -> int | str | Expr:
    """An extent as tensors hold it: numbers and names are plain."""
    return int(extent) if extent.is_Integer else extent.name if extent.is_Symbol else extent


class _Reader:
    def __init__(self, text: str) -> None:
        self.cursor = Cursor(text)
        self.scope: Scope = {}
        self.tiles: Tiles = {}

    def end(self) -> None:
        self.cursor.lines()
        if self.cursor.at < len(self.cursor.text):
            self.cursor.fail(f"expected the end of the text; got {self.cursor.shown()}")

    # headers -----------------------------------------------------------------------------------

    def program(self) -> K.Program:
        c = self.cursor
        c.expect("program", after_lines=True)
        c.expect("{")
        c.lines()
        text = ""
        if c.take("text"):
            text = c.string("the text the kernels were made from")
            c.end_statement()
        checks = []
        while c.take("check"):
            condition = c.string("a condition")
            c.expect(":")
            checks.append((condition, c.string("a message")))
            c.end_statement()
        intermediates = []
        while c.take("intermediate"):
            intermediates.append(self.intermediate())
            c.end_statement()
        kernels = []
        while not c.take("}"):
            kernels.append(self.kernel())
            c.end_statement()
        return K.Program(tuple(kernels), tuple(intermediates), text, tuple(checks))

    def kernel(self) -> K.Kernel:
        c = self.cursor
        self.scope, self.tiles = {}, {}
        comment = self.comment()
        c.expect("kernel")
        c.expect("@")
        name = c.word("the name of the kernel")
        args = c.items("(", ")", self.argument)
        c.expect("grid", after_lines=True)
        grid = c.items("(", ")", self.grid_dim)
        self.scope.update((g.name, integer(g.name)) for g in grid)
        c.expect("axes", after_lines=True)
        axes = c.items("(", ")", self.axis)
        self.scope.update((a.name, a.symbol) for a in axes)
        c.lines()
        lanes = c.name("the lane axis") if c.take("lanes") else None
        c.lines()
        meta = c.items("(", ")", self.hint) if c.take("meta") else ()
        c.lines()
        body = self.block()
        return K.Kernel(name, args, grid, axes, lanes, body, meta, comment)

    def comment(self) -> tuple[str, ...]:
        """The `#` lines right above the kernel."""
        c = self.cursor
        c.lines()
        above = c.text[: c.at].split("\n")[:-1]
        lines: list[str] = []
        while above and above[-1].strip().startswith("#"):
            lines.insert(0, above.pop().strip()[1:].removeprefix(" "))
        return tuple(lines)

    def argument(self) -> K.Tensor | K.Scalar:
        c = self.cursor
        name = c.name("the name of an argument")
        c.expect(":")
        dtype = self.dtype()
        if c.peek("["):
            return self.tensor(name, dtype)
        self.scope[name] = symbol_of(name, dtype)
        return K.Scalar(name, dtype)

    def tensor(self, name: str, dtype: str) -> K.Tensor:
        c = self.cursor
        shape = c.items("[", "]", self.extent)
        role = c.one_of(("in", "out", "inout"), "a role")
        unit = c.integer("the dimension of stride 1") if c.take("unit") else None
        align = c.integer("the alignment in bytes") if c.take("align") else 1
        self.scope.update((n, integer(n)) for n in shape if isinstance(n, str))
        self.scope[name] = integer(name) if dtype == "bool" else symbol_of(name, dtype)
        return K.Tensor(name, dtype, shape, role, unit, align)

    def intermediate(self) -> K.Tensor:
        """A tensor whose extents are expressions of integers that the kernels' arguments name."""
        c = self.cursor
        name = c.name("the name of a tensor")
        c.expect(":")
        dtype = self.dtype()
        shape = c.items("[", "]", lambda: _plain(c.expr(None, ",")))
        role = c.one_of(("in", "out", "inout"), "a role")
        return K.Tensor(
            name, dtype, shape, role, c.integer("the dimension of stride 1") if c.take("unit") else None
        )

    def extent(self) -> int | str:
        c = self.cursor
        return c.integer() if c.text[c.at : c.at + 1].isdigit() else c.name("an extent (a number or a name)")

    def grid_dim(self) -> K.GridDim:
        c = self.cursor
        name = c.name("the name of a grid dimension")
        c.expect(":")
        return K.GridDim(name, c.expr(self.scope, ","))

    def axis(self) -> K.Axis:
        c = self.cursor
        name = c.name("the name of an axis")
        c.expect(":")
        extent = c.integer("an extent")
        size = c.integer("a padded extent") if c.take("of") else extent
        return K.Axis(name, extent, size, c.name("a `let`") if c.take("live") else None)

    def hint(self) -> tuple[str, int]:
        name = self.cursor.word("the name of a hint")
        self.cursor.expect("=")
        return name, self.cursor.integer()

    def dtype(self) -> str:
        return self.cursor.one_of(DTYPES, "a dtype")

    # statements --------------------------------------------------------------------------------

    def block(self) -> tuple[K.Stmt, ...]:
        """`{ statements }`; names made inside end with it."""
        c = self.cursor
        c.expect("{")
        c.lines()
        scope, tiles = dict(self.scope), dict(self.tiles)
        body: list[K.Stmt] = []
        while not c.take("}"):
            if c.at >= len(c.text):
                c.fail("expected a statement or '}'; got the end of the text")
            body.append(self.statement())
            c.end_statement()
        self.scope, self.tiles = scope, tiles
        return tuple(body)

    def statement(self) -> K.Stmt:
        c = self.cursor
        if c.take("let"):
            return self.let()
        if c.take("store"):
            return self.store()
        if c.take("for"):
            return self.loop()
        if c.take("if"):
            return K.If(c.expr(self.scope, "{"), self.block())
        if c.take("tile"):
            return self.declaration()
        return self.assignment()

    def let(self) -> K.Let:
        c = self.cursor
        name = c.name("the name of a scalar")
        c.expect("=")
        expr = c.expr(self.scope)
        self.scope[name] = boolean(name) if kind(expr) == "bool" else integer(name)
        return K.Let(name, expr)

    def store(self) -> K.Store:
        c = self.cursor
        tensor, index = self.place()
        adds = c.take("+=")
        if not adds:
            c.expect("=")
        value = c.expr(self.scope, "over")
        axes = self.over()
        guard = c.expr(self.scope) if c.take("where") else sympy.true
        return K.Store(tensor, index, value, axes, guard, adds)

    def loop(self) -> K.For:
        c = self.cursor
        var = c.name("a loop variable")
        c.expect("in")
        spans = [self.span()]
        while c.take("|"):
            c.lines()
            spans.append(self.span())
        outer = self.scope
        self.scope = {**outer, var: integer(var)}
        body = self.block()
        self.scope = outer
        return K.For(var, tuple(spans), body)

    def span(self) -> K.Span:
        lo = self.cursor.expr(self.scope, "..", "|", "{")
        self.cursor.expect("..")
        return K.Span(lo, self.cursor.expr(self.scope, "..", "|", "{"))

    def declaration(self) -> K.Stmt:
        c = self.cursor
        name = c.name("the name of a tile")
        c.expect(":")
        dtype = self.dtype()
        axes = c.items("[", "]", lambda: c.name("an axis"))
        made = self.value(name, dtype, axes, declares=True)
        self.scope[name] = symbol_of(name, dtype)
        self.tiles[name] = (dtype, axes)
        return made

    def assignment(self) -> K.Stmt:
        c = self.cursor
        at = c.at
        name = c.name("a statement")
        if name not in self.tiles:
            c.fail(f"expected a statement or the name of a tile in scope; got {name!r}", at)
        return self.value(name, *self.tiles[name], declares=False)

    def value(self, dst: str, dtype: str, axes: tuple[str, ...], *, declares: bool) -> K.Stmt:
        """What follows the target: `= load ...`, `= dot(...)`, `+= dot(...)`, `= max ... over`,
        `= cumsum ... over`, `= expr`."""
        c = self.cursor
        accumulate = c.take("+=")
        if not accumulate:
            c.expect("=")
        if accumulate or c.peek("dot"):
            return self.dot(dst, dtype, axes, accumulate=accumulate, declares=declares)
        if declares and c.take("load"):
            return self.load(dst, dtype, axes)
        if c.take("cumsum"):
            summed = c.expr(self.scope, "over")
            c.expect("over")
            return K.Scan(dst, dtype, axes, summed, c.name("the axis to sum along"), declares)
        start = c.at
        for op in REDUCTIONS:
            # `max x over i` is a reduction, `max(x, y)` a function.
            if c.take(op):
                c.until("over")
                reduces = c.peek("over")
                c.at = start
                if reduces:
                    c.expect(op)
                    return K.Reduce(dst, dtype, axes, op, c.expr(self.scope, "over"), self.over(), declares)
        return K.Compute(dst, dtype, axes, c.expr(self.scope), declares)

    def load(self, dst: str, dtype: str, axes: tuple[str, ...]) -> K.Load:
        c = self.cursor
        tensor, index = self.place()
        if not c.take("where"):
            return K.Load(dst, dtype, axes, tensor, index)
        guard = c.expr(self.scope, "else")
        c.expect("else")
        return K.Load(dst, dtype, axes, tensor, index, guard, c.expr(self.scope))

    def dot(self, dst: str, dtype: str, axes: tuple[str, ...], *, accumulate: bool, declares: bool) -> K.Dot:
        c = self.cursor
        c.expect("dot")
        c.expect("(")
        a = c.name("the first tile")
        c.expect(",")
        b = c.name("the second tile")
        c.expect(")")
        c.expect("over")
        over = c.name("the axis to sum over")
        precision = c.word("a precision") if c.take("precision") else "ieee"
        return K.Dot(dst, dtype, axes, a, b, over, accumulate, declares, precision)  # type: ignore[arg-type]

    def place(self) -> tuple[str, tuple[Expr, ...]]:
        """`tensor[index, ...]`."""
        c = self.cursor
        tensor = c.name("the name of a tensor")
        return tensor, c.items("[", "]", lambda: c.expr(self.scope, ","))

    def over(self) -> tuple[str, ...]:
        """`over i` or `over (i, j)`."""
        c = self.cursor
        c.expect("over")
        if c.peek("("):
            return c.items("(", ")", lambda: c.name("an axis"))
        return (c.name("an axis"),)

"""Text of graphs. `parse(to_text(graph)) == graph`; the grammar is in ir/README.md."""

from __future__ import annotations

from typing import Any

from . import attributes as _attributes  # noqa: F401  (registers what attributes may hold)
from .expr import DTYPES
from .graph import Extent, Graph, Op, Value
from .scanner import Cursor
from .text import dump, load

FORMATS = ("dense", "acsr", "blocks")


def to_text(graph: Graph) -> str:
    """The text of a graph; ends with a newline.

    >>> x = Value("x", "f32", ("n", 8))
    >>> from .expr import real
    >>> square = Op("map", ("x",), (Value("y", "f32", ("n", 8)),), (("expr", real("x0") ** 2),))
    >>> print(to_text(Graph("square", (x,), (square,), ("y",))))
    graph @square(%x: f32[n, 8]) {
      %y = map %x {expr = expr('x0 ** 2', floats=('x0',))} : f32[n, 8]
      return %y
    }
    <BLANKLINE>
    """
    inputs = ", ".join(f"%{v.name}: {_type(v)}" for v in graph.inputs)
    lines = [f"graph @{graph.name}({inputs}) {{", *(f"  {op_text(op)}" for op in graph.ops)]
    return "\n".join([*lines, f"  return {_names(graph.outputs)}", "}"]) + "\n"


def op_text(op: Op) -> str:
    """One operation, as it stands in the text of its graph."""
    attrs = ", ".join(f"{name} = {dump(value)}" for name, value in op.attrs)
    operands = f" {_names(op.inputs)}" if op.inputs else ""
    types = ", ".join(_type(v) for v in op.outputs)
    braces = f" {{{attrs}}}" if attrs else ""
    return f"{_names(tuple(v.name for v in op.outputs))} = {op.kind}{operands}{braces} : {types}"


def parse(text: str) -> Graph:
    """The graph a text spells. Raises ParseError with line and column."""
    return _Reader(text).graph()


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"%{n}" for n in names)


def _type(value: Value) -> str:
    stored = "" if value.format == "dense" else f" as {value.format}"
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]{stored}"


class _Reader:
    """Recursive descent, one method a rule."""

    def __init__(self, text: str) -> None:
        self.cursor = Cursor(text)

    def graph(self) -> Graph:
        c = self.cursor
        c.expect("graph", after_lines=True)
        c.expect("@")
        name = c.word("the name of the graph")
        inputs = c.items("(", ")", self.input)
        c.expect("{")
        c.lines()
        ops = []
        while not c.take("return"):
            ops.append(self.op())
            c.end_statement()
        outputs = self.names() if c.peek("%") else ()
        c.end_statement()
        c.expect("}")
        c.lines()
        if c.at < len(c.text):
            c.fail(f"expected the end of the text; got {c.shown()}")
        return Graph(name, inputs, tuple(ops), outputs)

    def input(self) -> Value:
        self.cursor.expect("%")
        name = self.cursor.word("the name of an input")
        self.cursor.expect(":")
        return self.type(name)

    def op(self) -> Op:
        c = self.cursor
        results = self.names()
        c.expect("=")
        kind = c.word("the kind of an operation")
        inputs = self.names() if c.peek("%") else ()
        attrs = c.items("{", "}", self.attr) if c.peek("{") else ()
        c.expect(":")
        types = [self.type(results[0])]
        for result in results[1:]:
            c.expect(",")
            types.append(self.type(result))
        return Op(kind, inputs, tuple(types), attrs)

    def names(self) -> tuple[str, ...]:
        c = self.cursor
        names: list[str] = []
        while not names or c.take(","):
            c.expect("%")
            names.append(c.word("the name of a value"))
        return tuple(names)

    def attr(self) -> tuple[str, Any]:
        c = self.cursor
        name = c.word("the name of an attribute")
        c.expect("=")
        text, start = c.until(",")
        line, column = c.place(start)
        return name, load(text, line=line, column=column)

    def type(self, name: str) -> Value:
        c = self.cursor
        dtype = c.one_of(DTYPES, "a dtype")
        shape = c.items("[", "]", self.extent)
        stored = c.one_of(FORMATS, "a format") if c.take("as") else "dense"
        return Value(name, dtype, shape, stored)

    def extent(self) -> Extent:
        c = self.cursor
        return c.integer() if c.text[c.at : c.at + 1].isdigit() else c.name("an extent (a number or a name)")

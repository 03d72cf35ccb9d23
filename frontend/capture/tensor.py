"""Tensors of a graph as functions of their indices.

`Reader.of(node)` gives the term of element [i0, i1, ...] of what a node computes. Pointwise operations act on
terms, views and broadcasts act on indices, and `arange`, `tril` and the like are terms to begin with;
anything else is a *leaf*, read as it is: `readf("%node", i0, i1)`. So all ways to write a mask or a score end
in one term, and nothing is evaluated. Sizes that are known at run time only are names such as `$s77`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.errors import GossamerError
from ..term import Term, children, constant, rename
from ..trace.captures import Trace
from ..trace.tensor import dtype_name
from ..trace.value import Value
from .memory import Memory
from .ops import Operation, operation, value_of
from .softmax import softmax_of
from .terms import bounds, kind_of, size_of, tidy

MAX_SIZE = 400  # operations of a term that is still worth carrying on; larger ones are read as tensors
LEAF, SIZE = "%", "$"  # how the names of tensors and of sizes start
AT = "@"  # before the node that reads a tensor of which a part was written to
PRODUCT = "#"  # how the name of a product ends that is a part of its node's result


class LeftAlone(Exception):
    """Why something in a graph is not compiled."""


class Opaque(Exception):
    """An operation that has no term: its result is read as it is."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as the term of its element at i0, i1, ...; a dimension of size 1 has index 0.

    shape: integers, or sizes of the capture that are known at run time only."""

    shape: tuple[Any, ...]
    term: Term
    kind: str

    @property
    def sizes(self) -> dict[str, Any]:
        return {axis(d): n for d, n in enumerate(self.shape)}

    def at(self, indices: list[Term]) -> Term:
        """The element at other indices."""
        return rename(self.term, {axis(d): index for d, index in enumerate(indices)})


def axis(d: int) -> str:
    """The name of an index."""
    return f"i{d}"


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def size_term(size: Any) -> Term:
    """A size, or another integer of the capture, as a term. Raises Opaque."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    if not isinstance(size, torch.SymInt) or node is None:
        raise Opaque(f"a size {size}")
    return _from_sympy(node.expr)


def _from_sympy(expr: Any) -> Term:
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return SIZE + expr.name
    name = type(expr).__name__
    op = {"Add": "add", "Mul": "mul", "FloorDiv": "floordiv", "PythonMod": "mod", "Mod": "mod"}.get(name)
    if op is None:
        raise Opaque(f"a size {expr}")
    first, *rest = map(_from_sympy, expr.args)
    for term in rest:
        first = (op, first, term)
    return tidy(first)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal; no guard is added to find out."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    try:
        return size_term(a) == size_term(b)
    except Opaque:
        return False


class Reader:
    """The tensors of one graph as functions of their indices.

    aliases: what the inputs of a graph within a graph stand for; in such a graph nothing can be a leaf."""

    def __init__(self, graph: fx.Graph, aliases: Mapping[fx.Node, Tensor] | None = None) -> None:
        self.memory = Memory(graph)
        self.trace = Trace("graph", float_params=True)
        self._known: dict[fx.Node, Tensor] = dict(aliases or {})
        self.inner = aliases is not None
        self.leaves: dict[str, fx.Node] = {}
        self._read_at: dict[str, fx.Node] = {}

    def of(self, node: fx.Node) -> Tensor:
        """Raises LeftAlone for what is no tensor that kernels can read."""
        if node not in self._known:
            self._known[node] = self._read(node)
        return self._known[node]

    def operand(self, node: fx.Node, at: fx.Node) -> Tensor:
        """What a tensor holds when the node `at` reads it."""
        holder, whole = self.memory.current(node, at)
        return self.of(holder) if whole else self.leaf(node, at)

    def leaf(self, node: fx.Node, at: fx.Node | None = None) -> Tensor:
        """The tensor of a node, read as it is when the node `at` runs, or when it is made.

        Whether it still holds the same later is for `tensor_of` to say."""
        value = value_of(node)
        if self.inner:
            raise LeftAlone(f"{node.name} in its score_mod or mask_mod has no closed form")
        if not isinstance(value, torch.Tensor):
            raise LeftAlone(f"{node.name} is no tensor")
        dtype = dtype_name(value.dtype)
        if dtype is None:
            raise LeftAlone(f"{node.name} has dtype {value.dtype}, which kernels do not read")
        name = LEAF + node.name + (AT + at.name if at is not None else "")
        self.leaves[name], self._read_at[name] = node, at or node
        shape = tuple(value.shape)
        indices = [0 if is_one(n) else axis(d) for d, n in enumerate(shape)] or [0]
        floats = dtype[0] == "f" or dtype == "bf16"
        read = ("readf" if floats else "read", name, *indices)
        if dtype == "bool":
            return Tensor(shape, ("ne", read, 0), "bool")
        return Tensor(shape, read, "float" if floats else "int")

    def tensor_of(self, name: str) -> fx.Node:
        """The node of a leaf that a kernel reads. Raises LeftAlone where it is written to before that."""
        if name.endswith(PRODUCT):
            raise LeftAlone("its scores are those of another attention")
        node = self.leaves[name]
        self.check(node, self._read_at[name])
        return node

    def read_at(self, name: str) -> fx.Node:
        """The node that reads a leaf."""
        return self._read_at[name]

    def made(self, name: str) -> fx.Node:
        """The node of a leaf that holds what the node made. Raises LeftAlone where a part is overwritten."""
        if AT in name:
            raise LeftAlone(f"{self.leaves[name].name} is written in place before it is used")
        return self.leaves[name]

    def check(self, node: fx.Node, at: fx.Node) -> None:
        """Raise LeftAlone if something writes to a tensor after the node `at` has read it."""
        if not self.memory.settled(node, at):
            raise LeftAlone(f"{node.name} is written in place later")

    def product(self, node: fx.Node) -> Tensor:
        """The product of which a node's result is a part."""
        found = self.leaf(node)
        name = LEAF + node.name + PRODUCT
        self.leaves[name] = node
        return Tensor(found.shape, (found.term[0], name, *found.term[2:]), found.kind)

    def _read(self, node: fx.Node) -> Tensor:
        did = operation(node)
        if softmax_of(node) is not None:
            return self.leaf(node)
        if did is not None and isinstance(value_of(node), torch.Tensor):
            try:
                found = self._operate(node, did)
            except (Opaque, GossamerError, TypeError, ValueError, IndexError):
                found = None  # no term, or one that nobody has a rule for: read what it computes
            if found is not None and size_of(found.term) <= MAX_SIZE and not self._cuts(node, found.term):
                return found
        return self.leaf(node)

    def _cuts(self, node: fx.Node, term: Term) -> bool:
        """Whether gradients stop at a node, by `detach` or `no_grad`, that its operands would have."""
        if value_of(node).requires_grad or self.inner:
            return False
        return any(value_of(self.leaves[read[1]]).requires_grad for read in _weighed(term))

    def _operate(self, node: fx.Node, did: Operation) -> Tensor | None:
        from .create import CREATIONS
        from .pointwise import pointwise
        from .views import VIEWS

        for table in (VIEWS, CREATIONS):
            if did.name in table:
                shape, term, kind = table[did.name](self, node)
                return Tensor(shape, tidy(term), kind)
        return pointwise(self, node, did.name)

    def scalar(self, value: Any, at: fx.Node) -> Value:
        """An argument that is a number of the capture, or a tensor without dimensions."""
        value = value_of(value) if isinstance(value, fx.Node) else value
        if isinstance(value, (bool, int, float)):
            return self.trace.constant(value)
        return Value(self.trace, size_term(value), "int")

    def integer(self, value: Any) -> Term:
        """An argument that is an integer, as a term."""
        value = value_of(value) if isinstance(value, fx.Node) else value
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise Opaque(f"an integer {value}")
        return int(value) if isinstance(value, float) else size_term(value)


def fitting(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor. Raises Opaque where an element may wrap around in its dtype, as 8-bit differences do."""
    if dtype in (torch.uint8, torch.int8, torch.int16):
        low, high = bounds(tensor.term, tensor.sizes)
        if low < torch.iinfo(dtype).min or high > torch.iinfo(dtype).max:
            raise Opaque(f"numbers that wrap around in {dtype}")
    return tensor


def _weighed(term: Term) -> list[Term]:
    """The reads of a term whose gradients its own passes to: those in conditions and indices get none."""
    if not isinstance(term, tuple) or kind_of(term) != "float":
        return []
    if term[0] == "readf":
        return [term]
    parts = term[2:] if term[0] == "where" else children(term)
    return [read for part in parts for read in _weighed(part)]


def broadcast(tensor: Tensor, shape: tuple[Any, ...]) -> Term:
    """The term of a tensor's element under the indices of a shape that it broadcasts to."""
    first = len(shape) - len(tensor.shape)
    return tensor.at([0 if is_one(n) else axis(first + d) for d, n in enumerate(tensor.shape)])


def kind_of_dtype(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"


def filled(value: Any, kind: str) -> Term:
    """A constant of a kind."""
    if kind == "bool":
        return constant(bool(value))
    if kind == "int":
        return constant(int(value))
    return constant(float(value) if not isinstance(value, complex) else math.nan)

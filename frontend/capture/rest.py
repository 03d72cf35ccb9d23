"""What gossamer leaves of a captured graph, handed to another backend of torch.compile in pieces.

The graph is cut at what is ours, which runs between the pieces as it is. Pieces that differ only in the
tensors they are given, as those of identical layers do, are compiled once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.fx.passes.split_module import split_module

from .adapters import adapted
from .ops import operation

LEAST = 2  # operations of a piece that is worth compiling


def compile_rest(module: fx.GraphModule, backend: str) -> Callable[..., Any]:
    """A function like the graph, whose pieces a backend compiles when they are first run."""
    parts = _parts(module.graph)
    whole = split_module(module, None, parts.__getitem__, keep_original_order=True)  # type: ignore[arg-type]
    compiled: dict[str, Callable[..., Any]] = {}
    for node in whole.graph.nodes:
        if node.op == "call_module":
            piece: Any = getattr(whole, str(node.target))
            if sum(n.op in ("call_function", "call_method") for n in piece.graph.nodes) >= LEAST:
                _compile(whole, str(node.target), piece, backend, compiled)
    return whole.forward


def _parts(graph: fx.Graph) -> dict[fx.Node, int]:
    """Which piece each node belongs to: even ones are others', odd ones ours."""
    parts: dict[fx.Node, int] = {}
    last = 0
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if node.target is operator.getitem and source is not None and source in parts and _is_tuple(source):
            parts[node] = parts[source]  # pieces are given tensors
            continue
        if _is_ours(node) != (last % 2 == 1):
            last += 1
        parts[node] = last
    return parts


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), (tuple, list))


def _is_ours(node: fx.Node) -> bool:
    """Whether a node runs as it is: what gossamer has put there, and operators that take graphs."""
    if node.op != "call_function":
        return False
    takes_graphs = isinstance(node.target, torch._ops.HigherOrderOperator)
    ours = (
        type(node.target).__module__.startswith(__name__.partition(".capture")[0]) or node.target is adapted
    )
    return (ours or takes_graphs) and operation(node) is None


def _compile(
    whole: fx.GraphModule, name: str, piece: fx.GraphModule, backend: str, compiled: dict[str, Any]
) -> None:
    """Put what a backend makes of a piece into its place, unless the piece is ours."""
    if any(_is_ours(node) for node in piece.graph.nodes):
        return
    plain = _renamed(piece)
    holds = any(node.op == "get_attr" for node in plain.nodes)
    key = plain.python_code("self").src + (name if holds else "")  # what a piece holds is its own
    if key not in compiled:
        compiled[key] = _Compiled(piece if holds else torch.nn.Module(), plain, backend)
    delattr(whole, name)
    setattr(whole, name, _Piece(compiled[key]))


class _Compiled:
    """A graph that a backend compiles when it is first run: TorchDynamo does not look into what is made while
    it captures."""

    def __init__(self, root: torch.nn.Module, graph: fx.Graph, backend: str) -> None:
        self.made = root, graph, backend
        self.call: Callable[..., Any] | None = None

    def __call__(self, *given: Any) -> Any:
        if self.call is None:
            root, graph, backend = self.made
            self.call = torch.compile(fx.GraphModule(root, graph), backend=backend)
        return self.call(*given)


class _Piece(torch.nn.Module):
    """Calls a compiled piece, which others may share."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["call"] = call

    def forward(self, *given: Any) -> Any:
        return self.__dict__["call"](*given)


def _renamed(piece: fx.GraphModule) -> fx.Graph:
    """A piece's graph with names that do not tell which layer it is of."""
    graph, copies = fx.Graph(), {}
    for count, node in enumerate(piece.graph.nodes):
        target = f"x{count}" if node.op == "placeholder" else node.target
        args, kwargs = (map_arg(a, copies.__getitem__) for a in (node.args, node.kwargs))
        copies[node] = graph.create_node(node.op, target, args, kwargs, name=f"x{count}")
    return graph

"""Capture of a mask_mod, score_mod or prob_mod that torch.compile has traced to a graph of torch operations.

The graph is run once on stand-ins, as a Python function is; what it lifted out of the function's
surroundings comes as further inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.node import map_arg

from ..mask import Mask
from ..score import ProbMod, ScoreMod
from .function import run_traced
from .tensor import Captured

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from .captures import Trace
    from .value import Value

KINDS: dict[str, type[Mask] | type[ScoreMod]] = {"mask_mod": Mask, "score_mod": ScoreMod, "prob_mod": ProbMod}


def trace_graph(graph: GraphModule, role: str, lifted: Sequence[Any]) -> Any:
    """The Mask, ScoreMod or ProbMod of a graph over (score,) b, h, q_idx, kv_idx and what was lifted.

    lifted: tensors and numbers. Raises TraceError."""

    def run(trace: Trace, *indices: Value) -> Any:
        others = [trace.lift(value, (("item", i),)) for i, value in enumerate(lifted)]
        trace.memo = False  # graphs come once
        return _run(graph, [*indices, *others])

    traced = run_traced(run, role)
    return KINDS[role](traced.term, traced.values, traced.tensors, traced.signature)  # type: ignore[arg-type]


def _run(graph: GraphModule, inputs: list[Any]) -> Any:
    """What the graph computes on stand-ins."""
    found: dict[Node, Any] = {}
    waiting = iter(inputs)
    for node in graph.graph.nodes:
        if node.op == "output":
            [result] = map_arg(node.args, found.__getitem__)
            return result[0] if isinstance(result, (tuple, list)) else result
        if node.op == "placeholder":
            found[node] = next(waiting)
        elif node.op == "get_attr":
            found[node] = getattr(graph, node.target)
        else:
            args, kwargs = map_arg((node.args, node.kwargs), found.__getitem__)
            found[node] = _call(node, args, kwargs)
    raise AssertionError("a graph without an output")


def _call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method" and node.target == "item" and isinstance(args[0], Captured):
        return args[0]  # a float that changes from call to call, which dynamo wrapped in a tensor
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.target in (torch.ops.aten.index, torch.ops.aten.index.Tensor):
        tensor, indices = args
        return tensor[tuple(_constant(i) for i in indices)]
    if node.target is torch.sym_sum:
        return sum(args[0])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _constant(index: Any) -> Any:
    """An index that dynamo wrapped in a tensor, as the number it was."""
    return slice(None) if index is None else int(index) if isinstance(index, torch.Tensor) else index

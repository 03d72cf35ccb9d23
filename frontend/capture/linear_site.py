"""Linear attention of a captured graph at run time, and how it takes the place of what stood there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..linear.attention import linear_attention
from ..linear.feature_maps import FeatureMap
from ..term import Term
from .linear import LinearAttention
from .operand import Axes, Operand, back, memory_order
from .ops import value_of
from .site import Sizes, numbers_in
from .slots import symbols
from .tensor import LeftAlone, Reader, size_term

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LinearSite:
    """Calls `gossamer.linear_attention` in place of a part of a graph.

    Its arguments: query, key and value, then a number for each of `numbers` (the $ names)."""

    def __init__(
        self,
        operands: Sequence[Operand],
        axes: Axes,
        out: tuple[Term, ...],
        order: Sequence[int],
        sizes: dict[str, Term],
        maps: tuple[Term, Term],
        options: dict[str, Any],
        scale: float,
        numbers: tuple[str, ...],
    ) -> None:
        self.operands, self.axes, self.out, self.order = operands, axes, out, order
        self.sizes, self.numbers, self.scale = sizes, numbers, scale
        q_map, k_map = (FeatureMap((term,)) for term in maps)
        self.options = {"feature_map": q_map, "key_map": k_map, **options}
        self.__name__ = "gossamer_linear_attention"

    def __call__(self, query: Any, key: Any, value: Any, *others: Any) -> torch.Tensor:
        sizes = Sizes(self.sizes, dict(zip(self.numbers, map(int, others), strict=True)))
        q, k, v = (
            operand.arranged(tensor, self.axes, row, sizes, True)
            for operand, tensor, row in zip(self.operands, (query, key, value), "qkk", strict=True)
        )
        out = linear_attention(q, k, v, **self.options)
        out = out if self.scale == 1 else out * self.scale
        return back(out, self.axes, self.out, sizes, self.order)


def replace_linear(graph: fx.Graph, reader: Reader, match: LinearAttention) -> None:
    """Put a LinearSite in the place of linear attention. Raises LeftAlone, and changes nothing then."""
    out, tensors = value_of(match.node), [value_of(node) for node in match.tensors]
    dtypes = {t.dtype for t in (*tensors, out)}
    if len(dtypes) > 1 or out.dtype not in FLOATS:
        raise LeftAlone(f"its tensors have dtypes {', '.join(sorted(map(str, dtypes)))}")
    inside = [v for node in match.inside if isinstance(v := value_of(node), torch.Tensor)]
    if out.requires_grad and not all(v.requires_grad for v in inside if v.is_floating_point()):
        raise LeftAlone("gradients stop inside it")
    sizes = {name: size_term(n) for name, n in match.sizes.items()}
    numbers, known = numbers_in(*sizes.values()), symbols(graph)
    missing = [name for name in numbers if name not in known]
    if missing:
        raise LeftAlone(f"a size ({missing[0]}) that is no input of the graph")
    options = {"causal": match.causal, "normalize": match.eps is not None, "eps": match.eps or 0.0}
    site = LinearSite(
        match.operands, match.axes, match.out, memory_order(out), sizes, match.maps, options, match.scale,
        numbers,
    )  # fmt: skip
    with graph.inserting_before(match.node):
        call = graph.call_function(site, (*match.tensors, *(known[name] for name in numbers)))
    reader.memory.replace(match.node, call)

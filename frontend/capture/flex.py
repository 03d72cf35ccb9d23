"""FlexAttention in a graph: the operator's score_mod and mask_mod are graphs of their own, read as terms.

As in PyTorch's eager mode the mask_mod alone says which pairs attend; the block lists serve its kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..term import Term, constant, rename
from .match import Attention, named_batch, operand_roles, shared
from .ops import value_of
from .tensor import LeftAlone, Reader, Tensor
from .terms import tidy


def is_flex(node: fx.Node) -> bool:
    """Whether a node is PyTorch's operator for FlexAttention."""
    return node.op == "call_function" and str(node.target) == "flex_attention" and len(node.args) >= 7


def flex(reader: Reader, node: fx.Node) -> Attention:
    """The attention of a `flex_attention` operator. Raises LeftAlone."""
    given: tuple[Any, ...] = node.args
    query, key, value, score_mod, block_mask, scale, _, *buffers = given
    used = {user.args[1]: user for user in node.users}
    if set(used) - {0}:
        raise LeftAlone("its LSE or its largest scores are asked for")
    if 0 not in used:
        raise LeftAlone("its output is not used")
    if not isinstance(scale, (int, float)):
        raise LeftAlone("its scale is known at run time only")
    shapes = [tuple(value_of(x).shape) for x in (query, key, value)]
    full = (*shapes[0][:3], shapes[1][2])
    axes, roles, sizes = named_batch(full)
    sizes |= {"d": shapes[0][-1], "e": shapes[2][-1]}
    operands = operand_roles(shapes, full[:2], roles, gqa=True)
    indices = axes.in_indices(sizes)
    b, h = (rename(roles.get(f"i{d}", 0), indices) for d in (0, 1))
    places = [Tensor((), term, "int") for term in (b, h, "q", "k")]
    outer = [buffer for group in buffers for buffer in group]
    count = len(buffers[0])
    score: Term = ("mul", "score", constant(float(scale)))
    score = _mod(reader, node, score_mod, [Tensor((), score, "float"), *places], outer[:count])
    mask = _mod(reader, node, block_mask[-1], places, outer[count:])
    key_part, value_part = (
        shared(reader, x, operand, node, sizes) for x, operand in zip((key, value), operands[1:], strict=True)
    )
    return Attention(
        used[0],
        (query, key_part[0], value_part[0]),
        (operands[0], key_part[1], value_part[1]),
        (*(roles.get(f"i{d}", 0) for d in (0, 1, 2)), "e"),
        axes,
        sizes,
        tidy(("where", mask, score, constant(float("-inf")))),
        empty="zero",
        inside={node},
    )


def _mod(reader: Reader, node: fx.Node, mod: Any, places: list[Tensor], buffers: Any) -> Term:
    """What a mod's graph computes for these arguments."""
    module = getattr(node.graph.owning_module, str(mod.target))
    held = [_buffer(reader, buffer, node) for buffer in buffers]
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    inner = Reader(module.graph, dict(zip(inputs, (*places, *held), strict=True)))
    result = next(n for n in module.graph.nodes if n.op == "output").args[0]
    found = result[0] if isinstance(result, (tuple, list)) else result
    return inner.of(found).term


def _buffer(reader: Reader, buffer: Any, node: fx.Node) -> Tensor:
    """A captured tensor, read as it is, or a number."""
    if isinstance(buffer, fx.Node) and isinstance(value_of(buffer), torch.Tensor):
        return reader.operand(buffer, node)
    value = reader.scalar(buffer, node)
    return Tensor((), value.term, value.kind)

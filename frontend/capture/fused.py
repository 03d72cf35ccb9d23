"""`scaled_dot_product_attention` in a graph."""

from __future__ import annotations

import torch
from torch import fx

from ..term import Term, constant, rename
from .match import Attention, checked, named_batch, operand_roles, shared
from .ops import arguments, value_of
from .tensor import LeftAlone, Reader, axis, broadcast
from .terms import tidy


def fused(reader: Reader, node: fx.Node) -> Attention:
    """A call of `scaled_dot_product_attention`. Raises LeftAlone."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    query, key, value, mask, dropout, causal, scale, gqa = arguments(node, *names)
    if dropout:
        raise LeftAlone("dropout in training, whose random numbers are the framework's")
    if not isinstance(causal or False, bool) or not isinstance(scale, (int, float, type(None))):
        raise LeftAlone("its scale or is_causal is known at run time only")
    shapes = [tuple(value_of(x).shape) for x in (query, key, value)]
    out = tuple(value_of(node).shape)
    full = (*out[:-1], shapes[1][-2])
    axes, roles, sizes = named_batch(full)
    sizes |= {"d": shapes[0][-1], "e": shapes[2][-1]}
    operands = operand_roles(shapes, out[:-2], roles, bool(gqa))
    factor = 1 / float(shapes[0][-1]) ** 0.5 if scale is None else float(scale)
    score: Term = ("mul", "score", constant(factor))
    nothing = constant(float("-inf"))
    if causal:
        score = ("where", ("ge", "q", "k"), score, nothing)
    if mask is not None:
        given = reader.operand(mask, node)
        term = rename(broadcast(given, full), roles)
        score = ("where", term, score, nothing) if given.kind == "bool" else ("add", score, term)
    key, value = (
        shared(reader, x, operand, node, sizes) for x, operand in zip((key, value), operands[1:], strict=True)
    )
    return Attention(
        node,
        (checked(reader, query, node), key[0], value[0]),
        (operands[0], key[1], value[1]),
        (*(roles.get(axis(d), 0) for d in range(len(out) - 1)), "e"),
        axes,
        sizes,
        tidy(rename(score, axes.in_indices(sizes))),
        empty="zero",
        least=torch.finfo(value_of(node).dtype).min,
    )

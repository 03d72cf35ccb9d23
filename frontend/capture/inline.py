"""Operations of torch that hold a whole attention, written out in a graph where nothing of them is lost.

`nn.MultiheadAttention` and `nn.TransformerEncoderLayer` reach a graph as one operation each. The functions
below compute the same from smaller ones; they run once on the graph's fake tensors, and what they call is
recorded in the operation's place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .ops import value_of
from .tensor import LeftAlone


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: int,
    heads: int,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`F.multi_head_attention_forward` without its weights. query: (q_len, B, size). Raises LeftAlone."""
    special = (bias_k, bias_v, others.get("static_k"), others.get("static_v"))
    if weight is None or add_zero_attn or any(x is not None for x in special) or query.dim() != 3:
        raise LeftAlone("it has keys or projections of its own")
    if dropout and training:
        raise LeftAlone("dropout in training, whose random numbers are the framework's")
    length, batch, _ = query.shape
    if query is key and key is value:
        parts = F.linear(query, weight, bias).chunk(3, dim=-1)
    else:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        parts = tuple(
            F.linear(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
        )
    q, k, v = (x.unflatten(-1, (heads, size // heads)).permute(1, 2, 0, 3) for x in parts)
    mask = None
    for given, shape in ((attn_mask, None), (key_padding_mask, (batch, 1, 1, key.shape[0]))):
        if given is None:
            continue
        if given.dtype == torch.bool:
            given = torch.zeros_like(given, dtype=query.dtype).masked_fill(given, float("-inf"))
        if shape is not None:
            given = given.view(shape)
        elif given.dim() == 3:
            given = given.view(batch, heads, length, key.shape[0])
        mask = given if mask is None else mask + given
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.permute(2, 0, 1, 3).reshape(length * batch, size)
    return F.linear(out, out_weight, out_bias).view(length, batch, size), None


def encoder_layer(
    x: Tensor,
    size: int,
    heads: int,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    scale_1: Tensor,
    shift_1: Tensor,
    scale_2: Tensor,
    shift_2: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """torch's fused layer of an encoder, (B, length, size).

    mask: anything but 0 takes a pair out, and rows without pairs give NaN. mask_type: of what shape it is,
    0 (length, length), 1 (B, length), of keys, 2 (B, heads, length, length). Raises LeftAlone."""
    if mask is not None and mask_type not in (0, 1, 2):
        raise LeftAlone(f"torch computes this layer in one operation, with a mask of type {mask_type}")

    def attend(y: Tensor) -> Tensor:
        if mask is not None:
            parts = F.linear(y, weight, bias).chunk(3, dim=-1)
            q, k, v = (p.unflatten(-1, (heads, size // heads)).transpose(1, 2) for p in parts)
            out = torch.ne(mask.view(mask.shape[0], 1, 1, -1) if mask_type == 1 else mask, 0)
            scores = torch.mul(torch.matmul(q, k.transpose(-2, -1)), (size // heads) ** -0.5)
            y = torch.matmul(torch.softmax(scores.masked_fill(out, float("-inf")), -1), v)
            return F.linear(y.transpose(1, 2).flatten(2), out_weight, out_bias)
        y = y.transpose(0, 1)
        given = (y, y, y, size, heads, weight, bias, None, None, False, 0.0, out_weight, out_bias)
        return multi_head_attention(*given)[0].transpose(0, 1)

    def feed(y: Tensor) -> Tensor:
        y = F.linear(y, weight_1, bias_1)
        return F.linear(F.gelu(y) if use_gelu else F.relu(y), weight_2, bias_2)

    def first(y: Tensor) -> Tensor:
        return F.layer_norm(y, (size,), scale_1, shift_1, eps)

    def second(y: Tensor) -> Tensor:
        return F.layer_norm(y, (size,), scale_2, shift_2, eps)

    if norm_first:
        x = x + attend(first(x))
        return x + feed(second(x))
    x = first(x + attend(x))
    return second(x + feed(x))


WHOLE: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention,
    torch._transformer_encoder_layer_fwd: encoder_layer,  # pyright: ignore[reportPrivateImportUsage]
}


def is_whole(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in WHOLE


def write_out(node: fx.Node) -> None:
    """Put what a node computes into its place, step by step. Raises LeftAlone, and changes nothing then."""
    several = isinstance(value_of(node), tuple)
    parts: dict[Any, fx.Node] = {user.args[1]: user for user in node.users} if several else {}
    if several and 0 not in parts:
        raise LeftAlone("its output is not used")
    if 1 in parts and parts[1].users:
        raise LeftAlone("its probabilities are used elsewhere too")
    values: Any = map_arg((node.args, node.kwargs), value_of)
    recorded = _Recorder(node)
    for source in node.all_input_nodes:
        recorded.nodes[id(value_of(source))] = source
    fakes = [v for v in pytree.tree_leaves(values) if isinstance(v, torch._subclasses.FakeTensor)]
    try:
        with fakes[0].fake_mode, recorded:
            result = WHOLE[node.target](*values[0], **values[1])
    except LeftAlone:
        for made in reversed(recorded.made):
            node.graph.erase_node(made)
        raise
    if parts:
        parts[0].replace_all_uses_with(recorded.nodes[id(result[0])])
    else:
        node.replace_all_uses_with(recorded.nodes[id(result)])
    for dead in (*parts.values(), node):
        node.graph.erase_node(dead)


class _Recorder(TorchFunctionMode):
    """Writes the torch functions that are called into a graph, before a node.

    nodes: of tensors, by identity, for which tensors are kept alive. made: the nodes written."""

    def __init__(self, before: fx.Node) -> None:
        super().__init__()
        self.before, self.kept = before, []
        self.nodes: dict[int, fx.Node] = {}
        self.made: list[fx.Node] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        parts = result if isinstance(result, (tuple, list)) else (result,)
        if not all(isinstance(part, Tensor) for part in parts):
            return result  # a size, a flag
        name = getattr(function, "__name__", "")
        given = pytree.tree_map(self._node, (tuple(args), kwargs or {}))
        with self.before.graph.inserting_before(self.before):
            if getattr(Tensor, name, None) is function:
                made = self.before.graph.call_method(name, *given)
            else:
                made = self.before.graph.call_function(function, *given)
            self._note(made, result)
            if isinstance(result, (tuple, list)):
                for i, part in enumerate(parts):
                    self._note(self.before.graph.call_function(operator.getitem, (made, i)), part)
        return result

    def _note(self, node: fx.Node, value: Any) -> None:
        kept = {key: self.before.meta.get(key) for key in ("stack_trace", "nn_module_stack")}
        node.meta = kept | {"example_value": value}
        self.nodes[id(value)] = node
        self.made.append(node)
        self.kept.append(value)

    def _node(self, value: Any) -> Any:
        return self.nodes[id(value)] if isinstance(value, Tensor) else value

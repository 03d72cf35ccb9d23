"""Hugging Face's Longformer: its attention, which writes a band of scores in place, by gossamer's.

Local tokens see their window and all global tokens, global tokens see everything by projections of their own.
Keys of global tokens stand once more behind the others, where every row finds them; in the window they are
left out, as padding is.
"""

from __future__ import annotations

from typing import Any

import torch

from ..attention import attention
from ..masks import sliding_window
from .adapters import Adapter, register


def take(
    module: Any,
    hidden_states: Any,
    attention_mask: Any = None,
    is_index_masked: Any = None,
    is_index_global_attn: Any = None,
    is_global_attn: Any = None,
    output_attentions: bool = False,
) -> tuple[Any, ...] | str:
    if output_attentions:
        return "its probabilities are asked for"
    if module.training and module.dropout > 0:
        return "dropout in training, whose random numbers are the framework's"
    return hidden_states, attention_mask


def compute(module: Any, hidden: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """hidden: (B, S, E). kinds: (B, S), below 0 for padding, above for global tokens. Gives (B, S, E)."""
    batch, length, size = hidden.shape
    window = module.one_sided_attn_window_size

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, -1, module.num_heads, module.head_dim).transpose(1, 2)

    def joined(x: Any) -> torch.Tensor:
        return x.transpose(1, 2).reshape(batch, -1, size)

    query, key, value = (heads(f(hidden)) for f in (module.query, module.key, module.value))
    padding, everywhere = kinds < 0, kinds > 0
    counts = everywhere.sum(1)
    most, padded = torch.stack((counts.max(), padding.any().long())).tolist()
    if not most:
        seen = ~padding
        near = sliding_window(window)
        out = joined(attention(query, key, value, mask=near & known(seen) if padded else near))
        return out.masked_fill(padding[..., None], 0.0) if padded else out
    places = everywhere.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    valid = torch.arange(most, device=places.device) < counts[:, None]
    again = places[:, None, :, None].expand(-1, module.num_heads, -1, module.head_dim)
    key, value = (torch.cat((x, x.gather(2, again)), 2) for x in (key, value))
    seen = torch.cat((kinds == 0, valid), 1)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((k >= length) | ((q - k).abs() <= window)) & seen[b, k]

    out = joined(attention(query, key, value, mask=mask))
    if padded:
        out = out.masked_fill(padding[..., None], 0.0)
    chosen = hidden.gather(1, places[..., None].expand(-1, -1, size))
    rows = rows_of_all(module, heads(module.query_global(chosen)), hidden, padding if padded else None)
    return out.masked_scatter(everywhere[..., None], joined(rows)[valid])


def rows_of_all(
    module: Any, query: torch.Tensor, hidden: torch.Tensor, padding: torch.Tensor | None
) -> torch.Tensor:
    """What global tokens see: query (B, H, G, D), hidden (B, S, E) -> (B, H, G, D).

    Projections of all tokens serve a few rows only. Where these are few, queries are taken back through the
    projection of keys, and results through that of values: E * H * G operations a token in place of E * E."""
    _, count, most, dim = query.shape
    size = hidden.shape[2]
    projections = (module.key_global, module.value_global)
    if 2 * count * most > size:
        key, value = (f(hidden).unflatten(-1, (count, dim)).transpose(1, 2) for f in projections)
        found: Any = attention(query, key, value, mask=None if padding is None else known(~padding))
        return found
    (key, key_bias), (value, value_bias) = (
        (f.weight.view(count, dim, size), f.bias.view(count, dim)) for f in projections
    )
    back = torch.einsum("bhgd,hde->bhge", query, key).flatten(1, 2)
    scores = torch.matmul(back, hidden.mT).unflatten(1, (count, most))
    scores = (scores + torch.einsum("bhgd,hd->bhg", query, key_bias)[..., None]) * dim**-0.5
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1, dtype=torch.float32).to(hidden.dtype)
    seen = torch.matmul(probs.flatten(1, 2), hidden).unflatten(1, (count, most))
    return torch.einsum("bhge,hde->bhgd", seen, value) + value_bias[:, None]


def known(seen: torch.Tensor) -> Any:
    """The mask of keys that a tensor (B, kv_len) allows."""
    from ..mask import Mask

    return Mask.trace(lambda b, h, q, k: seen[b, k])


register(
    "longformer",
    Adapter(
        "attention",
        ("transformers.models.longformer.modeling_longformer", "LongformerSelfAttention.forward"),
        take,
        compute,
        lambda result: (result,),
    ),
)

"""Hugging Face's Longformer: its attention, which writes a band of scores in place, by gossamer's.

Local tokens see their window and all global tokens, global tokens see everything by projections of their own.
Keys of global tokens stand once more behind the others, where every row finds them; in the window they are
left out, as padding is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

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
    window, tokens = module.one_sided_attn_window_size, tokens_of(kinds, module)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, -1, module.num_heads, module.head_dim).transpose(1, 2)

    def joined(x: Any) -> torch.Tensor:
        return x.transpose(1, 2).reshape(batch, -1, size)

    def blank(out: torch.Tensor) -> torch.Tensor:
        return out if tokens.padding is None else out.masked_fill(tokens.padding[..., None], 0.0)

    everywhere = tokens.everywhere
    if everywhere is None:
        query, key, value = (heads(f(hidden)) for f in (module.query, module.key, module.value))
        near, padding = sliding_window(window), tokens.padding
        allowed = near if padding is None else near & known(~padding)
        return blank(joined(attention(query, key, value, mask=allowed)))
    places, seen = everywhere.places[..., None].expand(-1, -1, size), everywhere.seen
    chosen = hidden.gather(1, places)
    more = torch.cat((hidden, chosen), 1)
    query, key, value = heads(module.query(hidden)), heads(module.key(more)), heads(module.value(more))

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((k >= length) | ((q - k).abs() <= window)) & seen[b, k]

    out = blank(joined(attention(query, key, value, mask=mask)))
    rows = joined(rows_of_all(module, heads(module.query_global(chosen)), hidden, tokens.padding))
    if everywhere.valid is not None:
        rows = rows.where(everywhere.valid, out.gather(1, places))
    return out.scatter(1, places, rows)


@dataclass(frozen=True)
class Everywhere:
    """Global tokens. places: (B, G), in sequences with fewer of them filled up with others; valid: (B, G, 1),
    which are global, or None: all. seen: (B, S + G), keys that local tokens may see, then those of places."""

    places: torch.Tensor
    valid: torch.Tensor | None
    seen: torch.Tensor


@dataclass(frozen=True)
class Tokens:
    """What all layers of a pass ask of the kinds of its tokens.

    padding: (B, S), or None where nothing is padded. everywhere: None where no token is global. version: of
    the kinds. users: the modules that have asked."""

    padding: torch.Tensor | None
    everywhere: Everywhere | None
    version: int
    users: set[int] = field(default_factory=set)


_TOKENS = WeakTensorKeyDictionary()


def tokens_of(kinds: torch.Tensor, module: Any) -> Tokens:
    """The tokens of (B, S) kinds. To know them waits for the device, so that all layers of a pass share them:
    a module that asks again belongs to another pass. Modes that watch operations, as those of checkpoints do,
    see none of it: which layer they would belong to depends on who asks first."""
    version = -1 if kinds.is_inference() else kinds._version
    found = _TOKENS.get(kinds)
    if found is None or version < 0 or found.version != version or id(module) in found.users:
        with _disable_current_modes():
            found = _TOKENS[kinds] = _tokens(kinds, version)
    found.users.add(id(module))
    return found


def _tokens(kinds: torch.Tensor, version: int) -> Tokens:
    padding, everywhere = kinds < 0, kinds > 0
    counts = everywhere.sum(1)
    least, most, padded = torch.stack((*counts.aminmax(), padding.any().long())).tolist()
    found = None
    if most:
        places = everywhere.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        valid = torch.arange(most, device=places.device) < counts[:, None]
        seen = torch.cat((kinds == 0, valid), 1)
        found = Everywhere(places, valid[..., None] if least < most else None, seen)
    return Tokens(padding if padded else None, found, version)


def rows_of_all(
    module: Any, query: torch.Tensor, hidden: torch.Tensor, padding: torch.Tensor | None
) -> torch.Tensor:
    """What global tokens see: query (B, H, G, D), hidden (B, S, E) -> (B, H, G, D).

    Projections of all tokens serve a few rows only. Where these are few, queries are taken back through the
    projection of keys, and results through that of values: E * H * G operations a token in place of E * E.
    The bias of keys adds one number to all scores of a row, which its softmax takes out again."""
    _, count, most, dim = query.shape
    size = hidden.shape[2]
    if 2 * count * most > size:
        projections = (module.key_global, module.value_global)
        key, value = (f(hidden).unflatten(-1, (count, dim)).transpose(1, 2) for f in projections)
        found: Any = attention(query, key, value, mask=None if padding is None else known(~padding))
        return found
    key, value = (f.weight.view(count, dim, size) for f in (module.key_global, module.value_global))
    query, bias = query * dim**-0.5, module.key_global.bias
    scores = torch.matmul(torch.matmul(query, key).flatten(1, 2), hidden.mT)
    if bias.requires_grad and torch.is_grad_enabled():  # its gradient is zero, not absent
        scores = scores + (query * bias.view(count, 1, dim)).sum(-1).flatten(1, 2)[..., None]
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, :], torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1, dtype=torch.float32).to(hidden.dtype)
    seen = torch.matmul(probs, hidden).unflatten(1, (count, most))
    return torch.matmul(seen, value.mT) + module.value_global.bias.view(count, 1, dim)


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

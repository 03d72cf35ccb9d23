"""Hugging Face transformers: attention by gossamer, chosen by name.

    gossamer.register_transformers()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="gossamer")

transformers asks two functions registered under one name: the first makes a mask once for each forward pass
and kind of layer, the second computes attention in every layer. Masks arrive as functions of indices; they
are captured, and nothing of size q_len x kv_len is made.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..ir.errors import InputError, MissingDependencyError, TraceError, UnsupportedError

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.register_transformers") from None

from . import block_mask as blocks
from .attention import attention
from .flex import create_block_mask
from .mask import Mask
from .masks import causal
from .masks import sliding_window as causal_window

NAME = "gossamer"


class PassMask(blocks.BlockMask):
    """A block mask as transformers carries it: `generate` asks masks to be contiguous, GPT-2 for `ndim`."""

    ndim = 4

    def contiguous(self) -> PassMask:
        return self


def register_transformers() -> None:
    """Register "gossamer" with transformers, for `attn_implementation="gossamer"`,
    `experts_implementation="gossamer"` and what sets either on a model that exists.

    Raises MissingDependencyError where transformers (5 or newer) is missing."""
    from .huggingface_experts import register_experts

    register_attention()
    register_experts(NAME)


def register_attention() -> None:
    """The part of `register_transformers` that concerns attention."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError:
        raise MissingDependencyError("transformers", "dev", "gossamer.register_transformers") from None
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    device: Any = None,
    **options: Any,
) -> Any:
    """The mask of a forward pass, as AttentionMaskInterface asks for it.

    mask_function: of (batch, head, query, key), which count from q_offset and kv_offset. attention_mask:
    which keys are no padding, (batch, kv_length) of bool, or None. Gives a `gossamer.flex.BlockMask`, which
    holds a closed form; a tensor (batch, 1, q_length, kv_length) of bool inside torch.compile, which has no
    place for other values, and where the function has no closed form."""
    from transformers import masking_utils

    mask_function = mask_function or masking_utils.causal_mask_function
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and not _is_all(padding):
        mask_function = masking_utils.and_masks(
            mask_function, masking_utils.padding_mask_function(padding.contiguous())
        )
    offsets = (_now(q_offset), _now(kv_offset))
    mask_function = masking_utils.add_offsets_to_mask_function(mask_function, *offsets)
    if not torch.compiler.is_compiling():
        with suppress(TraceError):
            mask: Any = Mask.trace(mask_function)
            made = create_block_mask(mask, batch_size, None, q_length, kv_length, device)
            return PassMask.lazy(mask, (batch_size, 1), (q_length, kv_length), made.BLOCK_SIZE, made._recipe)
    return masking_utils.sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        mask_function=mask_function,
        allow_is_causal_skip=False,
        device=device,
        use_vmap=bool(options.get("use_vmap")),
    )


def _is_all(padding: torch.Tensor) -> bool:
    """Whether a padding mask is known to allow every key; nobody waits for a GPU to find out."""
    return padding.device.type == "cpu" and not torch.compiler.is_compiling() and bool(padding.all())


def _now(offset: Any) -> Any:
    """An offset as it is at this moment: caches write to theirs while a forward pass runs."""
    if not isinstance(offset, torch.Tensor):
        return offset
    if offset.device.type == "cpu" and not torch.compiler.is_compiling():
        return int(offset)
    return offset.reshape(()).clone()


def attention_forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    softcap: float | None = None,
    s_aux: Any = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: Any = None,
    cache: Any = None,
    **options: Any,
) -> tuple[Any, None]:
    """The attention of a layer, as AttentionInterface asks for it.

    Args:
        query: (B, Hq, q_len, D); key, value: (B, Hk, kv_len, D), Hq a multiple of Hk.
        attention_mask: what `make_mask` gives, a tensor of bool or of numbers to add that broadcasts to
            (B, Hq, q_len, kv_len), or None for every pair.
        softcap: scores become softcap * tanh(score / softcap). s_aux: attention sinks, (Hq,).
        is_causal, sliding_window: used where there is no mask and a causal one is asked for by name.
        position_bias: added to scores, broadcastable to (B, Hq, q_len, kv_len).

    Returns:
        ((B, q_len, Hq, D), None).

    Raises:
        UnsupportedError: attention weights or a paged cache of transformers are asked for.
    """
    if options.get("output_attentions"):
        raise UnsupportedError(
            'attn_implementation="gossamer" makes no attention weights. Use "eager" to get them'
        )
    if cache is not None:
        raise UnsupportedError(
            'attn_implementation="gossamer" does not read transformers\' paged caches. Use "sdpa" for '
            "continuous batching"
        )
    mask, bias = mask_of(attention_mask, query, key)
    if attention_mask is None and is_causal and query.shape[2] > 1:
        mask = causal_window(sliding_window - 1, 0) if sliding_window else causal()
    found: Any = attention(
        query,
        key,
        value,
        mask=mask,
        score_mod=score_mod_of(softcap, [b for b in (bias, position_bias) if b is not None]),
        scale=scaling,
        enable_gqa=True,
        sinks=s_aux,
        dropout_p=dropout,
    )
    return found.transpose(1, 2), None


def mask_of(attention_mask: Any, query: Any, key: Any) -> tuple[Any, Any]:
    """(the mask, what is added to scores) of an attention_mask."""
    if attention_mask is None:
        return None, None
    if not isinstance(attention_mask, torch.Tensor):
        return blocks.of(attention_mask).mask, None
    if attention_mask.dim() != 4:
        expected = "a mask of 4 dimensions (B, Hq, q_len, kv_len)"
        raise InputError("attention_mask", expected, tuple(attention_mask.shape))
    attention_mask = attention_mask[..., : key.shape[2]]
    if attention_mask.dtype == torch.bool:
        return attention_mask, None
    return attention_mask > torch.finfo(attention_mask.dtype).min / 2, attention_mask


def score_mod_of(softcap: float | None, added: list[Any]) -> Callable[..., Any] | None:
    """The score_mod of a soft-cap, and of tensors that are added behind it."""
    if softcap is None and not added:
        return None
    whole = [tuple(int(n > 1) for n in x.shape) for x in added]

    def score_mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        for tensor, sizes in zip(added, whole, strict=True):
            at = [index if wide else 0 for index, wide in zip((b, h, q, k), sizes, strict=True)]
            score = score + tensor[tuple(at)]
        return score

    return score_mod

"""`gossamer.flex`: a drop-in for `torch.nn.attention.flex_attention`.

    from gossamer.flex import flex_attention, create_block_mask      # was: torch.nn.attention.flex_attention

Names, signatures, layouts and conventions are PyTorch's. What differs: nothing has to be wrapped in
torch.compile; a block mask costs microseconds, whatever its lengths; other lengths, batch sizes and
captured integers compile nothing; what is not supported is an error and never a slow path.
"""

from __future__ import annotations

from functools import partial, reduce
from operator import and_, or_
from typing import Any

from ..ir.errors import InputError, MissingDependencyError, UnsupportedError

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.flex") from None
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, FlexKernelOptions, create_mask, noop_mask
from torch.nn.attention.flex_attention import BlockMask as PyTorchBlockMask

from . import block_mask as blocks
from .attention import run
from .block_mask import BlockMask, MaskMod
from .form import Options
from .mask import Mask

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "FlexKernelOptions",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "noop_mask",
    "or_masks",
]


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: FlexKernelOptions | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Softmax attention over the pairs of a block mask, as `torch.nn.attention.flex_attention`.

    Args:
        query: (B, Hq, q_len, D); key: (B or 1, Hk, kv_len, D); value: (B or 1, Hk, kv_len, Dv).
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)`, applied to scale * q k^T.
        block_mask: a BlockMask, ours or PyTorch's; also anything `gossamer.attention` takes for a mask.
        scale: default 1 / sqrt(D).
        enable_gqa: allow Hq to be a multiple of Hk.
        return_lse: also return the LSE, float32, natural log, (B, Hq, q_len).
        kernel_options: tuning hints for PyTorch's own kernels, which ours do without: ignored.
        return_aux: also return an AuxOutput with what it asks for: `lse`, and `max_scores`, the largest
            score of each row after score_mod.

    Returns:
        The output (B, Hq, q_len, Dv), alone or with the LSE or the AuxOutput. Rows without any pair are
        zeros, with an LSE and a maximum of -inf.

    Raises:
        InputError (a ValueError): shapes, dtypes or the block mask do not fit. UnsupportedError: a
        gradient is asked for. TraceError: score_mod cannot be captured.
    """
    if return_lse and return_aux is not None:
        raise InputError("flex_attention", "return_lse or return_aux", "both", "Ask for AuxRequest(lse=True)")
    want = return_aux or AuxRequest(lse=return_lse)
    rows = ("lse", "max")[: 2 if want.max_scores else int(want.lse)]
    mask = _mask_of(block_mask, query, key)
    out, *found = run(query, key, value, mask, score_mod, scale, Options(enable_gqa, rows))
    if return_aux is None:
        return (out, found[0]) if return_lse else out
    lse, peak = (*found, None, None)[:2]
    return out, AuxOutput(lse if want.lse else None, peak if want.max_scores else None)


def _mask_of(block_mask: Any, query: Tensor, key: Tensor) -> Any:
    """The mask of a block mask that fits these tensors; anything else as it is."""
    if not isinstance(block_mask, PyTorchBlockMask) or not isinstance(query, torch.Tensor):
        return block_mask
    block_mask = blocks.of(block_mask)
    *batch, q_len, kv_len = block_mask.shape
    if (query.shape[-2], key.shape[-2]) != (q_len, kv_len):
        raise InputError(
            "flex_attention.block_mask",
            f"lengths ({query.shape[-2]}, {key.shape[-2]}), those of query and key",
            (q_len, kv_len),
            "Make one for these lengths, or shorten this one with _adjust(q_len, kv_len)",
        )
    for name, size, wanted in zip(("batch", "head"), batch, query.shape, strict=False):
        if size not in (1, wanted):
            raise InputError(f"flex_attention.block_mask, {name} size", f"1 or the query's {wanted}", size)
    return block_mask.mask


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
) -> BlockMask:
    """A block mask from a mask_mod, as PyTorch's, made in microseconds: it is captured, not evaluated.

    Args:
        mask_mod: `mask_mod(b, h, q_idx, kv_idx) -> bool`, True = attend, or a `gossamer.Mask`.
        B, H: batches and query heads, None for a mask that is the same for all.
        Q_LEN, KV_LEN: lengths.
        device: of the lists; default as PyTorch's.
        BLOCK_SIZE: of queries and keys, or (of queries, of keys); it shapes the lists, not our kernels.
        _compile, dq_kv_order: accepted; there is nothing to compile or to order.
        separate_full_blocks: whether full blocks have lists of their own.

    Raises:
        TraceError: mask_mod cannot be captured. UnsupportedError: compute_dq_write_order, which serves
        PyTorch's own backward kernels only.
    """
    if compute_dq_write_order:
        raise UnsupportedError(
            "compute_dq_write_order is metadata for PyTorch's own backward kernels: "
            "use PyTorch's create_block_mask"
        )
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    size = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else BLOCK_SIZE
    for name, number in (("Q_LEN", Q_LEN), ("KV_LEN", KV_LEN), ("BLOCK_SIZE", min(size))):
        if number < 1:
            raise InputError(f"create_block_mask.{name}", "at least 1", number)
    batch = (B or 1, H or 1)
    mask = Mask.of(mask_mod)
    recipe = partial(
        blocks.lists_of, mask, batch, (Q_LEN, KV_LEN), size, torch.device(device), separate_full_blocks
    )
    return BlockMask.lazy(mask_mod, batch, (Q_LEN, KV_LEN), size, recipe)


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """The mask_mod of the pairs that all of them allow; of every pair if there are none."""
    _check_callable(mask_mods)

    def and_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return reduce(and_, (mod(b, h, q_idx, kv_idx) for mod in mask_mods or (noop_mask,)))

    return and_mask


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """The mask_mod of the pairs that any of them allows; of no pair if there are none."""
    _check_callable(mask_mods)

    def or_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return reduce(or_, (mod(b, h, q_idx, kv_idx) for mod in mask_mods or (_nothing,)))

    return or_mask


def _nothing(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return ~noop_mask(b, h, q_idx, kv_idx)


def _check_callable(mask_mods: tuple[MaskMod, ...]) -> None:
    for mod in mask_mods:
        if not callable(mod):
            raise InputError("mask_mods", "functions of (b, h, q_idx, kv_idx)", repr(mod))

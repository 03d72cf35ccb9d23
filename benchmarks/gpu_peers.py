"""What users reach for on a GPU today: compiled FlexAttention, cuDNN and flash SDPA, FlashAttention-4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Call = Callable[[], torch.Tensor]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
PEERS = ("flex", "cudnn", "flash", "fa4")

# FlashAttention-4's own name for a mask: causal, and how many keys before and after a query it sees.
FA4_MASKS: dict[str, tuple[bool, tuple[int | None, int | None]]] = {
    "full": (False, (None, None)),
    "causal": (True, (None, None)),
    "window256": (False, (128, 128)),
    "window64": (False, (32, 32)),
    "causal_window1024": (False, (1023, 0)),
}
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Peer:
    """A way to compute the same attention; call returns (B, H, S, D)."""

    name: str
    call: Call


def able(name: str, case: Case) -> bool:
    """Whether a peer has this mask, without a dense mask tensor."""
    if name == "fa4":
        return case.name in FA4_MASKS and fa4() is not None
    return name == "flex" or case.name in ("full", "causal")


def peer(name: str, case: Case, tensors: Tensors) -> Peer:
    """The peer's call for a case that it is able to do, compiled and warmed up."""
    made = {"flex": _flex, "fa4": _fa4}.get(name)
    call = made(case, tensors) if made else _sdpa(name, case, tensors)
    call()
    return Peer(name, call)


def differentiable(name: str, case: Case, length: int) -> Callable[..., torch.Tensor]:
    """A peer's attention as a function of q, k and v, for autograd."""
    if name == "flex":
        return _flex_attention(case, length)
    if name == "fa4":
        attend, (causal, window) = fa4(), FA4_MASKS[case.name]

        def call(*tensors: torch.Tensor) -> torch.Tensor:
            out = attend(*(t.transpose(1, 2) for t in tensors), causal=causal, window_size=window)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return call

    def attention(*tensors: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPA[name]):
            return F.scaled_dot_product_attention(*tensors, is_causal=case.name == "causal")

    return attention


def _flex_attention(case: Case, length: int) -> Callable[..., torch.Tensor]:
    block_mask = None if case.name == "full" else block_mask_of(case, length)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda *tensors: compiled(*tensors, block_mask=block_mask)


def _flex(case: Case, tensors: Tensors) -> Call:
    attend = _flex_attention(case, tensors[0].shape[2])
    return lambda: attend(*tensors)


def block_mask_of(case: Case, length: int) -> BlockMask:
    """Made eagerly: the compiled way gives the same block mask, and may take 20 s a mask to compile."""
    return create_block_mask(case.mask_mod, None, None, length, length, device="cuda")


def _sdpa(name: str, case: Case, tensors: Tensors) -> Call:
    backend, causal = SDPA[name], case.name == "causal"

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*tensors, is_causal=causal)

    return call


def _fa4(case: Case, tensors: Tensors) -> Call:
    attend, (causal, window) = fa4(), FA4_MASKS[case.name]
    q, k, v = (t.transpose(1, 2).contiguous() for t in tensors)

    def call() -> torch.Tensor:
        out = attend(q, k, v, causal=causal, window_size=window)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


@cache
def fa4() -> Any:
    """flash_attn.cute.flash_attn_func; None where FlashAttention-4 is not installed."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func

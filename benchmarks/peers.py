"""What users of PyTorch reach for today: FlexAttention compiled for the CPU, and SDPA."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from cases import Case
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

Call = Callable[[], torch.Tensor]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """A way to compute the same attention. prepared: seconds of what has to happen before the first call."""

    name: str
    call: Call
    prepared: float = 0.0


def peers(case: Case, tensors: Tensors, *, flex: bool = True) -> list[Peer]:
    """Those that can compute a case, warmed up."""
    q, k, v = tensors
    length = q.shape[2]
    found = []
    if case.name == "full":
        found.append(Peer("sdpa", lambda: F.scaled_dot_product_attention(q, k, v)))
    else:
        dense = case.dense(length)[None, None].contiguous()
        found.append(Peer("sdpa_dense", lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)))
    if case.name == "causal":
        found.append(Peer("sdpa", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)))
    if flex:
        found.append(compiled_flex(case, tensors))
    return found


def compiled_flex(case: Case, tensors: Tensors) -> Peer:
    """FlexAttention with its block mask, compiled for exactly these shapes."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise SystemExit(
            "compiled FlexAttention needs g++ or clang++ on the PATH; leave it out with --no-flex"
        )
    length = tensors[0].shape[2]
    torch._dynamo.reset()
    start = perf_counter()
    block_mask = create_block_mask(case.mask_mod, None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> torch.Tensor:
        return compiled(*tensors, block_mask=block_mask)

    call()
    return Peer("flex", call, perf_counter() - start)

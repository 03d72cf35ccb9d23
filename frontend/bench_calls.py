"""What `gossamer bench` times: one attention, by gossamer and by PyTorch, on a CPU or a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..passes.cost import Size
    from .mask import Mask

Call = Callable[[], Any]

DENSE_BYTES = 4 << 30  # what scores of a peer may take before it is left out
SLOWEST = 60.0  # seconds after which a run is not repeated


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, best first, and what a call returned."""

    seconds: list[float]
    result: Any

    @property
    def best(self) -> float:
        return self.seconds[0]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time(run: Call, device: str, repeats: int) -> Timing:
    """repeats: of a CPU; on a GPU as many as 40 ms take, by its events."""
    result, seconds = run(), []
    if device == "cuda":
        from .measure_gpu import samples

        return Timing(sorted(ms / 1e3 for ms in samples(run)), result)
    for _ in range(repeats):
        start = perf_counter()
        result = run()
        seconds.append(perf_counter() - start)
        if sum(seconds) > SLOWEST:
            break
    return Timing(sorted(seconds), result)


def inputs(size: Size, device: str) -> tuple[Any, Any, Any]:
    """Query, key and value of normal numbers."""
    import torch

    kinds = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
    shapes = (
        (size.batch, size.heads, size.q_len, size.qk_size),
        (size.batch, size.kv_heads, size.kv_len, size.qk_size),
        (size.batch, size.kv_heads, size.kv_len, size.v_size),
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=generator).to(device, kinds[size.dtype]) for s in shapes)
    return q, k, v


def ours(mask: Mask, tensors: tuple[Any, Any, Any], size: Size) -> Call:
    from .attention import attention

    return lambda: attention(*tensors, mask=mask, enable_gqa=size.kv_heads != size.heads)


def sdpa(mask: Mask, tensors: tuple[Any, Any, Any], size: Size) -> Call | None:
    """PyTorch's attention without a mask tensor; None for masks that need one."""
    import torch

    from . import masks

    square = size.q_len == size.kv_len
    causal = square and mask == masks.causal()
    if not causal and mask != masks.full():
        return None
    attend = torch.nn.functional.scaled_dot_product_attention
    shared = size.kv_heads != size.heads
    return lambda: attend(*tensors, is_causal=causal, enable_gqa=shared)


def dense(mask: Mask, tensors: tuple[Any, Any, Any], size: Size) -> Call | None:
    """PyTorch's attention with the mask as a tensor; None where its scores would not fit."""
    import torch

    if size.batch * size.heads * size.q_len * size.kv_len * 4 > DENSE_BYTES:
        return None
    matrices = [
        torch.stack([torch.from_numpy(mask.to_dense(size.q_len, size.kv_len, b, h)) for h in range(heads)])
        for batches, heads in (_differing(mask, size),)
        for b in range(batches)
    ]
    table, shared = torch.stack(matrices).to(tensors[0].device), size.kv_heads != size.heads
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(*tensors, attn_mask=table, enable_gqa=shared)


def flex(mask: Mask, tensors: tuple[Any, Any, Any], size: Size) -> Call:
    """FlexAttention of PyTorch with its block mask, compiled for these shapes."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from .mask_mod import mask_mod_of

    mask_mod = mask_mod_of(mask, size.q_len, size.kv_len)
    batches, heads = _differing(mask, size)
    wanted = batches if batches > 1 else None, heads if heads > 1 else None
    block_mask = create_block_mask(mask_mod, *wanted, size.q_len, size.kv_len, device=tensors[0].device)
    compiled, shared = torch.compile(flex_attention, dynamic=False), size.kv_heads != size.heads
    return lambda: compiled(*tensors, block_mask=block_mask, enable_gqa=shared)


def _differing(mask: Mask, size: Size) -> tuple[int, int]:
    """Of how many batches and heads the mask differs."""
    used = {str(s) for s in mask.ir.predicate.free_symbols}
    return size.batch if "b" in used else 1, size.heads if "h" in used else 1

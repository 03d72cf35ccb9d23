"""Decoding on a GPU: one query a sequence against a long cache, contiguous or in pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_check import accuracy
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import gossamer
from gossamer import masks
from gossamer.frontend.measure_gpu import measured_gpu, milliseconds

DIM, HEADS, KV_HEADS = 128, 32, 8
WINDOW, PAGE = 4096, 64


@dataclass(frozen=True)
class Decode:
    """keys: in each sequence's cache. window: how many of them the query sees, the last; None for all.
    page: keys a page, 0 for a contiguous cache."""

    name: str
    batch: int
    keys: int
    window: int | None = None
    page: int = 0

    @property
    def bytes(self) -> int:
        """Of the keys and values that the queries see, the queries and the outputs, in bf16."""
        seen = self.window or self.keys
        return 2 * 2 * self.batch * DIM * (KV_HEADS * seen + HEADS)


CASES = (
    Decode("contiguous", 16, 32768),
    Decode("paged", 16, 32768, page=PAGE),
    Decode("window", 16, 32768, window=WINDOW),
    Decode("window, paged", 16, 32768, window=WINDOW, page=PAGE),
    Decode("one sequence", 1, 131072),
    Decode("one sequence, paged", 1, 131072, page=PAGE),
)


def decode(peers: bool = True) -> list[dict[str, Any]]:
    """One row a case: milliseconds, and the share of a copy's bandwidth on the bytes that have to move."""
    return [_row(case, peers) for case in CASES]


def _row(case: Decode, peers: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "batch": case.batch, "keys": case.keys, "page": case.page}
    try:
        q, k, v = inputs(case)
        call = ours(case, q, k, v)
        judged = accuracy(call(), (q, k, v), lambda rows: dense(case))
        if not judged.passes:
            raise AssertionError(f"error {judged.error:.3g}, allowed {judged.allowed:.3g}")
        row |= {"ms": milliseconds(call), "floor_ms": 1e3 * case.bytes / measured_gpu().bandwidth}
        row |= {"share": row["floor_ms"] / row["ms"], "error": judged.error, "allowed": judged.allowed}
        for name, make in (("sdpa", _sdpa), ("flex", _flex)) if peers and not case.page else ():
            row[f"{name}_ms"] = milliseconds(make(case, q, k, v))
    except Exception as error:  # one case that fails is a result
        row["failed"] = f"{type(error).__name__}: {error}"[:500]
    torch.cuda.empty_cache()
    return row


def inputs(case: Decode, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = (case.batch, HEADS, 1, DIM), *2 * ((case.batch, KV_HEADS, case.keys, DIM),)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes
    )
    return q, k, v


def ours(case: Decode, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    given: dict[str, Any] = {"enable_gqa": True}
    if case.window is not None:
        given |= {"mask": masks.sliding_window(case.window - 1, 0), "q_offset": case.keys - 1}
    if case.page:
        table, k, v = paged(case, k, v)
        lengths = torch.full((case.batch,), case.keys, dtype=torch.int32, device=q.device)
        given |= {"block_table": table, "kv_lens": lengths}
    return lambda: gossamer.attention(q, k, v, **given)


def paged(case: Decode, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(block_table, keys, values) with the pages of all sequences in random order."""
    width = case.keys // case.page
    count = case.batch * width
    order = torch.randperm(count, device=k.device)
    place = torch.empty_like(order)
    place[order] = torch.arange(count, device=k.device)

    def pages(tensor: torch.Tensor) -> torch.Tensor:
        split = tensor.unflatten(2, (width, case.page)).transpose(1, 2)
        return split.reshape(count, KV_HEADS, case.page, DIM)[order].contiguous()

    return place.view(case.batch, width).int(), pages(k), pages(v)


def dense(case: Decode, device: str = "cuda") -> torch.Tensor:
    """Who attends, bool (1, keys)."""
    keys = torch.arange(case.keys, device=device)
    return (keys >= case.keys - (case.window or case.keys))[None]


def _sdpa(case: Decode, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    """With a window, of the keys in it only, as a user who slices the cache would."""
    seen = slice(case.keys - (case.window or case.keys), None)
    keys, values = k[:, :, seen], v[:, :, seen]
    return lambda: F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)


def _flex(case: Decode, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    window, last = case.window, case.keys - 1
    block_mask = None
    if window is not None:
        block_mask = create_block_mask(
            lambda b, h, i, j: i + last - j < window, None, None, 1, case.keys, device="cuda"
        )
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)

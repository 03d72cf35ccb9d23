"""The masks that are timed, as mask_mods: what FlexAttention and gossamer are both given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MaskMod = Callable[[Any, Any, Any, Any], Any]
WIDTH = 64  # of the grid that natten2d_13 lays the sequence out in


@dataclass(frozen=True)
class Case:
    """One mask. goal: the speed-up wanted over the faster peer, where one is stated; closed: whether the
    mask is affine, so that nothing of it is read at run time."""

    name: str
    mask_mod: MaskMod
    goal: float | None = None
    closed: bool = True

    def dense(self, length: int, rows: slice = slice(None)) -> torch.Tensor:
        """The mask of some rows, bool (rows, length)."""
        q = torch.arange(length)[rows, None]
        return torch.as_tensor(self.mask_mod(0, 0, q, torch.arange(length))).expand(q.shape[0], length)

    def pairs(self, length: int) -> int:
        """How many pairs attend, of one batch and head."""
        return sum(
            int(self.dense(length, slice(first, first + 1024)).sum()) for first in range(0, length, 1024)
        )


def cases(length: int) -> dict[str, Case]:
    """Every case for a sequence length, by name."""
    generator = torch.Generator().manual_seed(1)
    table = _random_blocks(length // 64, 3, generator)
    document = torch.zeros(length, dtype=torch.int32)
    for cut in torch.randint(0, length, (7,), generator=generator).tolist():
        document[cut:] += 1

    def natten(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((q // WIDTH - k // WIDTH).abs() <= 6) & ((q % WIDTH - k % WIDTH).abs() <= 6)

    found = [
        Case("full", lambda b, h, q, k: q >= -1),
        Case("causal", lambda b, h, q, k: q >= k, goal=1.0),
        Case("window256", lambda b, h, q, k: (q - k).abs() <= 128, goal=1.7),
        Case("window64", lambda b, h, q, k: (q - k).abs() <= 32),
        Case("causal_window1024", lambda b, h, q, k: (q >= k) & (q - k < 1024)),
        Case("blocked256", lambda b, h, q, k: q // 256 == k // 256),
        Case("strided64", lambda b, h, q, k: ((q - k).abs() < 64) | ((q - k) % 64 == 0), goal=4.0),
        Case("dilated4_w64", lambda b, h, q, k: ((q - k).abs() <= 128) & ((q - k) % 4 == 0)),
        Case("dilated16_full", lambda b, h, q, k: (q - k) % 16 == 0, goal=4.0),
        Case("longformer", lambda b, h, q, k: ((q - k).abs() <= 128) | (k < 64) | (q < 64), goal=2.2),
        Case(
            "bigbird",
            lambda b, h, q, k: ((q - k).abs() <= 96) | (k < 64) | (q < 64) | table[q // 64, k // 64],
            goal=2.0,
            closed=False,
        ),
        Case(
            "document_causal",
            lambda b, h, q, k: (document[q] == document[k]) & (q >= k),
            closed=False,
        ),
        Case("natten2d_13", natten, goal=3.0),
    ]
    return {case.name: case for case in found}


def _random_blocks(blocks: int, per_row: int, generator: torch.Generator) -> torch.Tensor:
    table = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in table:
        row[torch.randperm(blocks, generator=generator)[:per_row]] = True
    return table

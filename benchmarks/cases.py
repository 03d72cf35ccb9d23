"""The masks that are timed, as mask_mods: what FlexAttention and gossamer are both given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import typer

MaskMod = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class Case:
    """One mask. goal: the speed-up wanted over the faster peer on a CPU, where one is stated; closed: whether
    the mask is affine, so that nothing of it is read at run time; device: of its captured tensors."""

    name: str
    mask_mod: MaskMod
    goal: float | None = None
    closed: bool = True
    device: str = "cpu"

    def dense(self, length: int, rows: slice = slice(None)) -> torch.Tensor:
        """The mask of some rows, bool (rows, length)."""
        k = torch.arange(length, device=self.device)
        q = k[rows, None]
        return torch.as_tensor(self.mask_mod(0, 0, q, k)).expand(q.shape[0], length)

    def pairs(self, length: int) -> int:
        """How many pairs attend, of one batch and head."""
        return sum(
            int(self.dense(length, slice(first, first + 1024)).sum()) for first in range(0, length, 1024)
        )


def cases(length: int, device: str = "cpu") -> dict[str, Case]:
    """The masks that peers are compared on, for a sequence length, by name."""
    generator = torch.Generator().manual_seed(1)
    table = _random_blocks(length // 64, 3, generator)
    document = torch.zeros(length, dtype=torch.int32)
    for cut in torch.randint(0, length, (7,), generator=generator).tolist():
        document[cut:] += 1
    table, document = table.to(device), document.to(device)
    width = _width(length)

    def natten(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((q // width - k // width).abs() <= 6) & ((q % width - k % width).abs() <= 6)

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
    return {case.name: replace(case, device=device) for case in found}


def more_cases(length: int, device: str = "cpu") -> dict[str, Case]:
    """Masks whose times are reported and have no goal, by name."""
    width = _width(length)
    found = [
        Case("causal_dilated", lambda b, h, q, k: (q >= k) & ((q - k) % 4 == 0) & (q - k <= 4 * 255)),
        Case("axial", lambda b, h, q, k: (q // width == k // width) | (q % width == k % width)),
        Case("prefix_lm", lambda b, h, q, k: (q >= k) | (k < 512)),
        Case("chunked_causal", lambda b, h, q, k: (q >= k) & (q // 1024 == k // 1024)),
        Case("sink_window", lambda b, h, q, k: (q >= k) & ((q - k < 1024) | (k < 4))),
    ]
    return {case.name: replace(case, device=device) for case in found}


def _width(length: int) -> int:
    """Of the grid that a sequence is laid out in, row by row: a square where there is one."""
    side = math.isqrt(length)
    return side if side * side == length else 64


def _random_blocks(blocks: int, per_row: int, generator: torch.Generator) -> torch.Tensor:
    table = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in table:
        row[torch.randperm(blocks, generator=generator)[:per_row]] = True
    return table


def chosen(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The names a command line's option lists, separated by commas; "all" is every known one."""
    names = known if text == "all" else tuple(filter(None, text.split(",")))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"no {what} {name!r}; there are {', '.join(known)}")
    return names

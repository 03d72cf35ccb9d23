"""A byte-level Longformer reads a source file of Python: with plain PyTorch, then through gossamer.

    python examples/longformer_bytes.py                # 16,384 bytes; a minute or so on two cores
    python examples/longformer_bytes.py --bytes 1024   # a quick look

Every byte sees the bytes at most 128 before and after it; the first 64 see all and are seen by all. The
model has 4 layers of 8 heads of 64, with random weights from a fixed seed: it predicts nothing, but takes
as long as one that does. One line differs between the two runs:

    - attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    + attend = lambda q, k, v: gossamer.attention(q, k, v, mask=mask)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import gossamer
from gossamer import masks
from gossamer.runtime.driver import compilations

LAYERS, HEADS, SIZE = 4, 8, 64
HALF_WINDOW, GLOBAL = 128, 64

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (1, HEADS, bytes, SIZE) thrice -> the same


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(self.norm1(x)).view(1, length, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class ByteLongformer(nn.Module):
    """Bytes in, a score for each possible byte at each place out: (1, length) to (1, length, 256)."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: Tensor, attend: Attend) -> Tensor:
        x = self.embedding(text) + _positions(text.shape[1], HEADS * SIZE)
        for layer in self.layers:
            x = layer(x, attend)
        return self.head(self.norm(x))


def _positions(length: int, width: int) -> Tensor:
    """Sines and cosines of geometrically growing wavelengths."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def read(count: int) -> Tensor:
    """The first bytes of Python's own argparse.py, as often as they are needed: (1, count)."""
    text = Path(argparse.__file__).read_bytes()
    return torch.tensor(list((text * (count // len(text) + 1))[:count]))[None]


def dense_mask(length: int) -> Tensor:
    """The same pairs as a matrix, which is what plain PyTorch wants."""
    q, k = torch.arange(length)[:, None], torch.arange(length)
    return ((q - k).abs() <= HALF_WINDOW) | (q < GLOBAL) | (k < GLOBAL)


@dataclass
class Run:
    """A model's scores, the seconds they took, and how many of those were spent in attention."""

    scores: Tensor
    seconds: float
    attention: float


def run(model: ByteLongformer, text: Tensor, attend: Attend) -> Run:
    inside = 0.0

    def timed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal inside
        start = perf_counter()
        out = attend(q, k, v)
        inside += perf_counter() - start
        return out

    start = perf_counter()
    scores = model(text, timed)
    return Run(scores, perf_counter() - start, inside)


def main() -> None:
    options = parse_options()
    console = Console()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    text, model = read(options.bytes), ByteLongformer().eval()
    length = text.shape[1]
    about, change = str(__doc__).rstrip().split("\n\n")[2:]
    story = Text.assemble(about.replace("\n", " "), "\n\n", change)
    console.print(Panel(story, title=f"a Longformer reads {length:,} bytes of argparse.py"))

    with console.status("plain PyTorch"):
        dense = dense_mask(length)
        plain = run(model, text, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense))

    mask = masks.longformer(HALF_WINDOW, GLOBAL)
    with console.status("compiling"):  # lengths are runtime values: the kernel of one row is that of all
        before, start = compilations(), perf_counter()
        gossamer.attention(*torch.zeros(3, 1, HEADS, 1, SIZE), mask=mask)
        seconds, compiled = perf_counter() - start, compilations() - before
    with console.status("gossamer"):
        ours = run(model, text, lambda q, k, v: gossamer.attention(q, k, v, mask=mask))

    table = Table("", "whole model", "attention alone")
    table.add_row("plain PyTorch, dense mask", f"{plain.seconds:.2f} s", f"{plain.attention:.2f} s")
    table.add_row("gossamer", f"{ours.seconds:.2f} s", f"{ours.attention:.2f} s")
    ratios = plain.seconds / ours.seconds, plain.attention / ours.attention
    table.add_row("", *(f"[bold]{ratio:.1f}x[/]" for ratio in ratios))
    console.print(table)
    what = "kernel compiled" if compiled else "kernel found in the cache and loaded"
    console.print(f"before the first call: {what} in {seconds:.2f} s")
    largest, scale = (ours.scores - plain.scores).abs().max(), plain.scores.abs().max()
    console.print(f"largest difference between the scores: {largest:.1e}, of {scale:.1f}")

    console.rule("what gossamer proved about the mask")
    console.print(mask.analyze(length, length).explain(), highlight=False, markup=False, soft_wrap=True)
    corner = min(length, 1024)
    mask.plot(options.picture, corner, corner)
    console.print(f"picture of the first {corner} rows and columns: {options.picture}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--bytes", type=int, default=16384, help="how many to read (default: 16384)")
    parser.add_argument("--picture", type=Path, default=Path("longformer_mask.png"), help="where to write it")
    return parser.parse_args()


if __name__ == "__main__":
    main()

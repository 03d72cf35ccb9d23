"""A small transformer learns to write bytes: with plain PyTorch, then through gossamer, on one seed.

    python examples/train_bytes.py                          # a minute or so on two cores
    python examples/train_bytes.py --device cuda --steps 2000 --length 2048 --batch 16
    python examples/train_bytes.py --compile                # both under torch.compile

The text is Python's own language reference, as pydoc keeps it. Two of six layers see all earlier bytes, the
others only the last 64: most of attention's work can be left out where a few layers look far (MASFormer,
arXiv:2310.12442). One line differs between the two runs:

    - attend = lambda q, k, v, window: F.scaled_dot_product_attention(q, k, v, attn_mask=dense[window])
    + attend = lambda q, k, v, window: gossamer.attention(q, k, v, mask=sparse[window])

Both see the same batches in the same order, so that their losses differ by rounding alone: less than the loss
moves from one batch to the next.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from time import perf_counter

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import gossamer
from gossamer import masks

HEADS, SIZE, WINDOW = 4, 32, 64
FULL = None  # a layer that sees all earlier bytes
LAYERS = (WINDOW, WINDOW, FULL, WINDOW, WINDOW, FULL)

Window = int | None
Attend = Callable[[Tensor, Tensor, Tensor, Window], Tensor]  # (batch, HEADS, length, SIZE) thrice -> the same


class Layer(nn.Module):
    def __init__(self, width: int, window: Window) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(q, k, v, self.window).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class ByteTransformer(nn.Module):
    """Bytes in, the mean loss of guessing each one's successor out: (batch, length + 1) to a number."""

    def __init__(self, length: int) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.embedding, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Layer(width, window) for window in LAYERS)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: Tensor, attend: Attend) -> Tensor:
        x = self.embedding(text[:, :-1]) + self.positions.weight
        for layer in self.layers:
            x = layer(x, attend)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), text[:, 1:].flatten())


def batches(options: argparse.Namespace) -> Iterator[Tensor]:
    """Pieces of the text, drawn from a fixed seed: (batch, length + 1) each."""
    text = torch.tensor(list("\n\n".join(topics.values()).encode()))
    draw = torch.Generator().manual_seed(1)
    for _ in range(options.steps):
        starts = torch.randint(len(text) - options.length, (options.batch,), generator=draw)
        pieces = torch.stack([text[at : at + options.length + 1] for at in starts.tolist()])
        yield pieces.to(options.device)


@dataclass
class Run:
    """The loss of every step, in bits a byte, and the seconds that a step took in the end."""

    losses: Tensor
    seconds: float


def train(attend: Attend, options: argparse.Namespace, title: str) -> Run:
    torch.manual_seed(0)
    model = ByteTransformer(options.length).to(options.device)
    step = torch.compile(model) if options.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 20))
    losses: list[Tensor] = []
    half = perf_counter()
    for n, text in enumerate(track(batches(options), title, options.steps, transient=True)):
        if n == options.steps // 2:
            losses[-1].item()  # a GPU has finished what came before
            half = perf_counter()
        loss = step(text, attend)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        losses.append(loss.detach())
    found = torch.stack(losses).cpu() / math.log(2)
    last = options.steps - options.steps // 2
    return Run(found, (perf_counter() - half) / last)


def smooth(losses: Tensor, over: int = 15) -> Tensor:
    """Means over some steps around each."""
    padded = F.pad(losses[None, None], (over // 2, over // 2), mode="replicate")
    return F.avg_pool1d(padded, over, stride=1).flatten()


def main() -> None:
    options = parse_options()
    console = Console()
    about, change, batches_are_alike = str(__doc__).rstrip().split("\n\n")[2:]
    story = "\n\n".join((about.replace("\n", " "), change, batches_are_alike.replace("\n", " ")))
    console.print(
        Panel(Text(story), title=f"{options.steps} steps of {options.batch} times {options.length} bytes")
    )

    q, k = torch.arange(options.length)[:, None], torch.arange(options.length)
    causal = (q >= k).to(options.device)
    dense = {FULL: causal, WINDOW: causal & (q - k < WINDOW).to(options.device)}
    plain = train(
        lambda q, k, v, window: F.scaled_dot_product_attention(q, k, v, attn_mask=dense[window]),
        options,
        "plain PyTorch",
    )
    sparse = {FULL: masks.causal(), WINDOW: masks.sliding_window(WINDOW - 1, 0)}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        out = gossamer.attention(q, k, v, mask=sparse[window])
        assert isinstance(out, torch.Tensor)  # a tuple only where more is asked for
        return out

    ours = train(attend, options, "gossamer")

    table = Table("", "first loss", "last loss, smoothed", "a step")
    for name, run in (("plain PyTorch, dense masks", plain), ("gossamer", ours)):
        last = smooth(run.losses)[-1]
        table.add_row(name, f"{run.losses[0]:.3f}", f"{last:.3f} bits a byte", f"{run.seconds * 1e3:.0f} ms")
    console.print(table)
    difference = (ours.losses - plain.losses).abs()
    noise = (plain.losses - smooth(plain.losses)).std().item()
    agree = difference.max().item() < noise
    largest = f"largest difference between the losses of a step: {difference.max():.1e} bits"
    console.print(f"{largest}; noise from batch to batch: {noise:.1e}")
    console.print(
        "the curves agree within noise" if agree else "[bold red]the curves differ by more than noise"
    )
    draw(plain, ours, options.picture)
    console.print(f"both curves: {options.picture}")
    if not agree:
        raise SystemExit(1)


def draw(plain: Run, ours: Run, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run, name, style in ((plain, "plain PyTorch, dense masks", "-"), (ours, "gossamer", "--")):
        [line] = axes.plot(smooth(run.losses), style, label=name, linewidth=2)
        axes.plot(run.losses, color=line.get_color(), alpha=0.3, linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss, bits a byte", title="A byte-level transformer with mixed masks")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    numbers = (("steps", 150, "steps of training"), ("length", 512, "bytes in a piece of text"))
    for name, default, what in (*numbers, ("batch", 4, "pieces in a step")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument("--compile", action="store_true", help="train both under torch.compile")
    picture = Path("train_bytes.png")
    parser.add_argument(
        "--picture", type=Path, default=picture, help=f"where to write it (default: {picture})"
    )
    options = parser.parse_args()
    if options.steps < 2 or min(options.length, options.batch) < 1:
        parser.error("expected --steps of 2 or more, --length and --batch of 1 or more")
    return options


if __name__ == "__main__":
    main()

"""A decoder that knows nothing of gossamer, and the same one with its attention and experts compiled.

python examples/whole_model.py [--layers 4] [--length 1024]

The model has windowed attention with a mask made of arange, and experts in a loop with index_add. The report
says what became of each, and why the rest was left. Gradients are compared too.
"""

import time
from typing import Annotated

import torch
import typer
from torch import nn
from torch.nn import functional as F

import gossamer

WIDTH, HEADS, EXPERTS, TOP, WINDOW = 256, 4, 8, 2, 128


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        at = torch.arange(length, device=x.device)
        back = at[:, None] - at[None, :]
        hidden = (back < 0) | (back >= WINDOW)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        weights, ids = self.router(rows).softmax(-1).topk(TOP)
        out = torch.zeros_like(rows)
        for expert in range(EXPERTS):
            token, slot = torch.where(ids == expert)
            gate, up = F.linear(rows[token], self.up[expert]).chunk(2, dim=-1)
            result = F.linear(F.silu(gate) * up, self.down[expert])
            out.index_add_(0, token, result * weights[token, slot, None])
        return out.view_as(x)


class Decoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part for _ in range(layers) for part in (Attention(), Experts()))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in self.parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part, norm in zip(self.parts, self.norms, strict=True):
            x = x + part(norm(x))
        return x


def main(layers: int = 4, length: int = 1024, rounds: Annotated[int, typer.Option(help="timed")] = 5) -> None:
    torch.manual_seed(0)
    model = Decoder(layers)
    compiled = gossamer.jit(model)
    x = torch.randn(1, length, WIDTH)
    slope = torch.randn_like(x)

    results = []
    for run in (model, compiled):
        model.zero_grad()
        out = run(x)
        out.backward(slope)
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    print(compiled.report())
    off = max(((a - b).norm() / a.norm()).item() for a, b in zip(*results, strict=True))
    print(f"largest difference of output and gradients, relative to their norms: {off:.1e}")

    with torch.no_grad():
        for name, run in (("as it is written", model), ("gossamer.jit", compiled)):
            run(x)
            start = time.perf_counter()
            for _ in range(rounds):
                run(x)
            print(f"{name}: {1e3 * (time.perf_counter() - start) / rounds:.0f} ms forward")


if __name__ == "__main__":
    typer.run(main)

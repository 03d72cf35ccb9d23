"""Models with `gossamer.attention` in DDP and FSDP2, on two processes of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gossamer
from gossamer import masks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

RANKS, BATCH = 2, 4


class Layer(nn.Module):
    """Attention in a window, with a learned table of relative positions and learned sinks."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.table = nn.Parameter(torch.randn(2, 31))
        self.sinks = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        out = gossamer.attention(
            q, k, v,
            mask=masks.sliding_window(6, 0),
            score_mod=lambda s, b, h, i, j: s + self.table[h, i - j + 15],
            sinks=self.sinks,
        )  # fmt: skip
        return x + self.out(out.transpose(1, 2).flatten(2))  # type: ignore[union-attr]


def model_and_data() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer()), torch.randn(BATCH, 16, 32)


def steps(model: nn.Module, x: Tensor) -> list[float]:
    """The losses of a few steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ddp(model: nn.Sequential) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Sequential) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS = {"ddp": ddp, "fsdp": fsdp}


def run_rank(number: int, wrap: str, meeting: str) -> None:
    """One of the processes: prints its losses."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=RANKS)
    try:
        model, data = model_and_data()
        share = BATCH // RANKS
        print(json.dumps(steps(WRAPS[wrap](model), data[number * share : (number + 1) * share])))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPS)
def test_two_ranks_train_as_one(wrap: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(number), wrap, str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(RANKS)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS, said
    losses = torch.tensor([json.loads(out.splitlines()[-1]) for out, _ in said])
    torch.testing.assert_close(losses.mean(0), torch.tensor(steps(*model_and_data())), atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), *sys.argv[2:])

"""`gossamer.attention` in torch.export and AOTInductor: programs that another process loads and runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer import masks

IDS = torch.arange(64) // 9
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")


class Layer(nn.Module):
    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask
        self.table = nn.Parameter(torch.randn(4, 127))
        self.register_buffer("ids", IDS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        def own(b: Any, h: Any, i: Any, j: Any) -> Any:
            return (self.ids[i] == self.ids[j]) | (i - j < q.shape[2] // 4)

        mask = own if self.mask is None else self.mask
        return gossamer.attention(
            q, k, v, mask=mask, score_mod=lambda s, b, h, i, j: s + self.table[h, i - j + 63]
        )


MASKS = {
    "function": None,
    "window": masks.sliding_window(5) | masks.global_tokens(3),
    "documents": masks.document(offsets=torch.tensor([0, 7, 64])),
    "selected": masks.selected(torch.tensor([[[[0], [1], [1], [2]]]]), 64, rows=16, keys=16),
}


def tensors(batch: int, length: int) -> tuple[Tensor, ...]:
    torch.manual_seed(length)
    return tuple(torch.randn(batch, 4, length, 16) for _ in range(3))


def shapes() -> Any:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=64)
    return ({0: batch, 2: length},) * 3


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def test_programs_hold_nothing_of_tracing(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, q: Tensor) -> Any:
            def scaled(
                score: Any, b: Any, h: Any, i: Any, j: Any
            ) -> Any:  # a new function, so it is traced here
                with torch.no_grad():
                    return score * torch.tanh(score)

            return gossamer.attention(q, q, q, score_mod=scaled)

    with torch.no_grad():
        program = torch.export.export(Scaled(), tensors(2, 20)[:1])
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["gossamer.attention.default", "<built-in function getitem>"]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_take_other_shapes(mask: Any, strict: bool, tmp_path: Path) -> None:
    model = Layer(mask)
    program = torch.export.export(model, tensors(2, 20), dynamic_shapes=shapes(), strict=strict)
    names = [str(node.target) for node in program.graph.nodes if "attention" in str(node.target)]
    assert names == ["gossamer.attention.default"]
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for given in (tensors(2, 20), tensors(3, 33)):
        torch.testing.assert_close(loaded(*given), model(*given))


LOAD = """
import sys, torch
import gossamer.operators
given, expected = torch.load(sys.argv[2])
if sys.argv[3] == "export":
    run = torch.export.load(sys.argv[1]).module()
else:
    run = torch._inductor.aoti_load_package(sys.argv[1])
torch.testing.assert_close(run(*given), expected)
"""


def load_elsewhere(tmp_path: Path, model: nn.Module, path: Any, kind: str) -> None:
    """Run a saved program in a process of its own, on another shape."""
    given = tensors(3, 33)
    torch.save((given, model(*given).detach()), tmp_path / "expected.pt")
    command = [sys.executable, "-c", LOAD, str(path), str(tmp_path / "expected.pt"), kind]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_another_process_loads_a_program(tmp_path: Path) -> None:
    model = Layer(MASKS["documents"])
    program = torch.export.export(model, tensors(2, 20), dynamic_shapes=shapes())
    torch.export.save(program, tmp_path / "model.pt2")
    load_elsewhere(tmp_path, model, tmp_path / "model.pt2", "export")


@pytest.mark.slow
@needs_compiler
def test_another_process_runs_an_aot_inductor_package(tmp_path: Path) -> None:
    model = Layer(None)
    with torch.no_grad():
        program = torch.export.export(model, tensors(2, 20), dynamic_shapes=shapes())
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    load_elsewhere(tmp_path, model, path, "package")


def test_a_loaded_program_learns(tmp_path: Path) -> None:
    model = Layer(MASKS["window"])
    with torch.no_grad():  # exported without, run with gradients
        program = torch.export.export(model, tensors(2, 20))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for run in (model, loaded):
        run(*tensors(2, 20)).square().sum().backward()
    torch.testing.assert_close(dict(loaded.named_parameters())["table"].grad, model.table.grad)

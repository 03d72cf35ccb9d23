"""Real compilers: a saved kernel runs in a process that has none of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gossamer.ir.errors import ArtifactError, InputError
from gossamer.ir.expr import ceildiv, integer, real
from gossamer.ir.kernel import Axis, Dot, GridDim, Kernel, Load, Reduce, Scalar, Store, Tensor
from gossamer.runtime import cpu, host
from gossamer.runtime.artifact import Artifact
from gossamer.runtime.driver import compilations, compile_kernels
from gossamer.runtime.executable import Executable

I = Axis("i", 16, 16)  # noqa: E741


def scale_kernel() -> Kernel:
    """y[n] = x[n] * by, 16 elements a grid cell."""
    at, n = 16 * integer("t") + I.symbol, integer("n")
    body = (
        Load("X", "f32", ("i",), "x", (at,), at < n),
        Store("y", (at,), real("X") * real("by"), ("i",), at < n),
    )
    args = (Tensor("x", "f32", ("n",), "in", 0), Tensor("y", "f32", ("n",), "out", 0), Scalar("by", "f32"))
    return Kernel("scale", args, (GridDim("t", ceildiv(n, 16)),), (I,), "i", body)


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return compile_kernels([scale_kernel()], "cpu", ir_text="graph @scale { }\n")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 16, 1000])
def test_compiled_kernel_runs(n: int, threads: int, artifact: Artifact) -> None:
    x, y = torch.randn(n), torch.full((n,), torch.nan)
    Executable(artifact)({"x": x, "y": y, "by": 2.5}, threads=threads)
    assert torch.equal(y, x * 2.5)


def test_artifact_tells_what_the_binary_needs(artifact: Artifact) -> None:
    requires = artifact.manifest.requires
    assert (requires.system, requires.machine) == (host.system(), host.machine())
    assert set(requires.features) <= (host.features() or set(requires.features))
    assert artifact.manifest.versions.keys() == {"tvm", "llvm"}
    assert compile_kernels([scale_kernel()], "cpu", ir_text="graph @scale { }\n") == artifact


def product_kernel() -> Kernel:
    """c = a b', 16 x 16 of it a grid cell: a dot keeps a block of registers."""
    j, d = Axis("j", 16, 16), Axis("d", 32, 32)
    row, n = 16 * integer("t") + I.symbol, integer("n")
    body = (
        Load("A", "f32", ("i", "d"), "a", (row, d.symbol), row < n),
        Load("B", "f32", ("j", "d"), "b", (j.symbol, d.symbol)),
        Dot("C", "f32", ("i", "j"), "A", "B", "d"),
        Reduce("top", "f32", ("i",), "max", real("C"), ("j",)),
        Store("c", (row, j.symbol), real("C") - real("top"), ("i", "j"), row < n),
    )
    shapes = {"a": ("n", 32), "b": (16, 32), "c": ("n", 16)}
    args = tuple(
        Tensor(name, "f32", shape, "out" if name == "c" else "in", 1) for name, shape in shapes.items()
    )
    return Kernel("product", args, (GridDim("t", ceildiv(n, 16)),), (I, j, d), "i", body)


RUN_SAVED = """
import sys, torch
from gossamer.runtime import driver
scale, product = map(driver.load, sys.argv[1:])
x = torch.arange(100.0)
y = torch.empty_like(x)
scale({"x": x, "y": y, "by": 2.0})
assert torch.equal(y, 2 * x)
a, b, c = torch.randn(40, 32), torch.randn(16, 32), torch.empty(40, 16)
product({"a": a, "b": b, "c": c})
expected = a @ b.T - (a @ b.T).amax(1, keepdim=True)
assert (c - expected).abs().max() < 1e-4
print(driver.compilations(), driver.loads(), *{"tvm", "sympy", "islpy", "networkx"} & set(sys.modules))
"""


def test_saved_kernels_run_without_any_compiler(artifact: Artifact, tmp_path: Path) -> None:
    paths = [artifact.save(tmp_path / "scale.gossamer")]
    paths.append(compile_kernels([product_kernel()], "cpu").save(tmp_path / "product"))
    environment = {"PATH": "/nonexistent", "HOME": str(tmp_path)}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", RUN_SAVED, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0 2"


def test_kernel_for_another_cpu_compiles_but_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compilations()
    artifact = compile_kernels([scale_kernel()], "cpu:x86-64-v3")
    assert compilations() == before + 1
    assert {"avx2", "fma"} <= set(artifact.manifest.requires.features)
    monkeypatch.setattr(host, "features", lambda: frozenset({"avx2"}))
    with pytest.raises(ArtifactError, match=r"instruction sets that this CPU lacks: .*fma"):
        Executable(artifact)({"x": torch.ones(1), "y": torch.ones(1), "by": 1.0})


def test_unknown_cpu_is_refused_with_its_neighbours() -> None:
    with pytest.raises(
        InputError, match=r"expected an LLVM CPU name after 'cpu:'; got 'znver44'. Did you mean znver4"
    ):
        compile_kernels([scale_kernel()], "cpu:znver44")


def test_threads_default_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        cpu, "launch", lambda function, arguments, threads, workspace, shares: seen.append(threads)
    )
    executable = Executable(compile_kernels([scale_kernel()], "cpu"))
    values = {"x": torch.ones(3), "y": torch.empty(3), "by": 2.0}
    monkeypatch.setenv("GOSSAMER_NUM_THREADS", "7")
    executable(values)
    executable(values, threads=3)
    assert seen == [7, 3]


def test_gpu_kernel_is_compiled_and_saved_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = compile_kernels([scale_kernel()], "cuda:sm_90").save(tmp_path / "scale.gossamer")
    artifact = Artifact.load(path)
    (launch,) = artifact.manifest.launches
    assert artifact.parts[launch.binary].startswith(b"\x7fELF")
    assert launch.details["warps"] >= 1
    assert artifact.manifest.requires.machine == ""  # a cubin does not care for its host

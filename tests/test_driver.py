"""The driver: compiles what no cache holds, once, and launches kernels with the right arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gossamer.ir.errors import ArtifactError, BackendError, InputError
from gossamer.ir.expr import ceildiv, integer
from gossamer.ir.kernel import GridDim, Kernel, Scalar, Tensor
from gossamer.runtime import compile as compile_module
from gossamer.runtime import driver as driver_module
from gossamer.runtime.artifact import Artifact
from gossamer.runtime.backends import BACKENDS, Compiled, Runner
from gossamer.runtime.cache import Cache
from gossamer.runtime.driver import Driver, compile_kernels
from gossamer.runtime.executable import Executable
from gossamer.runtime.manifest import Launch, Requirements
from gossamer.runtime.store import Store
from gossamer.runtime.target import Target


@dataclass(frozen=True)
class Recorded:
    """A kernel that runs nothing."""

    backend: RecordingBackend
    launch: Launch

    def bind(self, values: Mapping[str, Any], sizes: Mapping[str, int]) -> Runner:
        scalars = tuple(values[a.source] for a in self.launch.arguments if a.kind == "scalar")
        record = self.backend.launched.append
        return lambda tensors, threads: record((self.launch.kernel, (*scalars, *tensors), threads))


class RecordingBackend:
    """Compiles to a name, and records what is compiled and launched."""

    suffix = "o"
    concurrent = False

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.launched: list[tuple[str, Sequence[Any], int]] = []
        self.requires = Requirements()

    def compile(self, kernel: Kernel, target: Target) -> Compiled:
        if kernel.name == "broken":
            raise BackendError("broken: no such instruction")
        self.compiled.append(f"{kernel.name} {target}")
        return Compiled(f"# source of {kernel.name}\n", kernel.name.encode(), f"{kernel.name}_entry", 256)

    def requirements(self, target: Target) -> Requirements:
        return self.requires

    def versions(self) -> dict[str, str]:
        return {"recorder": "1"}

    def load(self, launch: Launch, binary: bytes, target: Target) -> Recorded:
        assert launch.entry == f"{binary.decode()}_entry"
        return Recorded(self, launch)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> RecordingBackend:
    recorder = RecordingBackend()
    monkeypatch.setitem(BACKENDS, "tvm", recorder)
    return recorder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", 1 << 20)


@pytest.fixture
def driver(store: Store) -> Driver:
    return Driver(Cache(store))


N, WINDOW = integer("n"), integer("window")


def make_kernel(name: str, *args: Tensor | Scalar) -> Kernel:
    return Kernel(name, args, (GridDim("t", ceildiv(N, 32)),), (), None, ())


@dataclass
class Program:
    """Scores into an intermediate, then a sum out of it; counts how often it was made."""

    kernels: Sequence[Kernel] = (
        make_kernel(
            "scores",
            Scalar("window", "i64"),
            Tensor("x", "f32", ("n", 64), "in", 1),
            Tensor("part", "f32", ("n", "m"), "out", 1),
        ),
        make_kernel("sum", Tensor("part", "f32", ("n", "m"), "in", 1), Tensor("y", "f32", ("n",), "out", 0)),
    )
    intermediates: Sequence[Any] = (SimpleNamespace(name="part", dtype="f32", shape=(N, ceildiv(WINDOW, 8))),)
    text: str = "graph @sum_of_scores { }\n"
    checks: Sequence[tuple[str, str]] = (("window > n", "the window is longer than the sequence"),)
    made: list[int] = field(default_factory=list)

    def make(self) -> Program:
        self.made.append(1)
        return self


def alone(name: str, *args: Tensor | Scalar) -> Program:
    return Program((make_kernel(name, *args),), (), "", ())


def tensor(*shape: int) -> Any:
    return SimpleNamespace(shape=shape)


# ---- compiled once ----


def test_second_call_is_a_dictionary_look_up(driver: Driver, backend: RecordingBackend) -> None:
    program = Program()
    first = driver.get_or_compile(("sum", 64), program.make)
    assert backend.compiled == ["scores cpu", "sum cpu"]
    assert driver.get_or_compile(("sum", 64), program.make) is first
    assert program.made == [1]


def test_fresh_process_takes_it_from_disk(driver: Driver, store: Store, backend: RecordingBackend) -> None:
    program = Program()
    first = driver.get_or_compile(("sum", 64), program.make)
    before = driver_module.compilations()
    fresh = Driver(Cache(store))
    assert fresh.get_or_compile(("sum", 64), program.make).artifact == first.artifact
    assert (program.made, driver_module.compilations()) == ([1], before)
    assert (fresh.cache.counts.disk_hits, fresh.cache.counts.misses) == (1, 0)


def test_keys_of_one_program_share_its_kernels(driver: Driver, backend: RecordingBackend) -> None:
    first = driver.get_or_compile(("lambda at line 1",), Program)
    assert driver.get_or_compile(("lambda at line 2",), Program) is first
    assert driver.compile(Program()) is first
    assert len(backend.compiled) == 2


def test_other_text_target_or_version_is_another_kernel(
    driver: Driver, backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = driver.get_or_compile(("sum",), Program)
    assert driver.get_or_compile(("sum", 2), lambda: Program(text="graph @other { }\n")) is not first
    assert driver.get_or_compile(("sum",), Program, "cpu:x86-64-v3") is not first
    assert backend.compiled[-1] == "sum cpu:x86-64-v3"
    monkeypatch.setattr(compile_module, "versions", lambda backend: (("tvm", "9"),))
    assert Driver(driver.cache).get_or_compile(("sum",), Program) is not first
    assert len(backend.compiled) == 8


def test_threads_compile_once(driver: Driver, backend: RecordingBackend) -> None:
    program = Program()
    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(driver.get_or_compile, ("sum",), program.make) for _ in range(64)]
    assert len({id(call.result()) for call in calls}) == 1
    assert program.made == [1]


def test_failed_compile_is_tried_again(driver: Driver, backend: RecordingBackend) -> None:
    for _ in range(2):
        with pytest.raises(BackendError, match="no such instruction"):
            driver.get_or_compile(("broken",), lambda: Program((make_kernel("broken"),)))
    driver.get_or_compile(("broken",), Program)
    assert len(backend.compiled) == 2


COMPILE_THE_SAME = """
import pathlib, sys
from gossamer.runtime.backends import BACKENDS, Compiled, Runner
from gossamer.runtime.cache import Cache
from gossamer.runtime.driver import Driver, compilations
from gossamer.runtime.manifest import Requirements
from gossamer.runtime.store import Store
folder, marker = map(pathlib.Path, sys.argv[1:])
def mark(what):
    with open(marker, "a") as file:
        file.write(what + "\\n")
class Backend:
    suffix = "o"
    concurrent = False
    requirements = lambda self, target: Requirements()
    versions = lambda self: {}
    def compile(self, kernel, target):
        mark(kernel.name)
        return Compiled("", b"binary", kernel.name)
BACKENDS["tvm"] = Backend()
class Program:
    intermediates, checks, text = (), (), ""
    def __init__(self):
        from gossamer.ir.kernel import Kernel
        mark("passes")
        self.kernels = [Kernel(name, (), (), (), None, ()) for name in ("first", "second")]
driver = Driver(Cache(Store(folder, 1 << 20)))
sys.stdin.readline()
driver.get_or_compile(("program",), Program)
print(compilations(), "sympy" in sys.modules)
"""


def test_sixteen_processes_run_passes_and_compiler_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", COMPILE_THE_SAME, str(tmp_path / "cache"), str(tmp_path / "marker")]
    options: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    processes = [subprocess.Popen(command, **options) for _ in range(16)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sorted(process.communicate()[0] for process in processes) == ["0 False\n"] * 15 + ["2 True\n"]
    assert (tmp_path / "marker").read_text().split() == ["passes", "first", "second"]


# ---- launched with the right arguments ----


def test_kernels_run_in_order_with_their_arguments(driver: Driver, backend: RecordingBackend) -> None:
    executable = driver.get_or_compile(("sum",), Program)
    x, y = tensor(100, 64), tensor(100)
    executable({"y": y, "window": 20, "x": x}, allocate=lambda shape, dtype: (shape, dtype), threads=3)
    part = ((100, 3), "f32")
    assert backend.launched == [("scores", (20, x, part), 3), ("sum", (part, y), 3)]
    assert list(executable.inputs) == ["window", "x", "y"]


def test_binaries_load_once_and_only_when_called(driver: Driver, backend: RecordingBackend) -> None:
    executable = driver.get_or_compile(("one",), lambda: alone("one"))
    before = driver_module.loads()
    with ThreadPoolExecutor(8) as pool:
        for call in [pool.submit(executable, {}) for _ in range(32)]:
            call.result()
    assert (driver_module.loads() - before, len(backend.launched)) == (1, 32)


def test_missing_value_is_named(driver: Driver, backend: RecordingBackend) -> None:
    executable = driver.get_or_compile(("sum",), Program)
    with pytest.raises(InputError, match=r"argument y: expected values for window, x, y; got only x, window"):
        executable({"x": tensor(8, 64), "window": 8}, allocate=lambda shape, dtype: None)
    with pytest.raises(
        InputError, match=r"allocate: expected a function \(shape, dtype\) -> tensor for part"
    ):
        executable({"x": tensor(8, 64), "window": 8, "y": tensor(8)})


def test_failing_check_of_the_program_is_an_error(driver: Driver, backend: RecordingBackend) -> None:
    executable = driver.get_or_compile(("sum",), Program)
    message = r"the window is longer than the sequence: expected not window > n; got window = 9, n = 8"
    with pytest.raises(InputError, match=message):
        executable({"x": tensor(8, 64), "window": 9, "y": tensor(8)}, allocate=lambda shape, dtype: None)
    assert backend.launched == []


def test_binary_for_another_cpu_is_refused_when_called(driver: Driver, backend: RecordingBackend) -> None:
    backend.requires = Requirements("linux", "pdp11")
    executable = driver.get_or_compile(("sum",), Program)
    assert executable.source == "# source of scores\n\n# source of sum\n"  # looking at it is fine
    with pytest.raises(ArtifactError, match="linux pdp11"):
        executable({"x": tensor(8, 64), "window": 8, "y": tensor(8)}, allocate=lambda shape, dtype: None)
    assert backend.launched == []


# ---- saved and loaded ----


def test_loaded_artifact_answers_without_compiling(
    driver: Driver, backend: RecordingBackend, tmp_path: Path
) -> None:
    path = driver.get_or_compile(("sum", 64), Program).save(tmp_path / "sum.gossamer")
    elsewhere, program = Driver(Cache(Store(tmp_path / "empty", 1 << 20))), Program()
    loaded = elsewhere.install(Artifact.load(path))
    assert elsewhere.get_or_compile(("sum", 64), program.make) is loaded
    assert program.made == []
    elsewhere.get_or_compile(("sum", 80), program.make)
    assert program.made == [1]


def test_compiled_program_answers_and_carries_what_it_is_given(
    driver: Driver, backend: RecordingBackend, tmp_path: Path
) -> None:
    first = driver.get_or_compile(("sum", "of a lambda"), Program)
    compiled = driver.compile(Program(), quick_keys=[("sum", 64)], extra={"spec": {"sizes": [64, 80]}})
    assert len(backend.compiled) == 2
    assert first.artifact.manifest.extra == {}

    loaded = Artifact.load(compiled.save(tmp_path / "sum"))
    assert loaded.manifest.extra["spec"]["sizes"] == (64, 80)
    elsewhere, program = Driver(Cache(Store(tmp_path / "empty", 0))), Program()
    executable = elsewhere.install(loaded)
    for key in (("sum", "of a lambda"), ("sum", 64)):
        assert elsewhere.get_or_compile(key, program.make) is executable
    assert Driver(Cache(driver.cache.store)).get_or_compile(("sum", 64), program.make).source == first.source
    assert program.made == []


def test_artifact_says_what_it_is(backend: RecordingBackend) -> None:
    artifact = compile_kernels(Program().kernels, "cpu", ir_text="graph @g { }\n", extra={"spec": [1]})
    assert list(artifact.parts) == [
        "program.ir",
        *(f"kernels/{number}.{suffix}" for number in ("0_scores", "1_sum") for suffix in ("ir", "py", "o")),
    ]
    first = artifact.manifest.launches[0]
    assert [(a.name, a.kind, a.dtype, a.shape, a.role, a.unit) for a in first.arguments] == [
        ("window", "scalar", "i64", (), "in", None),
        ("x", "tensor", "f32", ("n", 64), "in", 1),
        ("part", "tensor", "f32", ("n", "m"), "out", 1),
    ]
    assert (first.entry, first.workspace, first.grid) == ("scores_entry", 256, ("(n + 31) // 32",))
    assert artifact.manifest.extra == {"spec": (1,)}
    assert Executable(Artifact.from_bytes(artifact.to_bytes())).ir.startswith("graph @g { }\n")


# ---- refused ----


@pytest.mark.parametrize(
    "target", ["gpu", "cpu:", "cuda", "cuda:90", "cuda:sm_9", "hip:942", "tpu:v5", "", "cpu:x y", None]
)
def test_unknown_target_lists_the_known_ones(target: Any, driver: Driver) -> None:
    with pytest.raises(
        InputError, match=r"target: expected 'cpu', 'cpu:<LLVM CPU name>' such as .*'hip:gfx942'; got"
    ):
        driver.get_or_compile(("sum",), Program, target)


@pytest.mark.parametrize(
    "target", ["cpu", "cpu:znver4", "cpu:x86-64-v3", "cuda:sm_90a", "cuda:sm_100", "hip:gfx942"]
)
def test_known_target_keeps_its_name(target: str) -> None:
    assert str(Target.parse(target)) == target


def test_key_that_would_not_outlive_the_process_is_refused(driver: Driver) -> None:
    with pytest.raises(
        InputError, match="quick key: expected nested tuples of text, numbers, booleans and None"
    ):
        driver.get_or_compile(("sum", len), Program)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    driver_module.reset()

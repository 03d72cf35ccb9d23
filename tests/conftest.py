"""What every test run needs."""

import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# JAX reads it once, when the first test needs it: several devices on one CPU, and programs that compile fast.
_XLA = (
    "force_host_platform_device_count=4",
    "backend_optimization_level=0",
    "llvm_disable_expensive_passes=true",
)
os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{option}" for option in _XLA))


class RootIsNoTestPackage:
    """Keeps pytest from importing the root's ``__init__.py`` a second time, named after the checkout."""

    @staticmethod
    def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # A plugin of its own, because a conftest's hooks are not asked about the folders above it.
    config.pluginmanager.register(RootIsNoTestPackage())
    if config.option.seed == "fresh":  # the workers inherit what is drawn here
        config.option.seed = str(random.SystemRandom().randrange(2**32))
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed {config.option.seed}"


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file draws when it is imported is its own, too."""
    _seed(collector)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Names of tests are the same in every process: workers have to agree on them."""
    for item in items:
        if " at 0x" in item.name:
            raise pytest.UsageError(f"{item.nodeid}: expected ids without addresses (tests/ids.py)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test draws from seeds of its own, whatever ran before it."""
    _seed(item)


def _seed(node: pytest.Item | pytest.Collector) -> None:
    seed = zlib.crc32(f"{node.config.option.seed} {node.nodeid}".encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", default="0", help="of all random inputs; 'fresh' draws one and prints it")
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden instead of comparing")


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A kernel cache of this run's own, shared by its workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A driver of a CUDA GPU that runs nothing: see fake_cuda.py."""
    from gossamer.runtime.driver import reset
    from gossamer.tests import fake_cuda

    reset()
    yield fake_cuda.install(monkeypatch, tmp_path)
    reset()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("triton/gemm.py", text)`: text is what tests/golden holds, or becomes it (--update-golden)."""

    def compare(name: str, text: str) -> None:
        path = ROOT / "tests" / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.is_file(), f"tests/golden/{name} is missing: run `make golden`"
        assert text == path.read_text(), f"tests/golden/{name} differs: `make golden`, then read the diff"

    return compare

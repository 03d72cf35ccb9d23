"""Python's parser is called by one thread at a time: on its own it raises SystemError now and then."""

import gc
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from gossamer import masks
from gossamer.codegen import tvm as codegen
from gossamer.ir.syntax import parse_expression
from gossamer.passes.pipeline import compile_spec
from gossamer.passes.spec import AttentionSpec
from gossamer.runtime import cpu

THREADS = 4


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can, inside the C code of Python's parser too."""
    switch, thresholds = sys.getswitchinterval(), gc.get_threshold()

    def take_time(phase: str, info: dict[str, int]) -> None:
        for _ in range(20):
            pass

    gc.callbacks.append(take_time)
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    yield
    gc.set_threshold(*thresholds)
    sys.setswitchinterval(switch)
    gc.callbacks.remove(take_time)


def at_depths(work):
    """The results of `work` in several threads, each called at a depth of its own."""

    def call(depth):
        return call(depth - 1) if depth else work()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, range(0, 10 * THREADS, 10)))


def test_expressions_are_parsed_in_several_threads(restless):
    text = " + ".join(f"x{i} * ((q - {i}) // (k + {i}))" for i in range(400))
    for _ in range(3):
        assert len(at_depths(lambda: parse_expression(text))) == THREADS


def test_kernels_are_built_in_several_threads(restless):
    (kernel,) = compile_spec(AttentionSpec(masks.causal().ir, qk_size=8, v_size=8)).kernels
    source, numbers = codegen.emit(kernel), count()  # equal scripts would be built once
    assert all(at_depths(lambda: cpu.build_object(f"# {next(numbers)}\n{source}", "cpu")))

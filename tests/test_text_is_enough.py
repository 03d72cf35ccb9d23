"""IR text alone, in a new process, yields byte-identical generated source, on every backend."""

import json
import os
import subprocess
import sys

import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.codegen import triton, tvm
from gossamer.ir.graph_text import to_text
from gossamer.ir.kernel_text import to_text as kernel_text
from gossamer.ir.sequences import Sequences
from gossamer.passes.build import build
from gossamer.passes.pipeline import lower, run
from gossamer.passes.spec import AttentionSpec

WINDOWS = torch.tensor([3, 40])
MASKS = {
    "window and global": masks.sliding_window(9) | masks.global_tokens(4),
    "strided": masks.strided(8, local=4),
    "box": masks.neighborhood((16, 16), (5, 5)),
    "documents": masks.document(ids=[0, 0, 1, 1, 2]),
    "windows by head": gossamer.Mask.trace(
        lambda b, h, q, k: (q - k <= WINDOWS[h]) & (k >= WINDOWS[b] * WINDOWS[h])
    ),
    "random blocks": masks.bigbird(9, 4, 2, 16, seed=1),
}
SEQUENCES = {
    "documents": Sequences(q_bounds="i32", kv_lens="i32", block_table="i32", page=64),
    "window and global": Sequences(kv_lens="i32", q_offset="scalar"),
}
CHILD = """
import json, sys
from gossamer.codegen import triton, tvm
from gossamer.ir.graph_text import parse
from gossamer.ir.kernel_parse import parse as parse_kernel
from gossamer.passes.pipeline import lower, run
graph, planned, kernels, backend = json.load(sys.stdin)
emit = {"tvm": tvm, "triton": triton}[backend].emit
json.dump([
    [emit(k) for k in lower(run(parse(graph))).kernels],
    [emit(k) for k in lower(parse(planned)).kernels],
    [emit(parse_kernel(k)) for k in kernels],
], sys.stdout)
"""


@pytest.mark.parametrize("backend, target", [("tvm", "cpu"), ("triton", "cuda:sm_90")])
@pytest.mark.parametrize("name", MASKS)
def test_sources_from_text_are_identical(name, backend, target):
    stored = {"sequences": SEQUENCES[name]} if name in SEQUENCES else {}
    graph = build(AttentionSpec(MASKS[name].ir, return_lse=True, target=target, **stored))
    planned = run(graph)
    kernels = lower(planned).kernels
    sources = [{"tvm": tvm, "triton": triton}[backend].emit(k) for k in kernels]
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([to_text(graph), to_text(planned), [kernel_text(k) for k in kernels], backend]),
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    for level, found in zip(("graph", "planned graph", "kernels"), json.loads(child.stdout), strict=True):
        assert found == sources, f"from the text of the {level}"

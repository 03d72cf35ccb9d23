"""Quantised matrices that are decoded once, before a product with many rows: at every level, on Triton's
interpreter, through tensor descriptors; where that is chosen, and how long the matrices live."""

import weakref
from importlib import import_module

import numpy as np
import pytest

from gossamer import testing
from gossamer.ir import graph_interpret, kernel_interpret
from gossamer.ir.ragged import Tiling
from gossamer.passes.moe.build import build_experts
from gossamer.passes.moe.gradient import build_gradients
from gossamer.passes.moe.once import decodes_once
from gossamer.passes.moe.pipeline import compile_experts, lower_experts, run_experts
from gossamer.tests import quantized_cases as CASES

arguments, for_kernels, spec_of, stored = CASES.arguments, CASES.for_kernels, CASES.spec_of, CASES.stored
BOTH = {"once": (True, True), "load": "many", "target": "cuda:sm_90"}
NAMES = ["experts_gate_up", "experts_h", "experts_down", "experts_y", "experts_o"]


@pytest.mark.parametrize("once", [(True, True), (False, True)])
@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_80", "cpu"])
@pytest.mark.parametrize(
    ("format", "group", "hidden", "inner"),
    [
        ("int4", 8, 24, 16),
        ("int2", 8, 45, 40),
        ("mxfp4", 16, 33, 20),
        ("nested", 8, 24, 40),
        ("fp8", 64, 24, 16),
    ],
)
def test_every_level_computes_the_same(format, group, hidden, inner, target, once):
    spec = spec_of(format, group, hidden, inner, **(BOTH | {"target": target, "once": once}))
    given = arguments(spec)
    graph = build_experts(spec)
    expected = graph_interpret.interpret(graph, given)["o"]
    scheduled = run_experts(graph, spec)
    testing.verify(scheduled)
    assert testing.parse(testing.to_text(scheduled)) == scheduled
    assert [op.kind for op in scheduled.ops].count("dequantize") == sum(once)
    given = for_kernels(given, spec)
    if target == "cuda:sm_80" and format == "fp8":
        given |= {n: v for n, v in arguments(spec).items() if n.endswith("codes")}
    found = kernel_interpret.interpret(lower_experts(scheduled, spec), given)["o"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_experts_without_rows_are_not_decoded():
    spec = spec_of("int4", **BOTH)
    given = for_kernels(arguments(spec), spec) | {"ids": np.full(18, 1)}
    program = compile_experts(spec)
    tensors = {t.name: t for t in program.intermediates}
    assert tensors["gate_up"].shape == (3, 32, 24)
    given["gate_up"] = np.full((3, 32, 24), np.nan, np.float32)
    given["bounds"] = np.array([0, 0, 18, 18], np.int32)
    (decode,) = (k for k in program.kernels if k.name == "experts_gate_up")
    found = kernel_interpret.interpret(decode, {t.name: given[t.name] for t in decode.args})["gate_up"]
    assert np.isnan(found[[0, 2]]).all() and np.isfinite(found[1]).all()


@pytest.mark.parametrize("format", ["int4", "mxfp4", "int8 zeros"])
def test_triton_interpreter(format):
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    tiling = Tiling(16, 16, 16, wide=2)
    spec = spec_of(format, 16, 64, 32, tiling=(tiling, tiling), **BOTH)
    given = arguments(spec, 6)
    expected = graph_interpret.interpret(build_experts(spec), given)["o"]
    found = CASES.on_triton(compile_experts(spec), for_kernels(given, spec), 6)["o"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_gradients_hold_one_matrix_at_a_time():
    """Two products take gate_up: the first one, computed anew, and the gradient of x."""
    spec = spec_of("int4", **BOTH)
    ops = run_experts(build_gradients(spec, ("x", "weights")), spec).ops
    takes = [op.inputs[1] for op in ops if op.kind == "grouped_gemm"]
    assert takes == ["down", "gate_up", "gate_up"]
    assert [op.output.name for op in ops if op.kind == "dequantize"] == ["down", "gate_up"]


def test_where_it_pays():
    """On an H100, from some hundred rows an expert for 4 bits, and some thousand for 8."""
    q4, q8 = stored("int4", 4096, 128), stored("int8", 4096, 4096)
    assert not decodes_once(q4, 128, "bf16", "cuda:sm_90")
    assert decodes_once(q4, 1024, "bf16", "cuda:sm_90") and not decodes_once(q8, 1024, "bf16", "cuda:sm_90")
    assert decodes_once(q8, 2048, "bf16", "cuda:sm_90")
    assert not decodes_once(q4, 99999, "f32", "cuda:sm_90") and not decodes_once(q4, 99999, "bf16", "cpu")


# ---- calls ----


@pytest.fixture
def cuda(fake, monkeypatch):
    for name in ("torch", "triton"):
        pytest.importorskip(name)
    for module in map(import_module, ("gossamer.frontend.moe.layer_kernels", "gossamer.frontend.plan")):
        monkeypatch.setattr(module, "target_of", lambda device: "cuda:sm_90")
    return fake


def layer(tokens):
    import gossamer

    torch = pytest.importorskip("torch")
    x = torch.randn(tokens, 64, dtype=torch.bfloat16)
    ids, weights = torch.randint(0, 2, (tokens, 2)), torch.rand(tokens, 2)
    up, down = (gossamer.quantize(torch.randn(2, n, k), "int4") for n, k in ((64, 64), (64, 32)))
    return x, ids, weights, up, down


@pytest.mark.parametrize(
    ("room", "names"),
    [("", NAMES), ("15K", [NAMES[1], *NAMES[2:]]), ("0", [NAMES[1], *NAMES[3:]])],
)
def test_calls_decode_once_where_there_is_room(cuda, monkeypatch, room, names):
    import gossamer

    monkeypatch.setenv("GOSSAMER_WORKSPACE", room)
    given = layer(700)  # 700 rows an expert; gate_up takes 16 KiB, down 8
    for _ in range(2):
        gossamer.experts(*given)
    found = [one.name for one in cuda.launched if one.name.startswith("experts")]
    assert found == names * 2


def test_of_decoded_matrices_one_is_there_at_a_time(cuda, monkeypatch):
    import gossamer
    from gossamer.frontend import prepare

    alive, most = weakref.WeakSet(), 0
    made = prepare.allocate

    def allocate(shape, dtype, device):
        nonlocal most
        tensor = made(shape, dtype, device)
        if len(shape) == 3:
            alive.add(tensor)
            most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(prepare, "allocate", allocate)
    gossamer.experts(*layer(700))
    assert most == 1 and not alive

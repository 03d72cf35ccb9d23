"""The order in which row tiles start on a GPU, and the launch grids that spell it."""

import math

import pytest

from gossamer import masks
from gossamer.codegen import triton as codegen
from gossamer.frontend.mask import Mask
from gossamer.ir.evaluate import evaluate
from gossamer.passes.pipeline import compile_spec
from gossamer.passes.spec import AttentionSpec

ORDERS = {
    "full": (masks.full(), ["rows"]),
    "causal": (masks.causal(), ["reversed"]),
    "window": (masks.sliding_window(128), ["spread"]),
    "longformer": (masks.longformer(128, 64), ["spread"]),
    "dilated": (masks.dilated_window(64, 4), ["rows"]),
    "strided": (masks.strided(64, 64), ["spread", "rows"]),
    "neighborhood": (masks.neighborhood((24, 24), (5, 5)), ["rows"]),
}


def program(mask, **given):
    found = {}
    spec = AttentionSpec(Mask.of(mask).ir, None, "f32", 16, 16, target="cuda:sm_90", **given)
    made = compile_spec(spec, watch=lambda name, graph: found.__setitem__(name, graph))
    [op] = found["tile"].of_kind("attention")
    return made, [loops.programs for loops in op.attr("loops")]


@pytest.mark.parametrize("name", ORDERS)
def test_order(name):
    mask, expected = ORDERS[name]
    assert program(mask)[1] == expected


@pytest.mark.parametrize("name", ORDERS)
def test_grid_launches_every_program_once(name):
    sizes = {"B": 3, "Hq": 5, "q_len": 333, "kv_len": 217}
    for kernel in program(ORDERS[name][0])[0].kernels:
        module = {}
        source = codegen.emit(kernel)
        exec(source[source.index("def grid(") : source.index("def bind(")], module)
        assert module["grid"](**sizes) == (math.prod(int(evaluate(g.extent, sizes)) for g in kernel.grid),)

"""The order in which row tiles start on a GPU, and the launch grids that spell it."""

import itertools
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
    kernels = program(ORDERS[name][0])[0].kernels
    for (batch, heads), kernel in itertools.product([(3, 5), (4, 2), (6, 20), (8, 40), (2, 0)], kernels):
        sizes = {"B": batch, "Hq": heads, "q_len": 333, "kv_len": 217}
        module = {}
        source = codegen.emit(kernel)
        exec(source[source.index("def grid(") : source.index("def bind(")], module)
        assert module["grid"](**sizes) == (math.prod(int(evaluate(g.extent, sizes)) for g in kernel.grid),)


@pytest.mark.parametrize(
    "batch, heads, together", [(4, 16, 4), (6, 16, 2), (4, 17, 2), (3, 16, 1), (4, 40, 1)]
)
def test_as_many_batches_start_side_by_side_as_have_64_heads(batch, heads, together):
    [kernel] = program(masks.sliding_window(128))[0].kernels
    extents = {g.name: int(evaluate(g.extent, {"B": batch, "Hq": heads, "q_len": 640})) for g in kernel.grid}
    assert list(extents) == ["h", "inner", "m0", "outer"]
    assert (extents["inner"], extents["inner"] * extents["outer"]) == (together, batch)

"""Random masks through every pass, both interpreters and the compiler.

    make test ARGS="-k random"                                            as CI runs it
    HYPOTHESIS_PROFILE=deep make test ARGS="-k random --durations=0"      10^5 masks, for a night

A mask is 1 to 4 patterns of the library with random integers, joined by & | ~ (`gossamer.testing.masks`).
"""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gossamer
from gossamer import testing
from gossamer.frontend.checking import check_attention
from gossamer.frontend.problem import Problem
from gossamer.frontend.reference import exact_attention
from gossamer.ir import graph_interpret
from gossamer.ir.kernel import Program
from gossamer.passes.build import build
from gossamer.passes.pipeline import PIPELINE, compile_spec
from gossamer.passes.spec import AttentionSpec

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
LENGTHS = st.sampled_from([1, 2, 3, 31, 32, 33, 63, 65, 97]) | st.integers(1, 110)
LONG = st.sampled_from([1, 64, 127, 255, 257, 513, 600]) | st.integers(1, 600)
HEADS = st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (3, 1)])


def examples(ci: int, deep: int) -> settings:
    """How many examples a test takes, with fresh seeds."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=deep if DEEP else ci, deadline=None, suppress_health_check=slow)


def spec_of(mask: gossamer.Mask, size: int = 4) -> AttentionSpec:
    return AttentionSpec(mask.ir, qk_size=size, v_size=size, return_lse=True)


def arguments(
    mask: gossamer.Mask, q_len: int, kv_len: int, heads: tuple[int, int], batch: int = 1
) -> dict[str, Any]:
    """Random inputs of a graph built from `spec_of(mask)`, by name."""
    rng = np.random.default_rng(np.random.randint(2**31))
    shapes = {
        "q": (batch, heads[0], q_len, 4),
        "k": (batch, heads[1], kv_len, 4),
        "v": (batch, heads[1], kv_len, 4),
    }
    found: dict[str, Any] = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    found |= {f"p{i}": value for i, value in enumerate(mask.values)}
    found |= {f"c{i}": np.asarray(tensor) for i, tensor in enumerate(mask.tensors)}
    return found | {"scale": 0.5}


def expect(mask: gossamer.Mask, given: dict[str, Any], found: dict[str, np.ndarray]) -> None:
    """Output and LSE are those of dense attention in float64."""
    problem = Problem(*(torch.from_numpy(given[name]) for name in "qkv"), enable_gqa=True)
    out, lse, _ = exact_attention(problem, mask, None, given["scale"], np.float64)
    np.testing.assert_allclose(found["o"], out, atol=3e-5)
    np.testing.assert_allclose(found["lse"], lse, atol=3e-5)


@examples(ci=150, deep=100_000)
@given(testing.masks(4, 110), LENGTHS, LENGTHS, HEADS)
def test_lowered_kernels_on_random_masks(mask, q_len, kv_len, heads):
    program = compile_spec(spec_of(mask))
    given = arguments(mask, q_len, kv_len, heads)
    expect(
        mask,
        given,
        testing.interpret(program, {name: given[name] for name in names_of(program) & given.keys()}),
    )


@examples(ci=70, deep=5_000)
@given(
    testing.masks(4, 600), st.lists(st.tuples(LONG, LONG), min_size=2, max_size=2), HEADS, st.integers(1, 2)
)
def test_compiled_kernels_on_random_masks(mask, lengths, heads, batch):
    for q_len, kv_len in lengths:
        q = torch.randn(batch, heads[0], q_len, 8)
        k, v = torch.randn(2, batch, heads[1], kv_len, 8)
        check_attention(q, k, v, mask=mask, enable_gqa=True)


@pytest.mark.parametrize("name", [name for name, _ in PIPELINE])
@examples(ci=20, deep=5_000)
@given(testing.masks(3, 40), st.integers(1, 40), st.integers(1, 40), HEADS)
def test_passes_keep_the_meaning(name, mask, q_len, kv_len, heads):
    """interpret(pass(g)) == interpret(g), for the graph as each pass meets it."""
    graph = build(spec_of(mask))
    for earlier, apply in PIPELINE:
        if earlier == name:
            break
        graph = apply(graph)
    given = arguments(mask, q_len, kv_len, heads)
    before, after = (graph_interpret.interpret(g, given) for g in (graph, testing.run_pass(graph, name)))
    assert before.keys() == after.keys()
    for output in before:
        np.testing.assert_allclose(after[output], before[output], rtol=1e-5, atol=1e-6)


@examples(ci=40, deep=5_000)
@given(testing.graphs())
def test_the_pipeline_keeps_the_meaning_of_graphs(graph):
    """Also of graphs without a mask, with a score_mod, or with no attention in them: those are left alone."""
    testing.assert_equivalent(graph, testing.run_pipeline(graph, stop="fuse"))


TABLE, DISTANCES = np.random.default_rng(0).standard_normal((2, 9)), np.arange(19.0)

TIGHT = {
    "distance in a window": (
        gossamer.masks.sliding_window(9),
        lambda s, b, h, q, k: s + DISTANCES[q - k + 9],
    ),
    "distance, causal": (gossamer.masks.causal(), lambda s, b, h, q, k: s + DISTANCES[(q - k) // 5]),
    "columns of a grid": (gossamer.masks.neighborhood((9, 9), 3), lambda s, b, h, q, k: s + TABLE[h, k % 9]),
    "few rows": (lambda b, h, q, k: q < 19, lambda s, b, h, q, k: s + DISTANCES[q]),
    "anchored ids": (gossamer.masks.sliding_window(5) & gossamer.masks.document(np.arange(81) // 9), None),
    "ids in boxes": (
        gossamer.masks.neighborhood((9, 9), 3) & (lambda b, h, q, k: TABLE[h, q % 9] > TABLE[1, k % 9]),
        None,
    ),
}


@pytest.mark.parametrize("name", TIGHT)
def test_tensors_need_be_no_larger_than_what_is_read(name):
    """The interpreter refuses any read outside a tensor, of pairs that do not attend too."""
    mask, score = gossamer.Mask.of(TIGHT[name][0]), gossamer.ScoreMod.of(TIGHT[name][1])
    program = compile_spec(replace(spec_of(mask), score_map=None if score is None else score.ir))
    given = arguments(mask, 81, 81, (2, 1))
    if score is not None:
        given |= {f"t{i}": np.asarray(tensor) for i, tensor in enumerate(score.tensors)}
        given |= {f"s{i}": value for i, value in enumerate(score.values)}
    found = testing.interpret(program, {name: given[name] for name in names_of(program) & given.keys()})
    problem = Problem(*(torch.from_numpy(given[name]) for name in "qkv"), enable_gqa=True)
    out, *_ = exact_attention(problem, mask, score, given["scale"], np.float64)
    np.testing.assert_allclose(found["o"], out, atol=3e-5)


def names_of(program: Program) -> set[str]:
    return {argument.name for kernel in program.kernels for argument in kernel.args}

"""Lengths by batch, positions, packed rows and pages: kernels against float64, on both interpreters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.codegen import triton
from gossamer.ir.errors import UnsupportedError, VerifyError
from gossamer.ir.graph_interpret import interpret as interpret_graph
from gossamer.ir.kernel import Program
from gossamer.ir.kernel_interpret import interpret
from gossamer.ir.mask import Mask
from gossamer.ir.plan import Schedule
from gossamer.ir.score import ScoreMap
from gossamer.ir.sequences import Sequences
from gossamer.passes.build import build
from gossamer.passes.pipeline import compile_spec
from gossamer.tests import sequences as helper

Batch = helper.Batch

MASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("mask() { true }", {}),
    "window": ("mask(p0) { q >= k and q - k <= p0 }", {"p0": 17}),
    "sink and window": ("mask(p0) { q >= k and (q - k <= p0 or k < 4) }", {"p0": 9}),
    "prefix": ("mask(; c0: i32[1]) { q >= k or k < c0[b] }", {"c0": np.array([5, 0, 40, 11], np.int32)}),
    "windows by head": ("mask(; c0: i64[1]) { q >= k and q - k <= c0[h] }", {"c0": np.array([3, 30])}),
    "strided": ("mask() { q >= k and ((q - k) % 8 == 0 or q - k < 5) }", {}),
    "ids": ("mask(; c0: i32[1]) { c0[q] == c0[k] }", {"c0": np.arange(200, dtype=np.int32) // 23}),
}
STORED = {
    "lens": Sequences(kv_lens="i32"),
    "scalar offset": Sequences(q_offset="scalar"),
    "offsets and lens": Sequences(q_offset="i64", kv_lens="i64"),
    "pages": Sequences(q_offset="i32", kv_lens="i32", block_table="i32", page=16),
    "large pages": Sequences(q_offset="i32", kv_lens="i32", block_table="i32", page=64),
    "packed": Sequences(q_bounds="i32", kv_bounds="i32"),
    "packed, lens": Sequences(q_bounds="i64", kv_bounds="i64", kv_lens="i32", q_offset="i32"),
    "packed queries": Sequences(q_bounds="i32", kv_lens="i32", block_table="i32", page=32, q_offset="i32"),
}


def batch(stored: Sequences, seed: int = 0, **more: Any) -> Any:
    """Four sequences, one without keys; packed ones have odd numbers of queries, none too."""
    lengths = [(5, 33), (5, 0), (5, 70), (5, 1)]
    if stored.q_bounds:
        lengths = [(1, 33), (0, 7), (40, 41), (3, 0)]
    if not (stored.kv_lens or stored.kv_bounds):
        lengths = [(5, 37)] * 4
    return Batch(stored, lengths, seed=seed, **more)


def run(program: Program, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    return interpret(program, {**arguments, "scale": 0.3})


def run_triton(program: Program, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """On Triton's interpreter."""
    from gossamer.runtime.triton_interpreter import run_interpreted

    shapes = {name: x.shape for name, x in run(program, arguments).items()}
    given = {name: torch.as_tensor(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    given |= {name: torch.full(shape, math.nan) for name, shape in shapes.items()} | {"scale": 0.3}
    splits = arguments.get("splits", 0)
    for made in program.intermediates:
        rows = shapes["lse"]
        shape = (splits, *rows, *made.shape[1 + len(rows) :])
        given[made.name] = torch.full(shape, math.nan)
    for kernel in program.kernels:
        run_interpreted(triton.emit(kernel), {a.name: given[a.name] for a in kernel.args})
    return {name: given[name].numpy() for name in shapes}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_in_every_way_of_storing(name, stored):
    text, values = MASKS[name]
    mask, of = Mask.parse(text), batch(STORED[stored], hash((name, stored)) % 1000)
    found = run(compile_spec(of.spec(mask)), of.arguments() | values)
    of.check(found, mask=mask, values=values)


LISTED = {
    "ids": MASKS["ids"],
    "bits": ("mask() { bitand(q, k) % 4 == 0 and k <= q }", {}),
    "rows of a key of a batch": (
        "mask(; c0: i32[2]) { q < c0[b, k] }",
        {"c0": np.random.default_rng(1).integers(0, 60, (8, 200)).astype(np.int32)},
    ),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", LISTED)
def test_lists_of_key_tiles(name, stored):
    text, values = LISTED[name]
    mask, of = Mask.parse(text), batch(STORED[stored], 5)
    schedule = Schedule((16,), (16,), lazy_rescale=False)
    program = compile_spec(of.spec(mask, target="cuda:sm_90"), schedule)
    assert any(kernel.name.endswith("_tiles") for kernel in program.kernels)
    of.check(run(program, of.arguments() | values), mask=mask, values=values)


@pytest.mark.parametrize("stored", STORED)
def test_scores_see_positions(stored):
    score = ScoreMap.parse("score(; t0: f32[1]) { score + 0.1 * t0[h] * (q - k) }")
    mask, values = Mask.parse("mask() { q >= k }"), {"t0": np.array([0.5, -1], np.float32)}
    of = batch(STORED[stored], 3)
    found = run(compile_spec(of.spec(mask, score)), of.arguments() | values)
    of.check(found, mask=mask, score=score, values=values)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", MASKS)
def test_few_rows_share_tiles_and_split_keys(name, stored):
    """Rows of several heads in a tile, several programs a row tile, and the merge of what they found."""
    text, values = MASKS[name]
    seed = hash((name, stored)) % 1000
    splits = (1, 3, 50)[seed % 3]
    hk = 1 + seed % 2
    of = batch(STORED[stored], seed, heads=(hk * (1 + seed % 5), hk))
    values = values | ({"c0": np.arange(99)} if name == "windows by head" else {})
    program = compile_spec(of.spec(Mask.parse(text), few=16 << seed % 3, group=of.heads[0] // hk))
    of.check(run(program, of.arguments() | values | {"splits": splits}), mask=Mask.parse(text), values=values)


def test_splits_are_even_shares_of_the_tiles_that_a_mask_visits():
    mask = Mask.parse("mask(p0) { q >= k and q - k <= p0 or k < 4 }")
    of = Batch(Sequences(q_offset="scalar"), [(1, 4096)], heads=(1, 1))
    of.offsets = [4000]
    first, _ = compile_spec(of.spec(mask, few=16)).kernels
    made = {f"part_{x}": np.full((4, 1, 1, 1), np.nan, np.float32) for x in "ml"}
    made["part_O"] = np.full((4, 1, 1, 1, 8), np.nan, np.float32)
    found = interpret(first, of.arguments() | made | {"p0": 640, "splits": 4, "scale": 0.0})
    # With a scale of 0 every key weighs 1: 641 of the window and 4 of the prefix, in tiles of 32.
    weights = found["part_l"].ravel() * np.exp2(found["part_m"].ravel())
    assert weights.tolist() == [6 * 32, 6 * 32, 6 * 32, 645 - 18 * 32]


@pytest.mark.parametrize("lists", ["none", "all"])
@pytest.mark.parametrize("name", ["ids", "sink and window"])
def test_a_given_schedule_may_leave_keys_unsplit(name, lists):
    text, values = MASKS[name]
    of = batch(STORED["pages"], 5, heads=(6, 2))
    schedule = Schedule((8,), (16,), lists=lists)
    program = compile_spec(of.spec(Mask.parse(text), few=16, group=3), schedule)
    of.check(run(program, of.arguments() | values), mask=Mask.parse(text), values=values)


@pytest.mark.parametrize("splits", [1, 17])
def test_sinks_and_scores_by_head_in_a_shared_tile(splits):
    score = ScoreMap.parse("score(; t0: f32[1]) { score + 0.1 * t0[h] * (q - k) }")
    mask, values = Mask.parse("mask() { q >= k }"), {"t0": np.arange(6, dtype=np.float32)}
    of = batch(STORED["pages"], 3, heads=(6, 2))
    sinks = np.linspace(-2, 3, 6).astype(np.float32)
    program = compile_spec(of.spec(mask, score, few=16, group=3, sinks="f32"))
    found = run(program, of.arguments() | values | {"sinks": sinks, "splits": splits})
    for b, (out, lse) in enumerate(of.expected(mask, score, values=values)):
        share = 1 / (1 + np.exp(sinks[:, None] - lse))
        np.testing.assert_allclose(found["o"][b], out * share[..., None], 2e-5, 2e-5)
        np.testing.assert_allclose(found["lse"][b], lse, 2e-5, 2e-5)


@pytest.mark.parametrize("page", [16, 32, 128, 256])
@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
def test_page_sizes_below_and_above_a_key_tile(page, target):
    stored = Sequences(q_offset="i32", kv_lens="i32", block_table="i32", page=page)
    of = Batch(stored, [(3, 300), (3, page), (3, page + 1), (3, 0)], seed=page)
    mask = Mask.parse("mask(p0) { q >= k and q - k <= p0 or k < 20 }")
    found = run(compile_spec(of.spec(mask, target=target)), of.arguments() | {"p0": 25})
    of.check(found, mask=mask, values={"p0": 25})


@pytest.mark.parametrize("count", [1, 130, 300])
def test_many_packed_sequences(count):
    rng = np.random.default_rng(count)
    lengths = [(int(n), int(n)) for n in rng.integers(0, 3, count)]
    of = Batch(Sequences(q_bounds="i32", kv_bounds="i32"), lengths, heads=(1, 1))
    mask = Mask.parse("mask() { q >= k }")
    of.check(run(compile_spec(of.spec(mask)), of.arguments()), mask=mask)


@pytest.mark.parametrize("few", [{}, {"few": 16, "group": 3}], ids=["many", "few"])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", ["sink and window", "windows by head"])
def test_triton(name, stored, few):
    text, values = MASKS[name]
    mask, of = Mask.parse(text), batch(STORED[stored], sizes=(16, 16), heads=(3, 1))
    values = values | ({"c0": np.array([4, 0, 20])} if name == "windows by head" else {})
    program = compile_spec(of.spec(mask, target="cuda:sm_90", **few))
    given = of.arguments() | values | ({"splits": 3} if few else {})
    of.check(run_triton(program, given), mask=mask, values=values)


@pytest.mark.parametrize("stored", ["scalar offset", "pages", "large pages", "packed"])
def test_kernels_of_few_rows_load_ahead_in_vectors(stored):
    """Compiled for an H100: loads of 16 bytes that do not wait, for pages too; registers suffice."""
    from gossamer.runtime.gpu import compile_ahead

    how = dict(dtype="bf16", target="cuda:sm_90", few=16, group=4, aligned=True, positive=True)
    of = batch(STORED[stored], sizes=(128, 128), heads=(4, 1))
    mask = Mask.parse("mask(p0) { q >= k and q - k <= p0 }")
    for kernel in compile_spec(of.spec(mask, **how)).kernels:
        binary = compile_ahead(triton.emit(kernel), "cuda:sm_90")
        assert binary.spills == 0 and binary.shared < 227 * 1024 // 2
        if kernel.name == "attention_acsr_fwd":
            assert binary.assembly.count("cp.async.cg.shared.global") >= 32


def test_what_lies_outside_memory_is_never_read():
    """Lengths, bounds, offsets and pages that make no sense: garbage out, from memory that is there."""
    mask = Mask.parse("mask(; c0: i32[1]) { q >= k and q - k <= c0[q] }")
    rng = np.random.default_rng(0)
    values = {"c0": np.arange(9, dtype=np.int32)}
    for stored in STORED.values():
        of = batch(stored)
        wrong = of.arguments()
        for name in wrong.keys() & {"kv_lens", "block_table", "kv_bounds", "q_offsets"}:
            wrong[name] = rng.integers(-500, 500, wrong[name].shape).astype(wrong[name].dtype)
        run(
            compile_spec(of.spec(mask)),
            wrong | values if stored.uneven else of.arguments() | {"c0": np.arange(99)},
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_lens": "f32"},
        {"block_table": "i32", "page": 16},
        {"page": 16},
        {"q_bounds": "i32"},
        {"kv_bounds": "i32"},
    ],
)
def test_sequences_are_verified(wrong):
    with pytest.raises(VerifyError, match="sequences: "):
        Sequences(**wrong)


def test_graphs_with_sequences_are_not_interpreted():
    of = batch(STORED["lens"])
    with pytest.raises(UnsupportedError, match="Interpret its kernels"):
        interpret_graph(build(of.spec(Mask.parse("mask() { true }"))), {})

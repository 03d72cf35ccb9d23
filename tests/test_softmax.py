"""Sinks, prob_mod, dropout and column sums: on compiled kernels, both interpreters and ahead of time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer
from gossamer import masks, testing
from gossamer.frontend.checking import check_attention
from gossamer.frontend.score import ProbMod
from gossamer.ir.errors import InputError
from gossamer.ir.graph import Graph, Op
from gossamer.ir.kernel import Program
from gossamer.ir.mask import Mask
from gossamer.ir.philox import random_bits
from gossamer.ir.score import ProbMap, ScoreMap
from gossamer.passes.build import build
from gossamer.passes.pipeline import compile_spec
from gossamer.passes.spec import AttentionSpec
from gossamer.passes.transpose import exchanged_mask
from gossamer.runtime.driver import compilations

SEED = 20


def tensors(q_len=61, kv_len=83, *, batch=1, heads=2, kv_heads=None, size=16, dtype=torch.float32):
    shapes = [(batch, heads, q_len, size), *[(batch, kv_heads or heads, kv_len, size)] * 2]
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


IDS = np.arange(100) // 17
MASKS = {
    "causal": masks.causal(),
    "two groups": masks.strided(8, 5),
    "opaque": masks.document(IDS),
    "boxes": masks.neighborhood((9, 10), 3),
}
TABLE = torch.randn(2, 200)
PROB_MODS = {
    "scaled": lambda p, b, h, q, k: p * (q - k) * 0.1,
    "chosen": lambda p, b, h, q, k: torch.where(k % 3 == 0, p * TABLE[h, k], p / 2),
    "threshold": lambda p, b, h, q, k: torch.relu(p - 0.02),
    "square": lambda p, b, h, q, k: p * p * TABLE[h, q],
}


# ---- the passes: graphs, their kernels, and Triton's text, on interpreters ----

LINEAR = ProbMap.parse("prob(x0: float; w0: f32[1]) { where(k % 3 == 0, prob * x0, prob * w0[k]) }")
THRESHOLD = ProbMap.parse("prob(x0: float) { max(prob - x0, 0) }")
SOFT_CAP = ScoreMap.parse("score(s0: float) { s0 * tanh(score / s0) + 0.1 * (q - k) }")
ALIBI = ScoreMap.parse("score(; t0: f32[1]) { score - t0[h] * (q - k) }")
RELATIVE = ScoreMap.parse("score(; t0: f32[1]) { score + t0[q - k + 100] }")
WISHES = {
    "ALiBi": dict(score_map=ALIBI),
    "relative bias": dict(score_map=RELATIVE, sinks="f32"),
    "sinks": dict(sinks="f16", return_lse=True),
    "linear": dict(prob_map=LINEAR),
    "threshold": dict(prob_map=THRESHOLD, sinks="f32"),
    "column sums": dict(return_column_sums=True, return_lse=True, score_map=SOFT_CAP),
    "all": dict(prob_map=THRESHOLD, sinks="f32", return_column_sums=True),
    "dropout": dict(prob_map=ProbMod.identity().dropped_out(-(2**27), 1.6, None).ir, sinks="f32"),
}


def problem(mask, q_len=70, kv_len=90, heads=(4, 2), size=16, v_size=8, **wishes):
    """A spec and arguments for it."""
    spec = AttentionSpec(mask.ir, dtype="f32", qk_size=size, v_size=v_size, **wishes)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    (hq, hk), batch = heads, 2
    given = {"q": normal(batch, hq, q_len, size), "k": normal(batch, hk, kv_len, size)}
    given |= {"v": normal(batch, hk, kv_len, v_size), "scale": 0.3}
    given |= {f"p{i}": v for i, v in enumerate(mask.values)}
    given |= {f"c{i}": np.asarray(t) for i, t in enumerate(mask.tensors)}
    if spec.sinks:
        given["sinks"] = normal(hq).astype({"f16": np.float16, "f32": np.float32}[spec.sinks])
    for mapped in spec.maps:
        given |= {name: 0.05 if kind == "float" else -(2**27) for name, kind in mapped.params}
        given |= {c.name: np.array([SEED]) if c.dtype == "i64" else normal(200) for c in mapped.captures}
    return spec, given


def names_of(program: Program) -> set[str]:
    return {argument.name for kernel in program.kernels for argument in kernel.args}


def run(program: Program, given):
    return testing.interpret(program, {name: given[name] for name in names_of(program) & given.keys()})


def run_triton(program: Program, given, expected):
    """The program's kernels on Triton's interpreter."""
    from gossamer.codegen import triton
    from gossamer.runtime.triton_interpreter import run_interpreted

    values = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in given.items()}
    rows = given["q"].shape[:3]
    extents = dict(zip(("B", "Hq", "q_len"), rows, strict=True)) | {"kv_len": given["k"].shape[2]}
    written = {t.name: t for k in program.kernels for t in k.tensors if t.role != "in"}
    for tensor in written.values():
        shape = [extents[n] if isinstance(n, str) else n for n in tensor.shape]
        values[tensor.name] = torch.full(shape, math.nan)
    for kernel in program.kernels:
        run_interpreted(triton.emit(kernel), {a.name: values[a.name] for a in kernel.args})
    return {name: values[name].numpy() for name in expected}


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("mask", MASKS)
def test_kernels_do_what_their_graph_says(mask, wish):
    spec, given = problem(MASKS[mask], **WISHES[wish])
    expected = testing.interpret(build(spec), given)
    for target in ("cpu", "cuda:sm_90"):
        program = compile_spec(replace(spec, target=target))
        found = run(program, given)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=f"{name}, {target}")


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("mask", ["causal", "two groups"])
def test_triton_text_does_too(mask, wish):
    pytest.importorskip("triton")
    spec, given = problem(MASKS[mask], 33, 40, heads=(2, 1), target="cuda:sm_90", **WISHES[wish])
    expected = testing.interpret(build(spec), given)
    found = run_triton(compile_spec(spec), given, expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "wish, dtype", [*((wish, "bf16") for wish in WISHES), ("all", "f32"), ("all", "f64")]
)
def test_every_kernel_compiles_for_a_gpu(wish, dtype):
    pytest.importorskip("triton")
    from gossamer.codegen import triton
    from gossamer.runtime.gpu import compile_ahead

    wishes = {"score_map": None, **WISHES[wish]}
    spec = AttentionSpec(masks.causal().ir, dtype=dtype, target="cuda:sm_90", **wishes)
    for kernel in compile_spec(spec).kernels:
        built = compile_ahead(triton.emit(kernel), "cuda:sm_90")
        assert built.code, kernel.name


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
@pytest.mark.parametrize("wish", WISHES)
def test_few_rows_of_several_heads_in_a_tile(wish, target):
    spec, given = problem(MASKS["causal"], 3, 90, target=target, **WISHES[wish])
    expected = testing.interpret(build(spec), given)
    found = run(compile_spec(replace(spec, few=16, group=2)), given | {"splits": 3})
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


def test_without_wishes_nothing_changes():
    plain = compile_spec(AttentionSpec(masks.causal().ir))
    assert [k.name for k in plain.kernels] == ["attention_acsr_fwd"]
    assert not names_of(plain) & {"sinks", "column_sums", "x0", "w0", "lse"}


# ---- fuse and transpose ----


def fused(graph: Graph) -> list[str]:
    return [op.kind for op in testing.run_pass(graph, "fuse").ops]


def test_linear_maps_run_before_the_sum_is_known_and_others_after():
    mask = masks.causal().ir
    assert fused(build(AttentionSpec(mask, prob_map=LINEAR))) == ["attention"]
    assert fused(build(AttentionSpec(mask, prob_map=THRESHOLD))) == ["row_lse", "weigh"]
    sums = AttentionSpec(mask, prob_map=THRESHOLD, return_column_sums=True)
    assert fused(build(sums)) == ["row_lse", "weigh", "column_sums"]


@pytest.mark.parametrize(
    "text, linear",
    [
        ("prob", True),
        ("0", True),
        ("prob * (q - k) / 3 + 2 * prob", True),
        ("where(q < k, 0, prob * w0[k])", True),
        ("where(prob < 0.5, 0, prob)", False),
        ("prob + 1", False),
        ("prob * prob", False),
        ("sqrt(prob)", False),
        ("min(prob, 0.5)", False),
        ("where(q < k, 1, prob)", False),
    ],
)
def test_which_maps_are_linear(text, linear):
    assert ProbMap.parse(f"prob(; w0: f32[1]) {{ {text} }}").is_linear == linear


@pytest.mark.parametrize("other", ["sum over keys", "scores returned", "other scores"])
def test_fuse_leaves_alone_what_it_cannot_hold(other):
    graph = build(AttentionSpec(masks.causal().ir, prob_map=LINEAR, return_column_sums=True))
    if other == "sum over keys":
        rows = graph.values["p"].shape[:3]
        by_axis = (("axis", 3), ("op", "sum"))
        changed = [
            Op("reduce", op.inputs, (type(op.output)("r", "f32", rows),), by_axis)
            if op.kind == "reduce"
            else op
            for op in graph.ops
        ]
        graph = Graph(graph.name, graph.inputs, tuple(changed), ("o", "r"))
    elif other == "scores returned":
        graph = Graph(graph.name, graph.inputs, graph.ops, (*graph.outputs, "t"))
    else:
        ops = tuple(
            Op(op.kind, ("p", "s", *op.inputs[2:]), op.outputs, op.attrs) if op.kind == "prob_map" else op
            for op in graph.ops
        )
        graph = Graph(graph.name, graph.inputs, ops, graph.outputs)
    assert testing.run_pass(graph, "fuse") == graph


def test_transposed_groups_are_attached_to_what_runs_over_keys_only():
    spec, _ = problem(MASKS["two groups"], return_column_sums=True)
    graph = testing.run_pipeline(build(spec), stop="transpose")
    [attention], [sums] = graph.of_kind("attention"), graph.of_kind("column_sums")
    for one, other in zip(attention.attr("groups"), sums.attr("groups"), strict=True):
        assert one.order == other.order  # a symmetric mask
    assert testing.run_pass(graph, "transpose") == graph


@settings(max_examples=30, deadline=None)
@given(testing.masks(3, 40), st.integers(1, 40), st.integers(1, 40))
def test_an_exchanged_mask_is_the_transpose(mask, q_len, kv_len):
    other: Mask = exchanged_mask(mask.ir)
    given = (mask.values, [np.asarray(t) for t in mask.tensors])
    q, k = np.arange(q_len)[:, None], np.arange(kv_len)
    here = np.broadcast_to(mask.ir.evaluate(0, 0, q, k, *given, q_len, kv_len), (q_len, kv_len))
    there = np.broadcast_to(other.evaluate(0, 0, k[:, None], q.T, *given, kv_len, q_len), (kv_len, q_len))
    np.testing.assert_array_equal(here.T, there)
    assert exchanged_mask(other) == mask.ir


# ---- gossamer.attention ----


@pytest.mark.parametrize("mask", MASKS)
def test_sinks_join_the_softmax(mask):
    given = tensors(90, 90, heads=4, kv_heads=2)
    sinks = torch.tensor([0.4, -2, 3, 0], dtype=torch.float16)
    _, lse = check_attention(*given, mask=MASKS[mask], sinks=sinks, enable_gqa=True)
    plain = gossamer.attention(*given, mask=MASKS[mask], enable_gqa=True, return_lse=True)[1]
    assert torch.equal(lse, plain)  # the LSE is of the scores alone


def test_extreme_sinks():
    q, k, v = tensors(heads=7)
    sinks = torch.tensor([-math.inf, -1e30, -50, 50, 1e30, 3.4e38, math.inf])
    out = gossamer.attention(q, k, v, mask=masks.causal(), sinks=sinks)
    plain = gossamer.attention(q, k, v, mask=masks.causal())
    torch.testing.assert_close(out[:, :3], plain[:, :3], rtol=0, atol=0)
    assert (out[:, 4:] == 0).all() and 0 < out[:, 3].abs().max() < 1e-15
    reference = gossamer.attention(q, k, v, mask=masks.causal(), sinks=sinks, backend="reference")
    torch.testing.assert_close(out, reference)


def test_rows_without_pairs_are_zeros_whatever_the_sink():
    given, mask = tensors(80, 50), lambda b, h, q, k: (k >= q + 20) & (q % 3 != 0)
    out, lse = check_attention(*given, mask=mask, sinks=torch.tensor([1.0, -math.inf]))
    empty = (torch.arange(80) >= 30) | (torch.arange(80) % 3 == 0)
    assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -math.inf).all()


@pytest.mark.parametrize("name", PROB_MODS)
@pytest.mark.parametrize("mask", MASKS)
def test_prob_mods(mask, name):
    given = tensors(90, 90, batch=2, heads=2, kv_heads=1)
    check_attention(*given, mask=MASKS[mask], prob_mod=PROB_MODS[name], enable_gqa=True)


@pytest.mark.parametrize("scale", [0.25, 8.0])
def test_steep_maps_of_large_scores(scale):
    """A log-sum-exp far from 0 is rounded by as much as a probability may be wrong: none is read."""
    given = tensors(90, 90)
    check_attention(*given, mask=MASKS["two groups"], scale=scale, prob_mod=lambda p, b, h, q, k: p * p * p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    wishes = dict(sinks=torch.tensor([0.4, -2.0]).to(dtype), dropout_p=0.2, dropout_seed=SEED)
    for name in ("chosen", "threshold"):
        check_attention(
            *tensors(dtype=dtype),
            mask=masks.causal(),
            prob_mod=PROB_MODS[name],
            return_column_sums=True,
            **wishes,
        )


def test_what_does_not_attend_never_reaches_the_output():
    """A map that is infinite, NaN or not zero where pairs do not attend."""
    far = torch.full((200,), math.nan)
    far[21:] = 1.5
    for prob_mod in (
        lambda p, b, h, q, k: p / (q - k),
        lambda p, b, h, q, k: p * far[q - k],
        lambda p, b, h, q, k: p + 0.25,
    ):
        mask = lambda b, h, q, k: (k < q) & (q - k > 20)  # noqa: E731
        check_attention(*tensors(81, 81), mask=mask, prob_mod=prob_mod)


@pytest.mark.parametrize("mask", MASKS)
def test_column_sums(mask):
    given = tensors(90, 90, batch=2, heads=4, kv_heads=2)
    soft_cap = lambda s, b, h, q, k: 5 * torch.tanh(s / 5) + TABLE[h % 2, k]  # noqa: E731
    options = dict(enable_gqa=True, return_column_sums=True)
    check_attention(*given, mask=MASKS[mask], score_mod=soft_cap, **options)
    check_attention(*given, mask=MASKS[mask], sinks=torch.randn(4), **options)
    *_, sums = gossamer.attention(*given, mask=MASKS[mask], **options)
    # Every row's probabilities sum to one.
    torch.testing.assert_close(sums.sum(-1), torch.full((2, 4), 90.0))


@pytest.mark.parametrize("lengths", [(1, 1), (1, 90), (90, 1), (0, 9), (9, 0), (64, 64), (33, 65)])
def test_column_sums_of_any_lengths(lengths):
    check_attention(*tensors(*lengths), mask=MASKS["two groups"], return_column_sums=True)
    _, sums = gossamer.attention(*tensors(*lengths), mask=masks.causal(), return_column_sums=True)
    assert sums.shape == (1, 2, lengths[1]) and (sums[..., lengths[0] :] == 0).all()


def test_saved_kernels_take_the_same_tensors(tmp_path):
    given, sinks = tensors(), torch.randn(2)
    spec = gossamer.AttentionSpec(
        masks.causal(), qk_size=16, prob_mod=PROB_MODS["scaled"], sinks="f32", dropout=True,
        return_column_sums=True,
    )  # fmt: skip
    kernel = gossamer.load(gossamer.compile(spec).save(tmp_path / "k.gossamer"))
    options = dict(mask=masks.causal(), prob_mod=PROB_MODS["scaled"], sinks=sinks)
    options |= dict(dropout_p=0.3, dropout_seed=SEED)
    out, sums = kernel(*given, **options)
    expected = gossamer.attention(*given, **options, return_column_sums=True)
    assert torch.equal(out, expected[0]) and torch.equal(sums, expected[1])
    with pytest.raises(InputError, match="dropout"):
        kernel(*given, mask=masks.causal(), prob_mod=PROB_MODS["scaled"], sinks=sinks)


# ---- dropout ----


def kept(p, seed, mask=None, length=256, heads=2, **options):
    """Which pairs dropout keeps: equal scores, and values that tell keys apart."""
    q = torch.zeros(1, heads, length, 8)
    v = torch.eye(length).expand(1, heads, length, length)
    return gossamer.attention(q, q, v, mask=mask, dropout_p=p, dropout_seed=seed, **options) != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate_and_independence(p):
    keeps = kept(p, SEED).double()
    error = 5 * math.sqrt(p * (1 - p) / keeps.numel())
    assert abs(keeps.mean() - (1 - p)) < error
    centred = keeps - (1 - p)
    for other in (
        centred.roll(1, -1),
        centred.roll(1, -2),
        centred.roll((1, 1), (-1, -2)),
        centred.roll(1, 1),
        kept(p, SEED + 1).double() - (1 - p),
    ):
        assert abs((centred * other).mean()) < error * math.sqrt(p * (1 - p)) * 1.5
    rows = centred.sum(-1) / math.sqrt(256 * p * (1 - p))
    assert 0.8 < rows.var() < 1.2


def test_which_pairs_are_kept_is_a_function_of_seed_and_indices():
    p, length = 0.37, 150
    threshold = round(p * 2**30) - 2**29
    h, q, k = np.ogrid[:2, :length, :length]
    stream = random_bits(random_bits(SEED, SEED >> 32, 0), 0, h)
    expected = torch.from_numpy((random_bits(stream, q, k) >> 2) >= threshold)[None]
    assert torch.equal(kept(p, SEED, length=length), expected)
    assert torch.equal(kept(p, torch.tensor([SEED]), length=length, backend="reference"), expected)
    # Other tiles, other orders of keys.
    narrow = gossamer.Schedule(rows=(16,), cols=(8,))
    assert torch.equal(kept(p, SEED, length=length, schedule=narrow), expected)
    attends = torch.from_numpy(MASKS["two groups"].to_dense(length, length))
    assert torch.equal(kept(p, SEED, MASKS["two groups"], length), expected & attends)


def test_triton_keeps_the_same_pairs():
    pytest.importorskip("triton")
    dropped = ProbMod.identity().dropped_out(0, 2.0, None).ir
    spec, given = problem(
        masks.full(), 40, 40, heads=(2, 2), v_size=40, target="cuda:sm_90", prob_map=dropped
    )
    given |= {"q": 0 * given["q"], "v": np.broadcast_to(np.eye(40, dtype=np.float32), (2, 2, 40, 40)).copy()}
    given |= {"x0": 0, "x1": 2.0}
    found = run_triton(compile_spec(spec), given, ["o"])["o"] != 0
    b, h, q, k = np.ogrid[:2, :2, :40, :40]
    bits = random_bits(random_bits(random_bits(SEED, 0, 0), b, h), q, k)
    np.testing.assert_array_equal(found, bits >> 2 >= 0)


def test_seeds_come_from_the_generator_and_advance_it():
    given = tensors()

    def call(**options):
        return gossamer.attention(*given, dropout_p=0.5, **options)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(first, call()) and not torch.equal(first, second)
    before = torch.get_rng_state()
    assert torch.equal(call(dropout_seed=4), call(dropout_seed=torch.tensor([4])))
    assert torch.equal(call(dropout_seed=4), call(dropout_seed=np.int64(4)))
    assert not torch.equal(call(dropout_seed=4), call(dropout_seed=4 + 2**32))
    gossamer.attention(*given, dropout_p=0.0)
    assert torch.equal(before, torch.get_rng_state())


def test_ends_of_the_probability():
    given = tensors()
    plain = gossamer.attention(*given)
    assert torch.equal(gossamer.attention(*given, dropout_p=0.0, dropout_seed=1), plain)
    assert torch.allclose(gossamer.attention(*given, dropout_p=1e-12, dropout_seed=1), plain)
    rare = gossamer.attention(*given, dropout_p=1 - 2**-40, dropout_seed=1)
    assert (rare == 0).all()
    check_attention(*given, dropout_p=0.99, dropout_seed=1)


def test_seeds_and_probabilities_compile_nothing():
    given = tensors(size=24)
    gossamer.attention(*given, dropout_p=0.1, sinks=torch.zeros(2))
    before = compilations()
    for p, seed in ((0.2, None), (0.9, 7), (0.5, -1)):
        gossamer.attention(*given, dropout_p=p, dropout_seed=seed, sinks=torch.randn(2))
    assert compilations() == before

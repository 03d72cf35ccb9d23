"""`gossamer.attention` on a GPU: every case against the correctness rule of `check_attention`.

pytest -m gpu -n 12 tests/test_gpu_*.py
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.frontend.checking import check_attention
from gossamer.ir.errors import InputError
from gossamer.runtime.driver import compilations

pytestmark = pytest.mark.gpu

NAN, INF = math.nan, math.inf

from gossamer.tests import attention_cases as CASES  # noqa: E402

LIBRARY = CASES.LIBRARY
tensors = functools.partial(CASES.tensors, device="cuda", dtype=torch.bfloat16, size=64)

KINDS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "tf32": torch.float32}


@pytest.fixture(params=KINDS)
def dtype(request):
    """A dtype; of float32 with products in tf32 too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield KINDS[request.param]
    torch.set_float32_matmul_precision(before)


@functools.cache
def on_gpu(name):
    return [mask.to("cuda") for mask in LIBRARY[name]]


# ---- every library mask ----


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "f32"])
def test_library_mask(name, narrow):
    options = {} if narrow else {"dtype": torch.float32, "size": 32}
    for mask in on_gpu(name):
        for q_len, kv_len in ((81, 81), (33, 97), (104, 31)):
            batch = 2 if "batch" in name else 1
            check_attention(*tensors(q_len, kv_len, batch=batch, **options), mask=mask)


@pytest.mark.parametrize("name", ["full", "longformer", "strided", "document", "neighborhood", "bigbird"])
def test_dtypes(dtype, name):
    out, lse = check_attention(*tensors(81, 120, size=32, dtype=dtype), mask=on_gpu(name)[0])
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_cuda and lse.is_cuda


LONG = {
    "full": masks.full(),
    "causal": masks.causal(),
    "window": masks.sliding_window(128),
    "window, ahead": masks.sliding_window(0, 300),
    "dilated": masks.dilated_window(64, 4),
    "dilated, all": masks.dilated_window(4000, 16),
    "strided": masks.strided(64, 64),
    "strided, causal": masks.strided(16, 48) & masks.causal(),
    "blocked": masks.blocked(256),
    "chunked": masks.chunked_causal(200),
    "fixed": masks.fixed(128, 4) & masks.causal(),
    "longformer": masks.longformer(128, 64),
    "bigbird": masks.bigbird(96, 64, 3),
    "random blocks": masks.random_blocks(3, 64, 5, per_head=True),
    "prefix": masks.prefix_lm(333),
    "sinks and window": (masks.sliding_window(100, 0) | masks.global_tokens(4, rows=False)) & masks.causal(),
    "neighborhood": masks.neighborhood((32, 32), 13, edges="clip"),
    "neighborhood, shifted": masks.neighborhood((32, 32), 7),
    "neighborhood, dilated": masks.neighborhood((32, 32), 5, dilation=3),
    "neighborhood, 3-d": masks.neighborhood((8, 8, 16), 5, edges="clip"),
    "axial": masks.axial((32, 32), 0) | masks.axial((32, 32), 1),
    "documents": masks.document(np.repeat(np.arange(9), [3, 1, 400, 70, 250, 64, 90, 300, 222])),
    "documents, causal": masks.document(np.sort(np.random.default_rng(3).integers(0, 8, 1400)))
    & masks.causal(),
    "documents, unsorted": masks.document(np.random.default_rng(4).integers(0, 3, 1400)),
    "bits": gossamer.Mask.trace(lambda b, h, q, k: (q & k) == 0),
    "not a window": ~masks.sliding_window(200),
}


@pytest.mark.parametrize("name", LONG)
def test_many_tiles(name):
    mask = LONG[name].to("cuda")
    for q_len, kv_len in ((1024, 1024), (1000, 1027), (257, 1333)):
        check_attention(*tensors(q_len, kv_len), mask=mask)


@pytest.mark.parametrize("name", ["causal", "strided", "neighborhood", "bigbird", "document"])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 90), (90, 1), (0, 9), (9, 0), (0, 0), (64, 64), (128, 65)])
def test_lengths(name, lengths):
    out, lse = check_attention(*tensors(*lengths), mask=on_gpu(name)[0])
    if 0 in lengths:
        assert (out == 0).all() and (lse == -INF).all()


@pytest.mark.parametrize("shape", [{"batch": 0}, {"batch": 3}, {"batch": 2, "heads": 5}])
def test_batches_and_heads(shape):
    out, _ = check_attention(*tensors(40, 50, **shape), mask=masks.causal())
    assert out.shape == (shape["batch"], shape.get("heads", 2), 40, 64)


def test_rows_without_pairs_are_zeros():
    q, k, v = tensors(200, 150)
    out, lse = check_attention(q, k, v, mask=lambda b, h, q, k: (k >= q + 20) & (q % 3 != 0))
    rows = torch.arange(200, device="cuda")
    empty = (rows >= 130) | (rows % 3 == 0)
    assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -INF).all()
    assert lse[:, :, ~empty].isfinite().all()


# ---- sizes and heads ----

SIZES = [(n, n) for n in (16, 32, 64, 80, 96, 128, 192, 256)] + [(64, 40), (24, 128), (192, 128), (1, 3)]


@pytest.mark.parametrize("size, v_size", SIZES)
def test_head_sizes(dtype, size, v_size):
    check_attention(
        *tensors(150, 141, size=size, v_size=v_size, dtype=dtype), mask=masks.sliding_window(70, 4)
    )


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 4), (8, 1), (6, 2), (5, 1), (7, 7)])
def test_grouped_heads(heads, kv_heads):
    q, k, v = tensors(100, 145, batch=2, heads=heads, kv_heads=kv_heads)
    by_head, shared = torch.randn(heads, device="cuda"), heads != kv_heads
    check_attention(q, k, v, mask=lambda b, h, q, k: k <= q + 3 * h, enable_gqa=shared)
    check_attention(q, k, v, score_mod=lambda s, b, h, q, k: s + by_head[h], enable_gqa=shared)


BY_BATCH_AND_HEAD = {
    "window of the head": lambda b, h, q, k: abs(q - k) <= 4 * h + b,
    "dilation of the head": lambda b, h, q, k: (q - k) % (h + 1) == 0,
    "one batch causal": lambda b, h, q, k: (k <= q) | (b != 1),
    "one head full": lambda b, h, q, k: (h == 2) | (abs(q - k) <= 3),
    "bits": lambda b, h, q, k: ((q ^ k) & (h + 1)) == 0,
    "products": lambda b, h, q, k: (q * k + h) % 7 <= 3 + b,
}


@pytest.mark.parametrize("name", BY_BATCH_AND_HEAD)
def test_masks_of_batch_and_head(name):
    check_attention(*tensors(161, 183, batch=2, heads=4), mask=BY_BATCH_AND_HEAD[name])


def test_masks_of_captured_tables():
    lengths = torch.tensor([11, 64], device="cuda")
    table = torch.rand(2, 4, 61, 83, device="cuda") < 0.3
    q, k, v = tensors(61, 83, batch=2, heads=4)
    check_attention(q, k, v, mask=lambda b, h, q, k: k < lengths[b])
    for shape in ((2, 4), (1, 4), (2, 1), (1, 1)):
        check_attention(q, k, v, mask=table[: shape[0], : shape[1]])
    check_attention(q, k, v, mask=table[0, 0])
    check_attention(q, k, v, mask=table[:, :1, :1])
    blocks = torch.rand(4, 6, device="cuda") < 0.5
    check_attention(q, k, v, mask=lambda b, h, q, k: blocks[q // 16, k // 16])


def test_rows_chosen_by_index():
    """Each query names the keys it sees, as top-k selection does."""
    q, k, v = tensors(90, 300, heads=2)
    chosen = torch.rand(2, 90, 300, device="cuda").topk(16, -1).indices
    seen = torch.zeros(2, 90, 300, dtype=torch.bool, device="cuda").scatter_(2, chosen, True)
    check_attention(q, k, v, mask=lambda b, h, q, k: seen[h, q, k])


@pytest.mark.parametrize("make", ["gossamer", "torch"])
def test_block_masks(make):
    if make == "torch":
        from torch.nn.attention.flex_attention import create_block_mask
    else:
        from gossamer.flex import create_block_mask
    q, k, v = tensors(300, 400, batch=2, heads=2)
    ids = torch.arange(400, device="cuda") // 70
    block_mask = create_block_mask(
        lambda b, h, q, k: (ids[q] == ids[k]) | (k < 5 + h), 2, 2, 300, 400, device="cuda"
    )
    check_attention(q, k, v, mask=block_mask)
    listed = type(block_mask).from_kv_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, BLOCK_SIZE=128)
    listed.seq_lengths = (300, 400)
    check_attention(q, k, v, mask=listed)


# ---- score_mods ----


@pytest.fixture(scope="module")
def score_mods():
    return CASES.score_mods("cuda")


@pytest.mark.parametrize("name", CASES.score_mods())
@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "f32"])
def test_score_mods(name, narrow, score_mods):
    options = {} if narrow else {"dtype": torch.float32, "size": 32}
    check_attention(*tensors(61, 83, **options), mask=masks.sliding_window(9), score_mod=score_mods[name])


def test_scale_is_an_argument():
    q, k, v = tensors()
    check_attention(q, k, v, mask=masks.causal(), scale=0.25)
    before = compilations()
    for scale in (0.0, -1.0, 3):
        check_attention(q, k, v, mask=masks.causal(), scale=scale)
    assert compilations() <= before + 1, "kernels differ by whether the scale is above 0"


def test_large_scores(dtype):
    q, k, v = tensors(150, 160, size=32, dtype=dtype)
    check_attention(q * 12, k * 12, v, mask=masks.sliding_window(90))


def test_lse_merges_halves():
    q, k, v = tensors(140, 300, dtype=torch.float32, size=32)
    whole, total = gossamer.attention(q, k, v, return_lse=True)
    halves = [
        gossamer.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(137), slice(137, None))
    ]
    merged = sum(out * torch.exp(lse - total)[..., None] for out, lse in halves)
    torch.testing.assert_close(merged, whole, atol=1e-5, rtol=1e-5)


# ---- views ----


def test_views_are_read_in_place():
    q, k, v = (torch.randn(2, 150, 4, 64, device="cuda").bfloat16().transpose(1, 2) for _ in range(3))
    out, _ = check_attention(q, k, v, mask=masks.causal())
    assert torch.equal(out, gossamer.attention(*(t.contiguous() for t in (q, k, v)), mask=masks.causal()))
    packed = torch.randn(2, 150, 3, 4, 64, device="cuda").bfloat16()
    check_attention(*(packed[:, :, i].transpose(1, 2) for i in range(3)), mask=masks.causal())


@pytest.mark.parametrize("moved", [(True, True, True), (False, True, False)])
def test_strided_last_dimension(moved):
    made = [
        torch.randn((1, 2, 64, 150) if m else (1, 2, 150, 64), device="cuda").bfloat16().transpose(2, 3)
        if m
        else torch.randn(1, 2, 150, 64, device="cuda").bfloat16()
        for m in moved
    ]
    check_attention(*made, mask=masks.causal())


@pytest.mark.parametrize("name", ["causal", "strided", "neighborhood"])
def test_odd_views(name):
    mask = LIBRARY[name][0]
    check_attention(*(t[:, :, ::2, 1::2] for t in tensors(162, 162)), mask=mask)
    one = tensors(81, 81, heads=1)[0]
    check_attention(*(one.expand(1, 2, 81, 64) for _ in range(3)), mask=mask)
    flat = torch.randn(81 * 64 + 1, device="cuda").bfloat16()
    shifted = flat[1:].view(1, 1, 81, 64).expand(1, 2, 81, 64)
    check_attention(shifted, shifted, shifted, mask=mask)


def test_views_of_captured_tensors():
    q, k, v = tensors(50, 60)
    ids = torch.arange(120, device="cuda")[::2] // 7
    bias = torch.randn(90, 70, device="cuda").T
    check_attention(q, k, v, mask=masks.document(ids))
    check_attention(q, k, v, score_mod=lambda s, b, h, q, k: s + bias[q, k])
    every = torch.tensor(0.5, device="cuda").expand(60)
    check_attention(q, k, v, score_mod=lambda s, b, h, q, k: s + every[k])


def test_more_than_two_billion_elements():
    """Offsets beyond int32: only the last head, at the far end of every tensor, is compared."""
    shape = (17, 16, 65536, 128)
    assert math.prod(shape) > 2**31
    q, k, v = (torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(3))
    out, lse = gossamer.attention(q, k, v, mask=masks.sliding_window(32), return_lse=True)
    last = [t[-1:, -1:].clone() for t in (q, k, v)]
    wanted, sums = gossamer.attention(*last, mask=masks.sliding_window(32), return_lse=True)
    assert torch.equal(out[-1:, -1:], wanted) and torch.equal(lse[-1:, -1:], sums)
    check_attention(*(t[:, :, -500:] for t in last), mask=masks.sliding_window(32))


# ---- memory that is not ours ----

MASKS = {
    "full": masks.full(),
    "window": masks.sliding_window(9),
    "strided": masks.strided(8, 5),
    "box": masks.neighborhood((9, 9), 3),
    "document": masks.document(CASES.IDS),
    "bits": gossamer.Mask.trace(lambda b, h, q, k: (q & k) == 0),
}


@pytest.mark.parametrize("name", MASKS)
def test_nothing_beyond_the_lengths_is_read(name):
    mask, given = MASKS[name].to("cuda"), tensors(61, 83)
    wide = [torch.full((1, 2, 200, 64), NAN, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for whole, part in zip(wide, given, strict=True):
        whole[:, :, : part.shape[2]] = part
    views = [whole[:, :, : part.shape[2]] for whole, part in zip(wide, given, strict=True)]
    out, lse = check_attention(*views, mask=mask)
    assert torch.equal(out, gossamer.attention(*given, mask=mask)) and not lse.isnan().any()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", ["causal", "window", "chunked", "fixed", "sinks and window"])
def test_what_lies_in_empty_tiles_reaches_nobody(name, bad):
    mask = LONG[name] & masks.causal()
    q, k, v = tensors(600, 600)
    clean = gossamer.attention(q, k, v, mask=mask)
    k[:, :, 500:], v[:, :, 500:] = bad, bad
    out = gossamer.attention(q, k, v, mask=mask)
    assert torch.equal(out[:, :, :300], clean[:, :, :300])
    assert not out[:, :, -100:].isfinite().all()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_query_stays_in_its_row(name, bad):
    mask = MASKS[name].to("cuda")
    q, k, v = tensors()
    k[..., 3] = k[..., 3].abs()  # a row of nothing but -inf would count as empty
    clean = gossamer.attention(q, k, v, mask=mask)
    q[0, 1, 8, 3] = bad
    out, lse = check_attention(q, k, v, mask=mask)
    hit = torch.zeros(1, 2, 61, dtype=torch.bool, device="cuda")
    hit[0, 1, 8] = True
    assert torch.equal(out[~hit], clean[~hit]) and out[hit].isnan().all() and lse[~hit].isfinite().all()


@pytest.mark.parametrize("name", LIBRARY)
def test_every_element_is_written(name):
    """The allocator hands out memory full of NaN: results and intermediates overwrite all they return."""
    given = tensors(81, 70, batch=2)
    mask = on_gpu(name)[0]
    wanted = gossamer.attention(*given, mask=mask, return_lse=True)
    for _ in range(2):
        poison = [torch.full((n,), NAN, device="cuda") for n in (200, 2_000, 20_000, 200_000, 400_000) * 8]
        del poison
        found = gossamer.attention(*given, mask=mask, return_lse=True)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


# ---- one kernel for many calls ----


@pytest.mark.parametrize("name", ["causal", "window", "dilated", "strided", "longformer", "bits"])
def test_other_lengths_compile_nothing(name):
    counts = []
    for length in (1000, 1024, 4095, 16384):
        q, k, v = tensors(length, length, heads=1)
        gossamer.attention(q, k, v, mask=LONG[name])
        counts.append(compilations())
    assert len(set(counts)) == 1


def test_other_documents_compile_nothing():
    counts = []
    for length in (1000, 1024, 4095, 16384):
        q, k, v = tensors(length, length, heads=1)
        ids = torch.sort(torch.randint(0, 9, (length,), device="cuda")).values
        gossamer.attention(q, k, v, mask=masks.document(ids) & masks.causal())
        counts.append(compilations())
    assert len(set(counts)) == 1


def test_captured_tensors_are_read_at_each_call():
    q, k, v = tensors()
    ids, bias = torch.arange(83, device="cuda") // 10, torch.randn(83, device="cuda")

    def call():
        score_mod = lambda s, b, h, q, k: s + bias[k]  # noqa: E731
        return check_attention(q, k, v, mask=masks.document(ids), score_mod=score_mod)[0]

    first, before = call(), compilations()
    bias.mul_(-3)
    second = call()
    ids.copy_(torch.arange(83) // 21)
    third = call()
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert compilations() == before
    ids.copy_(torch.arange(83) % 4)
    call()


def test_results_do_not_depend_on_the_call():
    q, k, v = tensors(600, 600)
    for mask in (masks.longformer(20, 4), masks.strided(16, 9), masks.bigbird(20, 4, 2)):
        first = gossamer.attention(q, k, v, mask=mask)
        assert all(torch.equal(first, gossamer.attention(q, k, v, mask=mask)) for _ in range(5))


# ---- streams, graphs, threads ----


@pytest.mark.parametrize("name", ["window", "strided", "neighborhood", "bigbird", "documents", "bits"])
def test_cuda_graphs(name):
    mask, (q, k, v) = LONG[name].to("cuda"), tensors(1024, 1024)
    gossamer.attention(q, k, v, mask=mask, return_lse=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = gossamer.attention(q, k, v, mask=mask, return_lse=True)
    for _ in range(2):
        for tensor in (q, k, v):
            tensor.normal_()
        for tensor in mask.tensors:
            tensor.copy_(tensor.roll(37, -1))
        graph.replay()
        wanted = gossamer.attention(q, k, v, mask=mask, return_lse=True)
        assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])


def test_the_current_stream_is_used():
    q, k, v = tensors(1000, 1000)
    wanted = gossamer.attention(q * 2, k, v, mask=masks.causal())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        found = gossamer.attention(q * 2, k, v, mask=masks.causal())
    assert not stream.query()
    stream.synchronize()
    assert torch.equal(found, wanted)


def test_threads_call_at_once():
    made = [tensors(170 + i, 190) for i in range(8)]
    kinds = [masks.sliding_window(9), masks.strided(16, 3), masks.blocked(16), masks.causal()]
    expected = [gossamer.attention(*made[i], mask=kinds[i % 4]) for i in range(8)]

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [gossamer.attention(*made[i], mask=kinds[i % 4]) for _ in range(5)]
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(work, range(8)), expected, strict=True):
            assert all(torch.equal(out, wanted) for out in found)


# ---- other ways in ----


@pytest.mark.parametrize("name", ["window", "strided", "documents, unsorted"])
def test_kernels_are_saved_and_loaded(name, tmp_path):
    mask, (q, k, v) = LONG[name].to("cuda"), tensors(300, 300)
    wanted, sums = check_attention(q, k, v, mask=mask)
    major, minor = torch.cuda.get_device_capability()
    spec = gossamer.AttentionSpec(mask, dtype="bf16", qk_size=64, return_lse=True)
    path = gossamer.compile(spec, target=f"cuda:sm_{major}{minor}").save(tmp_path / "kernel.gossamer")
    before = compilations()
    out, lse = gossamer.load(path)(q, k, v, mask=mask)
    assert torch.equal(out, wanted) and torch.equal(lse, sums) and compilations() == before


@pytest.mark.parametrize("name", ["alibi", "bias of the pair"])
def test_flex_attention(name, score_mods):
    from torch.nn.attention import flex_attention as pytorch

    from gossamer import flex

    q, k, v = tensors(61, 83, dtype=torch.float32)
    results = []
    for module in (pytorch, flex):
        block_mask = module.create_block_mask(
            lambda b, h, q, k: abs(q - k) <= 20, None, None, 61, 83, device="cuda"
        )
        results.append(
            module.flex_attention(q, k, v, score_mods[name], block_mask=block_mask, return_lse=True)
        )
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_bench_prints_the_table():
    from typer.testing import CliRunner

    from gossamer.frontend.cli.main import app

    options = ["--q-len", "512", "--heads", "2", "--no-flex", "--device", "cuda"]
    text = CliRunner().invoke(app, ["bench", "causal", *options], catch_exceptions=False).output
    for part in ("gossamer", "torch SDPA", "torch SDPA, dense mask", "floor", torch.cuda.get_device_name()):
        assert part in text
    assert float(text.split("largest difference to PyTorch ")[1]) < 0.05


# ---- bad input ----


def test_tensors_have_to_be_on_one_device():
    q, k, v = tensors()
    with pytest.raises(InputError, match=r"attention\.key: expected a tensor on cuda:0.*got cpu"):
        gossamer.attention(q, k.cpu(), v)
    with pytest.raises(InputError, match=r"captured tensor: expected a tensor on cuda:0"):
        gossamer.attention(q, k, v, mask=masks.document(torch.zeros(90, dtype=torch.int32)))


def test_validate_reads_captured_tensors():
    q, k, v = tensors()
    table, index = torch.ones(5, device="cuda") > 0, torch.full((83,), 7, device="cuda")
    with pytest.raises(InputError, match=r"c0\[c1\[k\]\]: expected an index from 0 to 4; got 7"):
        gossamer.attention(q, k, v, mask=lambda b, h, q, k: table[index[k]], validate=True)

"""`gossamer.jax.attention` against float64, under jit, vmap and shard_map."""

import itertools
import math
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402

import gossamer  # noqa: E402
import gossamer.jax  # noqa: E402
from gossamer import masks  # noqa: E402
from gossamer.frontend.checking import judged, see_results  # noqa: E402
from gossamer.frontend.jax.call import Call  # noqa: E402
from gossamer.ir.errors import InputError, TraceError, UnsupportedError  # noqa: E402
from gossamer.runtime.driver import compilations  # noqa: E402

attention = gossamer.jax.attention
from gossamer.tests import attention_cases as CASES  # noqa: E402

tensors, LIBRARY, SCORES = CASES.tensors, CASES.LIBRARY, CASES.score_mods()
SHORT = jnp.arange(9)


def to_jax(tensor):
    """A torch tensor (B, heads, length, size) as JAX has it: (B, length, heads, size)."""
    if tensor.dtype == torch.bfloat16:
        return jnp.asarray(tensor.transpose(1, 2).float().numpy()).astype(jnp.bfloat16)
    return jnp.asarray(tensor.transpose(1, 2).numpy())


def to_torch(array, dtype=None):
    array = array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array
    tensor = torch.from_numpy(np.array(array)).transpose(1, 2)
    return tensor if dtype is None else tensor.to(dtype)


def check(q, k, v, *, jit=True, **options):
    """Run on torch tensors by way of JAX and judge the results; returns them as JAX has them."""
    run = partial(attention, return_lse=True, **options)
    run = jax.jit(run) if jit else run
    given = {name: torch.tensor(np.asarray(x)) if name == "sinks" else x for name, x in options.items()}
    wide = jnp.float64 if q.dtype == torch.float64 else jnp.float32

    def draw(judge, n):
        tensors = [t.flatten()[torch.randperm(t.numel())].view(t.shape) if n else t for t in (q, k, v)]
        out, lse = run(*map(to_jax, tensors))
        assert out.dtype == to_jax(q).dtype and lse.dtype == wide
        see_results(judge, (to_torch(out, q.dtype), to_torch(lse)), *tensors, enable_gqa=True, **given)
        return out, lse

    return judged(draw)


@pytest.mark.parametrize("name", LIBRARY)
def test_library_mask(name):
    for mask in LIBRARY[name]:
        check(*tensors(81, 81, batch=2), mask=mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_dtypes_lengths_and_groups(dtype, jit):
    q, k, v = tensors(61, 83, batch=2, heads=6, kv_heads=2, size=24, v_size=40, dtype=dtype)
    check(q, k, v, jit=jit, mask=masks.sliding_window(9, 3))


def test_float64():
    with jax.enable_x64(True):
        check(*tensors(33, 45, dtype=torch.float64), mask=masks.causal())


def test_empty_rows():
    out, lse = check(*tensors(40, 9), mask=masks.sliding_window(2))
    assert (out[:, 12:] == 0).all() and (lse[:, 12:] == -math.inf).all()


@pytest.mark.parametrize("name", ["alibi", "bias of the pair", "soft cap", "where"])
def test_score_mods(name):
    check(*tensors(), mask=masks.causal(), score_mod=SCORES[name])


def test_softmax_arguments():
    q, k, v = tensors(heads=4)
    check(q, k, v, sinks=jnp.arange(4.0), scale=0.3)
    check(q, k, v, prob_mod=lambda prob, b, h, q_idx, kv_idx: prob * (q_idx - kv_idx))


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def same(ours, wanted):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(wanted), atol=2e-5, rtol=2e-5)


Q, K, V = random(3, 21, 4, 16), random(3, 34, 2, 16, seed=1), random(3, 34, 2, 8, seed=2)


def plain(q, k, v, mask):
    """The formula, for values of any size."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    weights = jnp.nan_to_num(jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)))
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def window(q_len, kv_len, width, offset=0):
    q, k = jnp.arange(q_len)[:, None] + offset, jnp.arange(kv_len)
    return abs(q - k) <= width


def test_layouts():
    mask = masks.causal()
    out, lse = attention(Q, K, V, mask=mask, return_lse=True)
    heads = [x.swapaxes(1, 2) for x in (Q, K, V)]
    other, other_lse = attention(*heads, mask=mask, return_lse=True, layout="BNTH")
    same(other.swapaxes(1, 2), out)
    same(other_lse.swapaxes(1, 2), lse)
    single, single_lse = attention(Q[1], K[1], V[1], mask=mask, return_lse=True)
    same(single, out[1])
    same(single_lse, lse[1])
    assert lse.shape == (3, 21, 4) and single.shape == (21, 4, 8)


def test_one_sequence_of_keys_serves_all_queries():
    same(attention(Q, K[:1], V[:1]), attention(Q, jnp.repeat(K[:1], 3, 0), jnp.repeat(V[:1], 3, 0)))


def test_no_queries_and_no_keys():
    assert attention(Q[:, :0], K, V).shape == (3, 0, 4, 8)
    assert attention(Q[:0], K[:0], V[:0]).shape == (0, 21, 4, 8)
    out, lse = jax.jit(partial(attention, return_lse=True))(Q, K[:, :0], V[:, :0])
    assert (out == 0).all() and (lse == -jnp.inf).all()


def test_another_length_compiles_no_kernel():
    run = jax.jit(partial(attention, mask=masks.sliding_window(5, 0)))
    run(Q, K, V)
    known = compilations()
    for length in (1, 7, 20):
        same(run(Q[:, :length], K, V), run(Q, K, V)[:, :length])
    same(jax.jit(partial(attention, mask=masks.sliding_window(3, 2)))(Q, K, V), plain(Q, K, V, mask_of(3, 2)))
    assert compilations() == known


def mask_of(left, right):
    q, k = jnp.arange(21)[:, None], jnp.arange(34)
    return (q - left <= k) & (k <= q + right)


def test_traced_numbers_and_arrays_are_captured():
    @jax.jit
    def run(width, allowed):
        return attention(Q, K, V, mask=lambda b, h, q, k: (abs(q - k) <= width) & allowed[b, k])

    allowed = random(3, 34) > 0
    run(jnp.int32(3), allowed)
    known = compilations()
    for width in (0, 4, 9):
        same(run(jnp.int32(width), allowed), plain(Q, K, V, window(21, 34, width) & allowed[:, None, None]))
    assert compilations() == known


def test_a_boolean_array_is_a_mask():
    mask = random(3, 1, 21, 34) > 0
    same(jax.jit(lambda m: attention(Q, K, V, mask=m))(mask), plain(Q, K, V, mask))


def test_layers_of_a_scan_share_a_kernel():
    """A window by layer, as an array: one kernel, one program."""
    widths = jnp.array([1, 4, 40])

    def layer(x, width):
        return attention(x, x, x, mask=lambda b, h, q, k: abs(q - k) <= width), None

    out, _ = jax.lax.scan(layer, Q, widths)
    wanted = Q
    for width in widths:
        wanted = plain(wanted, wanted, wanted, window(21, 21, width))
    same(out, wanted)


def test_lengths_and_offsets():
    lens, offsets = jnp.array([34, 0, 11]), jnp.array([13, 0, 5])
    keys = jnp.arange(34) < lens[:, None, None, None]
    causal = jnp.arange(21)[:, None] + offsets[:, None, None, None] >= jnp.arange(34)
    run = partial(attention, Q, K, V, mask=masks.causal())
    for wrap in (lambda f: f, jax.jit):
        same(wrap(lambda n, o: run(kv_lens=n, q_offset=o))(lens, offsets), plain(Q, K, V, keys & causal))
    same(run(q_offset=7), plain(Q, K, V, jnp.arange(21)[:, None] + 7 >= jnp.arange(34)))


BOUNDS = [0, 9, 9, 30], [0, 17, 20, 41]


def packed(q, k, v):
    """Causal attention of the sequences between BOUNDS, one by one."""
    parts = [(slice(*BOUNDS[0][n : n + 2]), slice(*BOUNDS[1][n : n + 2])) for n in range(3)]
    tril = [
        jnp.tril(jnp.ones((rows.stop - rows.start, cols.stop - cols.start), bool)) for rows, cols in parts
    ]
    pairs = zip(parts, tril, strict=True)
    return jnp.concatenate([plain(q[:, r], k[:, c], v[:, c], t) for (r, c), t in pairs if t.size], 1)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_packed_sequences(wrap):
    arrays = random(1, 30, 4, 16), random(1, 41, 2, 16, seed=1), random(1, 41, 2, 16, seed=2)
    bounds = [jnp.array(b) for b in BOUNDS]

    def run(q, k, v, rows, keys):
        return attention(q, k, v, mask=masks.causal(), cu_seqlens_q=rows, cu_seqlens_kv=keys)

    same(wrap(run)(*arrays, *bounds), packed(*arrays))
    ours = wrap(jax.grad(lambda *a: (run(*a) ** 2).sum(), (0, 1, 2)))(*arrays, *bounds)
    wanted = jax.grad(lambda *a: (packed(*a) ** 2).sum(), (0, 1, 2))(*arrays)
    for one, other in zip(ours, wanted, strict=True):
        same(one, other)


def test_packed_sequences_side_by_side():
    """vmap: calls with bounds of their own run one after the other."""
    q, k, v = random(2, 1, 30, 4, 16), random(1, 41, 2, 16, seed=1), random(1, 41, 2, 16, seed=2)
    rows, keys = (jnp.array(b) for b in BOUNDS)
    run = partial(attention, mask=masks.causal(), cu_seqlens_q=rows, cu_seqlens_kv=keys)
    same(jax.vmap(lambda q: run(q, k, v))(q), jnp.stack([packed(x, k, v) for x in q]))


def test_pages():
    q, pages = random(2, 3, 4, 16), [random(7, 8, 2, 16, seed=seed) for seed in (1, 2)]
    table, lens = jnp.array([[3, 0, 6], [2, 5, 99]]), jnp.array([20, 11])
    run = jax.jit(lambda q, k, v, t, n: attention(q, k, v, block_table=t, kv_lens=n))
    keys = [x[jnp.minimum(table, 6)].reshape(2, 24, 2, 16) for x in pages]
    wanted = plain(q, *keys, jnp.arange(24) < lens[:, None, None, None])
    same(run(q, *pages, table, lens), wanted)
    turned = [x.transpose(0, 2, 1, 3) for x in (q, *pages)]
    same(attention(*turned, block_table=table, kv_lens=lens, layout="BNTH").transpose(0, 2, 1, 3), wanted)
    with pytest.raises(UnsupportedError, match="pages of keys have no gradient"):
        jax.grad(lambda q: run(q, *pages, table, lens).sum())(q)


def test_decode_of_one_query():
    q, k, v = random(2, 1, 8, 16), random(2, 1500, 2, 16, seed=1), random(2, 1500, 2, 16, seed=2)
    lens = jnp.array([1500, 700])
    out = jax.jit(lambda n: attention(q, k, v, kv_lens=n, q_offset=n - 1, mask=masks.causal()))(lens)
    same(out, plain(q, k, v, jnp.arange(1500) < lens[:, None, None, None]))


# ---- sorted and unsorted ids ----


def test_ids_may_be_sorted_in_one_call_and_not_in_the_next():
    run = jax.jit(lambda ids: attention(Q, K, V, mask=masks.document(ids)))
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, 4, 34)
        for given in (ids, np.sort(ids)):
            given = jnp.asarray(given)
            same(run(given), plain(Q, K, V, given[:21, None] == given))


# ---- vmap ----


def loop(function, *arrays):
    return jnp.stack([function(*(x[i] for x in arrays)) for i in range(len(arrays[0]))])


def test_vmap_becomes_the_batch():
    many = random(5, 3, 21, 4, 16)
    run = partial(attention, mask=masks.causal())
    same(jax.vmap(lambda q: run(q, K, V))(many), loop(lambda q: run(q, K, V), many))
    text = str(jax.make_jaxpr(jax.vmap(lambda q: run(q, K, V)))(many))
    assert text.count("gossamer_attention") == 1 and "15,21,4,16" in text


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_vmap_over_any_axis(axis):
    keys, values = (random(*x.shape[:axis], 4, *x.shape[axis:], seed=3) for x in (K, V))
    found = jax.vmap(partial(attention, Q), in_axes=(axis, axis))(keys, values)
    same(found, loop(partial(attention, Q), jnp.moveaxis(keys, axis, 0), jnp.moveaxis(values, axis, 0)))


def test_vmap_of_shared_keys_copies_none():
    many = random(5, 3, 21, 4, 16)
    run = lambda q: attention(q, K[:1], V[:1])  # noqa: E731
    same(jax.vmap(run)(many), loop(run, many))
    assert "15,34" not in str(jax.make_jaxpr(jax.vmap(run))(many))


def test_vmap_numbers_sequences_of_each_call():
    """b in a mask is the sequence of the call, and captured arrays may differ by call or not."""
    many, starts, own = random(5, 3, 21, 4, 16), jnp.arange(3), jnp.arange(15).reshape(5, 3) % 7
    table = random(5, 40, seed=4)

    def run(q, own, row):
        def biased(score, b, h, q_idx, kv_idx):
            return score + row[kv_idx] * h

        mask = lambda b, h, q, k: (k >= starts[b]) & (k - q <= own[b]) & (k >= b)  # noqa: E731
        return attention(q, K, V, mask=mask, score_mod=biased)

    same(jax.vmap(run)(many, own, table), loop(run, many, own, table))
    twice = jax.vmap(jax.vmap(run, in_axes=(None, 0, None)), in_axes=(0, None, 0))
    same(
        twice(many, own, table),
        jnp.stack([jax.vmap(run, (None, 0, None))(many[i], own, table[i]) for i in range(5)]),
    )


def test_vmap_of_sinks_lengths_and_offsets():
    many, sinks = random(4, 3, 21, 4, 16), random(4, 4, seed=5)
    lens, offset = jnp.array([[34, 5, 2]] * 4), jnp.arange(4)

    def run(q, sinks, lens, offset):
        return attention(
            q, K, V, sinks=sinks, kv_lens=lens, q_offset=jnp.full(3, offset), mask=masks.causal()
        )

    same(jax.vmap(run)(many, sinks, lens, offset), loop(run, many, sinks, lens, offset))


# ---- several devices ----


@pytest.mark.skipif(len(jax.devices("cpu")) < 4, reason="XLA was started with fewer devices")
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), devices=jax.devices("cpu")[:4])
    spec = jax.sharding.PartitionSpec("batch", None, "heads")
    q, k, v = random(4, 21, 4, 16), random(4, 34, 2, 16, seed=1), random(4, 34, 2, 16, seed=2)
    width = jnp.int32(6)

    def local(q, k, v):
        return attention(q, k, v, mask=lambda b, h, q, k: abs(q - k) <= width)

    spread = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma)
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in (q, k, v)]
    same(jax.jit(spread)(*placed), plain(q, k, v, window(21, 34, 6)))


@pytest.mark.skipif(len(jax.devices("cpu")) < 4, reason="XLA was started with fewer devices")
def test_sharded_arrays_outside_shard_map():
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("batch",), kinds, devices=jax.devices("cpu")[:4])
    q, k = random(4, 21, 4, 16), random(4, 34, 2, 16, seed=1)
    placed = [
        jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch")))
        for x in (q, k, k)
    ]
    same(jax.jit(attention)(*placed), plain(q, k, k, True))


# ---- SPLAT's route ----


def test_a_dense_mask_of_a_model_becomes_a_closed_form():
    """The 0/1 matrix that a JAX model computes, recovered: the kernel reads no matrix."""
    q, k = jnp.arange(64)[:, None], jnp.arange(64)
    matrix = ((q - k) % 4 == 0) & (abs(q - k) <= 16)
    mask = gossamer.Mask.from_dense(matrix)
    assert not mask.captures
    x = random(1, 64, 2, 16)
    same(jax.jit(partial(attention, mask=mask))(x, x, x), plain(x, x, x, matrix))


# ---- programs that leave the process ----


def test_the_text_of_a_call_is_all_of_it():
    score = lambda score, b, h, q, k: score * 2.0 + 1 / 3 - math.inf * 0  # noqa: E731
    text = str(jax.make_jaxpr(partial(attention, score_mod=score, scale=2, q_offset=3))(Q, K, V))
    found = re.search(r"call=(\{.*\})", text)
    assert found is not None
    call = Call.parse(found[1])
    assert Call.parse(call.text) == call and call.q_offset == 3 and call.scale == 2.0


PROCESS = """
import jax, jax.numpy as jnp, gossamer.jax
from jax import monitoring
hits = []
monitoring.register_event_listener(lambda event, **_: hits.append(event))
x = jnp.arange(2 * 9 * 2 * 8.0).reshape(2, 9, 2, 8) / 100
run = jax.jit(lambda x: gossamer.jax.attention(x, x, x, mask=gossamer.masks.causal()))
print(float(run(x).sum()), sum(event.endswith("/cache_hits") for event in hits))
"""


@pytest.mark.slow
def test_a_program_from_jax_s_cache_finds_its_kernels(tmp_path):
    """XLA's own compiled programs carry the call: another process runs them without tracing a mask."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    found = [
        subprocess.run(
            [sys.executable, "-c", PROCESS],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert found[0][0] == found[1][0] and int(found[1][1]) > int(found[0][1])


# ---- refused ----

BAD = {
    "layout": (dict(layout="BHSD"), InputError, "BTNH or BNTH; got 'BHSD'"),
    "dtype": (dict(query=Q.astype(jnp.int32)), InputError, "attention.query: expected float16"),
    "dtypes": (dict(key=K.astype(jnp.float16)), InputError, "the query's dtype float32; got float16"),
    "rank": (dict(key=K[0]), InputError, "attention.key: expected 4 dimensions"),
    "heads": (dict(key=K[:, :, [0, 1, 0]], value=V[:, :, [0, 1, 0]]), InputError, "divides the query's 4"),
    "value": (dict(value=V[:, :9]), InputError, "attention.value"),
    "size": (dict(key=V), InputError, "head size 16; got 8"),
    "batch": (dict(key=K[:2], value=V[:2]), InputError, "batch 3 (the query's) or 1; got 2"),
    "mask": (dict(mask=jnp.ones((4, 34), bool)), InputError, "attention.mask: expected an array broad"),
    "numbers as mask": (dict(mask=jnp.ones((21, 34))), InputError, "a boolean tensor"),
    "branch": (dict(mask=lambda b, h, q, k: q > k and k > 3), TraceError, "test_jax_attention.py"),
    "sinks": (dict(sinks=jnp.ones(3)), InputError, "shape (4,)"),
    "integer sinks": (dict(sinks=jnp.ones(4, int)), InputError, "attention.sinks"),
    "offset": (dict(q_offset=-1), InputError, "attention.q_offset"),
    "offsets": (dict(q_offset=jnp.array([1, 2, -3])), InputError, "attention.q_offset[2]"),
    "float offset": (dict(q_offset=0.5), InputError, "attention.q_offset"),
    "lengths": (dict(kv_lens=jnp.array([1, 2])), InputError, "shape (3,)"),
    "one bound": (dict(cu_seqlens_q=jnp.array([0, 21])), InputError, "bounds of the keys, or a block_table"),
    "a batch": (dict(cu_seqlens_q=jnp.arange(3), cu_seqlens_kv=jnp.arange(3)), InputError, "(1, Hq, total_q"),
    "pages alone": (dict(block_table=jnp.zeros((3, 2), int)), InputError, "beside block_table"),
    "float lengths": (dict(kv_lens=jnp.ones(3)), InputError, "int32 or int64"),
    "a length": (dict(kv_lens=jnp.array([1, 35, 2])), InputError, "[1]: expected a length from 0 to 34"),
    "scale": (dict(scale="big"), InputError, "attention.scale"),
    "short table": (
        dict(mask=lambda b, h, q, k: SHORT[k] > 0), InputError, "shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, kind, words = BAD[name]
    given = dict(query=Q, key=K, value=V) | changed
    with pytest.raises(kind) as raised:
        attention(**given)
    assert words in str(raised.value)


def test_what_only_contents_tell_is_raised_by_the_program():
    pages, table = jnp.array([1, 5, 99]), jnp.arange(50.0)

    def biased(score, b, h, q_idx, kv_idx):
        return score + table[pages[b]]

    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"t0\[t1\[b\]\]: expected an index from 0 to 49; got 99"
    ):
        attention(Q, K, V, score_mod=biased).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"kv_lens\[0\]"):
        jax.jit(lambda n: attention(Q, K, V, kv_lens=n))(jnp.array([77, 1, 1])).block_until_ready()


def test_other_platforms_are_refused_in_words():
    with pytest.raises(UnsupportedError, match="on rocm is not built"):
        jax.jit(attention).trace(Q, K, V).lower(lowering_platforms=("rocm",))


def test_wide_captured_integers_are_refused():
    ids = np.array([0, 2**40] * 20)
    with pytest.raises(InputError, match="jax_enable_x64"):
        attention(Q, K, V, mask=masks.document(ids))


def test_a_traced_scale_is_refused_in_words():
    with pytest.raises(InputError, match=r"Multiply the query by it"):
        jax.jit(lambda s: attention(Q, K, V, scale=s))(0.5)


def test_random_masks_agree_with_the_formula():
    generator = np.random.default_rng(7)
    for q_len, kv_len in itertools.product((1, 18), (1, 33)):
        q, k, v = random(2, q_len, 2, 16), random(2, kv_len, 2, 16, seed=1), random(2, kv_len, 2, 16, seed=2)
        table = jnp.asarray(generator.random((2, 2, q_len, kv_len)) < 0.3)
        same(jax.jit(lambda q, k, v, t: attention(q, k, v, mask=t))(q, k, v, table), plain(q, k, v, table))


def test_torch_is_not_needed():
    program = """
import sys
sys.modules["torch"] = None
import jax, jax.numpy as jnp, gossamer.jax
x = jnp.ones((1, 9, 2, 8))
run = lambda x: gossamer.jax.attention(x, x, x, mask=gossamer.masks.causal()).sum()
ours = gossamer.jax.jit(lambda x: jax.nn.dot_product_attention(x, x, x))
print(float(jax.grad(run)(x).sum()) >= 0, len((ours(x), ours.report().compiled)[1]))
learned = lambda w: gossamer.jax.linear_attention(x, x, x, gossamer.feature_maps.hedgehog(w)).sum()
print(bool(jnp.isfinite(jax.grad(learned)(jnp.ones((8, 4)))).all()))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "1", "True"]

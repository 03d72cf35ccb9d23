"""Gradients of `gossamer.jax.attention` against float64, and under JAX's transformations."""

import math
from functools import partial

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402

import gossamer.jax  # noqa: E402
from gossamer import masks  # noqa: E402
from gossamer.frontend.checking import judged  # noqa: E402
from gossamer.ir.errors import UnsupportedError  # noqa: E402

attention = gossamer.jax.attention
ALL = (0, 1, 2)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def dense(q, k, v, mask, score=lambda s: s, sinks=None):
    """(out, lse) by the formula, in the dtype of the arrays; mask: an array."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(mask, score(scores), -jnp.inf)
    lse = jax.nn.logsumexp(scores, -1)
    if sinks is not None:
        last = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, last], -1))[..., :-1]
    else:
        weights = jax.nn.softmax(scores)
    weights = jnp.where(mask, weights, 0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v), lse.swapaxes(1, 2)


def total(function, weight, lse_weight):
    """A number that depends on all results."""

    def run(*arrays):
        out, lse = function(*arrays)
        found = (out * weight).sum()
        return (
            found if lse_weight is None else found + jnp.where(jnp.isfinite(lse), lse * lse_weight, 0).sum()
        )

    return run


def check(ours, plain, arrays, dtype=np.float32, lse=False):
    """Judge every gradient by the error rule; draws after the first take the numbers in another order."""
    out = jax.eval_shape(ours, *(jnp.asarray(x, dtype) for x in arrays))
    weights = [random(*out[0].shape, seed=9), random(*out[1].shape, seed=10) if lse else None]
    weights = [w if w is None else jnp.asarray(w, dtype) for w in weights]
    places = tuple(range(len(arrays)))

    def wide(x):
        return x if x is None else jnp.asarray(np.asarray(x, float))

    def draw(judge, n):
        order = np.random.default_rng(n)
        drawn = [order.permuted(x.reshape(-1)).reshape(x.shape) if n else x for x in arrays]
        drawn = [jnp.asarray(x, dtype) for x in drawn]
        found, peers = (jax.grad(total(f, *weights), places)(*drawn) for f in (ours, plain))
        with jax.enable_x64(True):
            exact = jax.grad(total(plain, *map(wide, weights)), places)(*map(wide, drawn))
        for name, x, peer, wanted in zip("qkvabcde", found, peers, exact, strict=False):
            assert x.dtype == dtype
            judge.see(f"d{name}", as_torch(x), np.asarray(wanted), as_torch(peer))

    judged(draw)


def as_torch(x):
    """On the CPU, in the same dtype."""
    return torch.utils.dlpack.from_dlpack(jax.device_put(x, jax.devices("cpu")[0]))


T, S = 37, 51
ARRAYS = random(2, T, 4, 16), random(2, S, 2, 16, seed=1), random(2, S, 2, 24, seed=2)

MASKS = {
    "window": masks.sliding_window(9, 4),
    "strided": masks.strided(8, 5),
    "longformer": masks.longformer(6, 3),
    "empty rows": masks.sliding_window(3) & ~masks.blocked(10),
}


CASES = [*((name, np.float32) for name in MASKS), ("window", jnp.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=[f"{n}-{np.dtype(d).name}" for n, d in CASES])
def test_masks(name, dtype):
    array = MASKS[name].to_dense(T, S)
    ours = partial(attention, mask=MASKS[name], return_lse=True)
    plain = lambda q, k, v: dense(q, k, v, array) if array.any(-1).all() else _empty(q, k, v, array)  # noqa: E731
    check(ours, plain, ARRAYS, dtype)


def _empty(q, k, v, array):
    """Rows without pairs replaced before the softmax, so that no NaN reaches a gradient."""
    rows = jnp.asarray(array.any(-1))
    out, lse = dense(q, k, v, array | ~array.any(-1)[:, None])
    return jnp.where(rows[:, None, None], out, 0), jnp.where(rows[:, None], lse, -jnp.inf)


def test_float64():
    with jax.enable_x64(True):
        arrays = list(map(jnp.asarray, ARRAYS))
        found = jax.grad(lambda *a: attention(*a, mask=masks.causal()).sum(), ALL)(*arrays)
        wanted = jax.grad(lambda *a: dense(*a, np.tril(np.ones((T, S), bool)))[0].sum(), ALL)(*arrays)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_lse_sinks_and_captured_arrays():
    bias, sinks = random(4, S, seed=3), random(4, seed=4)

    def soft(x):  # what is written with operators is captured
        return x / (1 + x * x)

    def ours(q, k, v, bias, sinks):
        def biased(score, b, h, q_idx, kv_idx):
            return 5 * soft(score / 5) + bias[h, kv_idx]

        return attention(q, k, v, mask=masks.causal(), score_mod=biased, sinks=sinks, return_lse=True)

    def plain(q, k, v, bias, sinks):
        def biased(scores):
            return 5 * soft(scores / 5) + bias[:, None]

        return dense(q, k, v, np.tril(np.ones((T, S), bool)), biased, sinks)

    check(ours, plain, (*ARRAYS, bias, sinks), lse=True)


def test_captured_numbers_and_what_has_no_gradient():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in ARRAYS)
    ids = jnp.arange(S) // 9

    def run(q, slope):
        return attention(
            q,
            k,
            v,
            mask=lambda b, h, q, k: ids[q] == ids[k],
            score_mod=lambda s, b, h, q, k: s + slope * (k - q),
        )[..., :3].sum()

    def plain(q, slope):
        shift = slope * (jnp.arange(S) - jnp.arange(T)[:, None])
        return dense(q, k, v, ids[:T, None] == ids, lambda s: s + shift)[0][..., :3].sum()

    for a, b in zip(jax.grad(run, (0, 1))(q, 0.1), jax.grad(plain, (0, 1))(q, 0.1), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def same(ours, wanted):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["BTNH", "BNTH"])
def test_transformations(layout):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in ARRAYS)
    turn = (lambda x: x) if layout == "BTNH" else (lambda x: x.swapaxes(1, 2))
    bias = jnp.asarray(random(4, seed=5), jnp.float32)

    def ours(q, k, v, bias):
        given = (turn(x) for x in (q, k, v))
        out = attention(
            *given, mask=masks.causal(), score_mod=lambda s, b, h, q, k: s * bias[h], layout=layout
        )
        return (turn(out) ** 2).sum()

    def plain(q, k, v, bias):
        return (
            dense(q, k, v, np.tril(np.ones((T, S), bool)), lambda s: s * bias[:, None, None])[0] ** 2
        ).sum()

    many, places = jnp.stack([q, 2 * q, -q]), (0, 1, 2, 3)
    same(jax.jit(jax.grad(ours, places))(q, k, v, bias), jax.grad(plain, places)(q, k, v, bias))
    for axes in ((0, None, None, None), (0, None, None, 0)):
        given = (many, k, v, bias if axes[3] is None else jnp.stack([bias, 2 * bias, 3 * bias]))
        over = lambda f, axes=axes: jax.vmap(jax.grad(f, places), axes)  # noqa: E731
        same(over(ours)(*given), over(plain)(*given))
        inside = lambda f, axes=axes: jax.grad(lambda *a: jax.vmap(f, axes)(*a).sum(), places)  # noqa: E731
        same(inside(ours)(*given), inside(plain)(*given))
    repeated = lambda q, k, v, b: plain(q, jnp.repeat(k, 2, 0), jnp.repeat(v, 2, 0), b)  # noqa: E731
    shared = (q, k[:1], v[:1], bias)
    same(jax.grad(ours, (1, 2))(*shared), jax.grad(repeated, (1, 2))(*shared))


def test_only_what_is_asked_for():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in ARRAYS)
    text = str(jax.make_jaxpr(jax.grad(lambda v: attention(q, k, v).sum()))(v))
    assert '\\"wanted\\": [\\"v\\"]' in text or '"wanted": ["v"]' in text


def test_scan_and_checkpoint():
    q = jnp.asarray(ARRAYS[0], jnp.float32)

    def model(attend):
        def run(x, widths):
            step = jax.checkpoint(lambda x, w: (x + attend(x, w) / 2, None))
            return (jax.lax.scan(step, x, widths)[0] ** 2).sum()

        return jax.jit(jax.grad(run))

    near = lambda w: abs(jnp.arange(T)[:, None] - jnp.arange(T)) <= w  # noqa: E731
    ours = model(lambda x, w: attention(x, x, x, mask=lambda b, h, q, k: abs(q - k) <= w))
    same(ours(q, jnp.array([1, 5])), model(lambda x, w: dense(x, x, x, near(w))[0])(q, jnp.array([1, 5])))


@pytest.mark.skipif(len(jax.devices("cpu")) < 4, reason="XLA was started with fewer devices")
def test_shard_map():
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), devices=jax.devices("cpu")[:4])
    spec = jax.sharding.PartitionSpec("batch", None, "heads")
    arrays = [jnp.asarray(x, jnp.float32) for x in ARRAYS]
    run = jax.shard_map(
        partial(attention, mask=masks.causal()), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec
    )
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in arrays]
    ours = jax.jit(jax.grad(lambda *a: (run(*a) ** 2).sum(), ALL))(*placed)
    wanted = jax.grad(lambda *a: (dense(*a, np.tril(np.ones((T, S), bool)))[0] ** 2).sum(), ALL)(*arrays)
    same(ours, wanted)


def test_lengths():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in ARRAYS)
    lens = jnp.array([51, 9])
    ours = jax.grad(lambda q, k, v: attention(q, k, v, kv_lens=lens)[..., 0].sum(), ALL)(q, k, v)
    mask = (jnp.arange(S) < lens[:, None])[:, None, None]
    same(ours, jax.grad(lambda q, k, v: dense(q, k, v, mask)[0][..., 0].sum(), ALL)(q, k, v))


def test_other_derivatives_are_refused_in_words():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in ARRAYS)
    once = jax.grad(lambda q: attention(q, k, v).sum())
    with pytest.raises(UnsupportedError, match="gradients of gradients are not built"):
        jax.grad(lambda q: once(q).sum())(q)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: attention(q, k, v), (q,), (q,))

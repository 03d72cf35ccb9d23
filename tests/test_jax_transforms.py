"""`gossamer.jax` in the places of JAX programs: options of jit, `shard_map`, functions of jax.numpy."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402

import gossamer  # noqa: E402
import gossamer.jax  # noqa: E402
from gossamer import masks  # noqa: E402
from gossamer.ir.errors import TraceError  # noqa: E402

Q, K, V = (jax.random.normal(key, (2, 21, 4, 16)) for key in jax.random.split(jax.random.key(0), 3))
SLOPES, LENS = jnp.arange(4.0), jnp.array([5, 17])


@jax.jit
def plain(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def causal(q, k, v):
    return gossamer.jax.attention(q, k, v, mask=masks.causal())


def close(got, wanted, atol=3e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), atol=atol)


# ---- jit's options and methods ----


def test_options_of_jit():
    donating = gossamer.jax.jit(lambda q, k, v: q + plain(q, k, v), donate_argnums=0, keep_unused=True)
    given = jnp.array(Q)
    close(donating(given, K, V), Q + plain(Q, K, V))
    assert given.is_deleted() and len(donating.report().compiled) == 1


def test_methods_of_jit():
    ours = gossamer.jax.jit(plain)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (Q, K, V)]
    assert ours.eval_shape(*shapes).shape == Q.shape
    close(ours.lower(*shapes).compile()(Q, K, V), plain(Q, K, V))
    ours.clear_cache()


def test_a_method_of_a_class():
    class Layer:
        scale = 2.0

        @gossamer.jax.jit(static_argnums=0)
        def __call__(self, q):
            return plain(self.scale * q, K, V)

    close(Layer()(Q), plain(2 * Q, K, V))


def test_without_jit():
    with jax.disable_jit():
        close(causal(Q, K, V), plain(Q, K, V))
        close(gossamer.jax.jit(plain)(Q, K, V), plain(Q, K, V))


# ---- shard_map ----


@pytest.mark.skipif(len(jax.devices("cpu")) < 2, reason="XLA was started with fewer devices")
@pytest.mark.parametrize(("kind", "check_vma"), [("Auto", False), ("Explicit", True)])
def test_attention_is_found_in_shard_map(kind, check_vma):
    kinds = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((2,), ("batch",), kinds, devices=jax.devices("cpu")[:2])
    spec = jax.sharding.PartitionSpec("batch")

    def local(q, k, v):
        def layer(x, _):
            return plain(x, k, v), None

        return jax.lax.psum(jax.lax.scan(layer, plain(q, k, v), length=2)[0], "batch")

    def model(q, k, v):
        out = jax.sharding.PartitionSpec()
        return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=out, check_vma=check_vma)(
            q, k, v
        )

    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in (Q, K, V)]
    ours = gossamer.jax.jit(model)
    close(ours(*placed), jax.jit(model)(*placed))
    assert len(ours.report().compiled) == 2, str(ours.report())


# ---- functions of jax.numpy in masks and maps ----

MAPS = {
    "tanh, clip, where": lambda s, b, h, q, k: jnp.where(
        jnp.abs(q - k) < 4,
        5 * jnp.tanh(s / 5) + SLOPES[jnp.clip(q - k, 0, max=3)],
        jnp.finfo(jnp.float32).min,
    ),
    "logic": lambda s, b, h, q, k: jnp.where(
        jnp.logical_and(q >= k, jnp.logical_not(k >= LENS[b])), s, -jnp.inf
    ),
    "nn": lambda s, b, h, q, k: jax.nn.gelu(s) + jax.nn.silu(s) * jnp.mod(q, 3) + jnp.maximum(s, jnp.pi / 9),
    "gradient": lambda s, b, h, q, k: s + jax.lax.stop_gradient(s * s),
}


def dense(score_mod):
    def run(q, k, v):
        score = jnp.einsum("btnh,bsnh->bnts", q, k) / 4
        indices = jnp.meshgrid(*map(jnp.arange, score.shape), indexing="ij")
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(score_mod(score, *indices)), v)

    return run


@jax.jit(static_argnums=0)
def with_slopes(function):
    """Its output, and the gradient of the sum of its squares with respect to the query."""

    def total(q):
        out = function(q, K, V)
        return (out**2).sum(), out

    slopes, out = jax.grad(total, has_aux=True)(Q)
    return out, slopes


@pytest.mark.parametrize("name", MAPS)
def test_a_score_mod_of_functions_of_jax_numpy(name):
    def run(q, k, v):
        return gossamer.jax.attention(q, k, v, score_mod=MAPS[name])

    (ours, slopes), (wanted, wanted_slopes) = (with_slopes(f) for f in (run, dense(MAPS[name])))
    close(ours, wanted)
    close(slopes, wanted_slopes, atol=1e-3)


def test_a_mask_mod_of_functions_of_jax_numpy():
    def mask(b, h, q, k):
        return jnp.logical_and(jnp.greater_equal(q, k), jnp.less(k, LENS[b]))

    wanted = dense(lambda s, b, h, q, k: jnp.where(mask(b, h, q, k), s, -jnp.inf))
    close(gossamer.jax.attention(Q, K, V, mask=mask), jax.jit(wanted)(Q, K, V))
    near = gossamer.Mask.trace(lambda b, h, q, k: jnp.abs(q - k) <= 2)
    assert near.key == gossamer.Mask.trace(lambda b, h, q, k: abs(q - k) <= 2).key


@pytest.mark.parametrize("function", [jax.lax.div, jnp.max, jnp.log1p])
def test_functions_that_cannot_be_captured_are_named(function):
    name = function.__name__
    with pytest.raises(TraceError, match=rf"{name}\(\), which cannot be captured"):
        gossamer.Mask.trace(lambda b, h, q, k: function(q, 3) > k)

"""`gossamer.jax.linear_attention` against float64, and under jit, vmap, grad and shard_map."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402

import gossamer  # noqa: E402
import gossamer.jax  # noqa: E402
from gossamer import feature_maps  # noqa: E402
from gossamer.ir.errors import InputError, TraceError  # noqa: E402
from gossamer.runtime.driver import compilations  # noqa: E402
from gossamer.tests import linear_cases as CASES  # noqa: E402

Case = CASES.Case
linear = gossamer.jax.linear_attention


# ---- against float64 ----


class Bridge(torch.autograd.Function):
    """A function of JAX's arrays on tensors, with its gradients."""

    @staticmethod
    def forward(ctx, function, *tensors):
        found, ctx.back = jax.vjp(function, *map(to_jax, tensors))
        return tuple(map(to_torch, found))

    @staticmethod
    def backward(ctx, *slopes):
        return None, *map(to_torch, ctx.back(tuple(map(to_jax, slopes))))


def to_jax(tensor):
    wide = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
    array = jnp.asarray(wide.contiguous().numpy())
    return array.astype(jnp.bfloat16) if tensor.dtype == torch.bfloat16 else array


def to_torch(array):
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(array.astype(jnp.float32))).bfloat16()
    return torch.from_numpy(np.array(array))


def by_jax(layout):
    """`gossamer.linear_attention` by way of JAX, under jit."""

    def function(q, k, v, feature_map, *, initial_state, enable_gqa, **options):
        states = () if initial_state is None else initial_state
        states = states if isinstance(states, tuple) else (states,)

        @jax.jit
        def run(q, k, v, *states):
            given = (states if options["normalize"] else states[0]) if states else None
            if layout == "BTNH":
                q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
            out, new = linear(q, k, v, feature_map, initial_state=given, layout=layout, **options)
            out = jnp.swapaxes(out, 1, 2) if layout == "BTNH" else out
            return (out, *(new if options["normalize"] else (new,)))

        out, *new = Bridge.apply(run, q, k, v, *states)
        return out, (tuple(new) if options["normalize"] else new[0])

    return function


def ours(x):
    return jnp.exp(x / 8), jnp.exp(-x / 8)


FORMS = {
    "causal": Case(length=45, v_size=8),
    "all keys": Case(length=33, keys=41, causal=False),
    "grouped": Case(length=34, heads=4, key_heads=2, feature_map="relu"),
    "sums alone": Case(length=34, normalize=False, feature_map="identity"),
    "with a state": Case(length=34, initial=True, batch=2),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    CASES.check(FORMS[name], function=by_jax("BTNH"))


@pytest.mark.parametrize("name", ["all keys", "grouped", "with a state"])
def test_gradients(name):
    CASES.check(FORMS[name], gradients=True, function=by_jax("BTNH"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_with_heads_first(dtype):
    CASES.check(replace(FORMS["causal"], dtype=dtype), function=by_jax("BNTH"))


# ---- as part of programs ----

Q, K, V = (jax.random.normal(key, (2, 37, 4, 16)) for key in jax.random.split(jax.random.key(0), 3))


def elu(x):
    return jax.nn.elu(x) + 1


def dense(q, k, v, features=elu, eps=1e-6):
    fq, fk = (features(x) for x in (q, k))
    fq, fk = (jnp.concatenate(f, -1) if isinstance(f, tuple) else f for f in (fq, fk))
    scores = jnp.tril(jnp.einsum("btnf,bsnf->bnts", fq, fk))
    return jnp.einsum("bnts,bsnh->btnh", scores / (scores.sum(-1, keepdims=True) + eps), v)


whole = jax.jit(dense, static_argnames=("features", "eps"))


def causal(q, k, v, *features):
    return linear(q, k, v, *features, causal=True)


def close(got, wanted, atol=3e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("function", [ours, lambda x: jax.nn.relu(x) ** 2 + 0.01, jax.jit(elu)])
def test_functions_of_jax_numpy_are_feature_maps(function):
    close(jax.jit(causal, static_argnums=3)(Q, K, V, function), whole(Q, K, V, function))


def test_vmap_becomes_the_batch():
    many = jnp.stack([Q, 2 * Q, -Q], 2)

    def run(function):
        def total(q, k):
            out = function(q, k, V)
            return (out**2).sum(), out

        return jax.jit(jax.vmap(jax.grad(total, (0, 1), has_aux=True), (2, None)))(many, K)

    close(run(causal), run(dense))
    text = str(jax.make_jaxpr(jax.vmap(causal, (2, None, None)))(many, K, V))
    assert text.count("gossamer_kernels[") == 1


def test_a_scan_over_chunks_carries_the_state():
    chunks = [jnp.moveaxis(x[:, :36].reshape(2, 4, 9, 4, 16), 1, 0) for x in (Q, K, V)]

    def step(state, chunk):
        out, state = linear(*chunk, causal=True, initial_state=state, return_state=True)
        return state, out

    def run(chunks):
        start = jnp.zeros((2, 4, 16, 16)), jnp.zeros((2, 4, 16))
        return jnp.moveaxis(jax.lax.scan(step, start, chunks)[1], 0, 1).reshape(2, 36, 4, 16)

    def joined(chunks):
        return dense(*(jnp.moveaxis(x, 0, 1).reshape(2, 36, 4, 16) for x in chunks))

    def with_slopes(function):
        def total(chunks):
            out = function(chunks)
            return (out**2).sum(), out

        return jax.jit(jax.grad(total, has_aux=True))(chunks)

    close(with_slopes(run), with_slopes(joined))


@pytest.mark.skipif(len(jax.devices("cpu")) < 4, reason="XLA was started with fewer devices")
def test_shard_map():
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), devices=jax.devices("cpu")[:4])
    spec = jax.sharding.PartitionSpec("batch", None, "heads")
    spread = jax.shard_map(causal, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in (Q, K, V)]
    close(jax.jit(spread)(*placed), whole(Q, K, V))


def features_of(make, weight):
    def features(x):
        rows = make(weight)
        return jnp.swapaxes(to_jax(rows(to_torch(jnp.swapaxes(x, 1, 2)))), 1, 2)

    return features


MAPS = ("positive", "random_fourier", "hedgehog", "hashing")


@pytest.mark.parametrize("name", MAPS)
def test_maps_with_projections(name):
    make, weight = getattr(feature_maps, name), 0.3 * jax.random.normal(jax.random.key(1), (4, 16, 8))
    with_torch = features_of(make, to_torch(weight))
    got = jax.jit(lambda w: linear(Q, K, V, make(w), causal=True, eps=0.5))(weight)
    close(got, dense(Q, K, V, with_torch, eps=0.5), atol=3e-4)


def test_gradients_flow_to_projections():
    weight = 0.3 * jax.random.normal(jax.random.key(1), (4, 16, 8))

    def features(x, w):
        rows = jnp.einsum("btnh,nhr->btnr", x, w)
        return jax.nn.softmax(jnp.concatenate([rows, -rows], -1), -1)

    def loss(w):
        return (causal(Q, K, V, feature_maps.hedgehog(w)) ** 2).sum()

    wanted = jax.jit(jax.grad(lambda w: (dense(Q, K, V, lambda x: features(x, w)) ** 2).sum()))(weight)
    close(jax.jit(jax.grad(loss))(weight), wanted, atol=1e-3)


def test_another_length_compiles_no_kernel():
    run = jax.jit(causal)
    run(Q, K, V)
    known = compilations()
    close(run(Q[:1, :21], K[:1, :21], V[:1, :21]), whole(Q, K, V)[:1, :21])
    assert compilations() == known


def test_without_a_batch_and_without_rows():
    close(causal(Q[0], K[0], V[0]), whole(Q, K, V)[0])
    state = jnp.ones((4, 16, 16)), jnp.ones((4, 16))
    out, new = linear(Q[0, :0], K[0, :0], V[0, :0], causal=True, initial_state=state, return_state=True)
    assert out.shape == (0, 4, 16)
    close(new, state)
    assert not linear(Q, K[:, :0], V[:, :0]).any()


def test_bad_input():
    with pytest.raises(InputError, match=r"linear_attention\.key: .*37"):
        causal(Q, K[:, :9], V[:, :9])
    with pytest.raises(InputError, match=r"linear_attention\.layout"):
        linear(Q, K, V, layout="BHTN")
    with pytest.raises(InputError, match=r"linear_attention\.value"):
        linear(Q, K, V[:, :3])
    with pytest.raises(InputError, match=r"initial_state: expected \(2, 4, 16, 16\)"):
        linear(Q, K, V, causal=True, initial_state=(jnp.ones((2, 4, 8, 16)), jnp.ones((2, 4, 8))))
    with pytest.raises(InputError, match="one of elu, relu"):
        linear(Q, K, V, "tanh")
    with pytest.raises(TraceError, match="log1p"):
        linear(Q, K, V, lambda x: jnp.log1p(jnp.exp(x)))

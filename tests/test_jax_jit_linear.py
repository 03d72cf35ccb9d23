"""`gossamer.jax.jit` on linear attention: found in every spelling, and never where it is something else."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402

import gossamer.jax  # noqa: E402

B, S, HEADS, SIZE = 2, 20, 3, 8
ROWS = jnp.arange(S)


def drawn():
    g = np.random.default_rng(0)
    return [jnp.asarray(g.standard_normal((B, S, HEADS, SIZE)), jnp.float32) for _ in range(3)]


def phi(x):
    return jax.nn.elu(x) + 1


def products(q, k):
    return jnp.einsum("bihd,bjhd->bhij", phi(q), phi(k))


def weigh(weights, v):
    return jnp.einsum("bhij,bjhm->bihm", weights, v)


def states(q, k, v):
    q, k = phi(q), phi(k)
    kv = jnp.einsum("nshd,nshm->nhmd", k, v)
    z = 1 / (jnp.einsum("nlhd,nhd->nlh", q, k.sum(1)) + 1e-6)
    return jnp.einsum("nlhd,nhmd,nlh->nlhm", q, kv, z)


def heads_first(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q, k = jax.nn.relu(q) + 1e-3, jax.nn.relu(k) + 1e-3
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdims=True).mT + 1e-4)


def by_the_inverse(q, k, v):
    q, k = jnp.exp(0.3 * q), jnp.exp(0.3 * k)
    total = (q * k.sum(1, keepdims=True)).sum(-1, keepdims=True)
    return jnp.einsum("bihd,bhdm->bihm", q, jnp.einsum("bjhd,bjhm->bhdm", k, v)) * (1 / total)


def masked(q, k, v):
    scores = products(q, k) * jnp.tril(jnp.ones((S, S)))
    return weigh(scores / (scores.sum(-1, keepdims=True) + 1e-6), v)


def filled(q, k, v):
    scores = jnp.where(ROWS[:, None] < ROWS, 0, products(q, k))
    return jnp.einsum("bhij,bjhm->bhim", scores, v) / scores.sum(-1)[..., None]


def running_sums(q, k, v):
    q, k = phi(q), phi(k)
    sums = jnp.cumsum(jnp.einsum("bnhd,bnhm->bnhdm", k, v), 1)
    z = 1 / (jnp.einsum("bnhd,bnhd->bnh", q, jnp.cumsum(k, 1)) + 1e-6)
    return jnp.einsum("bnhd,bnhdm,bnh->bnhm", q, sums, z)


def unnormalised(q, k, v):
    return jnp.einsum("bnhd,bnhdm->bnhm", q * 0.5, jnp.cumsum(k[..., None] * v[..., None, :], 1))


def softmax_features(q, k, v):
    context = jnp.einsum("bnhd,bnhe->bhde", jax.nn.softmax(k, 1), v)
    return jnp.einsum("bnhd,bhde->bnhe", jax.nn.softmax(q, -1) * 0.5, context)


@jax.jit
def mapped(q, k, v):
    def head(q, k, v):
        return (phi(q) @ (phi(k).T @ v)) / (phi(q) @ phi(k).sum(0) + 1e-6)[:, None]

    return jax.vmap(jax.vmap(head, 1, 1))(q, k, v)


def random_features(q, k, v):
    projection = jnp.linspace(-1, 1, SIZE * 12).reshape(SIZE, 12)

    def features(x):
        x = x * SIZE**-0.25
        return 12**-0.5 * (jnp.exp(x @ projection - (x * x).sum(-1, keepdims=True) / 2) + 1e-4)

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q, k = features(q), features(k)
    return (q @ (k.mT @ v)) / (q @ k.sum(-2)[..., None])


SPELLINGS = [
    states,
    heads_first,
    by_the_inverse,
    masked,
    filled,
    running_sums,
    unnormalised,
    softmax_features,
    mapped,
    random_features,
]


def near(found, wanted):
    scale = max(1.0, float(jnp.abs(wanted).max()))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("function", SPELLINGS, ids=lambda f: f.__name__)
def test_spelling(function):
    ours = gossamer.jax.jit(function)
    near(ours(*drawn()), jax.jit(function)(*drawn()))
    report = ours.report()
    assert [part.kind for part in report.compiled] == ["linear attention"] and not report.left, str(report)
    assert "test_jax_jit_linear.py:" in report.compiled[0].where


@pytest.mark.parametrize("function", [states, running_sums], ids=lambda f: f.__name__)
def test_gradients(function):
    def gradients(q, k, v):
        return jax.grad(lambda *a: (function(*a) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)

    ours = gossamer.jax.jit(gradients)
    for found, wanted in zip(ours(*drawn()), jax.jit(gradients)(*drawn()), strict=True):
        near(found, wanted)
    assert len(ours.report().compiled) == 1


def divided(scores, total, v):
    return weigh(scores, v) / total.swapaxes(1, 2)[..., None]


def used_elsewhere(q, k, v):
    kv = jnp.einsum("nshd,nshm->nhmd", phi(k), v)
    z = jnp.einsum("nlhd,nhd->nlh", phi(q), phi(k).sum(1))
    return jnp.einsum("nlhd,nhmd->nlhm", phi(q), kv) / z[..., None], kv


def reversed_sums(q, k, v):
    sums = jax.lax.cumsum(phi(k)[..., None] * v[..., None, :], 1, reverse=True)
    return jnp.einsum("bnhd,bnhdm->bnhm", phi(q), sums)


def other_mask(q, k, v):
    scores = jnp.where(ROWS[:, None] + 1 < ROWS, 0, products(q, k))
    return divided(scores, scores.sum(-1), v)


def other_denominator(q, k, v):
    scores = products(q, k)
    return divided(scores, jnp.einsum("bihd,bjhd->bhi", phi(q), jax.nn.relu(k) + 1), v)


def denominator_without_the_mask(q, k, v):
    scores = products(q, k)
    return divided(jnp.where(ROWS[:, None] < ROWS, 0, scores), scores.sum(-1), v)


def less(q, k, v):
    scores = products(q, k)
    return divided(scores, scores.sum(-1) - 0.01, v)


def three_matrices(q, k, v):
    return weigh(products(q, k), v)


@pytest.mark.parametrize(
    "function",
    [
        used_elsewhere,
        reversed_sums,
        other_mask,
        other_denominator,
        denominator_without_the_mask,
        less,
        three_matrices,
    ],
    ids=lambda f: f.__name__,
)
def test_left_alone(function):
    ours = gossamer.jax.jit(function)
    assert "gossamer" not in str(jax.make_jaxpr(ours)(*drawn()))
    assert not ours.report().compiled


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (used_elsewhere, "its sums are used elsewhere too"),
        (other_mask, "its mask is another than the causal one"),
        (other_denominator, "its denominator is another sum than that of its scores and eps"),
        (three_matrices, None),
    ],
)
def test_why(function, why):
    ours = gossamer.jax.jit(function)
    jax.make_jaxpr(ours)(*drawn())
    assert {part.why for part in ours.report().left} == ({why} if why else set())

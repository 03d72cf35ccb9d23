"""Gradients that a program takes inside `gossamer.jax.jit`: kernels there too, and the same results."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402

import gossamer.jax  # noqa: E402

LAYERS, T, HEADS, SIZE = 2, 20, 2, 16
WIDTH = HEADS * SIZE


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


PARAMS, X = random(LAYERS, WIDTH, WIDTH) / 8, random(2, T, HEADS, SIZE, seed=1)


def attention(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(q.shape[-1])
    seen = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -1e30)), v)


def layer(x, weight):
    q = (x.reshape(*x.shape[:2], -1) @ weight).reshape(x.shape)
    return x + attention(q, x, x)


def mean_square(params, x):
    for weight in params:
        x = layer(x, weight)
    return (x**2).mean()


def scanned(params, x, layer=layer):
    return (jax.lax.scan(lambda x, weight: (layer(x, weight), None), x, params)[0] ** 2).mean()


def step(loss):
    """A step of training, with momentum by hand."""

    def run(params, momentum, x):
        value, gradient = jax.value_and_grad(loss)(params, x)
        momentum = 0.9 * momentum + gradient
        return value, params - 0.1 * momentum, momentum

    return run


def once(params, x):
    return step(mean_square)(params, jnp.zeros_like(params), x)


def repeated(params, x):
    def body(state, _):
        value, *state = step(mean_square)(*state, x)
        return state, value

    return jax.lax.scan(body, [params, jnp.zeros_like(params)], None, length=2)


def with_auxiliary(params, x):
    """What is differentiated reads what the step has computed, and returns more than arrays."""
    x = x * 2

    def loss(params):
        found = mean_square(params, x)
        return found, {"name": "loss", "half": found / 2, "sum": x.sum(), "one": 1}

    (value, more), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    assert more.pop("name") == "loss" and more["one"] == 1
    return value, more, gradient


INSIDE = {
    "step": (once, LAYERS, LAYERS),
    "steps in a scan": (repeated, 1, 1),
    "jit around and inside": (jax.jit(jax.grad(jax.jit(mean_square), argnums=(0, 1))), 1, 1),
    "scan of layers": (jax.value_and_grad(scanned), LAYERS, 1),
    "scan of checkpoints": (jax.grad(lambda *a: scanned(*a, layer=jax.checkpoint(layer))), LAYERS, 1),
    "auxiliary": (with_auxiliary, 1, 1),
    "vjp": (lambda p, x: jax.vjp(lambda x: layer(x, p[0]), x)[1](x), 1, 1),
    "each example": (lambda p, x: jax.vmap(jax.grad(mean_square), (None, 0))(p, x[:, None]), 1, 1),
}


def check(function, *arrays, compiled, left=0, kind="attention"):
    ours = gossamer.jax.jit(function)
    text = str(jax.make_jaxpr(ours)(*arrays))
    report = ours.report()
    assert (len(report.compiled), len(report.left)) == (compiled, left), str(report)
    assert all(part.kind == kind and "test_jax_" in part.where for part in report.compiled)
    for found, wanted in zip(
        jax.tree.leaves(ours(*arrays)), jax.tree.leaves(jax.jit(function)(*arrays)), strict=True
    ):
        scale = max(1.0, float(jnp.abs(wanted).max()))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5 * scale)
    return text, report


@pytest.mark.parametrize("name", INSIDE)
def test_gradients_are_kernels(name):
    function, layers, compiled = INSIDE[name]
    text, _ = check(function, PARAMS[:layers], X, compiled=compiled)
    assert "gossamer_attention_gradient[" in text


def test_experts():
    def loss(params, x):
        router, up, down = params
        weights, ids = jax.lax.top_k(jax.nn.softmax(x @ router), 2)
        y = jnp.einsum("tei,eih->teh", jax.nn.silu(jnp.einsum("th,ehi->tei", x, up)), down)
        return (jnp.einsum("tk,tke,teh->th", weights, jax.nn.one_hot(ids, 4), y) ** 2).sum()

    params = random(8, 4), random(4, 8, 6) / 3, random(4, 6, 8) / 3
    text, _ = check(jax.grad(loss), params, random(20, 8, seed=1), compiled=1, kind="experts")
    assert '["gradients", ' in text


def test_what_stays_is_reported_once():
    def loss(params, x):
        scores = jnp.einsum("btnh,bsnh->bnts", layer(x, params[0]), x)
        weights = jax.nn.softmax(scores)
        return jnp.einsum("bnts,bsnh->btnh", weights, x).sum() + weights[0, 0, 0, 0]

    ours = gossamer.jax.jit(jax.grad(loss))
    jax.make_jaxpr(ours)(PARAMS, X)
    report = ours.report()
    assert (len(report.compiled), len(report.left)) == (1, 1)
    assert "its probabilities are used elsewhere too" in report.left[0].why


@pytest.mark.parametrize("outer", ["reverse", "forward", "linearize"])
def test_gradients_of_gradients_are_the_original_s(outer):
    def slope(x):
        return jax.grad(lambda x: (layer(x, PARAMS[0]) ** 2).mean())(x)

    def run(x):
        if outer == "reverse":
            return jax.grad(lambda x: (slope(x) * x).sum())(x)
        if outer == "forward":
            return jax.jvp(jax.jit(slope), (x,), (x,))[1]
        return jax.linearize(slope, x)[1](x)

    ours = gossamer.jax.jit(run)
    assert "gossamer" not in str(jax.make_jaxpr(ours)(X))
    report = ours.report()
    assert not report.compiled and report.left


def test_programs_outside_are_as_before():
    """A function that both trace is compiled inside alone, and nothing is changed when tracing has failed."""
    inner = jax.jit(jax.grad(mean_square))

    def failing(params, x):
        inner(params, x)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        gossamer.jax.jit(failing)(PARAMS, X)
    assert "gossamer" not in str(jax.make_jaxpr(inner)(PARAMS, X))
    assert "gossamer" in str(jax.make_jaxpr(gossamer.jax.jit(inner))(PARAMS, X))

"""`gossamer.jax.experts`, `moe`, `route` and `ragged_dot` against plain JAX, under its transformations."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402

import gossamer.jax  # noqa: E402
from gossamer.ir.errors import InputError, TraceError  # noqa: E402
from gossamer.runtime.driver import compilations  # noqa: E402

E, H, INNER = 5, 24, 16


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def drawn(tokens=23, top_k=2, *, gated=True, biased=False, transposed=False, dtype=np.float32, **_):
    """ids, some of nobody, and x, weights and the matrices of a layer."""
    columns = INNER * (2 if gated else 1)
    up, down = random(E, columns, H, seed=1) / H**0.5, random(E, H, INNER, seed=2) / INNER**0.5
    if transposed:
        up, down = up.swapaxes(1, 2), down.swapaxes(1, 2)
    ids = np.random.default_rng(3).integers(-1, E + 1, (tokens, top_k)).astype(np.int32)
    given = {"x": random(tokens, H), "weights": random(tokens, top_k, seed=4), "up": up, "down": down}
    if biased:
        given |= {"up_bias": random(E, columns, seed=5), "down_bias": random(E, H, seed=6)}
    return ids, {name: jnp.asarray(a, dtype) for name, a in given.items()}


def ours(ids, given, activation="swiglu", **options):
    bias = {f"gate_{n}" if n[0] == "u" else n: given[n] for n in ("up_bias", "down_bias") if n in given}
    arrays = (given["x"], ids, given["weights"], given["up"], given["down"])
    return gossamer.jax.experts(*arrays, activation=activation, **bias, **options)


def plain(ids, given, activation=None, *, transposed=False, interleaved=False, **_):
    """Every expert on every token, and the sum of those that a token takes."""
    up, down = given["up"], given["down"]
    up, down = (up, down) if transposed else (up.swapaxes(1, 2), down.swapaxes(1, 2))
    h = jnp.einsum("th,ehc->tec", given["x"], up)
    if "up_bias" in given:
        h = h + given["up_bias"]
    if activation is None:
        gate, value = (h[..., ::2], h[..., 1::2]) if interleaved else jnp.split(h, 2, -1)
        h = jax.nn.silu(gate) * value
    else:
        h = activation(h)
    y = jnp.einsum("tei,eih->teh", h, down)
    if "down_bias" in given:
        y = y + given["down_bias"]
    chosen = jax.nn.one_hot(ids, E, dtype=y.dtype) * given["weights"].astype(y.dtype)[..., None]
    return jnp.einsum("tke,teh->th", chosen, y)


def near(found, wanted, tolerance=2e-5):
    wanted = np.asarray(wanted, np.float64)
    scale = max(1.0, np.abs(wanted).max(initial=0))
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=tolerance * scale)


LAYOUTS = {
    "transposed, biased": dict(transposed=True, biased=True),
    "interleaved": dict(interleaved=True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_gradients(name):
    layout = dict(LAYOUTS[name])
    ids, given = drawn(**layout)
    layout.pop("biased", None)
    weight = random(23, H, seed=9)

    def total(function, given):
        return (function(ids, given, **layout) * weight).sum()

    found, wanted = (jax.jit(jax.value_and_grad(lambda g, f=f: total(f, g)))(given) for f in (ours, plain))
    near(found[0], wanted[0], 1e-4)
    for key in given:
        near(found[1][key], wanted[1][key], 1e-4)


def test_recomputed_gradients_are_the_same_and_only_what_is_asked_for():
    ids, given = drawn(biased=True)
    kept, again = (
        jax.grad(lambda w, r=r: (ours(ids, given | {"weights": w}, recompute=r) ** 2).sum())(given["weights"])
        for r in (False, True)
    )
    near(again, kept)
    text = str(jax.make_jaxpr(jax.grad(lambda w: ours(ids, given | {"weights": w}).sum()))(given["weights"]))
    assert '"dw"' in text and '"dx"' not in text


def test_narrow_dtypes(dtype=jnp.bfloat16):
    ids, given = drawn(dtype=dtype)
    wide = {name: a.astype(jnp.float32) for name, a in given.items()}
    out = ours(ids, given)
    assert out.dtype == dtype
    near(out, plain(ids, wide), 4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    ids, given = drawn(tokens)
    near(ours(ids, given), plain(ids, given))
    if not tokens:
        gradient = jax.grad(lambda w: ours(ids, given | {"down": w}).sum())(given["down"])
        assert gradient.shape == given["down"].shape and not gradient.any()


def test_activations_of_jax():
    ids, given = drawn(gated=False)
    for function in (
        lambda x: jax.nn.gelu(x, approximate=False),
        lambda x: jnp.where(x > 0, jnp.square(jax.nn.relu(x)), 0.1 * x),
    ):
        near(ours(ids, given, function), plain(ids, given, function))
    with pytest.raises(TraceError, match="sort"):
        ours(ids, given, lambda x: jnp.sort(jnp.stack([x, x]))[0])


def test_vmap_folds_calls_into_one_and_gradients_are_those_of_each():
    ids, given = drawn()
    many = jnp.stack([given["x"], 2 * given["x"], -given["x"]])
    chosen = jnp.stack([ids, ids[::-1], (ids + 1) % E])

    def run(function, x, ids):
        return function(ids, given | {"x": x})

    mapped = jax.vmap(lambda x, i: run(ours, x, i))
    near(mapped(many, chosen), jax.vmap(lambda x, i: run(plain, x, i))(many, chosen))
    text = str(jax.make_jaxpr(mapped)(many, chosen))
    assert text.count("gossamer_kernels") == 1 and "scan" not in text

    def gradients(function):
        def total(up, x, ids):
            return (function(ids, given | {"x": x, "up": up}) ** 2).sum()

        return jax.jit(jax.vmap(jax.grad(total), (None, 0, 0)))(given["up"], many, chosen)

    near(gradients(ours), gradients(plain), 1e-4)


def test_other_numbers_of_tokens_compile_no_kernel():
    ids, given = drawn(40)
    ours(ids, given)
    known = compilations()
    ours(ids[:33], given | {"x": given["x"][:33], "weights": given["weights"][:33]})
    assert compilations() == known


def test_under_shard_map_and_scan():
    devices = jax.devices()[:4]
    ids, given = drawn(len(devices) * 6)
    mesh, p = jax.sharding.Mesh(np.array(devices), ("d",)), jax.sharding.PartitionSpec
    rows = ("x", "weights")
    specs = {name: p("d") if name in rows else p() for name in given}
    run = jax.shard_map(ours, mesh=mesh, in_specs=(p("d"), specs), out_specs=p("d"))
    near(jax.jit(run)(ids, given), plain(ids, given))
    steps = jax.lax.scan(lambda x, _: (x + ours(ids, given | {"x": x}), None), given["x"], length=2)[0]
    once = given["x"] + plain(ids, given)
    near(steps, once + plain(ids, given | {"x": once}), 1e-4)


# routers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "softmax_of_topk", lambda x: jnp.tanh(x) + 1])
def test_routers_and_their_gradients(router):
    logits = jnp.asarray(random(31, 7))

    def wanted(logits):
        scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "softmax_of_topk": lambda x: x}
        best, ids = jax.lax.top_k((scores[router] if isinstance(router, str) else router)(logits), 3)
        weights = jax.nn.softmax(best) if router == "softmax_of_topk" else best / best.sum(-1, keepdims=True)
        return ids, 2 * weights

    def found(logits):
        return gossamer.jax.route(logits, 3, router=router, scale=2)

    ids, weights = jax.jit(found)(logits)
    assert (ids == wanted(logits)[0]).all() and weights.dtype == jnp.float32
    near(weights, wanted(logits)[1])
    weight = random(31, 3, seed=2)
    near(*(jax.grad(lambda x, f=f: (f(x)[1] * weight).sum())(logits) for f in (found, wanted)))
    many = jnp.stack([logits, -logits])
    assert (jax.vmap(found)(many)[0] == jnp.stack([wanted(x)[0] for x in many])).all()


def test_routers_that_leave_out_experts():
    logits = jnp.asarray(random(40, 6))
    scores, ids = jax.lax.top_k(jax.nn.softmax(logits), 4)
    kept = jnp.cumsum(scores, -1) - scores < 0.6
    assert (gossamer.jax.route(logits, 4, top_p=0.6).ids == jnp.where(kept, ids, -1)).all()
    assert (gossamer.jax.route(logits, 4, threshold=0.2).ids == jnp.where(scores >= 0.2, ids, -1)).all()
    seen = dict.fromkeys(range(6), 0)
    found = gossamer.jax.route(logits, 4, capacity=9).ids
    for asked, got in zip(ids.reshape(-1).tolist(), found.reshape(-1).tolist(), strict=True):
        assert got == (asked if seen[asked] < 9 else -1)
        seen[asked] += 1
    corrected = gossamer.jax.route(logits, 1, correction_bias=jnp.array([9.0, 0, 0, 0, 0, 0]))
    assert (corrected.ids == 0).all() and (corrected.weights == 1).all()
    one, other = (gossamer.jax.route(logits, 2, router="random", seed=s).ids for s in (3, 4))
    assert (one != other).any() and (one[:, 0] != one[:, 1]).all()


def test_moe_is_a_router_and_experts():
    _, given = drawn()
    logits = jnp.asarray(random(23, E, seed=7))

    def layer(x, logits):
        return gossamer.jax.moe(x, logits, given["up"], given["down"], top_k=2)

    def wanted(x, logits):
        weights, ids = jax.lax.top_k(jax.nn.softmax(logits), 2)
        weights = weights / weights.sum(-1, keepdims=True)
        return plain(ids, given | {"x": x, "weights": weights})

    near(jax.jit(layer)(given["x"], logits), wanted(given["x"], logits))


# products alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(3, 0, 9, 10), (0, 0, 0, 0), (30, 0, 0, 0)])
def test_ragged_dot(sizes):
    lhs, rhs, sizes = jnp.asarray(random(30, 12)), jnp.asarray(random(4, 12, 7, seed=1)), jnp.array(sizes)
    weight = random(30, 7, seed=2)
    near(gossamer.jax.ragged_dot(lhs, rhs, sizes), jax.lax.ragged_dot(lhs, rhs, sizes))

    def gradients(function):
        return jax.jit(jax.grad(lambda *a: (function(*a, sizes) * weight).sum(), argnums=(0, 1)))(lhs, rhs)

    for found, wanted in zip(gradients(gossamer.jax.ragged_dot), gradients(jax.lax.ragged_dot), strict=True):
        near(found, wanted)


# bad input ------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_words():
    ids, given = drawn()
    x, w, up, down = (given[name] for name in ("x", "weights", "up", "down"))
    experts = gossamer.jax.experts
    for arguments, message in (
        ((x[0], ids, w, up, down), r"experts.x: expected 2 dimensions"),
        ((x, ids[:5], w, up, down), r"experts.topk_ids: expected 23 tokens"),
        ((x, ids, w[:, :1], up, down), r"experts.topk_weights: expected the shape of the ids \(23, 2\)"),
        ((x, w, w, up, down), r"experts.topk_ids: expected .*int32 or int64"),
        ((x, ids, w, up.astype(jnp.float16), down), r"experts.gate_up_proj: expected x's dtype float32"),
        ((x, ids, w, up[:3], down), r"experts.down_proj: expected 3 experts"),
        ((x, ids, w, up[:, :7], down), r"expected \[E, 2I, H\]"),
    ):
        with pytest.raises(InputError, match=message):
            experts(*arguments)
    with pytest.raises(InputError, match="both biases or neither"):
        experts(x, ids, w, up, down, gate_up_bias=jnp.zeros((E, 2 * INNER)))
    with pytest.raises(InputError, match=r"route.top_k: expected 1 to 5"):
        gossamer.jax.route(jnp.zeros((3, 5)), 6)
    with pytest.raises(InputError, match=r"moe.router_logits: expected 23 tokens"):
        gossamer.jax.moe(x, jnp.zeros((3, E)), up, down, top_k=1)
    with pytest.raises(InputError, match=r"ragged_dot.group_sizes: expected \(5,\) integers"):
        gossamer.jax.ragged_dot(x, jnp.zeros((5, H, 3)), jnp.zeros(4, jnp.int32))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(
            lambda x: gossamer.jax.ragged_dot(x, jnp.zeros((5, H, 3)), jnp.zeros(5, jnp.int32)), (x,), (x,)
        )

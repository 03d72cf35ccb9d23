"""`gossamer.jax.jit`: attention found in JAX programs, equal to what it replaces; all else left alone."""

import functools
import inspect
import json
import re

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402

import gossamer  # noqa: E402
import gossamer.jax  # noqa: E402
from gossamer.frontend.jax.call import Call  # noqa: E402
from gossamer.frontend.jax.program import flatten  # noqa: E402
from gossamer.frontend.jax.terms import Reader, reshaped  # noqa: E402
from gossamer.ir.errors import InputError  # noqa: E402
from gossamer.runtime.driver import compilations  # noqa: E402


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


T, S = 21, 34
Q, K, V = random(2, T, 4, 16), random(2, S, 4, 16, seed=1), random(2, S, 4, 16, seed=2)
KEYS, VALUES = K[:, :, :2], V[:, :, :2]  # for grouped queries
ROWS, COLUMNS = np.arange(T)[:, None], np.arange(S)


def check(function, *arrays, compiled=1, left=0, atol=3e-5):
    """Run with and without us; compare results, and the report. Returns ours, and its text."""
    ours = gossamer.jax.jit(function)
    got, wanted = ours(*arrays), function(*arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=atol, rtol=3e-5)
    report = ours.report()
    assert (len(report.compiled), len(report.left)) == (compiled, left), str(report)
    return ours, str(jax.make_jaxpr(ours)(*arrays))


def scores(q, k):
    return jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(q.shape[-1])


def weigh(weights, v):
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def attend(mask, fill=-jnp.inf):
    """Attention as programs write it, under a mask of a function of nothing."""

    def run(q, k, v):
        return weigh(jax.nn.softmax(jnp.where(mask(), scores(q, k), fill)), v)

    return run


# ---- jax.nn.dot_product_attention ----

FUSED = {
    "plain": {},
    "scale": dict(scale=0.3),
    "causal": dict(is_causal=True),
    "window": dict(is_causal=True, local_window_size=(5, 0)),
    "window, both sides": dict(local_window_size=4),
    "lengths": dict(key_value_seq_lengths=jnp.array([34, 5])),
    "no keys": dict(key_value_seq_lengths=jnp.array([0, 5]), query_seq_lengths=jnp.array([21, 3])),
    "mask": dict(mask=random(2, 1, T, S, seed=3) > 0),
    "mask by head": dict(mask=random(1, 4, T, S, seed=3) > 0),
    "bias": dict(bias=random(1, 4, T, S, seed=4), is_causal=True),
}


@pytest.mark.parametrize("groups", [1, 2], ids=["", "grouped"])
@pytest.mark.parametrize("name", FUSED)
def test_dot_product_attention(name, groups):
    k, v = (K, V) if groups == 1 else (KEYS, VALUES)
    check(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **FUSED[name]), Q, k, v)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    arrays = [x.astype(dtype) for x in (Q, KEYS, VALUES)]
    check(functools.partial(jax.nn.dot_product_attention, is_causal=True), *arrays, atol=2e-2)


# ---- masks that a program computes ----

MASKS = {
    "tril": lambda: jnp.tril(jnp.ones((T, S), bool)),
    "comparison": lambda: jnp.arange(T)[:, None] >= jnp.arange(S),
    "window": lambda: jnp.abs(jnp.arange(T)[:, None] - jnp.arange(S)) <= 7,
    "strided": lambda: (jnp.arange(T)[:, None] - jnp.arange(S)) % 4 == 0,
    "blocks": lambda: jnp.arange(T)[:, None] // 5 == jnp.arange(S) // 5,
    "iota": lambda: jax.lax.broadcasted_iota(int, (T, S), 0) > jax.lax.broadcasted_iota(int, (T, S), 1) - 3,
    "not": lambda: ~jnp.triu(jnp.ones((T, S), bool), 1),
    "constant": lambda: np.abs(ROWS - COLUMNS) <= 7,
    "arithmetic": lambda: (jnp.tril(jnp.ones((T, S))) * (jnp.arange(S) < 30)) > 0,
    "two": lambda: (jnp.arange(T)[:, None] >= jnp.arange(S)) | (jnp.arange(S) < 3),
}


def masks_of(text):
    """The masks of the calls in a jaxpr's text; they read no arrays."""
    calls = [Call.parse(json.dumps(json.loads(found))) for found in re.findall(r"call=(\{.*\})", text)]
    assert calls and not any(call.mask.signature for call in calls)
    return [call.mask.bound(gossamer.Mask, ()) for call in calls]


@pytest.mark.parametrize("fill", [-jnp.inf, -1e30, -1e9])
@pytest.mark.parametrize("name", MASKS)
def test_mask_becomes_symbolic(name, fill):
    _, text = check(attend(MASKS[name], fill), Q, K, V)
    [mask] = masks_of(text)
    assert (mask.to_dense(T, S) == np.asarray(MASKS[name]())).all()


def test_masks_that_are_added():
    bias = jnp.where(jnp.arange(T)[:, None] >= jnp.arange(S), 0.0, -1e30)
    _, text = check(lambda q, k, v: weigh(jax.nn.softmax(scores(q, k) + bias), v), Q, K, V)
    assert (masks_of(text)[0].to_dense(T, S) == np.tril(np.ones((T, S)))).all()
    allowed = random(2, S, seed=5) > 0
    padded = lambda q, k, v, m: weigh(jax.nn.softmax(scores(q, k) + (1 - m[:, None, None]) * -1e9), v)  # noqa: E731
    check(padded, Q, K, V, allowed.astype(jnp.float32))


def test_rows_without_pairs_are_what_the_original_gives():
    mask = lambda: jnp.abs(jnp.arange(T)[:, None] - 2 * jnp.arange(S) - 9) <= 0  # noqa: E731
    check(attend(mask, -1e30), Q, K, V)  # the mean of all values
    got = gossamer.jax.jit(attend(mask))(Q, K, V)
    assert np.array_equal(jnp.isnan(got), jnp.isnan(attend(mask)(Q, K, V)))


def test_a_traced_window_is_an_operand():
    def run(q, k, v, width):
        near = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(S)) <= width
        return weigh(jax.nn.softmax(jnp.where(near, scores(q, k), -1e30)), v)

    ours, _ = check(run, Q, K, V, jnp.int32(3))
    known = compilations()
    for width in (0, 9):
        np.testing.assert_allclose(ours(Q, K, V, jnp.int32(width)), run(Q, K, V, width), atol=3e-5)
    assert compilations() == known


def test_another_length_compiles_no_kernel():
    ours = gossamer.jax.jit(lambda x: jax.nn.dot_product_attention(x, x, x, local_window_size=(9, 0)))
    ours(Q)
    known = compilations()
    for length in (5, 17):
        ours(Q[:, :length])
    assert compilations() == known and len(ours.report().compiled) == 1


# ---- spellings ----


def softmax_by_hand(x):
    x = x - jax.lax.stop_gradient(x.max(-1, keepdims=True))
    return jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)


def heads_first(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return (jax.nn.softmax((q * 0.25) @ k.swapaxes(2, 3)) @ v).swapaxes(1, 2).reshape(2, T, 64)


def repeated(q, k, v):
    return weigh(jax.nn.softmax(scores(q, jnp.repeat(k, 2, 2))), jnp.repeat(v, 2, 2))


def alibi(q, k, v):
    slopes = 2.0 ** -jnp.arange(1, 5)
    return weigh(
        jax.nn.softmax(scores(q, k) + slopes[:, None, None] * (jnp.arange(S) - jnp.arange(T)[:, None])), v
    )


def scores_transposed(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bsnh,btnh->bnst", k, q), 2)
    return jnp.einsum("bsnh,bnst->btnh", v, weights)


def unshifted(q, k, v):
    near = jnp.arange(T)[:, None] >= jnp.arange(S) - 5
    weights = jnp.exp(jnp.where(near, scores(q, k), -1e30))
    return weigh(weights / weights.sum(-1, keepdims=True), v)


def relative(q, k, v):
    """Shaw's relative positions: a second product, whose rows are read by distance."""
    near = jnp.clip(jnp.arange(S) - jnp.arange(T)[:, None], -4, 4) + 4
    beside = jnp.einsum("btnh,tsh->bnts", q, random(9, 16, seed=8)[near])
    return weigh(jax.nn.softmax(scores(q, k) + beside), v)


SPELLINGS = {
    "einsum": lambda q, k, v: weigh(jax.nn.softmax(scores(q, k)), v),
    "values first": lambda q, k, v: jnp.einsum("bsnh,bnts->btnh", v, jax.nn.softmax(scores(q, k))),
    "scores transposed": scores_transposed,
    "by hand": lambda q, k, v: weigh(softmax_by_hand(scores(q, k)), v),
    "heads first": heads_first,
    "soft cap": lambda q, k, v: weigh(jax.nn.softmax(20 * jnp.tanh(scores(q, k) / 20)), v),
    "alibi": alibi,
    "conversions": lambda q, k, v: weigh(jax.nn.softmax(scores(q, k).astype(float)).astype(q.dtype), v),
    "vmap": jax.vmap(jax.vmap(lambda q, k, v: jax.nn.softmax(q @ k.T * 0.25) @ v, in_axes=1, out_axes=1)),
    "one head": lambda q, k, v: jax.nn.softmax(q[0, :, 0] @ k[0, :, 0].T) @ v[0, :, 0],
    "scaled weights": lambda q, k, v: weigh(jax.nn.softmax(scores(q, k)) * 2, v),
    "maximum not subtracted": unshifted,
    "relative positions": relative,
    "values of two sizes": lambda q, k, v: jnp.einsum(
        "bnts,bsncd->btncd", jax.nn.softmax(scores(q, k)), v.reshape(2, S, 4, 2, 8)
    ),
    "values of one number": lambda q, k, v: jnp.einsum(
        "bnts,bsn->bnt", jax.nn.softmax(scores(q, k)), v[..., 0]
    ),
    "jit inside": jax.jit(lambda q, k, v: weigh(jax.jit(jax.nn.softmax)(scores(q, k)), v)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    check(SPELLINGS[name], Q, K, V)


@pytest.mark.parametrize("factor", [1, 200], ids=["", "overflow"])
def test_where_exponentials_overflow_the_original_runs(factor):
    """Also for gradients, which do not hold what the original would compute."""

    def total(q):
        return (unshifted(q * factor, K, V)[0] ** 2).sum(), unshifted(q, K, V)

    ours, plain = (jax.jit(jax.value_and_grad(f, has_aux=True))(Q) for f in (gossamer.jax.jit(total), total))
    assert np.isnan(plain[0][0]) == (factor != 1)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5)


def test_repeated_heads_are_read_once():
    _, text = check(repeated, Q, KEYS, VALUES)
    assert "2,34,4,16" not in text and masks_of(text)


def test_documents():
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, S))))

    def run(q, k, v, ids):
        same = ids[:, :T, None] == ids[:, None]
        return weigh(jax.nn.softmax(jnp.where(same[:, None], scores(q, k), -1e30)), v)

    _, text = check(run, Q, K, V, ids)
    assert '"signature": [["i32", 2]' in text


# ---- programs ----


def layer(x, width=None):
    return x + jax.nn.dot_product_attention(x, x, x, is_causal=True, local_window_size=width)


def test_scan_loops_and_branches():
    check(lambda x: jax.lax.scan(lambda x, _: (layer(x) / 2, None), x, None, length=3)[0], Q)
    check(lambda x: jax.lax.fori_loop(0, 2, lambda _, x: layer(x) / 2, x), Q)
    check(lambda x, c: jax.lax.cond(c, layer, lambda x: x, x), Q, jnp.array(True))
    check(jax.checkpoint(layer), Q)


def test_every_layer_is_reported_at_its_line():
    def two(x):
        x = jax.nn.dot_product_attention(x, x, x)
        return jax.nn.dot_product_attention(x, x, x, is_causal=True)

    ours, _ = check(two, Q, compiled=2)
    first = inspect.getsourcelines(two)[1]
    lines = [part.where for part in ours.report().compiled]
    assert lines == [f"{__file__}:{first + 1}", f"{__file__}:{first + 2}"]
    assert str(ours.report()).splitlines()[0] == f"compiled attention at {lines[0]}"


def test_decorator_pytrees_and_static_arguments():
    @functools.partial(gossamer.jax.jit, static_argnames="causal")
    def run(arrays, *, causal):
        """Documented."""
        out = jax.nn.dot_product_attention(arrays["q"], arrays["k"], arrays["v"], is_causal=causal)
        return {"out": out, "sum": (out.sum(), None)}

    arrays = {"q": Q, "k": K, "v": V}
    for causal in (True, False):
        got = run(arrays, causal=causal)
        np.testing.assert_allclose(
            got["out"], jax.nn.dot_product_attention(Q, K, V, is_causal=causal), atol=1e-5
        )
        assert got["sum"][1] is None
    assert run.__name__ == "run" and run.__doc__ == "Documented."


def test_inside_jit_vmap_and_grad():
    ours = gossamer.jax.jit(lambda q: jax.nn.dot_product_attention(q, K, V, is_causal=True).sum())
    plain = lambda q: jax.nn.dot_product_attention(q, K, V, is_causal=True).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(ours)(Q), jax.grad(plain)(Q), atol=3e-5)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(ours))(jnp.stack([Q, 2 * Q])), [plain(Q), plain(2 * Q)], rtol=1e-4
    )
    ids = jnp.arange(S) // 7
    masked = lambda q, ids: attend(lambda: ids[:T, None] == ids, -1e30)(q, K, V).sum()  # noqa: E731
    np.testing.assert_allclose(
        jax.grad(gossamer.jax.jit(masked))(Q, ids), jax.grad(masked)(Q, ids), atol=3e-5
    )


def test_a_model_in_sixty_lines():
    """A decoder written without thinking of us: every layer compiled, nothing left."""

    def norm(x):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def block(p, x):
        B, T, C = x.shape
        q, k, v = jnp.split(norm(x) @ p["qkv"], 3, -1)
        q, k, v = (y.reshape(B, T, 4, C // 4).transpose(0, 2, 1, 3) for y in (q, k, v))
        att = (q @ k.swapaxes(-2, -1)) * (C // 4) ** -0.5
        att = jnp.where(jnp.tril(jnp.ones((T, T)))[None, None] == 0, float("-inf"), att)
        att = jax.nn.softmax(att, axis=-1)
        x = x + (att @ v).transpose(0, 2, 1, 3).reshape(B, T, C) @ p["out"]
        return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]

    def model(params, ids):
        x = params["embed"][ids]
        for p in params["layers"]:
            x = block(p, x)
        return norm(x) @ params["embed"].T

    def loss(params, ids):
        return -jnp.take_along_axis(
            jax.nn.log_softmax(model(params, ids[:, :-1])), ids[:, 1:, None], -1
        ).mean()

    shapes = {"qkv": (32, 96), "out": (32, 32), "up": (32, 64), "down": (64, 32)}
    make = lambda i: {n: 0.1 * random(*s, seed=i + len(n)) for n, s in shapes.items()}  # noqa: E731
    params = {"embed": random(50, 32), "layers": [make(i) for i in range(3)]}
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 20)))
    _, text = check(model, params, ids, compiled=3)
    assert len(masks_of(text)) == 3
    ours, plain = (jax.tree.leaves(jax.grad(f)(params, ids)) for f in (gossamer.jax.jit(loss), loss))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# ---- left alone ----


def used_twice(q, k, v):
    weights = jax.nn.softmax(scores(q, k))
    return weigh(weights, v), weights


def by_query(q, k, v):
    return jnp.einsum(
        "bnts,btsnh->btnh", jax.nn.softmax(scores(q, k)), jnp.broadcast_to(v[:, None], (2, T, S, 4, 16))
    )


LEFT = {
    "weights are returned": (used_twice, "its probabilities are used elsewhere too"),
    "values by query": (by_query, "its values depend on the query"),
    "no values": (lambda q, k, v: jax.nn.softmax(scores(q, k)), "not summed over the keys with values"),
    "other dtypes": (
        lambda q, k, v: weigh(jax.nn.softmax(scores(q, k)), v.astype(jnp.bfloat16)),
        "key and value are of",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_and_why(name):
    function, why = LEFT[name]
    ours, _ = check(function, Q, K, V, compiled=0, left=1)
    [part] = ours.report().left
    assert why in part.why and str(part).startswith("left attention at ") and "test_jax_jit.py:" in part.where


NOT_ATTENTION = {
    "softmax of queries": lambda q, k, v: weigh(jax.nn.softmax(scores(q, k), axis=2), v),
    "softmax of heads": lambda q, k, v: weigh(jax.nn.softmax(scores(q, k), axis=1), v),
    "no softmax": lambda q, k, v: weigh(jnp.exp(scores(q, k)), v),
    "sigmoid": lambda q, k, v: weigh(jax.nn.sigmoid(scores(q, k)), v),
    "another sum": lambda q, k, v: weigh((s := jnp.exp(scores(q, k))) / s.sum(-2, keepdims=True), v),
    "a classifier": lambda q, k, v: jax.nn.softmax(q.reshape(2, -1)[:, :50]),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_what_only_looks_like_attention(name):
    function = NOT_ATTENTION[name]
    ours = gossamer.jax.jit(function)
    np.testing.assert_allclose(ours(Q, K, V), function(Q, K, V), atol=3e-5)
    assert not ours.report().compiled


def test_a_function_called_floor_divide_is_read_as_what_it_computes():
    @jax.jit
    def floor_divide(x, y):
        return x + y

    mask = lambda: floor_divide(jnp.arange(T), 3)[:, None] >= jnp.arange(S)  # noqa: E731
    check(attend(mask, -1e30), Q, K, V)


def test_derivatives_of_a_user_s_own_stay():
    @jax.custom_jvp
    def shrink(x):
        return x / 2

    shrink.defjvp(lambda primals, tangents: (shrink(*primals), 100 * tangents[0]))
    run = lambda x: layer(shrink(x)).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(gossamer.jax.jit(run))(Q), jax.grad(run)(Q), rtol=1e-4, atol=1e-3)


def test_derivatives_of_a_user_s_own_stay_between_products():
    @jax.custom_vjp
    def hastened(x):
        return x * 2

    hastened.defvjp(lambda x: (x * 2, None), lambda _, slope: (100 * slope,))
    run = lambda q: (weigh(jax.nn.softmax(hastened(scores(q, K))), V) ** 2).sum()  # noqa: E731
    ours = gossamer.jax.jit(jax.grad(run))
    np.testing.assert_allclose(ours(Q), jax.jit(jax.grad(run))(Q), rtol=1e-4, atol=1e-3)
    assert [part.why for part in ours.report().left] == ["no product of queries and keys"]


def test_effects_stay():
    seen = []

    def run(x):
        jax.debug.callback(lambda total: seen.append(float(total)), (x * 2).sum())
        return layer(x)

    gossamer.jax.jit(run)(Q).block_until_ready()
    jax.effects_barrier()
    assert len(seen) == 1


def test_bad_input():
    with pytest.raises(InputError, match="expected a function; got int"):
        gossamer.jax.jit(3)


# ---- mutations: whatever is changed, the result is still that of the program ----

CHANGES = {
    "scale": lambda s, m: (s * 3.7, m),
    "off by one": lambda s, m: (s, jnp.roll(m, 1, -1)),
    "inverted": lambda s, m: (s, ~m),
    "shifted scores": lambda s, m: (jnp.roll(s, 1, -1), m),
    "negative": lambda s, m: (-s, m),
    "squared": lambda s, m: (s * s, m),
    "a row's mean": lambda s, m: (s - s.mean(-1, keepdims=True), m),
    "transposed": lambda s, m: (s, m.T),
    "scores transposed": lambda s, m: (s.swapaxes(-1, -2), m),
}  # fmt: skip


@pytest.mark.parametrize("fill", [-jnp.inf, -1e30, -1.0, 0.0])
@pytest.mark.parametrize("name", CHANGES)
def test_mutations(name, fill):
    def run(x, v):
        found, mask = CHANGES[name](scores(x, x), jnp.tril(jnp.ones((T, T), bool)))
        return weigh(jax.nn.softmax(jnp.where(mask, found, fill)), v)

    np.testing.assert_allclose(gossamer.jax.jit(run)(Q, Q), run(Q, Q), atol=3e-5)


# ---- terms ----


@pytest.mark.parametrize(
    ("old", "new"),
    [((6, 4), (2, 3, 4)), ((2, 3, 4), (6, 4)), ((4, 6), (8, 3)), ((1, 6), (6,)), ((2, 3, 5, 2), (6, 10))],
)
def test_reshaped(old, new):
    from gossamer.frontend.term_expr import to_expr
    from gossamer.ir.evaluate import evaluate

    grid = dict(zip((f"i{d}" for d in range(len(new))), np.indices(new), strict=True))
    at = tuple(np.broadcast_to(evaluate(to_expr(index), grid), new) for index in reshaped(old, new))
    array = np.arange(np.prod(old)).reshape(old)
    assert (array[at] == array.reshape(new)).all()


def test_an_array_is_read_where_no_rule_is_known():
    program = flatten(jax.make_jaxpr(lambda x: jnp.sort(x) + 1)(jnp.arange(5.0)))
    reader = Reader()
    array = reader.of(program.outputs[0])
    assert array.kind == "float" and len(reader.leaves) == 1

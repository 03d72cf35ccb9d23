"""`gossamer.jax.jit` on layers of experts: what is compiled, what is left, and that results stay the same."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402

import gossamer.jax  # noqa: E402

T, E, TOP, H, INNER, CAPACITY = 26, 4, 2, 8, 6, 9
ALL = (0, 1, 2, 3)


def drawn(seed=0):
    g = np.random.default_rng(seed)
    shapes = (T, H), (H, E), (E, H, 2 * INNER), (E, INNER, H)
    return [jnp.asarray(g.standard_normal(s) / s[-2] ** 0.5, jnp.float32) for s in shapes]


def halves(h):
    gate, up = jnp.split(h, 2, -1)
    return jax.nn.silu(gate) * up


def chosen(x, router):
    weights, ids = jax.lax.top_k(jax.nn.softmax(x @ router), TOP)
    return weights / weights.sum(-1, keepdims=True), ids


def sorted_rows(x, router, up, down, act=halves):
    """Rows sorted by expert, two ragged products, and back."""
    weights, ids = chosen(x, router)
    order = jnp.argsort(ids.reshape(-1))
    sizes = jnp.bincount(ids.reshape(-1), length=E)
    h = act(jax.lax.ragged_dot(x[order // TOP], up, sizes))
    y = jax.lax.ragged_dot(h, down, sizes)
    return jnp.einsum("tk,tkh->th", weights, y[jnp.argsort(order)].reshape(T, TOP, H))


def scattered(x, router, up, down):
    """The same, added up by a scatter."""
    weights, ids = chosen(x, router)
    order = jnp.argsort(ids.reshape(-1))
    sizes = jnp.bincount(ids.reshape(-1), length=E)
    y = jax.lax.ragged_dot(halves(jax.lax.ragged_dot(x[order // TOP], up, sizes)), down, sizes)
    return jnp.zeros_like(x).at[order // TOP].add(y * weights.reshape(-1)[order][:, None])


def everywhere(x, router, up, down, act=halves):
    """Every expert on every token, weighted by one_hot."""
    weights, ids = chosen(x, router)
    y = jnp.einsum("tei,eih->teh", act(jnp.einsum("th,ehc->tec", x, up)), down)
    return jnp.einsum("tk,tke,teh->th", weights, jax.nn.one_hot(ids, E), y)


def switched(x, router, up, down):
    """One expert a token, experts first."""
    probabilities = jax.nn.softmax(x @ router)
    best = jnp.argmax(probabilities, -1)
    mask = jax.nn.one_hot(best, E) * probabilities.max(-1)[:, None]
    y = jnp.einsum("eti,eih->eth", halves(jnp.einsum("th,ehc->etc", x, up)), down)
    return jnp.einsum("te,eth->th", mask, y)


def masks_of(x, router, capacity=CAPACITY):
    """GShard's dispatch and combine (T, E, C), of one expert a token."""
    probabilities = jax.nn.softmax(x @ router)
    mask = jax.nn.one_hot(jnp.argmax(probabilities, -1), E)
    position = jnp.cumsum(mask, 0) * mask
    mask = mask * (position <= capacity)
    gate = (probabilities * mask).sum(-1)
    slot = jax.nn.one_hot(((position * mask).sum(-1) - 1).astype(jnp.int32), capacity)
    combine = gate[:, None, None] * mask[..., None] * slot[:, None]
    return (combine != 0).astype(x.dtype), combine


def slots(x, router, up, down, change=lambda dispatch: dispatch):
    dispatch, combine = masks_of(x, router)
    rows = jnp.einsum("tec,th->ech", change(dispatch), x)
    y = jnp.einsum("eci,eih->ech", halves(jnp.einsum("ech,ehi->eci", rows, up)), down)
    return jnp.einsum("tec,ech->th", combine, y)


def grouped_slots(x, router, up, down):
    """Two groups of tokens, each with a capacity of its own."""
    x = x.reshape(2, T // 2, H)
    dispatch, combine = jax.vmap(masks_of, (0, None))(x, router)
    rows = jnp.einsum("gsec,gsm->egcm", dispatch, x)
    y = jnp.einsum("egci,eih->egch", halves(jnp.einsum("egch,ehi->egci", rows, up)), down)
    return jnp.einsum("gsec,egcm->gsm", combine, y).reshape(T, H)


def near(found, wanted, tolerance=2e-5):
    wanted = np.asarray(wanted)
    scale = max(1.0, np.abs(wanted).max(initial=0))
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=tolerance * scale)


def same(function, *arrays):
    """Its results are the same when it is compiled; the report."""
    jitted = gossamer.jax.jit(function)
    near(jitted(*arrays), function(*arrays))
    return jitted.report()


def gradients(function, *arrays):
    return jax.jit(jax.grad(lambda *a: (function(*a) ** 2).sum(), argnums=ALL))(*arrays)


LAYERS = [sorted_rows, scattered, everywhere, switched, slots, grouped_slots]


@pytest.mark.parametrize("function", LAYERS, ids=lambda f: f.__name__)
def test_spellings_are_compiled(function):
    report = same(function, *drawn())
    assert [part.kind for part in report.compiled] == ["experts"] and not report.left
    assert "compiled experts at" in str(report) and "test_jax_jit_experts.py" in str(report)


@pytest.mark.parametrize("function", [scattered, everywhere, grouped_slots], ids=lambda f: f.__name__)
def test_gradients(function):
    arrays = drawn(1)
    found = gradients(gossamer.jax.jit(function), *arrays)
    for one, wanted in zip(found, gradients(function, *arrays), strict=True):
        near(one, wanted, 1e-4)


def test_halves_in_turns_and_experts_without_a_gate():
    x, router, up, down = drawn()
    assert same(
        lambda *a: sorted_rows(*a, lambda h: jax.nn.gelu(h[:, ::2]) * (h[:, 1::2] + 1)), x, router, up, down
    )
    report = same(lambda *a: everywhere(*a, jax.nn.gelu), x, router, up[..., :INNER], down)
    assert [part.kind for part in report.compiled] == ["experts"]


def test_products_alone():
    x, _, up, _ = drawn()
    sizes = jnp.array([3, 0, 9, 10])
    report = same(lambda x, up: jax.lax.ragged_dot(x, up, sizes), x, up)
    assert [part.kind for part in report.compiled] == ["ragged_dot"]
    turned = jax.lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])

    def other(x, up):
        return jax.lax.ragged_dot_general(x, up.swapaxes(1, 2), sizes, turned)

    assert [part.kind for part in same(other, x, up).compiled] == ["ragged_dot"]


@pytest.mark.parametrize(
    "change",
    [
        lambda dispatch: (jnp.cumsum(dispatch, 0) > 0).astype(dispatch.dtype),  # several tokens in a slot
        lambda dispatch: (2 * (dispatch > 0)).astype(dispatch.dtype),  # not 0 or 1
        lambda dispatch: jnp.zeros_like(dispatch, int).astype(dispatch.dtype),  # nobody
    ],
    ids=["several", "twice", "nobody"],
)
def test_what_only_contents_tell_is_looked_at_when_the_program_runs(change):
    same(lambda *a: slots(*a, change), *drawn())


def biased(x, router, up, down):
    return sorted_rows(x, router, up, down, lambda h: halves(h + jnp.arange(2 * INNER)))


def other_groups(x, router, up, down):
    sizes = jnp.array([4, 8, 2, 9])
    h = halves(jax.lax.ragged_dot(x, up, sizes))
    return jax.lax.ragged_dot(h, down, sizes[::-1])


def with_products(x, router, up, down):
    sizes = jnp.array([4, 8, 2, 9])
    h = jax.lax.ragged_dot(x, up, sizes)
    return jax.lax.ragged_dot(halves(h), down, sizes).sum() + h.sum()


def dense_weights(x, router, up, down):
    y = jnp.einsum("tei,eih->teh", halves(jnp.einsum("th,ehc->tec", x, up)), down)
    return jnp.einsum("te,teh->th", jax.nn.softmax(x @ router), y)


def in_part(x, router, up, down):
    weights, ids = chosen(x, router)
    y = jnp.einsum("tei,eih->teh", halves(jnp.einsum("th,ehc->tec", x, up))[: T // 2], down)
    return jnp.einsum("tk,tke,teh->th", weights[: T // 2], jax.nn.one_hot(ids[: T // 2], E), y)


def from_the_second(x, router, up, down):
    weights, ids = chosen(x, router)
    y = jnp.einsum("tei,eih->teh", halves(jnp.einsum("th,ehc->tec", x[1:], up)), down)
    return jnp.einsum("tk,tke,teh->th", weights[:-1], jax.nn.one_hot(ids[:-1], E), y)


def learned_dispatch(x, router, up, down):
    return slots(x, router, up, down, lambda dispatch: dispatch * jax.nn.softmax(x @ router)[..., None])


@pytest.mark.parametrize(
    "function, kinds, why",
    [
        (biased, ["ragged_dot", "ragged_dot"], None),
        (other_groups, ["ragged_dot", "ragged_dot"], None),
        (with_products, ["ragged_dot"], "used elsewhere"),
        (dense_weights, [], "no sum of one_hot"),
        (learned_dispatch, [], "may have a gradient"),
        (in_part, [], None),
        (from_the_second, [], "read in part"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_is_not_the_same_is_left_alone(function, kinds, why):
    report = same(function, *drawn())
    assert [part.kind for part in report.compiled] == kinds
    assert not report.left if why is None else why in str(report)


def test_in_the_body_of_a_scan():
    x, router, up, down = drawn()

    def model(x, router, up, down):
        return jax.lax.scan(lambda x, _: (x + sorted_rows(x, router, up, down), None), x, length=2)[0]

    assert [part.kind for part in same(model, x, router, up, down).compiled] == ["experts"]


def test_attention_and_experts_of_one_layer():
    x, router, up, down = drawn()

    def model(x, router, up, down):
        q = x[None, :, None]
        x = x + jax.nn.dot_product_attention(q, q, q, is_causal=True)[0, :, 0]
        return x + everywhere(x, router, up, down)

    assert [part.kind for part in same(model, x, router, up, down).compiled] == ["attention", "experts"]

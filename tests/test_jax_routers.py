"""`gossamer.jax.route`: what `gossamer.route` gives on tensors, with its gradients."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402

import gossamer  # noqa: E402
import gossamer.jax  # noqa: E402
from gossamer.ir.errors import InputError  # noqa: E402

T, E, G, D = 23, 8, 4, 12


def drawn(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


LOGITS, LEVELS = drawn(T, E, seed=0), drawn(T, G, seed=1)
FEATURES, VECTORS = drawn(T, D, seed=2), drawn(E, D, seed=3)
TABLE = np.random.default_rng(4).permutation(3 * E).reshape(3, E).astype(np.int32)
REQUESTS = np.random.default_rng(5).integers(-1, 4, T).astype(np.int32)

ROUTERS = {
    "relative": (3, {}, dict(relative_threshold=0.5, min_k=1)),
    "at least two": (4, {}, dict(top_p=0.3, min_k=2)),
    "entropy": (E, {}, dict(top_p=0.6, entropy_threshold=0.7)),
    "shannon": (E, {}, dict(threshold=0.1, entropy_threshold=1.8, entropy_index=1)),
    "first choices first": (2, {}, dict(capacity=3, capacity_order="choice")),
    "two levels": (2, {"group_logits": LEVELS}, dict(top_groups=2)),
    "cosines": (2, {"expert_vectors": VECTORS, "temperature": np.full(1, 0.9, np.float32)}, {}),
    "tables": (2, {}, dict(remap=TABLE, request_ids=REQUESTS, num_experts=3 * E)),
}


def of(name, library):
    """(function of arrays, arrays) of a router; the function gives ids and weights."""
    top_k, arrays, options = ROUTERS[name]
    arrays = {"router_logits": FEATURES if name == "cosines" else LOGITS, **arrays}
    made = (lambda a: torch.from_numpy(a.copy())) if library is gossamer else jnp.asarray
    options = {n: made(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}

    def run(given):
        found = library.route(top_k=top_k, **given, **options)
        return (found.topk_ids, found.topk_weights) if library is gossamer else found

    return run, {n: made(a) for n, a in arrays.items()}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_and_their_gradients(name):
    run, arrays = of(name, gossamer.jax)
    plain, tensors = of(name, gossamer)
    tensors = {n: t.requires_grad_() for n, t in tensors.items()}
    ids, weights = plain(tensors)
    found_ids, found = jax.jit(run)(arrays)
    np.testing.assert_array_equal(found_ids, ids.numpy())
    np.testing.assert_allclose(found, weights.detach().numpy(), atol=1e-5)
    slope = drawn(*weights.shape, seed=6)
    (weights * torch.from_numpy(slope)).sum().backward()
    slopes = jax.jit(jax.grad(lambda a: (run(a)[1] * slope).sum()))(arrays)
    for n, tensor in tensors.items():
        np.testing.assert_allclose(slopes[n], tensor.grad.numpy(), atol=2e-5, err_msg=n)


def test_experts_choose():
    def layer(library, made, logits):
        x, up, down = map(
            made, (drawn(T, D, seed=7), drawn(E, 10, D, seed=8) / 4, drawn(E, D, 5, seed=9) / 3)
        )
        return library.moe(x, made(logits), up, down, top_k=2, router="expert_choice")

    wanted = layer(gossamer, lambda a: torch.from_numpy(np.array(a)), LOGITS)
    np.testing.assert_allclose(layer(gossamer.jax, jnp.asarray, LOGITS), wanted.numpy(), atol=1e-5)
    ids, weights = gossamer.jax.route(jnp.asarray(LOGITS), 2, router="expert_choice", capacity=3)
    assert ids.shape == weights.shape == (T, E)
    assert ((ids >= 0).sum(0) == 3).all() and (jnp.where(ids < 0, weights, 0) == 0).all()


def test_vmap_of_two_levels_is_one_call():
    run, arrays = of("two levels", gossamer.jax)
    many = {n: jnp.stack([a, -a]) for n, a in arrays.items()}
    ids, weights = jax.vmap(run)(many)
    for n in range(2):
        wanted = run({name: a[n] for name, a in many.items()})
        np.testing.assert_array_equal(ids[n], wanted.ids)
        np.testing.assert_allclose(weights[n], wanted.weights, atol=1e-6)
    assert str(jax.make_jaxpr(jax.vmap(run))(many)).count("gossamer_kernels[") == 1


BAD = {
    "entropy alone": (dict(entropy_threshold=0.5), "entropy_threshold"),
    "order": (dict(capacity=2, capacity_order="expert"), "capacity_order"),
    "a table alone": (dict(remap=TABLE), "both or neither"),
    "group logits of others": (dict(group_logits=LEVELS[:3]), "group_logits"),
    "choice of groups": (dict(router="expert_choice", groups=2), "where experts choose"),
    "vectors": (dict(expert_vectors=VECTORS), "expert_vectors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, message = BAD[name]
    with pytest.raises(InputError, match=message):
        gossamer.jax.route(jnp.asarray(LOGITS), 2, **options)

"""`gossamer.jax.attention` on arrays that are spread over devices outside of `shard_map`."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

import gossamer.jax  # noqa: E402
from gossamer import masks  # noqa: E402

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 4, reason="XLA was started with fewer devices")
T, HEADS, SIZE = 13, 4, 16
SLOPES, LENS = jnp.arange(4.0), jnp.array([13, 5, 9, 1])


def drawn(keys):
    shapes = (4, T, HEADS, SIZE), (4, T, keys, SIZE), (4, T, keys, SIZE)
    return [jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes)]


def causal(q, k, v, **options):
    return gossamer.jax.attention(q, k, v, mask=masks.causal(), **options)


def by_head(q, k, v):
    return causal(q, k, v, score_mod=lambda score, b, h, q_idx, kv_idx: score + SLOPES[h] * kv_idx)


def by_sequence(q, k, v):
    return gossamer.jax.attention(q, k, v, mask=lambda b, h, q_idx, kv_idx: kv_idx < LENS[b])


def with_lengths(q, k, v):
    return causal(q, k, v, kv_lens=LENS, sinks=SLOPES)


# What is called, the heads of keys, and the (sequences, heads) of one device's call, and of its gradients.
CALLS = {
    "heads": (causal, 4, (2, 2), (2, 2)),
    "groups of heads": (causal, 2, (2, 2), (2, 2)),
    "one head of keys": (causal, 1, (2, 2), (2, 4)),
    "a map of heads": (by_head, 2, (2, 4), (2, 4)),
    "a mask of sequences": (by_sequence, 2, (4, 2), (4, 2)),
    "lengths and sinks": (with_lengths, 2, (2, 2), (2, 2)),
}


def spread(arrays):
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), (AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    specs = (PartitionSpec("batch", None, "heads" if x.shape[2] > 1 else None) for x in arrays)
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


@pytest.mark.parametrize("name", CALLS)
def test_each_device_computes_its_part(name):
    function, keys, *parts = CALLS[name]
    arrays = drawn(keys)
    placed = spread(arrays)

    def total(q, k, v):
        out = function(q, k, v)
        return (out**2).sum(), out

    run = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
    compiled = run.lower(*placed).compile()
    for ours, whole in zip(jax.tree.leaves(compiled(*placed)), jax.tree.leaves(run(*arrays)), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if "custom-call(" in line]
    shapes = [f"f32[{batch},{T},{heads},{SIZE}]" for batch, heads in parts]
    assert len(calls) == len(shapes)
    assert all(shape in line.partition("custom-call")[0] for shape, line in zip(shapes, calls, strict=True))
    if parts == [(2, 2), (2, 2)]:
        assert "all-gather" not in text

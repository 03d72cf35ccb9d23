"""`gossamer.jax.linear_attention`: attention whose scores are products of features, in a JAX program."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ...ir.errors import InputError
from ..linear.feature_maps import FeatureMap
from ..linear.form import DTYPES, GRADIENTS, NAMES, Settings, check_shapes, rows_of, settings_of, shapes_of
from .attention import checked
from .gradient import _Names
from .kernels import call


def linear_attention(
    query: Any,
    key: Any,
    value: Any,
    feature_map: Any = "elu",
    *,
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    key_map: Any = None,
    initial_state: Any = None,
    return_state: bool = False,
    layout: str = "BTNH",
) -> Any:
    """Linear attention: o_i = sum_j (phi(q_i) . phi(k_j)) v_j / (sum_j phi(q_i) . phi(k_j) + eps).

    What `gossamer.linear_attention` computes, by the same kernels, in a JAX program for a CPU or an NVIDIA
    GPU: under jit, vmap (which becomes the kernel's batch), grad and shard_map.

    Args:
        query: (B, T, N, H), float16, bfloat16, float32 or float64. Without a batch, (T, N, H), so are the
            others and the results.
        key: (B, S, K, H), same dtype; N a multiple of K; a batch of 1 serves all queries. With `causal` S
            is T.
        value: (B, S, K, Hv).
        feature_map: phi: "elu" (elu(x) + 1), "relu" (relu(x) + 1e-3), "exp", "identity"; a map of
            `gossamer.feature_maps`, whose projections may be JAX's arrays, traced ones too; or a function of
            an element x, written with jax.numpy, which may give a tuple of features.
        causal: row i sums over keys 0 to i.
        normalize: whether to divide by the sum of the scores. eps: is added to it.
        key_map: phi of keys, where it is another one.
        initial_state: what `return_state` gave for the tokens before: (state, sums), or the state alone
            without `normalize`. Use it with `causal`.
        return_state: also return the state behind the last key: (state, sums), with state (B, K, F, Hv) the
            sum of phi(k_j) v_j^T and sums (B, K, F) that of phi(k_j), F features, in float32 (float64 for
            float64); without `normalize` the state alone.
        layout: "BTNH", or "BNTH" for (B, N, T, H), (B, K, S, H) and (B, K, S, Hv).

    Returns:
        (B, T, N, Hv) in the query's dtype and layout, and the state if asked for. Sums are float32 (float64
        for float64). Gradients flow to query, key, value, the initial state, and to projections.

    Raises:
        InputError: a shape, dtype or value is wrong. TraceError: a feature map cannot be captured.
        UnsupportedError: a platform other than these, a forward-mode gradient or a gradient of a gradient.
    """
    (q, k, v), single = checked(query, key, value, layout, who="linear_attention")
    states = () if initial_state is None else initial_state if normalize else (initial_state,)
    if not isinstance(states, tuple | list) or len(states) not in (0, 2 if normalize else 1):
        expected = "(state, sums)" if normalize else "a state, without normalize"
        raise InputError("linear_attention.initial_state", expected, type(initial_state).__name__)
    settings = settings_of(
        feature_map,
        key_map,
        causal=causal,
        normalize=normalize,
        eps=eps,
        initial=bool(states),
        final=return_state,
    )
    k, v = (jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])) for x in (k, v))
    rows: Any = tuple(jnp.swapaxes(x, 1, 2) if layout == "BTNH" else x for x in (q, k, v))
    check_shapes(*rows, causal=settings.causal, enable_gqa=True)
    if settings.prepares:
        prepared = rows_of(rows[0], rows[1], settings)
        rows = (*prepared, rows[2])
        q, k = (jnp.swapaxes(x, 1, 2) if layout == "BTNH" else x for x in rows[:2])
    operands = {"q": q, "k": k, "v": v}
    given = (jnp.asarray(x)[None] if single else jnp.asarray(x) for x in states)
    operands |= dict(zip(NAMES[3:], given, strict=False))
    _check_states(operands, rows[1], rows[2], len(settings.k_map.parts))
    form = (layout, settings.q_map.key, settings.k_map.key, settings.causal, settings.eps)
    found: Any = attend((*form, settings.initial, settings.final), operands)
    found = tuple(x[0] for x in found) if single else tuple(found)
    if not return_state:
        return found[0]
    return found[0], (found[1:] if normalize else found[1])


def _check_states(operands: Mapping[str, Any], k: Any, v: Any, parts: int) -> None:
    state = (*k.shape[:2], parts * k.shape[3], v.shape[3])
    wide = jnp.dtype(jnp.float64 if v.dtype == jnp.float64 else jnp.float32)
    for name, shape in (("state", state), ("sums", state[:3])):
        array = operands.get(name)
        if array is not None and (array.shape != shape or array.dtype != wide):
            got = f"{array.shape} of {array.dtype}"
            raise InputError("linear_attention.initial_state", f"{shape} of {wide}", got)


# kernels --------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(form: tuple[Any, ...], operands: dict[str, Any]) -> tuple[Any, ...]:
    """(out, *new states) of operands by the kernels' names, with gradients by kernels.

    form: layout, keys of both maps, causal, eps, initial, final."""
    return tuple(_forward(form, operands, keeps=False).values())


def _settings(form: tuple[Any, ...]) -> Settings:
    _, q_map, k_map, *options = form
    causal, eps, initial, final = options
    return Settings(FeatureMap(*q_map), FeatureMap(*k_map), causal, eps, initial, final)


def _forward(form: tuple[Any, ...], operands: Mapping[str, Any], *, keeps: bool) -> dict[str, Any]:
    settings, by_rows = _settings(form), form[0] == "BTNH"

    def turned(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], shape[2], shape[1], shape[3]) if by_rows else tuple(shape)

    values = {
        n: jax.ShapeDtypeStruct(turned(x.shape) if n in NAMES[:3] else x.shape, x.dtype)
        for n, x in operands.items()
    }
    made = shapes_of(values, settings, keeps=keeps)
    results: dict[str, Any] = {
        n: (turned(shape) if n == "o" else shape, DTYPES[dtype]) for n, shape, dtype in made
    }
    if 0 in values["q"].shape or 0 in values["k"].shape:
        return _empty(settings, operands, results)
    return call("linear", operands, results, (*form, keeps, ()))


def _empty(
    settings: Settings, operands: Mapping[str, Any], results: Mapping[str, tuple[tuple[int, ...], Any]]
) -> dict[str, Any]:
    """The results where there are no rows or no keys: states stay what they were."""
    if "state" in operands and operands["q"].size:
        raise InputError("linear_attention.key", "at least one key beside an initial state", "none")
    found: dict[str, Any] = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in results.items()}
    if settings.eps == 0:
        shape, dtype = results["o"]
        found["o"] = jnp.full(shape, jnp.nan, dtype)
    return found | {f"new_{n}": operands[n] for n in ("state", "sums") if n in operands and settings.final}


def _kept_forward(form: tuple[Any, ...], operands: Any) -> Any:
    settings, arrays = _settings(form), {name: x.value for name, x in operands.items()}
    wanted = _Names(name for name in NAMES if name in operands and operands[name].perturbed)
    found = _forward(form, arrays, keeps=bool(wanted))
    kept = {name: found[name] for name in settings.kept} if wanted else {}
    return tuple(x for name, x in found.items() if settings.given(name)), (arrays, kept, wanted)


def _backward(form: tuple[Any, ...], saved: Any, cotangents: Any) -> Any:
    arrays, kept, wanted = saved
    found: dict[str, Any] = {}
    if wanted and not all(isinstance(x, SymbolicZero) for x in cotangents):
        slopes = [x if isinstance(x, jax.Array) else jnp.zeros(x.shape, x.dtype) for x in cotangents]
        found = _gradients(form, arrays, kept, slopes, tuple(wanted))
    return ({name: found.get(name) for name in arrays},)


def _gradients(
    form: tuple[Any, ...],
    arrays: dict[str, Any],
    kept: dict[str, Any],
    slopes: list[Any],
    wanted: tuple[str, ...],
) -> dict[str, Any]:
    if not arrays["q"].size or not arrays["k"].size:
        found = {name: jnp.zeros_like(arrays[name]) for name in wanted}
        return found | {n: x for n, x in zip(("state", "sums"), slopes[1:], strict=False) if n in wanted}
    named = dict(zip(GRADIENTS, slopes, strict=False))
    results = {f"d{name}": (arrays[name].shape, arrays[name].dtype) for name in wanted}
    made = call("linear gradients", arrays | kept | named, results, (*form, True, wanted))
    return {name: made[f"d{name}"] for name in wanted}


attend.defvjp(_kept_forward, _backward, symbolic_zeros=True)

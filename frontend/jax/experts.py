"""`gossamer.jax.experts`, `moe` and `ragged_dot`: layers of experts in a JAX program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ...ir.errors import InputError
from ..moe.layer import MOST_EXPERTS, layer_of_shapes
from ..trace.tensor import dtype_name
from .activation import activation_of
from .layer import Sizes, grouped, layer
from .problem import FLOATS
from .routers import ROUTING, route


def experts(
    x: Any,
    topk_ids: Any,
    topk_weights: Any,
    gate_up_proj: Any,
    down_proj: Any,
    *,
    activation: str | Callable[..., Any] = "swiglu",
    gate_up_bias: Any = None,
    down_bias: Any = None,
    transposed: bool | None = None,
    interleaved: bool = False,
    recompute: bool = False,
) -> Any:
    """For every token the weighted sum of its experts' outputs, down(activation(gate_up(x))).

    Under jit, vmap (calls that share matrices become one), grad and shard_map, on a CPU or an NVIDIA GPU.
    Arguments and layouts are those of `gossamer.experts`, as arrays:

    Args:
        x: (T, H), float16, bfloat16, float32 or float64. T may be 0.
        topk_ids: (T, k), int32 or int64; ids outside 0 .. E - 1 mean "not here".
        topk_weights: (T, k), any float dtype.
        gate_up_proj, down_proj: (E, 2 I, H) and (E, H, I), gate first, then up, or transposed, (E, H, 2 I)
            and (E, I, H); without a gate I in place of 2 I. gate_up_bias, down_bias: (E, 2 I) and (E, H).
        activation: a name, or a function of (gate, up), or of (x), written with jax.numpy.
        transposed, interleaved, recompute: as for `gossamer.experts`.

    Returns (T, H) in x's dtype; sums run in float32 (float64 for float64), in the order of k. Gradients flow
    to all but ids; forward-mode ones are refused by JAX. Raises InputError, TraceError for a function that
    cannot be captured."""
    given = {"x": x, "weights": topk_weights, "gate_up": gate_up_proj, "down": down_proj}
    given |= {n: b for n, b in (("gate_up_bias", gate_up_bias), ("down_bias", down_bias)) if b is not None}
    arrays: dict[str, Any] = {name: jnp.asarray(a) for name, a in given.items()}
    ids = jnp.asarray(topk_ids)
    _check_layer(arrays, ids)
    matrices = (arrays["gate_up"], arrays["down"], arrays.get("gate_up_bias"), arrays.get("down_bias"))
    made = layer_of_shapes(arrays["x"].shape[1], matrices, (2, 2), transposed, interleaved)
    term = activation_of(activation, made.gated)
    shape = (made.experts, made.hidden, made.inner, made.gated, made.transposed, made.interleaved)
    sizes = Sizes(*shape, gate_up_bias is not None, term, bool(recompute))
    return layer(sizes.text, {**arrays, "ids": ids})


def moe(
    x: Any,
    router_logits: Any,
    gate_up_proj: Any,
    down_proj: Any,
    *,
    top_k: int,
    router: str | Callable[..., Any] = "softmax",
    activation: str | Callable[..., Any] = "swiglu",
    **options: Any,
) -> Any:
    """A mixture of experts: `route` decides from the logits (T, E), `experts` computes.

    options: of `route` and of `experts`, by name. Returns (T, H) in x's dtype. Raises as those two do."""
    known = {name: options.pop(name) for name in ROUTING if name in options}
    logits = jnp.asarray(router_logits)
    sizes = [(x.shape[0], "tokens, as x has"), (gate_up_proj.shape[0], "experts, as gate_up_proj has")]
    for d, (size, what) in enumerate(sizes[: 1 if known.keys() & {"expert_vectors", "remap"} else 2]):
        if logits.ndim == 2 and logits.shape[d] != size:
            raise InputError("moe.router_logits", f"{size} {what}", logits.shape[d])
    ids, weights = route(logits, top_k, router=router, **known)
    return experts(x, ids, weights, gate_up_proj, down_proj, activation=activation, **options)


def ragged_dot(lhs: Any, rhs: Any, group_sizes: Any) -> Any:
    """Products of groups of rows with a matrix each, as `jax.lax.ragged_dot` computes them.

    lhs (m, k), rhs (g, k, n), group_sizes (g,) integers -> (m, n) in lhs's dtype; rows behind the last group
    are zeros. Sums run in float32 (float64 for float64), in a fixed order. Gradients flow to lhs and rhs.
    Raises InputError."""
    lhs, rhs, sizes = (jnp.asarray(a) for a in (lhs, rhs, group_sizes))
    _check_float("ragged_dot.lhs", lhs)
    if lhs.ndim != 2 or rhs.ndim != 3 or rhs.dtype != lhs.dtype or rhs.shape[1] != lhs.shape[1]:
        wanted = f"(groups, {lhs.shape[-1]}, n) of {lhs.dtype}, for lhs (m, k)"
        raise InputError("ragged_dot.rhs", wanted, f"{rhs.shape} of {rhs.dtype}, lhs {lhs.shape}")
    if sizes.shape != (rhs.shape[0],) or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise InputError(
            "ragged_dot.group_sizes", f"({rhs.shape[0]},) integers", f"{sizes.shape} {sizes.dtype}"
        )
    if not 1 <= rhs.shape[0] <= MOST_EXPERTS:
        raise InputError("ragged_dot.rhs", f"1 to {MOST_EXPERTS} groups", rhs.shape[0])
    return grouped(False, lhs, rhs, bounds_of(sizes, lhs.shape[0]))


def bounds_of(sizes: Any, rows: int) -> Any:
    """(G + 1,) int32: where groups of so many rows begin, none behind the last row."""
    ends = jnp.minimum(jnp.cumsum(sizes.astype(jnp.int32)), rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends])


# arguments ------------------------------------------------------------------------------------------


def _check_float(where: str, array: Any) -> None:
    if dtype_name(array.dtype) not in FLOATS:
        raise InputError(where, "float16, bfloat16, float32 or float64", array.dtype)


def _check_layer(arrays: dict[str, Any], ids: Any) -> None:
    """Raise InputError unless ranks and dtypes are those of a layer."""
    x, weights = arrays["x"], arrays["weights"]
    ranks = {"x": (2, "(tokens, hidden)"), "weights": (2, "(tokens, top_k)")}
    ranks |= dict.fromkeys(("gate_up", "down"), (3, "(experts, out, in) or (experts, in, out)"))
    ranks |= dict.fromkeys(("gate_up_bias", "down_bias"), (2, "(experts, out)"))
    shown = {"weights": "topk_weights", "gate_up": "gate_up_proj", "down": "down_proj"}
    for name, array in arrays.items():
        where, (rank, meaning) = f"experts.{shown.get(name, name)}", ranks[name]
        if array.ndim != rank:
            raise InputError(where, f"{rank} dimensions {meaning}", array.shape)
        _check_float(where, array)
        if name != "weights" and array.dtype != x.dtype:
            raise InputError(where, f"x's dtype {x.dtype}", array.dtype, "Cast one of them")
    if ids.ndim != 2 or dtype_name(ids.dtype) not in ("i32", "i64"):
        raise InputError("experts.topk_ids", "(tokens, top_k), int32 or int64", f"{ids.shape} {ids.dtype}")
    if ids.shape[0] != x.shape[0]:
        raise InputError("experts.topk_ids", f"{x.shape[0]} tokens, as x has", ids.shape[0])
    if weights.shape != ids.shape:
        raise InputError("experts.topk_weights", f"the shape of the ids {ids.shape}", weights.shape)

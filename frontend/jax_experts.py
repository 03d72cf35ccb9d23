"""`gossamer.jax.experts`, `moe`, `route` and `ragged_dot`: layers of experts in a JAX program."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..ir.errors import InputError, TraceError
from .activation import activation_term
from .graph_terms import reads_in, replaced
from .jax_kernels import call
from .jax_layer import Sizes, grouped, layer
from .jax_problem import FLOATS
from .jax_program import flatten
from .jax_terms import LeftAlone, Reader
from .layer import MOST_EXPERTS, layer_of_shapes
from .layer_kernels import cut_of, router_facts
from .term import Term
from .trace_tensor import dtype_name


class Routed(NamedTuple):
    """Which experts a token takes: ids (T, k) int32, -1 for none, and weights (T, k), float32 or float64."""

    ids: Any
    weights: Any


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
    known = {name: options.pop(name) for name in _ROUTING if name in options}
    logits = jnp.asarray(router_logits)
    for d, (size, what) in enumerate(
        ((x.shape[0], "tokens, as x has"), (gate_up_proj.shape[0], "experts, as gate_up_proj has"))
    ):
        if logits.ndim == 2 and logits.shape[d] != size:
            raise InputError("moe.router_logits", f"{size} {what}", logits.shape[d])
    ids, weights = route(logits, top_k, router=router, **known)
    return experts(x, ids, weights, gate_up_proj, down_proj, activation=activation, **options)


_ROUTING = (
    "renormalize", "correction_bias", "groups", "top_groups", "scale", "top_p", "threshold", "capacity",
    "seed", "token_ids",
)  # fmt: skip


def route(
    router_logits: Any,
    top_k: int,
    *,
    router: str | Callable[..., Any] = "softmax",
    renormalize: bool = True,
    correction_bias: Any = None,
    groups: int = 1,
    top_groups: int | None = None,
    scale: float = 1.0,
    top_p: float | None = None,
    threshold: float | None = None,
    capacity: int | None = None,
    seed: int = 0,
    token_ids: Any = None,
) -> Routed:
    """The top_k experts of every token, and their weights, from logits (T, E) of any float dtype.

    Arguments are those of `gossamer.route`; numbers are Python's. A function as router is written with
    jax.numpy. Returns (ids, weights): (T, k) int32, -1 where an expert is not taken, and (T, k) float32
    (float64 for float64). Gradients flow from weights to logits. Raises InputError, TraceError."""
    logits = jnp.asarray(router_logits)
    if logits.ndim != 2:
        raise InputError("route.router_logits", "2 dimensions (tokens, experts)", logits.shape)
    _check_float("route.router_logits", logits)
    cut, tokens = cut_of(top_p, threshold, capacity), logits.shape[0]
    wide = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    corrected = None if correction_bias is None else dtype_name(jnp.dtype(wide))
    hashed, limited = token_ids is not None, capacity is not None
    options = (renormalize, corrected, groups, top_groups, cut)
    facts = router_facts(logits.shape[1], top_k, router, *options)
    operands: dict[str, Any] = {}
    if corrected is not None:
        operands["bias"] = bias = jnp.asarray(correction_bias).astype(wide)
        if bias.shape != (logits.shape[1],):
            raise InputError("route.correction_bias", f"shape ({logits.shape[1]},)", bias.shape)
    if hashed:
        operands["token_ids"] = names = jnp.asarray(token_ids)
        if router != "random" or names.shape != (tokens,):
            raise InputError("route.token_ids", f"shape ({tokens},), with router 'random'", names.shape)
        if not jax.config.read("jax_enable_x64"):
            raise InputError("route.token_ids", "64-bit integers", names.dtype, "Set jax_enable_x64")
        operands["token_ids"] = names.astype(jnp.int64)
    numbers: dict[str, float] = {"scale": float(scale)}
    if cut is not None:
        numbers["limit"] = float(top_p if threshold is None else threshold)  # type: ignore[arg-type]
    if facts[2] == "random":
        numbers["seed"] = int(seed)
    if capacity is not None:
        numbers["capacity"] = int(capacity)
    term = activation_of(router, False) if callable(router) else None
    spelled = router if isinstance(router, str) else jax.tree_util.Partial(router)
    settings = ((*facts, cut, hashed, limited, term), tuple(numbers.items()), spelled)
    decided: Any = _decide(*settings, logits, operands)
    return Routed(*decided[:2])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _decide(facts: Any, numbers: Any, router: Any, logits: Any, operands: dict[str, Any]) -> Any:
    tokens, count = logits.shape[0], facts[1]
    wide = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    results = {"ids": ((tokens, count), jnp.int32), "weights": ((tokens, count), wide)}
    if facts[-2]:
        results["chosen"] = results["ids"]
    if not tokens:
        return tuple(jnp.zeros(*result) for result in results.values())
    found = call("router", {"logits": logits, **operands}, results, facts, **dict(numbers))
    return tuple(found.values())


def _decide_forward(facts: Any, numbers: Any, router: Any, logits: Any, operands: dict[str, Any]) -> Any:
    decided: Any = _decide(facts, numbers, router, logits, operands)
    return decided, (logits, decided[2 if facts[-2] else 0], operands)


def _decide_backward(facts: Any, numbers: Any, router: Any, saved: Any, cotangents: Any) -> Any:
    logits, ids, operands = saved
    scale, nothing = dict(numbers)["scale"], dict.fromkeys(operands)
    if facts[2] == "random":
        return None, nothing

    def weights(logits: Any) -> Any:
        return _weights(logits, ids, router, facts[3]) * scale

    _, back = jax.vjp(weights, logits)
    return back(cotangents[1])[0], nothing


_decide.defvjp(_decide_forward, _decide_backward)


def _weights(logits: Any, ids: Any, router: Any, renormalize: bool) -> Any:
    """The weights of the chosen experts by jax.numpy, which differentiates them; 0 where nobody is chosen."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "softmax_of_topk": lambda x: x}
    whole = (scores[router] if isinstance(router, str) else router)(wide)
    found = jnp.take_along_axis(whole, jnp.maximum(ids, 0), 1)
    if router == "softmax_of_topk":
        return jax.nn.softmax(jnp.where(ids < 0, -jnp.inf, found), axis=-1)
    found = jnp.where(ids < 0, 0.0, found)
    return found / (found.sum(-1, keepdims=True) + 1e-20) if renormalize else found


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


def activation_of(activation: Any, gated: bool) -> Term:
    """The term over x0 (and x1) of a name or a function. Raises InputError, TraceError."""
    if not callable(activation) or hasattr(activation, "term"):
        return activation_term(activation, gated=gated)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    given = (number, number) if gated else (number,)
    try:
        closed = jax.make_jaxpr(activation)(*given)
    except (TypeError, AttributeError):
        return activation_term(activation, gated=gated)  # one of torch's, or of methods
    program, reader = flatten(closed), Reader()
    try:
        term = reader.of(program.outputs[0]).term
    except LeftAlone as reason:
        raise TraceError(f"experts.activation: {reason}") from None
    for read in reads_in(term):
        value = reader.leaves[read[1]]
        if value not in program.inputs:
            what = value.op.name if value.op is not None else "an array that it captures"
            raise TraceError(
                f"experts.activation: {what} cannot be captured; use functions of one number each"
            )
        term = replaced(term, read, f"x{program.inputs.index(value)}")
    return term


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

"""`gossamer.jax.route`: which experts tokens take, in a JAX program."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...ir.errors import InputError
from ..moe.router_form import ROUTERS, count_of, cuts_of, groups_of, limits_of, number_of, seed_of
from ..trace.tensor import dtype_name
from .activation import activation_of
from .kernels import call
from .problem import FLOATS

LOG_2, LARGEST = math.log(2), math.log(100)  # of temperatures: what Tutel starts with, and ends at


class Routed(NamedTuple):
    """Which experts a token takes: ids (T, k) int32, -1 for none, and weights (T, k), float32 or float64."""

    ids: Any
    weights: Any


def route(
    router_logits: Any,
    top_k: int,
    *,
    router: str | Callable[..., Any] = "softmax",
    renormalize: bool = True,
    correction_bias: Any = None,
    groups: int = 1,
    top_groups: int | None = None,
    group_logits: Any = None,
    scale: float = 1.0,
    top_p: float | None = None,
    threshold: float | None = None,
    relative_threshold: float | None = None,
    min_k: int = 0,
    entropy_threshold: float | None = None,
    entropy_index: float = 1.1,
    capacity: int | None = None,
    capacity_order: str = "token",
    expert_vectors: Any = None,
    temperature: Any = LOG_2,
    remap: Any = None,
    request_ids: Any = None,
    num_experts: int | None = None,
    seed: int = 0,
    token_ids: Any = None,
) -> Routed:
    """The top_k experts of every token, and their weights, from logits (T, E) of any float dtype.

    Arguments are those of `gossamer.route`; numbers, but for the temperature, are Python's. A function as
    router is written with jax.numpy. Returns (ids, weights): (T, k) int32, -1 where an expert is not taken,
    and (T, k) float32 (float64 for float64). With the router "expert_choice" k is E, and the experts that
    took a token stand at their own numbers. Gradients flow from weights to logits, group_logits,
    expert_vectors and temperature. Raises InputError, TraceError."""
    logits = _floats("router_logits", router_logits, 2, "(tokens, experts)")
    if expert_vectors is not None:
        logits = _cosines(logits, _floats("expert_vectors", expert_vectors, 2, "(experts, D)"), temperature)
    tokens, experts = logits.shape
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    count, scale = count_of(router, top_k, experts, capacity), number_of("scale", scale)
    cuts = {"top_p": top_p, "threshold": threshold, "relative_threshold": relative_threshold}
    if router == "expert_choice":
        others = (group_logits, correction_bias, remap, token_ids, entropy_threshold, *cuts.values())
        if (groups, scale, min_k) != (1, 1.0, 0) or any(other is not None for other in others):
            what = "router_logits, top_k, capacity and expert_vectors alone"
            raise InputError("route", f"{what}, where experts choose", "more than that")
        wanted = -(-tokens * count // experts) if capacity is None else capacity
        return _chosen_by_experts(logits.astype(wide), min(wanted, tokens))
    facts, numbers = cuts_of(router, cuts, min_k, entropy_threshold, entropy_index)
    facts |= {"top_k": count, "renormalize": bool(renormalize)}
    facts["scoring"] = "map" if callable(router) else ROUTERS[router]
    facts["term"] = activation_of(router, False) if callable(router) else None
    numbers["scale"] = scale
    operands: dict[str, Any] = {}
    if correction_bias is not None:
        operands["bias"] = _shaped("correction_bias", correction_bias, (experts,)).astype(wide)
    if group_logits is not None:
        operands["group_logits"] = given = _floats("group_logits", group_logits, 2, "(tokens, groups)")
        groups = _levels(router, given, logits, groups)
        facts["scoring"] = "levels"
    facts |= groups_of(groups, top_groups, experts, count, levels=group_logits is not None)
    if remap is not None or request_ids is not None:
        operands |= _remapped(remap, request_ids, tokens, experts)
        facts["remapped"] = experts if num_experts is None else num_experts
    elif num_experts is not None and num_experts != experts:
        raise InputError("route.num_experts", "a table of ids in remap", num_experts)
    if token_ids is not None:
        operands["token_ids"] = _tokens(router, token_ids, tokens)
    facts |= limits_of(capacity, capacity_order)
    if router == "random":
        numbers["seed"] = int(seed_of(seed))
    if capacity is not None:
        numbers["capacity"] = int(capacity)
    spelled = router if isinstance(router, str) else jax.tree_util.Partial(router)
    decided: Any = _decide(tuple(facts.items()), tuple(numbers.items()), spelled, logits, operands)
    return Routed(*decided[:2])


ROUTING = frozenset(inspect.signature(route).parameters) - {"router_logits", "top_k", "router"}


# kernels --------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _decide(facts: Any, numbers: Any, router: Any, logits: Any, operands: dict[str, Any]) -> Any:
    """(ids, weights), and ids before a limit or a table changed them, if there is one."""
    named, tokens = dict(facts), logits.shape[0]
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    shape = (tokens, named["top_k"])
    results = {"ids": (shape, jnp.int32), "weights": (shape, wide)}
    if "limited" in named or "remapped" in named:
        results["chosen"] = results["ids"]
    if not tokens:
        return tuple(jnp.zeros(*result) for result in results.values())
    found = call("router", {"logits": logits, **operands}, results, facts, **dict(numbers))
    return tuple(found.values())


def _decide_forward(facts: Any, numbers: Any, router: Any, logits: Any, operands: dict[str, Any]) -> Any:
    decided: Any = _decide(facts, numbers, router, logits, operands)
    return decided, (logits, decided[2 if len(decided) == 3 else 0], operands)


def _decide_backward(facts: Any, numbers: Any, router: Any, saved: Any, cotangents: Any) -> Any:
    logits, ids, operands = saved
    named, nothing = dict(facts), dict.fromkeys(operands)
    if named["scoring"] == "random":
        return None, nothing

    def weights(logits: Any, levels: Any) -> Any:
        return _weights(logits, levels, ids, router, named["renormalize"]) * dict(numbers)["scale"]

    _, back = jax.vjp(weights, logits, operands.get("group_logits"))
    found, levels = back(cotangents[1])
    return found, nothing | ({"group_logits": levels} if "group_logits" in operands else {})


_decide.defvjp(_decide_forward, _decide_backward)


def _weights(logits: Any, levels: Any, ids: Any, router: Any, renormalize: bool) -> Any:
    """The weights of the chosen experts by jax.numpy, which differentiates them; 0 where nobody is chosen."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "softmax_of_topk": lambda x: x}
    if levels is not None:
        inner = jax.nn.softmax(wide.reshape(*levels.shape, -1))
        whole = (jax.nn.softmax(levels.astype(wide.dtype))[..., None] * inner).reshape(wide.shape)
    else:
        whole = (scores[router] if isinstance(router, str) else router)(wide)
    found = jnp.take_along_axis(whole, jnp.maximum(ids, 0), 1)
    if router == "softmax_of_topk":
        return jax.nn.softmax(jnp.where(ids < 0, -jnp.inf, found), axis=-1)
    found = jnp.where(ids < 0, 0.0, found)
    return found / (found.sum(-1, keepdims=True) + 1e-20) if renormalize else found


def _chosen_by_experts(logits: Any, capacity: int) -> Routed:
    """Each expert takes the tokens with the largest scores; of equal ones the first."""
    scores, experts = jax.nn.softmax(logits), jnp.arange(logits.shape[1], dtype=jnp.int32)
    _, tokens = jax.lax.top_k(jax.lax.stop_gradient(scores).T, capacity)
    taken = jnp.zeros(scores.shape, bool).at[tokens, experts[:, None]].set(True)
    return Routed(jnp.where(taken, experts, -1), jnp.where(taken, scores, 0))


def _cosines(features: Any, vectors: Any, temperature: Any) -> Any:
    """Cosines of features with vectors, times exp(min(temperature, log 100))."""
    if vectors.shape[1] != features.shape[1] or vectors.dtype != features.dtype:
        wanted = f"(experts, {features.shape[1]}) of {features.dtype}, as the features"
        raise InputError("route.expert_vectors", wanted, f"{vectors.shape} of {vectors.dtype}")
    wide = jnp.promote_types(features.dtype, jnp.float32)
    t = jnp.asarray(temperature, wide)
    if t.size != 1:
        raise InputError("route.temperature", "one number", t.shape)

    def unit(x: Any) -> Any:
        x = x.astype(wide)
        return x / jnp.sqrt(jnp.maximum((x * x).sum(1, keepdims=True), 1e-24))

    return unit(features) @ unit(vectors).T * jnp.exp(jnp.minimum(t.reshape(()), LARGEST))


# arguments ------------------------------------------------------------------------------------------


def _floats(name: str, given: Any, rank: int, meaning: str) -> Any:
    array = jnp.asarray(given)
    if array.ndim != rank:
        raise InputError(f"route.{name}", f"{rank} dimensions {meaning}", array.shape)
    if dtype_name(array.dtype) not in FLOATS:
        raise InputError(f"route.{name}", "float16, bfloat16, float32 or float64", array.dtype)
    return array


def _shaped(name: str, given: Any, shape: tuple[int, ...]) -> Any:
    array = jnp.asarray(given)
    if array.shape != shape:
        raise InputError(f"route.{name}", f"shape {shape}", array.shape)
    return array


def _levels(router: Any, group_logits: Any, logits: Any, groups: int) -> int:
    """The number of groups."""
    found = group_logits.shape[1]
    if router != "softmax":
        raise InputError("route.group_logits", "router 'softmax'", repr(router))
    if group_logits.shape[0] != logits.shape[0] or group_logits.dtype != logits.dtype:
        wanted = f"({logits.shape[0]}, groups) of {logits.dtype}, as the logits"
        raise InputError("route.group_logits", wanted, f"{group_logits.shape} of {group_logits.dtype}")
    if groups not in (1, found):
        raise InputError("route.groups", f"{found}, as group_logits has", groups)
    return found


def _remapped(table: Any, requests: Any, tokens: int, experts: int) -> dict[str, Any]:
    if table is None or requests is None:
        raise InputError("route.remap, request_ids", "both or neither", "one of them")
    table, requests = jnp.asarray(table), _shaped("request_ids", requests, (tokens,))
    if table.ndim != 2 or not table.shape[0] or table.shape[1] != experts:
        raise InputError("route.remap", f"(requests, {experts})", table.shape)
    for name, array in (("remap", table), ("request_ids", requests)):
        if dtype_name(array.dtype) not in ("i32", "i64"):
            raise InputError(f"route.{name}", "int32 or int64", array.dtype)
    return {"table": table, "request": requests}


def _tokens(router: Any, token_ids: Any, tokens: int) -> Any:
    names = jnp.asarray(token_ids)
    if router != "random" or names.shape != (tokens,):
        raise InputError("route.token_ids", f"shape ({tokens},), with router 'random'", names.shape)
    if not jax.config.read("jax_enable_x64"):
        raise InputError("route.token_ids", "64-bit integers", names.dtype, "Set jax_enable_x64")
    return names.astype(jnp.int64)

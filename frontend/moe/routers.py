"""`gossamer.route`: from router logits to a `Routing`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ...ir.errors import InputError
from ..pure import pure
from .activation import activation_term
from .form import MoeForm
from .layers import FLOATS, check_tensor
from .operator import call, learns
from .router_form import ROUTERS, count_of, cuts_of, groups_of, limits_of, number_of, seed_of
from .routing import Routing

LOG_2 = math.log(2)  # what Tutel starts with
INTEGERS = (torch.int32, torch.int64)


def route(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    router: str | Callable[..., Any] = "softmax",
    renormalize: bool = True,
    correction_bias: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int | None = None,
    group_logits: torch.Tensor | None = None,
    scale: float = 1.0,
    top_p: float | None = None,
    threshold: float | None = None,
    relative_threshold: float | None = None,
    min_k: int = 0,
    entropy_threshold: float | None = None,
    entropy_index: float = 1.1,
    capacity: int | None = None,
    capacity_order: str = "token",
    expert_vectors: torch.Tensor | None = None,
    temperature: torch.Tensor | float = LOG_2,
    remap: torch.Tensor | None = None,
    request_ids: torch.Tensor | None = None,
    num_experts: int | None = None,
    seed: int = 0,
    token_ids: torch.Tensor | None = None,
) -> Routing:
    """The top_k experts of every token, and their weights.

    Args:
        router_logits: (T, E), any float dtype.
        top_k: 1 to E.
        router: how logits become scores: "softmax" over all experts (Mixtral, Qwen, OLMoE), "sigmoid"
            (DeepSeek-V3), or "softmax_of_topk": the k largest logits, softmax over these (gpt-oss). Or a
            function of a logit, such as `lambda logit: logit.tanh()`, which is traced.
        renormalize: whether weights of a token are divided by their sum.
        correction_bias: (E,), added to scores for the choice alone (DeepSeek-V3).
        groups, top_groups: experts lie in so many groups of equal size, of which each token may use so many;
            those with the largest sums of their two best scores.
        group_logits: (T, G): two levels (SMILE). Scores are the softmax of these times the softmax of
            router_logits within each of G groups; top_groups then goes by group_logits.
        scale: weights are multiplied by it.
        top_p: of the top_k, only the best until their scores add up to so much; threshold: only those that
            score so much; relative_threshold: so large a part of the best. Tokens then have different numbers
            of experts, min_k at least; ids that are not taken are -1.
        entropy_threshold: tokens whose scores have so large an entropy take all of top_k (DynMoLE, which has
            top_k = E): Tsallis's of `entropy_index`, Shannon's for 1.
        capacity: experts take so many tokens at most; other ids become -1. Which come first, capacity_order
            says: "token", by token (Switch), or "choice", all first choices before all second ones (GShard).
        router "expert_choice": experts take the `capacity` tokens with the largest scores (softmax), by
            default T top_k / E of them, rounded up; weights are scores.
        expert_vectors, temperature: (E, D): router_logits are features (T, D), of the same dtype, and logits
            the cosines of these with the vectors, times exp(min(temperature, log 100)) (Tutel). temperature:
            a number, or a tensor of one. Logits are found at Routing.logits.
        remap, request_ids, num_experts: (R, E) and (T,), int32 or int64: ids become those of the row of the
            table that belongs to the token's request (ExpertWeave), of num_experts in all; tokens of requests
            outside 0 .. R - 1 keep theirs.
        seed, token_ids: of the router "random" (THOR): scores are random bits by seed, token and expert,
            which need no gradient; with token_ids (T,), int64, by what stands there, so that equal ids take
            equal experts (hash routing). Of the logits only the shape counts.

    Returns a Routing; its topk_ids are int32, its weights float32 (float64 for float64). One kernel, two with
    a capacity or where experts choose, one for gradients; nothing waits for the device. Gradients flow to
    router_logits, group_logits, expert_vectors and temperature. Raises InputError, TraceError."""
    check_tensor("route.router_logits", router_logits, 2, "(tokens, experts)")
    if router_logits.dtype not in FLOATS:
        raise InputError("route.router_logits", "float16, bfloat16, float32 or float64", router_logits.dtype)
    wide = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
    tensors = {"logits": router_logits}
    given = isinstance(temperature, torch.Tensor)
    if expert_vectors is None and (given or temperature != LOG_2):
        raise InputError("route.temperature", "expert_vectors beside it", None, "Divide router_logits by it")
    if expert_vectors is not None:
        if not given:
            number = number_of("temperature", temperature)
            temperature = router_logits.new_full((1,), number, dtype=wide)
        tensors |= _cosines(router_logits, expert_vectors, temperature, wide)
    tokens, experts = router_logits.shape[0], tensors.get("vectors", router_logits.T).shape[0]
    count = count_of(router, top_k, experts, capacity)
    scale = number_of("scale", scale)
    cuts = {"top_p": top_p, "threshold": threshold, "relative_threshold": relative_threshold}
    if router == "expert_choice":
        others = (group_logits, correction_bias, remap, token_ids, entropy_threshold, *cuts.values())
        if (groups, scale, min_k) != (1, 1.0, 0) or any(other is not None for other in others):
            what = "router_logits, top_k, capacity and expert_vectors alone"
            raise InputError("route", f"{what}, where experts choose", "more than that")
        wanted = -(-tokens * count // experts) if capacity is None else capacity
        return _expert_choice(tensors, count, min(wanted, tokens))
    facts: dict[str, Any] = {"top_k": count, "renormalize": bool(renormalize), "term": None}
    facts["scoring"] = "map" if callable(router) else ROUTERS[router]
    if callable(router):
        facts["term"] = _term_of(router)
    integers: dict[str, Any] = {}
    numbers = {"scale": scale}
    made = cuts_of(router, cuts, min_k, entropy_threshold, entropy_index)
    facts, numbers = facts | made[0], numbers | made[1]
    if correction_bias is not None:
        _check("correction_bias", correction_bias, (experts,), router_logits)
        tensors["bias"] = correction_bias
    if group_logits is not None:
        groups = _levels(router, group_logits, router_logits, groups, experts)
        facts["scoring"], tensors["group_logits"] = "levels", group_logits
    facts |= groups_of(groups, top_groups, experts, count, levels=group_logits is not None)
    if remap is not None or request_ids is not None:
        tensors |= _remapped(remap, request_ids, tokens, experts)
        num_experts = experts if num_experts is None else num_experts
        facts["remapped"] = experts = num_experts
    elif num_experts is not None and num_experts != experts:
        raise InputError("route.num_experts", "a table of ids in remap", num_experts)
    if token_ids is not None:
        if router != "random":
            raise InputError("route.token_ids", "router 'random' beside them", repr(router))
        _check("token_ids", token_ids, (tokens,), dtypes=INTEGERS)
        tensors["token_ids"] = token_ids.to(torch.int64)
    if router == "random":
        integers["seed"] = seed_of(seed)
    facts |= limits_of(capacity, capacity_order)
    if capacity is not None:
        integers["capacity"] = capacity
    learning = router != "random" and learns([t for n, t in tensors.items() if n in LEARNT])
    form = MoeForm("route", tuple(tensors), tuple(integers), tuple(numbers), tuple(facts.items()), learning)
    weights, ids, *rest = call(form, [*tensors.values()], [*integers.values()], [*numbers.values()])
    chosen = Routing.from_topk(ids, weights, experts)
    if expert_vectors is not None:
        chosen.logits = rest[0]
    return chosen


LEARNT = ("logits", "group_logits", "vectors", "temperature")


@pure
def _term_of(router: Any) -> Any:
    return activation_term(router, gated=False)


def _expert_choice(tensors: dict[str, Any], top_k: int, capacity: int) -> Routing:
    facts = (("top_k", top_k), ("renormalize", False), ("scoring", "softmax"), ("term", None))
    learning = learns([*tensors.values()])
    form = MoeForm("expert_choice", tuple(tensors), ("capacity",), (), facts, learning)
    scores, rows, bounds, place, *rest = call(form, [*tensors.values()], [capacity])
    chosen = Routing.chosen(rows, bounds, place, scores)
    chosen.logits = rest[0] if rest else None
    return chosen


def _cosines(features: Any, vectors: Any, temperature: Any, wide: torch.dtype) -> dict[str, Any]:
    _check("expert_vectors", vectors, (None, features.shape[1]), features)
    if vectors.dtype != features.dtype:
        raise InputError("route.expert_vectors", f"the features' dtype {features.dtype}", vectors.dtype)
    if temperature.numel() != 1:
        raise InputError("route.temperature", "one number", tuple(temperature.shape))
    if temperature.dtype != wide:
        raise InputError("route.temperature", f"a number, or a tensor of {wide}", temperature.dtype)
    return {"vectors": vectors, "temperature": temperature.reshape(1)}


def _levels(router: Any, group_logits: Any, logits: Any, groups: int, experts: int) -> int:
    """The number of groups."""
    _check("group_logits", group_logits, (logits.shape[0], None), logits)
    if router != "softmax":
        raise InputError("route.group_logits", "router 'softmax'", repr(router))
    if group_logits.dtype != logits.dtype:
        raise InputError("route.group_logits", f"the logits' dtype {logits.dtype}", group_logits.dtype)
    found = group_logits.shape[1]
    if groups not in (1, found):
        raise InputError("route.groups", f"{found}, as group_logits has", groups)
    return found


def _remapped(table: Any, requests: Any, tokens: int, experts: int) -> dict[str, Any]:
    for name, tensor, shape in (("remap", table, (None, experts)), ("request_ids", requests, (tokens,))):
        if tensor is None:
            raise InputError(f"route.{name}", "remap and request_ids together", None)
        _check(name, tensor, shape, dtypes=INTEGERS)
    if not table.shape[0]:
        raise InputError("route.remap", "one row at least", tuple(table.shape))
    return {"table": table, "request": requests}


def _check(name: str, tensor: Any, shape: tuple[Any, ...], like: Any = None, dtypes: Any = FLOATS) -> None:
    """Raise InputError unless a tensor has a shape (None: any extent), a dtype and like's device."""
    check_tensor(f"route.{name}", tensor, len(shape), f"{shape}")
    if any(wanted is not None and wanted != n for wanted, n in zip(shape, tensor.shape, strict=True)):
        shown = ", ".join("any" if n is None else str(n) for n in shape)
        shown += "," * (len(shape) == 1)
        raise InputError(f"route.{name}", f"shape ({shown})", tuple(tensor.shape))
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"route.{name}", expected, tensor.dtype)
    if like is not None and tensor.device != like.device:
        raise InputError(f"route.{name}", f"a tensor on {like.device}", tensor.device)

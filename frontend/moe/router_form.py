"""What a router asks for besides its tensors, and the spec of its kernels, for tensors of any library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ...ir.errors import InputError
from ..device import target_of
from ..problem import as_integer
from ..trace.value import is_symbolic
from .layer_kernels import dtype_of

if TYPE_CHECKING:
    from ...passes.moe.router_spec import RouterSpec

ROUTERS = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "softmax_of_topk": "logits",
    "random": "random",
    "expert_choice": "softmax",
}
ORDERS = ("token", "choice")

Facts = dict[str, Any]


def count_of(router: str | Callable[..., Any], top_k: Any, experts: int, capacity: Any) -> int:
    """top_k as an integer. Raises InputError for it, and for what is no router or no capacity."""
    if not callable(router) and router not in ROUTERS:
        raise InputError("route.router", f"a function, or one of {', '.join(ROUTERS)}", repr(router))
    count = as_integer(top_k)
    if count is None or not 1 <= count <= experts:
        raise InputError("route.top_k", f"1 to {experts}, the number of experts", top_k)
    if capacity is not None and (_count(capacity) is None or capacity < 0):
        raise InputError("route.capacity", "a number of tokens, 0 or more", capacity)
    return count


def number_of(name: str, value: Any, lowest: float = -math.inf, highest: float = math.inf) -> float:
    """A finite number within bounds. Raises InputError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (lowest <= number <= highest and -math.inf < number < math.inf):
        bounded = f"a number from {lowest:g} to {highest:g}" if highest < math.inf else "a finite number"
        raise InputError(f"route.{name}", bounded, value)
    return number


def seed_of(seed: Any) -> Any:
    """A seed that kernels take. Raises InputError."""
    if _count(seed) is None or not -(2**63) <= seed < 2**63:
        raise InputError("route.seed", "an integer of 64 bits", seed)
    return seed


def _count(value: Any) -> Any:
    return value if is_symbolic(value) else as_integer(value)


_BOUNDS = {"top_p": (0.0, 1.0), "threshold": (-math.inf, math.inf), "relative_threshold": (0.0, 1.0)}


def cuts_of(
    router: Any, cuts: Mapping[str, Any], min_k: Any, entropy: Any, index: Any
) -> tuple[Facts, dict[str, float]]:
    """What leaves out experts, as facts and numbers. cuts: top_p, threshold, relative_threshold, or None.

    Raises InputError."""
    given = {
        name: number_of(name, value, *_BOUNDS[name]) for name, value in cuts.items() if value is not None
    }
    facts: Facts = {}
    numbers: dict[str, float] = {}
    if len(given) > 1:
        raise InputError(f"route.{', '.join(given)}", "one of them at most", tuple(given.values()))
    if entropy is not None and (not given or router != "softmax"):
        expected = "router 'softmax' and a top_p, threshold or relative_threshold for the other tokens"
        raise InputError("route.entropy_threshold", expected, entropy)
    least = as_integer(min_k)
    if least is None or least < 0 or (least and not given):
        raise InputError("route.min_k", "0 or more, with top_p, threshold or relative_threshold", min_k)
    for name, limit in given.items():
        if router == "softmax_of_topk":
            expected = "scores that are compared before their softmax is known"
            raise InputError(f"route.{name}", expected, repr(router), 'Pass router="softmax"')
        facts |= {"cut": name.removesuffix("_threshold"), "least": least}
        numbers["limit"] = limit
    if entropy is not None:
        index = number_of("entropy_index", index)
        facts["entropy"] = "shannon" if index == 1 else "tsallis"
        numbers["most_entropy"] = number_of("entropy_threshold", entropy)
        if index != 1:
            numbers["entropy_index"] = index
    return facts, numbers


def groups_of(
    groups: int, top_groups: int | None, experts: int, count: int, *, levels: bool = False
) -> Facts:
    """How many groups experts lie in, and are open. levels: groups have logits. Raises InputError."""
    opened = groups if top_groups is None else top_groups
    size = experts // groups if groups > 0 and experts % groups == 0 else 0
    if not size or not 1 <= opened <= groups or opened * size < count:
        expected = f"groups that divide {experts} experts, and enough of them open for {count}"
        raise InputError("route.groups, top_groups", expected, (groups, opened))
    return {"groups": groups, "top_groups": opened} if opened < groups or levels else {}


def limits_of(capacity: Any, order: str) -> Facts:
    """Which tokens come first where experts take so many. Raises InputError."""
    if order not in ORDERS:
        raise InputError("route.capacity_order", f"one of {', '.join(ORDERS)}", repr(order))
    return {} if capacity is None else {"limited": order}


def facts_of(asked: Mapping[str, Any], tensors: Mapping[str, Any], keeps: bool) -> tuple[Any, ...]:
    """What kernels depend on: what was asked for, and sizes and dtypes of tensors, by name and value."""
    logits, vectors = tensors["logits"], tensors.get("vectors")
    found = {**asked, "logits": dtype_of(logits), "target": target_of(logits.device)}
    found["experts"] = logits.shape[1] if vectors is None else vectors.shape[0]
    found["features"] = 0 if vectors is None else logits.shape[1]
    found["hashed"] = "token_ids" in tensors
    found["keeps"] = keeps
    if "bias" in tensors:
        found["corrected"] = dtype_of(tensors["bias"])
    if "group_logits" in tensors:
        found["groups"] = tensors["group_logits"].shape[1]
    if "table" in tensors:
        found["routing"] = tuple(dtype_of(tensors[name]) for name in ("table", "request"))
    return tuple(found.items())


def spec_of(facts: tuple[tuple[str, Any], ...]) -> RouterSpec:
    """The spec of a router's kernels. facts: as `facts_of` gives them."""
    from ...passes.moe.router_spec import RouterSpec
    from ..term_expr import to_expr

    named = dict(facts)
    term = named.pop("term")
    expr = None if term is None else to_expr(term, frozenset(("x0",)))
    return RouterSpec(expr=expr, **named)

"""Routing: which experts a token takes. `gossamer.route` decides from logits; a `Routing` can be inspected,
edited and passed to `gossamer.experts`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..ir.errors import InputError, MissingDependencyError
from . import layer_kernels as kernels
from .layer_kernels import cut_of, router_facts, router_term
from .problem import _fill_names

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.route") from None


class Routing:
    """A list of (token, expert, weight), sorted by expert.

    token_ids, expert_ids: (rows,) int32. weights: (rows,), any float dtype. counts: (E,) int32, how many rows
    each expert has; rows behind their sum belong to nobody, and what stands there is not read. num_tokens: T.
    topk_ids, topk_weights: (T, k), the same by token, where the list was made from them; else None.

    >>> import torch
    >>> chosen = Routing.from_topk(torch.tensor([[1, 0], [1, 2]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]]), 3)
    >>> [t.tolist() for t in (chosen.token_ids, chosen.expert_ids, chosen.counts)]
    [[0, 0, 1, 1], [0, 1, 1, 2], [1, 2, 1]]
    >>> chosen.replace(weights=torch.ones(4)).topk_ids is None
    True
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        counts: torch.Tensor,
        num_tokens: int,
    ) -> None:
        """A routing of one's own. Raises InputError where the parts do not fit each other."""
        rows = token_ids.shape
        for name, tensor, shape in (("expert_ids", expert_ids, rows), ("weights", weights, rows)):
            if tensor.shape != shape or tensor.dim() != 1:
                raise InputError(
                    f"Routing.{name}", f"shape ({rows[0]},), as token_ids has", tuple(tensor.shape)
                )
        if counts.dim() != 1:
            raise InputError("Routing.counts", "one number an expert", tuple(counts.shape))
        self._rows: Any = (token_ids, expert_ids)
        self._weights, self._counts, self.num_tokens = weights, counts, num_tokens
        self.num_experts = counts.shape[0]
        self.topk_ids: torch.Tensor | None = None
        self.topk_weights: torch.Tensor | None = None

    @classmethod
    def from_topk(cls, topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_experts: int) -> Routing:
        """The routing of (T, k) ids and weights; ids outside 0 .. num_experts - 1 are dropped.

        Nothing is sorted until the list is looked at."""
        from .layers import check_routing

        names = ("Routing.topk_ids", "Routing.topk_weights")
        check_routing(names, topk_ids, topk_weights, topk_ids.shape[0], num_experts, validate=False)
        self = cls.__new__(cls)
        self._rows = self._counts = self._weights = None
        self.num_tokens, self.num_experts = topk_ids.shape[0], num_experts
        self.topk_ids, self.topk_weights = topk_ids, topk_weights
        return self

    @property
    def token_ids(self) -> torch.Tensor:
        return self._sorted()[0][0]

    @property
    def expert_ids(self) -> torch.Tensor:
        return self._sorted()[0][1]

    @property
    def weights(self) -> torch.Tensor:
        return self._sorted()[1]

    @property
    def counts(self) -> torch.Tensor:
        return self._sorted()[2]

    def replace(self, **parts: Any) -> Routing:
        """The routing with some of token_ids, expert_ids, weights and counts replaced."""
        names = ("token_ids", "expert_ids", "weights", "counts")
        unknown = set(parts) - set(names)
        if unknown:
            raise InputError("Routing.replace", f"some of {', '.join(names)}", ", ".join(sorted(unknown)))
        tokens, experts, weights, counts = (parts.get(n, getattr(self, n)) for n in names)
        return Routing(tokens, experts, weights, counts, self.num_tokens)

    def _sorted(self) -> tuple[Any, Any, Any]:
        if self._rows is None:
            assert self.topk_ids is not None and self.topk_weights is not None
            tokens, bounds, place = grouped(self.topk_ids, self.num_experts)
            counts = bounds[1:] - bounds[:-1]
            rows = torch.arange(tokens.shape[0], device=tokens.device, dtype=torch.int32)
            experts = torch.searchsorted(bounds[1:], rows, right=True, out_int32=True)
            spread = torch.where(place < 0, tokens.shape[0], place).reshape(-1).long()
            weights = self.topk_weights.new_zeros(tokens.shape[0] + 1)
            weights = weights.index_put((spread,), self.topk_weights.reshape(-1))[:-1]
            inside = rows < bounds[-1]
            tokens = torch.where(inside, tokens, self.num_tokens)
            self._rows, self._weights, self._counts = (tokens, experts), weights, counts
        return self._rows, self._weights, self._counts

    def check(self, tokens: int, experts: int, device: Any, *, validate: bool) -> None:
        """Raise InputError unless this routes so many tokens among so many experts on a device."""
        if self.num_tokens != tokens:
            raise InputError("experts.topk_ids", f"a Routing of {tokens} tokens, as x has", self.num_tokens)
        if self.num_experts != experts:
            raise InputError("experts.topk_ids", f"a Routing among {experts} experts", self.num_experts)
        one = self.topk_ids if self.topk_ids is not None else self._rows[0]
        if one.device != device:
            raise InputError("experts.topk_ids", f"a Routing on {device}, as x is", one.device)
        if validate and self.topk_ids is None:
            (token_ids, expert_ids), counts = self._rows, self._counts
            rows = int(counts.sum())
            if rows > token_ids.shape[0] or (rows and int(counts.min()) < 0):
                raise InputError("experts.topk_ids", f"counts of {token_ids.shape[0]} rows at most", rows)
            wanted = torch.repeat_interleave(torch.arange(experts, device=device), counts.long())
            if not torch.equal(expert_ids[:rows].long(), wanted):
                expected = "expert_ids sorted, as many of each as counts say"
                raise InputError("experts.topk_ids", expected, expert_ids)
            if rows and not 0 <= int(token_ids[:rows].min()) <= int(token_ids[:rows].max()) < tokens:
                raise InputError("experts.topk_ids", f"token_ids from 0 to {tokens - 1}", token_ids)

    def operands(self) -> dict[str, Any]:
        """What kernels take: ids and weights by token, or rows with their bounds and the rows of each
        token."""
        if self.topk_ids is not None:
            return {"ids": self.topk_ids, "weights": self.topk_weights}
        (token_ids, _), counts = self._rows, self._counts
        zero = counts.new_zeros(1)
        bounds = torch.cat((zero, counts)).cumsum(0).to(torch.int32)
        rows = torch.arange(token_ids.shape[0], device=token_ids.device)
        key = torch.where(rows < bounds[-1], token_ids, self.num_tokens)
        ordered, place = key.sort(stable=True)
        marks = torch.arange(self.num_tokens + 1, device=token_ids.device, dtype=ordered.dtype)
        return {
            "tokens": token_ids.to(torch.int32),
            "bounds": bounds,
            "place": place.to(torch.int32),
            "starts": torch.searchsorted(ordered, marks, out_int32=True),
            "weights": self._weights,
        }

    def __repr__(self) -> str:
        how = (
            f"top {self.topk_ids.shape[1]}" if self.topk_ids is not None else f"{self._rows[0].shape[0]} rows"
        )
        return f"Routing({self.num_tokens} tokens, {self.num_experts} experts, {how})"


def grouped(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    """tokens (T k,), bounds (E + 1,) and place (T, k) of ids, as ir/ragged.py defines them."""
    from .prepare import allocate

    flat = topk_ids.reshape(-1)
    entries, device = flat.shape[0], topk_ids.device
    tokens, place = (torch.empty(entries, dtype=torch.int32, device=device) for _ in range(2))
    bounds = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    if entries:
        executable = kernels.groups_executable(num_experts, topk_ids.shape[1], flat)
        values = {"ids": flat, "tokens": tokens, "bounds": bounds, "place": place}
        executable(values, allocate=partial(allocate, device=device))
    return tokens, bounds, place.reshape(topk_ids.shape)


def route(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    router: str | Callable[..., Any] = "softmax",
    renormalize: bool = True,
    correction_bias: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int | None = None,
    scale: float = 1.0,
    top_p: float | None = None,
    threshold: float | None = None,
    capacity: int | None = None,
    seed: int = 0,
    token_ids: torch.Tensor | None = None,
) -> Routing:
    """The top_k experts of every token, and their weights.

    Args:
        router_logits: (T, E), any float dtype.
        top_k: 1 to E.
        router: how logits become scores: "softmax" over all experts (Mixtral, Qwen, OLMoE), "sigmoid"
        (DeepSeek-V3),
            or "softmax_of_topk": the k largest logits, softmax over these (gpt-oss).
        renormalize: whether weights of a token are divided by their sum.
        correction_bias: (E,), added to scores for the choice alone (DeepSeek-V3).
        groups, top_groups: experts lie in so many groups of equal size, of which each token may use so many;
        those
            with the largest sums of their two best scores.
        scale: weights are multiplied by it.
        top_p: of the top_k, only the best until their scores add up to so much; threshold: only those that
        score
            so much. Tokens then have different numbers of experts; ids that are not taken are -1.
        capacity: experts take so many tokens at most, the first ones (Switch, GShard); other ids become -1.
        seed, token_ids: of the router "random" (THOR): scores are random bits by seed, token and expert,
        which need
            no gradient; with token_ids (T,), int64, by what stands there, so that equal ids take equal
            experts (hash routing). Of the logits only the shape counts.

    router may be a function of a logit, such as `lambda logit: logit.tanh()`, which is traced: its result is
    the score of an expert.

    Returns a Routing; its topk_ids are int32, its weights float32 (float64 for float64). One kernel, a few
    more with a capacity; nothing waits for the device. Raises InputError, TraceError."""
    from .layers import check_tensor

    check_tensor("route.router_logits", router_logits, 2, "(tokens, experts)")
    names = _fill_names()
    if router_logits.dtype not in names:
        raise InputError("route.router_logits", "float16, bfloat16, float32 or float64", router_logits.dtype)
    tokens, experts = router_logits.shape
    cut, term = cut_of(top_p, threshold, capacity), router_term(router)
    if token_ids is not None and (router != "random" or tuple(token_ids.shape) != (tokens,)):
        raise InputError(
            "route.token_ids", f"shape ({tokens},), with router 'random'", tuple(token_ids.shape)
        )
    corrected = correction_bias is not None
    facts = router_facts(experts, top_k, router, renormalize, corrected, groups, top_groups, cut)
    count, scoring = facts[1:3]
    wide = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
    device = router_logits.device
    ids = torch.empty((tokens, count), dtype=torch.int32, device=device)
    weights = torch.empty((tokens, count), dtype=wide, device=device)
    if not tokens:
        return Routing.from_topk(ids, weights, experts)
    logits = router_logits.detach()
    values = {"logits": logits if logits.stride(1) == 1 else logits.contiguous()}
    values |= {"ids": ids, "weights": weights, "scale": float(scale)}
    if correction_bias is not None:
        if tuple(correction_bias.shape) != (experts,):
            raise InputError("route.correction_bias", f"shape ({experts},)", tuple(correction_bias.shape))
        values["bias"] = correction_bias.detach().to(device=device, dtype=wide).contiguous()
    limit = top_p if threshold is None else threshold
    if cut is not None and limit is not None:
        values["limit"] = float(limit)
    if scoring == "random":
        values["seed"] = int(seed)
    if token_ids is not None:
        values["token_ids"] = token_ids.to(torch.int64)
    kernels.router_executable(facts, values["logits"], cut, token_ids is not None, term)(values)
    if router_logits.requires_grad and torch.is_grad_enabled() and scoring != "random":
        weights = _weights(router_logits.to(wide), ids, router, renormalize) * scale
    chosen = Routing.from_topk(ids, weights, experts)
    return chosen if capacity is None else limited(chosen, capacity)


def limited(chosen: Routing, capacity: int) -> Routing:
    """A routing by token in which experts take their first `capacity` tokens; other ids become -1."""
    ids, weights, experts = chosen.topk_ids, chosen.topk_weights, chosen.num_experts
    assert ids is not None and weights is not None
    if not ids.numel():
        return chosen
    _, bounds, place = grouped(ids, experts)
    kept = torch.empty_like(ids)
    values = {"ids": ids.reshape(-1), "place": place.reshape(-1), "bounds": bounds, "limited": kept.view(-1)}
    kernels.capacity_executable(experts, ids)(values | {"capacity": capacity})
    return Routing.from_topk(kept, weights, experts)


def _weights(logits: torch.Tensor, ids: torch.Tensor, router: Any, renormalize: bool) -> torch.Tensor:
    """The weights of the chosen experts by torch, which differentiates them; 0 where nobody is chosen."""
    scores = {
        "softmax": lambda: logits.softmax(-1),
        "sigmoid": logits.sigmoid,
        "softmax_of_topk": lambda: logits,
    }
    whole = scores[router]() if isinstance(router, str) else router(logits)
    found = whole.gather(1, ids.clamp(min=0).long())
    if router == "softmax_of_topk":
        return found.masked_fill(ids < 0, -torch.inf).softmax(-1)
    found = found.masked_fill(ids < 0, 0.0)
    return found / (found.sum(-1, keepdim=True) + 1e-20) if renormalize else found

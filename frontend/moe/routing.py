"""Routing: which experts a token takes. `gossamer.route` decides from logits (`routers.py`); what it
gives can be inspected, edited and passed to `gossamer.experts`."""

from __future__ import annotations

from typing import Any

from ...ir.errors import InputError, MissingDependencyError
from .form import MoeForm
from .layers import FLOATS, check_routing, check_tensor
from .operator import call

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.route") from None


class Routing:
    """A list of (token, expert, weight), sorted by expert.

    token_ids, expert_ids: (rows,) int32. weights: (rows,), any float dtype. counts: (E,) int32, how many rows
    each expert has; rows behind their sum belong to nobody, and what stands there is not read. num_tokens: T.
    topk_ids, topk_weights: (T, k), the same by token, where the list was made from them; else None. logits:
    (T, E), where `route` made them from features; else None.

    A list that was changed in place is what `experts` takes from then on, in the place of topk_ids.

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
        """A routing of one's own: rows sorted by expert. Raises InputError where the parts do not fit each
        other, or are no tensors of such dtypes."""
        ids, floats = (torch.int32, torch.int64), FLOATS
        parts = {"token_ids": (token_ids, ids), "expert_ids": (expert_ids, ids)}
        parts |= {"weights": (weights, floats), "counts": (counts, ids)}
        for name, (tensor, dtypes) in parts.items():
            where, meaning = f"Routing.{name}", "(experts,)" if name == "counts" else "(rows,)"
            check_tensor(where, tensor, 1, meaning)
            if tensor.dtype not in dtypes:
                expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise InputError(where, f"one of {expected}", tensor.dtype)
            if tensor.device != token_ids.device:
                raise InputError(where, f"a tensor on {token_ids.device}, as token_ids is", tensor.device)
            if name != "counts" and tensor.shape != token_ids.shape:
                expected = f"shape ({token_ids.shape[0]},), as token_ids has"
                raise InputError(where, expected, tuple(tensor.shape))
        self._rows: Any = (token_ids, expert_ids)
        self._weights, self._counts, self.num_tokens = weights, counts, num_tokens
        self.num_experts = counts.shape[0]
        self.topk_ids: torch.Tensor | None = None
        self.topk_weights: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        self._table: dict[str, torch.Tensor] | None = None
        self._versions: tuple[int, ...] | None = None

    @classmethod
    def from_topk(cls, topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_experts: int) -> Routing:
        """The routing of (T, k) ids and weights; ids outside 0 .. num_experts - 1 are dropped.

        Nothing is sorted until the list is looked at."""
        names = ("Routing.topk_ids", "Routing.topk_weights")
        check_routing(names, topk_ids, topk_weights, topk_ids.shape[0], num_experts, validate=False)
        return cls._lazy(topk_ids.shape[0], num_experts, topk_ids, topk_weights)

    @classmethod
    def known(cls, expert_ids: torch.Tensor, num_experts: int) -> Routing:
        """The routing of tokens whose expert is known in advance, by domain (MoDE) or modality
        (Mixture-of-Transformers): expert_ids (T,) int32 or int64, weights 1; other ids mean no expert."""
        if not isinstance(expert_ids, torch.Tensor) or expert_ids.dim() != 1:
            got = (
                tuple(expert_ids.shape) if isinstance(expert_ids, torch.Tensor) else type(expert_ids).__name__
            )
            raise InputError("Routing.expert_ids", "an expert for each token, shape (T,)", got)
        ids = expert_ids[:, None]
        return cls.from_topk(ids, torch.ones(ids.shape, device=ids.device), num_experts)

    @classmethod
    def chosen(
        cls, tokens: torch.Tensor, bounds: torch.Tensor, place: torch.Tensor, scores: torch.Tensor
    ) -> Routing:
        """The routing of experts that chose: tokens (rows,) by expert, bounds (E + 1,), place (T, E), the row
        of a token with an expert or -1, and scores (T, E), the weights of these."""
        self = cls._lazy(*place.shape)
        self._table = {"tokens": tokens, "bounds": bounds, "place": place, "weights": scores}
        return self

    @classmethod
    def _lazy(cls, num_tokens: int, num_experts: int, ids: Any = None, weights: Any = None) -> Routing:
        self = cls.__new__(cls)
        self._rows = self._counts = self._weights = self._table = self._versions = self.logits = None
        self.num_tokens, self.num_experts = num_tokens, num_experts
        self.topk_ids, self.topk_weights = ids, weights
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
        """The routing with some of token_ids, expert_ids, weights and counts replaced.

        With other expert_ids and no counts, rows are sorted and counted anew, but for those whose ids are not
        from 0 to num_experts - 1."""
        names = ("token_ids", "expert_ids", "weights", "counts")
        unknown = set(parts) - set(names)
        if unknown:
            raise InputError("Routing.replace", f"some of {', '.join(names)}", ", ".join(sorted(unknown)))
        tokens, experts, weights, counts = (parts.get(n, getattr(self, n)) for n in names)
        made = Routing(tokens, experts, weights, counts, self.num_tokens)
        return made._counted() if "expert_ids" in parts and "counts" not in parts else made

    def _counted(self) -> Routing:
        """The routing of these rows in the order of their experts, whatever counts say."""
        tokens, experts = self._rows
        inside = (experts >= 0) & (experts < self.num_experts)
        ordered, order = torch.where(inside, experts, self.num_experts).sort(stable=True)
        marks = torch.arange(self.num_experts + 1, device=ordered.device, dtype=ordered.dtype)
        bounds = torch.searchsorted(ordered, marks, out_int32=True)
        parts = (tokens[order], ordered, self._weights[order], bounds[1:] - bounds[:-1])
        return Routing(*parts, self.num_tokens)

    @property
    def is_list(self) -> bool:
        """Whether the list says what is routed, rather than the ids, or the experts' choice, that it was made
        of: there is nothing else, or somebody has looked at it, and may have changed what he got."""
        if self._rows is None:
            return False
        if self._versions is None or torch.compiler.is_compiling():
            return True
        return self._versions != self._versions_now()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of: their tensors have counted no changes yet."""
        return self.__dict__ | {"_versions": None}

    def _versions_now(self) -> tuple[int, ...] | None:
        """How often each part was changed in place; None where torch does not count that."""
        parts = (*self._rows, self._weights, self._counts)
        return None if any(t.is_inference() for t in parts) else tuple(t._version for t in parts)

    def _sorted(self) -> tuple[Any, Any, Any]:
        if self._rows is None:
            self._sort()
            if not torch.compiler.is_compiling():
                self._versions = self._versions_now()
        return self._rows, self._weights, self._counts

    def _sort(self) -> None:
        """Make the list, of the experts' choice or of ids and weights by token."""
        if self._table is not None:
            tokens, bounds, _, scores = self._table.values()
            experts = torch.arange(self.num_experts, device=tokens.device, dtype=torch.int32)
            experts = experts.repeat_interleave(tokens.shape[0] // self.num_experts)
            self._weights = scores[tokens.long(), experts.long()]
            self._rows, self._counts = (tokens, experts), bounds[1:] - bounds[:-1]
        else:
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

    def check(self, tokens: int, experts: int, device: Any, *, validate: bool) -> None:
        """Raise InputError unless this routes so many tokens among so many experts on a device."""
        if self.num_tokens != tokens:
            raise InputError("experts.topk_ids", f"a Routing of {tokens} tokens, as x has", self.num_tokens)
        if self.num_experts != experts:
            raise InputError("experts.topk_ids", f"a Routing among {experts} experts", self.num_experts)
        one = self.topk_ids if self.topk_ids is not None else self._table or self._rows[0]
        one = one["tokens"] if isinstance(one, dict) else one
        if one.device != device:
            raise InputError("experts.topk_ids", f"a Routing on {device}, as x is", one.device)
        if validate and not self.is_list and self.topk_ids is not None:
            names = ("experts.topk_ids", "experts.topk_weights")
            check_routing(names, self.topk_ids, self.topk_weights, tokens, experts, validate=True)
        elif validate:
            (token_ids, expert_ids), _, counts = self._sorted()
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
        token. Rows behind those that counts leave room for, and those of tokens that there are not, count
        nowhere."""
        if not self.is_list and self.topk_ids is not None:
            return {"ids": self.topk_ids, "weights": self.topk_weights}
        if not self.is_list:
            assert self._table is not None
            return self._table
        (token_ids, _), counts, many = self._rows, self._counts, self._rows[0].shape[0]
        bounds = torch.nn.functional.pad(counts.clamp(min=0).cumsum(0), (1, 0)).clamp(max=many)
        rows = torch.arange(many, device=token_ids.device)
        inside = (rows < bounds[-1]) & (token_ids >= 0) & (token_ids < self.num_tokens)
        ordered, place = torch.where(inside, token_ids, self.num_tokens).sort(stable=True)
        marks = torch.arange(self.num_tokens + 1, device=token_ids.device, dtype=ordered.dtype)
        return {
            "tokens": token_ids.clamp(0, max(self.num_tokens - 1, 0)).to(torch.int32),
            "bounds": bounds.to(torch.int32),
            "place": place.to(torch.int32),
            "starts": torch.searchsorted(ordered, marks, out_int32=True),
            "weights": torch.where(inside, self._weights, 0),
        }

    def __repr__(self) -> str:
        ids = None if self.is_list else self.topk_ids
        how = f"{len(self.token_ids)} rows" if ids is None else f"top {ids.shape[1]}"
        return f"Routing({self.num_tokens} tokens, {self.num_experts} experts, {how})"


def grouped(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    """tokens (T k,), bounds (E + 1,) and place (T, k) of ids, as ir/ragged.py defines them."""
    tokens, bounds, place = call(MoeForm("groups", ("ids",), ("experts",)), [topk_ids], [num_experts])
    return tokens, bounds, place

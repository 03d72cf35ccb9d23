"""What a call asks of its softmax: sinks that join it, and what becomes of its probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ir.errors import InputError
from .problem import as_integer
from .score import ProbMod

if TYPE_CHECKING:
    import torch

    from .problem import Problem

BITS = 30  # of a random number that decides on a pair: kernels compare 32-bit integers


@dataclass(frozen=True)
class Softmax:
    """sinks: a float tensor (Hq,) or None; dtype: its dtype by name. prob: what probabilities become."""

    sinks: torch.Tensor | None = None
    dtype: str | None = None
    prob: ProbMod | None = None

    @staticmethod
    def of(problem: Problem, sinks: Any, prob_mod: Any, dropout_p: Any, dropout_seed: Any) -> Softmax:
        """The checked arguments of a call; draws a seed where dropout has none.

        Raises InputError, TraceError."""
        return Softmax.joined(
            check_sinks(problem, sinks), prob_of(problem.query, prob_mod, dropout_p, dropout_seed)
        )

    @staticmethod
    def joined(sinks: torch.Tensor | None, prob: ProbMod | None) -> Softmax:
        """Of checked sinks, and of what probabilities become."""
        if sinks is None:
            return PLAIN if prob is None else Softmax(prob=prob)
        from .problem import DTYPE_NAMES

        return Softmax(sinks.detach() if sinks.requires_grad else sinks, DTYPE_NAMES[sinks.dtype], prob)

    @property
    def key(self) -> tuple[Any, ...] | None:
        """What a kernel depends on, made of primitives."""
        if self.dtype is None and self.prob is None:
            return None
        return self.dtype, None if self.prob is None else self.prob.key

    @property
    def spec_fields(self) -> dict[str, Any]:
        """The fields of an AttentionSpec of the passes that hold it."""
        return {"sinks": self.dtype, "prob_map": None if self.prob is None else self.prob.ir}


PLAIN = Softmax()
"""No sinks, probabilities as they are."""


def prob_of(query: Any, prob_mod: Any, dropout_p: Any, dropout_seed: Any) -> ProbMod | None:
    """What becomes of the probabilities of a call; draws a seed where dropout has none.

    Raises InputError, TraceError."""
    prob = None if prob_mod is None else ProbMod.of(prob_mod)
    dropout = dropout_of(query, dropout_p, dropout_seed)
    return prob if dropout is None else (prob or ProbMod.identity()).dropped_out(*dropout)


def dropout_of(query: Any, p: Any, seed: Any) -> tuple[int, float, torch.Tensor] | None:
    """The threshold, the factor and the seed of a call's dropout; None where there is none.

    Raises InputError."""
    p = probability(p)
    if seed is None and not p:
        return None
    seed = _seed(query.device, seed)
    threshold = min(round(p * 2**BITS), 2**BITS - 1) - 2 ** (BITS - 1)
    return (threshold, 1 / (1 - p), seed) if p else None


def probability(p: Any) -> float:
    """The dropout probability of a call, 0 for None. Raises InputError."""
    if p is None:
        return 0.0
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise InputError("attention.dropout_p", "a number p with 0 <= p < 1", repr(p))
    return float(p)


def _seed(device: torch.device, seed: Any) -> torch.Tensor:
    """The seed as an int64 tensor of one element on the query's device, without waiting for the device."""
    import torch

    if seed is None:  # the device's default generator, which advances
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            got = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            raise InputError("attention.dropout_seed", f"an int64 tensor of one element on {device}", got)
        return seed.reshape(1)
    number = as_integer(seed)
    if number is None or not -(2**63) <= number < 2**63:
        raise InputError(
            "attention.dropout_seed", "an integer of 64 bits, or an int64 tensor of one", repr(seed)
        )
    return torch.full((1,), number, dtype=torch.int64, device=device)


def check_sinks(problem: Problem, sinks: Any) -> torch.Tensor | None:
    """The sinks of a call. Raises InputError unless they are None or a float tensor (Hq,)."""
    import torch

    from .problem import DTYPE_NAMES

    if sinks is None:
        return None
    where, query = "attention.sinks", problem.query
    if not isinstance(sinks, torch.Tensor):
        raise InputError(where, "a torch.Tensor of one number a query head", type(sinks).__name__)
    if sinks.dtype not in DTYPE_NAMES:
        raise InputError(where, "float16, bfloat16, float32 or float64", sinks.dtype)
    if tuple(sinks.shape) != (problem.heads,):
        expected = f"shape ({problem.heads},): one number a query head"
        raise InputError(where, expected, tuple(sinks.shape))
    if sinks.device != query.device:
        fix = f"Pass sinks.to({str(query.device)!r})"
        raise InputError(where, f"a tensor on {query.device}, as the query is", sinks.device, fix)
    return sinks

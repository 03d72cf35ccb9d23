"""Hugging Face transformers: the experts of their models by gossamer, see `register_transformers`.

What stands between the products of an expert is taken from the module: its `_apply_gate`, or `act_fn` where
there is no gate, runs once on stand-ins for gate and up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..ir.errors import GossamerError, MissingDependencyError, UnsupportedError
from .moe.activation import baked
from .moe.experts import experts
from .term import Term
from .trace.error import trace_error
from .trace.function import run_traced
from .trace.value import Value


def register_experts(name: str) -> None:
    """Register what computes experts under a name, for `experts_implementation=name`.

    Raises MissingDependencyError where transformers (5 or newer) is missing."""
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError:
        raise MissingDependencyError("transformers>=5", "dev", "gossamer.register_transformers") from None
    ExpertsInterface.register(name, experts_forward)


def experts_forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """The experts of a module of transformers: hidden_states (T, H), ids and weights (T, k) -> (T, H).

    Ids equal to the number of experts, which expert parallelism uses for "not local", are dropped. Raises
    UnsupportedError for a norm behind each expert, TraceError for a gate that cannot be captured."""
    if getattr(self, "has_post_expert_norm", False):
        raise UnsupportedError(f"{type(self).__name__}: a norm behind each expert is not built yet")
    up = self.gate_up_proj if self.has_gate else self.up_proj
    biases: dict[str, Any] = {}
    if self.has_bias:
        first = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        biases = {"gate_up_bias": first, "down_bias": self.down_proj_bias}
    gate: Any = _Gate(gate_of(self))
    dense = isinstance(up, torch.Tensor)
    found = experts(
        hidden_states.to(up.dtype) if dense else hidden_states,
        top_k_index,
        top_k_weights,
        up,
        self.down_proj,
        activation=gate,
        transposed=bool(self.is_transposed) and dense,
        interleaved=self.has_gate and not self.is_concatenated,
        **biases,
    )
    return found.to(hidden_states.dtype)


class _Gate:
    """An activation whose term is known already."""

    def __init__(self, term: Term) -> None:
        self.term = term


_GATES: WeakKeyDictionary[Any, tuple[Any, Term]] = WeakKeyDictionary()


def gate_of(module: Any) -> Term:
    """The term of what a module of experts does between its products, over x0 (gate) and x1 (up).

    Captured anew when the module's numbers or its activation have changed."""
    state = tuple((k, v) for k, v in vars(module).items() if type(v) in (int, float, bool))
    state += (id(getattr(module, "act_fn", None)),)
    known = _GATES.get(module)
    if known is not None and known[0] == state:
        return known[1]
    gated = module.has_gate
    run: Callable[[Any], Any] = module._apply_gate if gated else module.act_fn

    def stand_in(trace: Any, *halves: Any) -> Any:
        return run(_Halves(*halves, interleaved=not module.is_concatenated) if gated else halves[0])

    try:
        term = baked(run_traced(stand_in, "activation" if gated else "plain activation"))
    except GossamerError:
        raise
    except Exception as error:
        name = f"{type(module).__name__}.{'_apply_gate' if gated else 'act_fn'}"
        raise trace_error(f"{name} cannot be captured: {type(error).__name__}: {error}") from error
    _GATES[module] = state, term
    return term


class _Halves:
    """Stands for the first product: what splits it into gate and up finds them, all else is refused."""

    def __init__(self, gate: Value, up: Value, *, interleaved: bool) -> None:
        self._gate, self._up, self._interleaved = gate, up, interleaved

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Value, Value]:
        if chunks != 2 or dim != -1 or self._interleaved:
            raise self._refused(f".chunk({chunks}, dim={dim})")
        return self._gate, self._up

    def __getitem__(self, index: Any) -> Value:
        last = index[-1] if isinstance(index, tuple) and index[:1] == (Ellipsis,) else None
        if self._interleaved and last == slice(None, None, 2):
            return self._gate
        if self._interleaved and last == slice(1, None, 2):
            return self._up
        raise self._refused(f"[{index}]")

    def __getattr__(self, name: str) -> Any:
        raise self._refused(f".{name}")

    @staticmethod
    def _refused(what: str) -> Exception:
        return UnsupportedError(
            f"an expert's gate takes {what} of the first product; expected .chunk(2, dim=-1), or [..., ::2] "
            "and [..., 1::2] where gate and up take turns"
        )

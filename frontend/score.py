"""The face `ScoreMod`: a captured score_mod with its runtime numbers and tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .captured import readable
from .term import show
from .term_expr import to_expr
from .term_mask import bake_large
from .trace import trace_score

if TYPE_CHECKING:
    from ..ir.score import ScoreMap


class ScoreMod:
    """What happens to a score: an expression, the numbers and the tensors that it captured.

    key: what the kernel depends on; made of primitives, the same in every process.
    values: the numbers for s0, s1, ...; kinds: 'int' or 'float' of each.
    tensors: the captured tensors t0, t1, ...; their contents are read at each call.

    >>> cap = 20.0
    >>> def soft_cap(score, b, h, q_idx, kv_idx):
    ...     return score / (1 + abs(score) / cap)
    >>> ScoreMod.trace(soft_cap)
    ScoreMod(score / (1 + (abs(score) / s0)), s0=20.0)
    """

    def __init__(
        self,
        term: Any,
        values: tuple[int | float, ...],
        tensors: tuple[Any, ...],
        signature: tuple[tuple[str, int], ...],
    ) -> None:
        self._term, self.values = bake_large(term, values, "s")
        self._signature, self._tensors = signature, tensors

    @staticmethod
    def trace(score_mod: Callable[..., Any]) -> ScoreMod:
        """Capture `score_mod(score, b, h, q_idx, kv_idx)`. Raises TraceError at the user's line."""
        traced = trace_score(score_mod)
        return ScoreMod(traced.term, traced.values, traced.tensors, traced.signature)

    @staticmethod
    def of(value: Any) -> ScoreMod | None:
        """The ScoreMod of an argument: a ScoreMod, a score_mod or None."""
        return value if value is None or isinstance(value, ScoreMod) else ScoreMod.trace(value)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple("float" if isinstance(v, float) else "int" for v in self.values)

    @property
    def tensors(self) -> tuple[Any, ...]:
        return tuple(map(readable, self._tensors))

    def tensors_on(self, device: Any) -> tuple[Any, ...]:
        """The captured tensors as kernels on a torch device read them; the user's own are not moved."""
        return tuple(readable(t, device) for t in self._tensors)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return ("score", self._term, self.kinds, self._signature)

    @cached_property
    def ir(self) -> ScoreMap:
        """The score map as an IR value."""
        from ..ir.mask import Capture
        from ..ir.score import ScoreMap

        params = tuple((f"s{i}", kind) for i, kind in enumerate(self.kinds))
        captures = tuple(Capture(f"t{i}", dtype, rank) for i, (dtype, rank) in enumerate(self._signature))
        floats = frozenset(["score", *(name for name, kind in params if kind == "float")])
        return ScoreMap(to_expr(self._term, floats), params, captures)

    @property
    def text(self) -> str:
        """The score map as IR text."""
        return self.ir.to_text()

    def __repr__(self) -> str:
        bound = "".join(f", s{i}={v}" for i, v in enumerate(self.values))
        bound += "".join(f", t{i}: {d}[{r}]" for i, (d, r) in enumerate(self._signature))
        return f"ScoreMod({show(self._term)}{bound})"

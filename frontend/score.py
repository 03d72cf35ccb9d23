"""The faces `ScoreMod` and `ProbMod`: captured functions of a score or a probability."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .captured import readable
from .term import show
from .term_expr import to_expr
from .term_mask import bake_large
from .trace.function import LETTERS, Traced, trace_prob, trace_score
from .trace.value import kind_of

if TYPE_CHECKING:
    from ..ir.score import ScoreMap


class ScoreMod:
    """What happens to a score: an expression, the numbers and the tensors that it captured.

    key: what the kernel depends on; made of primitives, the same in every process.
    values: the numbers for s0, s1, ...; kinds: 'int' or 'float' of each.
    tensors: the captured tensors t0, t1, ... as they are read now; sources: as they were captured;
    signature: (dtype, rank) of each.

    >>> cap = 20.0
    >>> def soft_cap(score, b, h, q_idx, kv_idx):
    ...     return score / (1 + abs(score) / cap)
    >>> ScoreMod.trace(soft_cap)
    ScoreMod(score / (1 + (abs(score) / s0)), s0=20.0)
    """

    argument: ClassVar[str] = "score"
    letters: ClassVar[tuple[str, str]] = LETTERS["score_mod"]

    def __init__(
        self,
        term: Any,
        values: tuple[int | float, ...],
        tensors: tuple[Any, ...],
        signature: tuple[tuple[str, int], ...],
    ) -> None:
        self.term, self.values = bake_large(term, values, self.letters[0])
        self.kinds = tuple(map(kind_of, self.values))
        self.signature, self.sources = signature, tensors

    @staticmethod
    def _traced(function: Callable[..., Any]) -> Traced:
        return trace_score(function)

    @classmethod
    def trace(cls, function: Callable[..., Any]) -> Self:
        """Capture `score_mod(score, b, h, q_idx, kv_idx)`. Raises TraceError at the user's line."""
        traced = cls._traced(function)
        return cls(traced.term, traced.values, traced.tensors, traced.signature)

    @classmethod
    def of(cls, value: Any) -> Self | None:
        """The ScoreMod of an argument: a ScoreMod, a score_mod or None."""
        return value if value is None or isinstance(value, cls) else cls.trace(value)

    @property
    def captures(self) -> int:
        """How many tensors it captured."""
        return len(self.sources)

    @property
    def tensors(self) -> tuple[Any, ...]:
        return tuple(map(readable, self.sources))

    def tensors_on(self, device: Any) -> tuple[Any, ...]:
        """The captured tensors as kernels on a torch device read them; the user's own are not moved."""
        return tuple(readable(t, device) for t in self.sources)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return (self.argument, self.term, self.kinds, self.signature)

    @cached_property
    def ir(self) -> ScoreMap:
        """The map as an IR value."""
        from ..ir.mask import Capture
        from ..ir.score import ProbMap, ScoreMap

        number, tensor = self.letters
        params = tuple((f"{number}{i}", kind) for i, kind in enumerate(self.kinds))
        captures = tuple(
            Capture(f"{tensor}{i}", dtype, rank) for i, (dtype, rank) in enumerate(self.signature)
        )
        floats = frozenset([self.argument, *(name for name, kind in params if kind == "float")])
        kind = {cls.word: cls for cls in (ScoreMap, ProbMap)}[self.argument]
        return kind(to_expr(self.term, floats), params, captures)

    @property
    def text(self) -> str:
        """The map as IR text."""
        return self.ir.to_text()

    def __repr__(self) -> str:
        number, tensor = self.letters
        bound = "".join(f", {number}{i}={v}" for i, v in enumerate(self.values))
        bound += "".join(f", {tensor}{i}: {d}[{r}]" for i, (d, r) in enumerate(self.signature))
        return f"{type(self).__name__}({show(self.term)}{bound})"


class ProbMod(ScoreMod):
    """What becomes of a probability after the softmax, before it weighs a value.

    As ScoreMod, with numbers x0, x1, ... and tensors w0, w1, ...

    >>> ProbMod.trace(lambda prob, b, h, q_idx, kv_idx: prob * (q_idx - kv_idx))
    ProbMod(prob * (q - k))
    """

    argument: ClassVar[str] = "prob"
    letters: ClassVar[tuple[str, str]] = LETTERS["prob_mod"]

    @staticmethod
    def _traced(function: Callable[..., Any]) -> Traced:
        return trace_prob(function)

    @staticmethod
    def identity() -> ProbMod:
        """Probabilities as they are."""
        return ProbMod("prob", (), (), ())

    def dropped_out(self, threshold: int, scale: float, seed: Any) -> ProbMod:
        """The same, then dropout: probabilities whose random bits are below the threshold become 0, others
        grow by the scale.

        threshold: of 30 random bits as a signed integer. seed: int64, one element, read at each call. The
        bits depend on the seed and on b, h, q and k alone."""
        number, tensor = self.letters
        least, grow = f"{number}{len(self.values)}", f"{number}{len(self.values) + 1}"
        word = ("read", f"{tensor}{len(self.sources)}", 0)
        stream = ("random_bits", ("random_bits", word, ("shr", word, 32), 0), "b", "h")
        kept = ("ge", ("shr", ("random_bits", stream, "q", "k"), 2), least)
        term = ("where", kept, ("mul", self.term, grow), ("f", (0.0).hex()))
        signature = (*self.signature, ("i64", 1))
        return ProbMod(term, (*self.values, threshold, scale), (*self.sources, seed), signature)

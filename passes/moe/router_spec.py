"""RouterSpec: everything about a router that its kernels depend on."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.errors import InputError
from ...ir.expr import Expr

SCORINGS = ("softmax", "sigmoid", "logits", "random", "map", "levels")
CUTS = (None, "top_p", "threshold", "relative")
ENTROPIES = (None, "tsallis", "shannon")
LIMITS = (None, "token", "choice")


@dataclass(frozen=True)
class RouterSpec:
    """Which experts a token takes, and their weights.

    scoring: of the logits, over all experts: 'softmax', 'sigmoid', or 'logits' themselves, whose softmax over
    the chosen ones gives weights. renormalize: weights of a token add up to 1. corrected: the dtype of a bias
    [E] that scores have added for the choice, weights have not. groups, top_groups: experts lie in so many
    groups, of which so many are open to a token. logits: their dtype.

    scoring 'random': of random bits by seed, token and expert, or, if `hashed`, by what stands in token_ids
    in place of the token. 'map': `expr` of a logit, x0. 'levels': softmax of group logits [T, groups] times
    softmax of logits within each group. features: of how many features logits are made, as cosines with a
    vector an expert; 0: they are given.

    cut: 'top_p' keeps the best experts until their scores add up to p, 'threshold' those that score so much,
    'relative' those that score so large a part of the best; `least` experts stay in any case, and all of them
    where the entropy of the scores is large (`entropy`: of which kind). The others get the id -1.

    remapped: ids become those of a table [requests, E] of so many experts; 0: they stay. routing: the dtypes
    of that table and of the numbers of requests. limited: experts take a number of tokens at most, the first
    ones ('token'), or all first choices before all second ones ('choice'). keeps: what gradients need is a
    result too. Raises InputError."""

    experts: int
    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    corrected: str | None = None
    groups: int = 1
    top_groups: int = 1
    logits: str = "f32"
    target: str = "cpu"
    cut: str | None = None
    hashed: bool = False
    expr: Expr | None = None
    features: int = 0
    entropy: str | None = None
    least: int = 0
    remapped: int = 0
    routing: tuple[str, str] = ("i32", "i64")
    limited: str | None = None
    keeps: bool = False

    def __post_init__(self) -> None:
        choices = (("scoring", SCORINGS), ("cut", CUTS), ("entropy", ENTROPIES), ("limited", LIMITS))
        for name, known in choices:
            if getattr(self, name) not in known:
                expected = f"one of {', '.join(map(str, known))}"
                raise InputError(f"RouterSpec.{name}", expected, repr(getattr(self, name)))
        if not 1 <= self.top_k <= self.experts:
            raise InputError("RouterSpec.top_k", f"1 to {self.experts}", self.top_k)
        if self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise InputError("RouterSpec.groups", f"a divisor of {self.experts}", self.groups)

    @property
    def is_cpu(self) -> bool:
        return self.target.partition(":")[0] == "cpu"

    @property
    def accumulator(self) -> str:
        return "f64" if self.logits == "f64" else "f32"

    @property
    def rows(self) -> int:
        """Tokens that are looked at together."""
        if self.features:
            return 16
        return 4 if self.groups > 1 or self.experts > 256 else 16

    @property
    def counted(self) -> int:
        """Experts that ids name in the end."""
        return self.remapped or self.experts

"""Values and operations of linear attention, whose scores are products of features: s_ij = x_i . f_j.

Without a softmax between the two products of attention, sums over keys can be done first: what earlier keys
give a query is a state of [features, value size] (Katharopoulos et al., "Transformers are RNNs", 2020).
Where every row sums over all keys, it reads one state:

    features         x [B, H, L, D] -> [B, H, L, P * D]: the rows' features by `map` (FeatureMap)
    linear_states    f [B, Hf, N, M], g [B, Hf, N, E] -> state [B, H, M, E] (, sums [B, H, M]):
                         sum_j f_j g_j and sum_j f_j c_j. c is 1 where it is no operand; H = `heads`
    read_values      x [B, Hx, L, M], state -> out [B, Hx, L, E] (, den [B, Hx, L]):
                         out_i = x_i state, den_i = x_i . sums
    read_features    y [B, Hx, L, E], state -> [B, Hx, L, M]: state y_i + r_i sums, the gradient of x where y
                     is that of out and r that of den. r: 1 where it is no operand but sums are

and where rows sum over the keys j that `order` says, 'forward' (j <= i) or 'backward' (j >= i):

    linear_values    x, f, g -> out (, den) (, state, sums): out_i = sum_j (x_i . f_j) g_j,
                     den_i = sum_j (x_i . f_j) c_j, and the state behind all j
    linear_features  y, f, g -> [B, Hx, L, M]: sum_j (y_i . g_j + r_i c_j) f_j, the gradient of x as above.
                     `sums` says that there are terms of r and c at all

    normalise        out, den -> out / (den + eps)
    normalise_grad   do, o, den -> the gradients of out and of den, where do is that of o
    features_grad    x, df -> the gradient of x, where df is that of its features by `map`

Where Hx is a multiple of Hf, row head h reads head h // (Hx / Hf); where Hf is one of Hx, head h sums over
the heads h * (Hf / Hx) and following. H is the smaller of the two.

`operands` names the operands of all but the last three by their roles, in order:

    x, y, f, g, r, c    as above
    state, sums         what is read, or what sums over j begin with: [B, H, M, E] and [B, H, M]

and, once linear/fuse has run (with attributes x_map, f_map: features of x and f are computed from rows):

    over                [B, H, N]: g or y is divided by over + eps, `divides` says which
    of                  [B, Hx, L, D]: the result is a gradient of these rows' features by `out_map`, and the
                        gradient of the rows is what the operation gives

linear_values and read_values with `eps` give out / (den + eps). `keeps`: den is a result; `final`: state
(and, with `sums`, sums) are, of `heads` heads. linear/join makes one operation of those that read the same
rows:

    read_gradients   x, y, state (, sums) (, begin, begin_sums) -> the gradients of rows x, of state and of
                     sums, where y is that of out = x state or, with `eps`, of out / (x . sums + eps). The
                     latter two are added to begin and begin_sums
    give_gradients   f, g, state (, sums) -> the gradients of rows f and of g, where state and sums are those
                     of what linear_states makes of them

`chunks` (Chunks) is what the schedule decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from .errors import VerifyError
from .expr import Expr, kind, real, symbols, to_text

ORDERS = ("forward", "backward")
ROLES = ("x", "y", "r", "f", "g", "c", "state", "sums", "begin", "begin_sums", "over", "of")
X0 = real("x0")


@dataclass(frozen=True)
class Chunks:
    """How an operation of linear attention runs: so many rows at once, and, where `split`, sequences in
    segments side by side, whose states are added up. width: how many columns of a state a program holds
    (features where these are what it gives, else value columns). meta: backend hints."""

    rows: int
    split: bool = False
    width: int = 0
    meta: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class FeatureMap:
    """Features of a row: each part is an expression of an element x0, and the parts' results stand side by
    side. softmax: they are then normalised together, exp(u - log sum exp u).

    >>> from .expr import parse
    >>> hedgehog = FeatureMap((X0, -X0), softmax=True)
    >>> len(hedgehog.parts)
    2
    """

    parts: tuple[Expr, ...]
    softmax: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(sympy.sympify(p) for p in self.parts))
        if not self.parts:
            raise VerifyError("a feature map has at least one part")
        for part in self.parts:
            stray = symbols(part) - {X0}
            if stray or kind(part) == "bool":
                raise VerifyError(f"a part of a feature map is a number made of x0; got {to_text(part)}")

    @property
    def is_identity(self) -> bool:
        return self.parts == (X0,) and not self.softmax

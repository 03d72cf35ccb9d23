"""AttentionSpec: everything about one attention that its kernels depend on.

Lengths, batch, head counts and the mask's runtime integers are absent on purpose: they are kernel
arguments, so changing them compiles nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import sympy

from ..ir.errors import InputError, UnsupportedError
from ..ir.expr import integer, maximum, minimum, read, real
from ..ir.kernel import Tensor
from ..ir.mask import Capture, Mask
from ..ir.score import ProbMap, ScoreMap
from ..ir.sequences import PLAIN, Sequences

SCALE = real("scale")
DTYPES = ("f16", "bf16", "f32", "f64")
BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
ALIGN = 16  # bytes of the widest load of one GPU thread
LEAST_SCALE = 2.0**-100  # a scale from here on orders scores as their products do, in f32 too


@dataclass(frozen=True)
class Gradient:
    """Which gradients of an attention kernels give.

    wanted: inputs: "q", "k", "v", "sinks" and captured tensors by name. given: results whose gradients come
    in: "o", and "lse" if that has one."""

    wanted: tuple[str, ...]
    given: tuple[str, ...] = ("o",)


@dataclass(frozen=True)
class AttentionSpec:
    """A fused attention: q [B, Hq, q_len, qk_size], k [B, Hk, kv_len, qk_size], v [.., v_size].

    contiguous: for q, k and v, whether the last dimension has stride 1 (other strides are always
    runtime values). return_max: also the largest score of every row (needs return_lse). monotone:
    captured tensors whose values never decrease (the caller has checked). aligned: the addresses of q, k
    and v and the strides of their rows are multiples of ALIGN bytes; a CPU does not ask. positive: the
    scale is at least LEAST_SCALE, which GPU kernels rely on. sinks: the attention sinks' dtype, or None.
    prob_map: what becomes of the probabilities before they weigh the values. return_column_sums: also
    what every key gets from all queries, before the prob_map. sequences: lengths by batch, and where
    rows lie in memory. few: a power of two that the rows of a key head (queries times query heads of a
    key head) do not exceed, where they are few; else 0. group: how many query heads read a key head,
    where row tiles hold them all; 1 where tiles hold rows of one head. exact_sums: the gradients of captured
    tensors add up as integers (`exact_sums`), whose order shows in no bit. descriptors: whether what launches
    kernels makes tensor descriptors, where the hardware has them. Raises InputError on an unknown dtype or
    a size outside 1..1024, UnsupportedError for column sums of sequences of different lengths."""

    mask: Mask
    score_map: ScoreMap | None = None
    dtype: str = "f32"
    qk_size: int = 64
    v_size: int = 64
    contiguous: tuple[bool, bool, bool] = (True, True, True)
    return_lse: bool = False
    return_max: bool = False
    aligned: bool = True
    precision: str = "ieee"
    positive: bool = True
    target: str = "cpu"
    monotone: frozenset[str] = frozenset()
    sinks: str | None = None
    prob_map: ProbMap | None = None
    return_column_sums: bool = False
    sequences: Sequences = PLAIN
    few: int = 0
    group: int = 1
    descriptors: bool = True
    exact_sums: bool = False

    def __post_init__(self) -> None:
        for name, dtype in (("dtype", self.dtype), ("sinks", self.sinks or self.dtype)):
            if dtype not in DTYPES:
                raise InputError(f"AttentionSpec.{name}", f"one of {', '.join(DTYPES)}", repr(dtype))
        if self.return_max and not self.return_lse:
            raise InputError("AttentionSpec.return_max", "return_lse=True beside it", "return_lse=False")
        if self.return_column_sums and self.sequences.uneven:
            raise UnsupportedError(
                "AttentionSpec.return_column_sums: not built for sequences of different lengths; "
                "ask for them one sequence at a time"
            )
        if self.exact_sums and self.dtype == "f64":
            raise UnsupportedError("AttentionSpec.exact_sums: f64 has numbers that no 64-bit integer holds")
        for name, size in (("qk_size", self.qk_size), ("v_size", self.v_size)):
            if not 1 <= size <= 1024:
                raise InputError(f"AttentionSpec.{name}", "a head size from 1 to 1024", size)

    @property
    def accumulator(self) -> str:
        return "f64" if self.dtype == "f64" else "f32"

    @property
    def product_dtype(self) -> str:
        """The dtype that matrix products run in: `dtype`, or "tf32" where f32 may be rounded to it."""
        return "tf32" if (self.dtype, self.precision) == ("f32", "tf32") else self.dtype

    @property
    def lse_dtype(self) -> str:
        return self.accumulator

    @property
    def target_kind(self) -> str:
        """'cpu', 'cuda' or 'hip'."""
        return self.target.partition(":")[0]

    @property
    def align(self) -> int:
        """The alignment of q, k and v that kernels rely on, in bytes."""
        return ALIGN if self.aligned and self.target_kind != "cpu" else 1

    def row_align(self, dtype: str, size: int) -> int:
        """The alignment in bytes of rows of so many elements in a tensor fresh from an allocator."""
        return 1 if self.target_kind == "cpu" else math.gcd(ALIGN, size * BYTES[dtype])

    @property
    def format(self) -> str:
        return "acsr" if self.mask.exact else "opaque"

    @property
    def mask_text(self) -> str:
        return self.mask.to_text()

    @property
    def params(self) -> tuple[str, ...]:
        return self.mask.params

    @property
    def scaled(self) -> AttentionSpec:
        """The same attention with the scale inside its score map: score_map(scale * q . k)."""
        score = real("score") * SCALE
        if self.score_map is None:
            return replace(self, score_map=ScoreMap(score, (("scale", "float"),)))
        inner = self.score_map
        expr = inner.expr.xreplace({real("score"): score})
        return replace(self, score_map=ScoreMap(expr, (("scale", "float"), *inner.params), inner.captures))

    @property
    def placed(self) -> AttentionSpec:
        """The same attention with the positions of queries spelled out: q + q_offset for every q."""
        if not self.sequences.q_offset:
            return self
        at = {integer("q"): integer("q") + integer("q_offset")}
        score, prob = (m and replace(m, expr=m.expr.xreplace(at)) for m in (self.score_map, self.prob_map))
        mask = replace(self.mask, predicate=self.mask.predicate.xreplace(at))
        return replace(self, mask=mask, score_map=score, prob_map=prob)

    @property
    def differentiable(self) -> AttentionSpec:
        """The same attention as its gradients are taken of: with the log-sum-exp of every row, one head a
        tile, and lengths of keys in the mask. Raises UnsupportedError for pages."""
        if self.sequences.block_table:
            raise UnsupportedError("gradients of an attention over pages: pass keys and values without pages")
        plain = replace(self, few=0, group=1, return_lse=True, return_max=False, return_column_sums=False)
        if not self.sequences.kv_lens:
            return plain
        dtype, name = self.sequences.kv_lens, integer("kv_lens")
        length = maximum(read(name, integer("b")), sympy.Integer(0))
        inside = self.mask.predicate.xreplace({integer("kv_len"): minimum(length, integer("kv_len"))})
        captures = (*self.mask.captures, Capture("kv_lens", dtype, 1))
        mask = replace(self.mask, predicate=sympy.And(inside, integer("k") < length), captures=captures)
        return replace(plain, mask=mask, sequences=replace(self.sequences, kv_lens=""))

    @property
    def shorter_keys(self) -> bool:
        """Whether the mask ends at the number of keys of a sequence, `kv_lens`; see `differentiable`."""
        return any(c.name == "kv_lens" for c in self.mask.captures)

    @property
    def maps(self) -> tuple[ScoreMap, ...]:
        """The score map and the probability map, those that there are."""
        return tuple(m for m in (self.score_map, self.prob_map) if m is not None)

    @property
    def map_params(self) -> tuple[tuple[str, str], ...]:
        """Names and argument dtypes of the maps' runtime numbers."""
        return tuple(p for m in self.maps for p in self.params_of(m))

    def params_of(self, map: ScoreMap) -> tuple[tuple[str, str], ...]:
        """Names and argument dtypes of one map's runtime numbers."""
        return tuple((name, "i64" if kind == "int" else self.accumulator) for name, kind in map.params)

    @property
    def capture_tensors(self) -> tuple[Tensor, ...]:
        captures = [*self.mask.captures, *(c for m in self.maps for c in m.captures)]
        return tuple(
            Tensor(
                c.name, "u8" if c.dtype == "bool" else c.dtype, tuple(f"{c.name}_{d}" for d in range(c.rank))
            )
            for c in captures
        )

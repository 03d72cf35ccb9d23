"""LinearSpec: everything about one linear attention that its kernels depend on.

Batch, numbers of heads and lengths are kernel arguments: changing them compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.errors import InputError
from ...ir.linear import FeatureMap

DTYPES = ("f16", "bf16", "f32", "f64")
BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
WIDEST = 1024


@dataclass(frozen=True)
class LinearSpec:
    """q [B, Hq, L, qk_size], k [B, Hk, N, qk_size], v [B, Hk, N, v_size] by features: see ir/linear.py.

    causal: row i sums over keys 0 to i (L == N). eps: what is added to denominators; None: not normalised.
    initial: sums begin with a given state. final: the state behind the last key is a result. keeps: the
    denominators are, for gradients. grouped: Hq != Hk. split: sequences are cut into segments that run side
    by side; their length in chunks is the kernels' argument `span`. aligned: on a GPU, whether rows start on
    multiples of 16 bytes. Raises InputError."""

    q_map: FeatureMap
    k_map: FeatureMap
    dtype: str = "f32"
    qk_size: int = 64
    v_size: int = 64
    causal: bool = True
    eps: float | None = 0.0
    initial: bool = False
    final: bool = False
    keeps: bool = False
    grouped: bool = False
    split: bool = False
    aligned: bool = True
    precision: str = "ieee"
    target: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError("LinearSpec.dtype", f"one of {', '.join(DTYPES)}", repr(self.dtype))
        for name, size in (("qk_size", self.qk_size), ("v_size", self.v_size)):
            if not 1 <= size <= WIDEST:
                raise InputError(f"LinearSpec.{name}", f"1 to {WIDEST}", size)
        if len(self.q_map.parts) != len(self.k_map.parts):
            counts = f"{len(self.q_map.parts)} and {len(self.k_map.parts)}"
            raise InputError("LinearSpec.k_map", "as many parts as q_map has", counts)

    @property
    def accumulator(self) -> str:
        return "f64" if self.dtype == "f64" else "f32"

    @property
    def is_cpu(self) -> bool:
        return self.target.partition(":")[0] == "cpu"

    def align(self, size: int | str, dtype: str) -> int:
        """Bytes that rows of so many numbers start on, at most 16."""
        if self.is_cpu or not self.aligned or not isinstance(size, int):
            return 1
        row = size * BYTES[dtype]
        return min(16, row & -row)

    @property
    def operand(self) -> str:
        """The dtype of what products multiply. float16 has too small a range for sums of features: such
        products run on f32, rounded to tf32, whose mantissa is as long."""
        return self.dtype if self.dtype == "bf16" and not self.is_cpu else self.accumulator

    @property
    def product_precision(self) -> str:
        return "tf32" if self.dtype == "f16" and not self.is_cpu else self.precision

    @property
    def features(self) -> int:
        return self.qk_size * len(self.q_map.parts)

    @property
    def normalised(self) -> bool:
        return self.eps is not None

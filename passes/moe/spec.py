"""ExpertsSpec: everything about one layer of experts that its kernels depend on.

The number of tokens is a kernel argument: changing it compiles nothing. Sizes of the weights are numbers,
for tiles are cut from them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.errors import InputError
from ...ir.expr import Expr
from ...ir.quantized import Quantized
from ...ir.ragged import Tiling

DTYPES = ("f16", "bf16", "f32", "f64")
BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
# How many rows an expert gets on average: at most 16, at most 64, more. 'one': a handful of entries in all.
LOADS = ("one", "few", "some", "many")
EXPERTS = 1024  # at most: a program compares with all of them at once


@dataclass(frozen=True)
class ExpertsSpec:
    """x [T, hidden] through top_k of `experts` feed-forward networks: down(act(up(x))), weighted and added.

    top_k: experts a token, a list of ids [T, top_k]; 0: the rows come as a list that says which tokens they
    belong to. activation: over x0 (and x1, the second half); halves: how the first product's columns hold two
    halves: None, 'split' or 'interleaved'. transposed: matrices are [E, in, out] in place of [E, out, in].
    units: the dimensions of stride 1 of the two matrices (None: neither). biased: both products have a bias.
    routing: the dtypes of ids and of weights. load: one of LOADS. single: few enough entries to be sorted by
    one program. routed: rows are sorted already; tokens, bounds and place are given. keeps: what the
    activation is taken of is a result too, for gradients. ranks: of what low-rank adapters add to the two
    matrices, lora_scale times b a; 0: none. adapters: the dtype of ids [T] that say which adapter of a stack
    [A, E, ..] a token takes; None: all take the same. masked: an input says which experts learn; the
    gradients of others are zeros. aligned: on a GPU, whether x and the matrices start, and their rows too, on
    multiples of 16 bytes. descriptors: whether what launches kernels makes tensor descriptors, where hardware
    has them. quantized: how the two matrices are stored, None: as they are. once: which of them are decoded
    before their product (moe_once). tiling: of products, in place of the default. Raises InputError."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    activation: Expr
    halves: str | None = "split"
    dtype: str = "f32"
    transposed: bool = False
    units: tuple[int | None, int | None] = (2, 2)
    biased: bool = False
    routing: tuple[str, str] = ("i64", "f32")
    load: str = "many"
    single: bool = False
    routed: bool = False
    keeps: bool = False
    ranks: tuple[int, int] = (0, 0)
    lora_scale: float = 1.0
    adapters: str | None = None
    masked: bool = False
    aligned: bool = True
    descriptors: bool = True
    quantized: tuple[Quantized | None, Quantized | None] = (None, None)
    once: tuple[bool, bool] = (False, False)
    precision: str = "ieee"
    target: str = "cpu"
    tiling: tuple[Tiling, Tiling] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError("ExpertsSpec.dtype", f"one of {', '.join(DTYPES)}", repr(self.dtype))
        if self.load not in LOADS:
            raise InputError("ExpertsSpec.load", f"one of {', '.join(LOADS)}", repr(self.load))
        if not 1 <= self.experts <= EXPERTS:
            raise InputError("ExpertsSpec.experts", f"1 to {EXPERTS}", self.experts)
        if self.top_k < 0:
            raise InputError("ExpertsSpec.top_k", "0 or more", self.top_k)
        if self.transposed and any(self.quantized):
            raise InputError("ExpertsSpec.quantized", "matrices [E, out, in]", "[E, in, out]")

    @property
    def accumulator(self) -> str:
        return "f64" if self.dtype == "f64" else "f32"

    @property
    def is_cpu(self) -> bool:
        return self.target.partition(":")[0] == "cpu"

    def align(self, columns: int) -> int:
        """Bytes that rows of so many columns start on, at most 16."""
        size = columns * BYTES[self.dtype]
        return 1 if self.is_cpu or not self.aligned else min(16, size & -size)

    @property
    def up_columns(self) -> int:
        """Columns of the first product."""
        return self.inner * (2 if self.halves else 1)

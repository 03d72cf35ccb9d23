"""The face `Mask`: which pairs attend, with the integers and tensors that the predicate depends on.

A Mask keeps its predicate as a term (frontend/term.py) and crosses over to the IR, and so to sympy and
isl, only when somebody asks for geometry. What a cached kernel needs (`key`, `values`, `tensors`) costs
microseconds.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..ir.errors import InputError, UnsupportedError
from .captured import Constant, as_numpy, is_array, readable
from .pure import is_compiled
from .term import TRUE, Term, negate, rename, show
from .term_expr import from_expr, to_expr
from .term_mask import bake_large, joined, segments
from .trace.function import dtype_name, trace_mask

if TYPE_CHECKING:
    import numpy as np

    from ..ir.mask import Mask as IRMask
    from ..passes.geometry import Geometry

Signature = tuple[tuple[str, int], ...]


class Mask:
    """Which pairs (query index q, key index k) attend, by batch b and query head h where it matters.

    Made by `gossamer.masks`, `Mask.trace`, `Mask.from_dense`, or from what other libraries use
    (`Mask.of`); combined with `&`, `|` and `~`; compared as sets. A Mask is a value: the integers it
    was made with stay. Tensors it captured are kept by reference and read at each call.

    key: what a kernel depends on; made of primitives, the same in every process.
    values: integers for p0, p1, ...; another value compiles nothing (from 2**30 on they are part of `key`).
    tensors: the captured tensors c0, c1, ... as they are read now; sources: as they were captured;
    signature: (dtype, rank) of each.

    >>> window = Mask.trace(lambda b, h, q_idx, kv_idx: abs(q_idx - kv_idx) <= 2)
    >>> causal = Mask.trace(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    >>> window & causal
    Mask((abs(q - k) <= 2) and (q >= k))
    >>> (window & causal).to_dense(4, 4).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [0, 1, 1, 1]])
    """

    def __init__(
        self,
        term: Term,
        values: tuple[int, ...] = (),
        tensors: tuple[Any, ...] = (),
        signature: Signature = (),
    ) -> None:
        self.term, self.values = bake_large(term, values, "p")
        self.kinds = ("int",) * len(self.values)
        self.signature, self.sources = signature, tensors

    # ---- making one ----

    @staticmethod
    def trace(mask_mod: Callable[..., Any]) -> Mask:
        """Capture `mask_mod(b, h, q_idx, kv_idx) -> bool`, True = attend, as in FlexAttention.

        It is called once, with stand-ins for the indices. Captured integers become runtime values where
        they are added, subtracted or compared, and numbers (part of `key`) where they divide or multiply
        an index. Captured tensors may be indexed by any integer expressions; an index that is negative
        at run time is out of range (a constant one counts from the end).

        Raises TraceError, pointing at the user's line, for what cannot be captured.
        """
        if is_compiled():
            raise UnsupportedError(
                "Mask.trace inside torch.compile. Pass the function itself to gossamer.attention, or make "
                "the Mask outside of what is compiled"
            )
        traced = trace_mask(mask_mod)
        return Mask(traced.term, traced.values, traced.tensors, traced.signature)  # type: ignore[arg-type]

    @staticmethod
    def of(value: Any) -> Mask:
        """The Mask of an argument.

        value: a Mask; a mask_mod; a BlockMask, PyTorch's or ours; a boolean array broadcastable to
        (B, Hq, q_len, kv_len); or None for all pairs. Raises InputError for anything else.
        """
        if isinstance(value, Mask):
            return value
        if value is None:
            return Mask(TRUE)
        if any(base.__name__ == "BlockMask" for base in type(value).__mro__):
            return Mask.from_block_mask(value)
        if is_array(value):
            return Mask._from_table(value)
        if callable(value):
            if getattr(value, "__module__", None) == "gossamer.frontend.masks":
                name = f"masks.{value.__name__}"
                raise InputError("mask", "a Mask", f"the function {name}", f"Call it: {name}(...)")
            return Mask.trace(value)
        raise InputError(
            "mask",
            "a Mask, a mask_mod, a BlockMask, a boolean tensor or None",
            f"{type(value).__name__} {reprlib.repr(value)}",
        )

    @staticmethod
    def from_block_mask(block_mask: Any) -> Mask:
        """The pairs that a BlockMask of `torch.nn.attention.flex_attention`, or of ours, lets attend."""
        from . import block_mask as blocks

        if not any(base.__name__ == "BlockMask" for base in type(block_mask).__mro__):
            raise InputError("Mask.from_block_mask", "a BlockMask", type(block_mask).__name__)
        return blocks.of(block_mask).mask

    @staticmethod
    def from_flashmask(startend_row_indices: Any, causal: bool = True) -> Mask:
        """See `gossamer.masks.from_flashmask`."""
        from .masks import from_flashmask

        return from_flashmask(startend_row_indices, causal)

    @staticmethod
    def from_dense(array: Any) -> Mask:
        """The mask of a 0/1 matrix, torch or NumPy, of shape (q_len, kv_len): closed forms where they fit.

        Rows and columns outside the array belong to whatever closed form was found. Raises InputError
        when the array is no matrix of zeros and ones.
        """
        from ..passes.recover import recover

        ir, tensors = recover(as_numpy(array))
        return Mask.from_ir(ir, tensors=tuple(map(Constant, tensors)))

    @staticmethod
    def from_ir(ir: IRMask, values: tuple[int, ...] = (), tensors: tuple[Any, ...] = ()) -> Mask:
        """An IR mask bound to its runtime integers and its tensors."""
        for name, wanted, got in (("values", ir.params, values), ("tensors", ir.captures, tensors)):
            if len(wanted) != len(got):
                raise InputError(f"Mask.from_ir.{name}", f"{len(wanted)} for {ir}", len(got))
        names = {p: f"p{i}" for i, p in enumerate(ir.params)}
        names |= {c.name: f"c{i}" for i, c in enumerate(ir.captures)}
        signature = tuple((c.dtype, c.rank) for c in ir.captures)
        return Mask(rename(from_expr(ir.predicate), names), tuple(values), tuple(tensors), signature)

    @staticmethod
    def _from_table(table: Any) -> Mask:
        dtype = dtype_name(table.dtype) or ""
        if dtype != "bool":
            fix = "Add numbers to scores with a score_mod, such as score + bias[h, q_idx, kv_idx]"
            if dtype[:1] in ("i", "u"):
                fix = "Compare it, such as mask != 0, or find its closed form with Mask.from_dense"
            raise InputError("mask", "a boolean tensor, True = attend", f"dtype {table.dtype}", fix)
        shape = tuple(table.shape)
        if len(shape) > 4:
            raise InputError("mask", "a tensor broadcastable to (B, Hq, q_len, kv_len)", f"shape {shape}")
        kept = [d for d, n in enumerate(shape) if n != 1]
        indices = [("b", "h", "q", "k")[d + 4 - len(shape)] for d in kept]
        table = table.reshape([shape[d] for d in kept])
        signature = (("bool", max(1, len(kept))),)
        return Mask(("ne", ("read", "c0", *(indices or [0])), 0), (), (table,), signature)

    # ---- what a call needs ----

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return ("mask", self.term, self.signature)

    @property
    def captures(self) -> int:
        """How many tensors it captured."""
        return len(self.sources)

    @property
    def tensors(self) -> tuple[Any, ...]:
        return tuple(map(readable, self.sources))

    def to(self, device: Any) -> Mask:
        """The same pairs, with the captured tensors as torch tensors on a device.

        Those that are not there are copied: what is later written to the original is not seen."""
        import torch

        tensors = tuple(torch.as_tensor(tensor, device=device) for tensor in self.tensors)
        return Mask(self.term, self.values, tensors, self.signature)

    def tensors_on(self, device: Any) -> tuple[Any, ...]:
        """The captured tensors as kernels on a torch device read them; the user's own are not moved."""
        return tuple(readable(t, device) for t in self.sources)

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """The captured tensors read only as segment ids: c[q] == c[k], or c[b, q] == c[b, k].

        Where such ids never decrease (`is_monotone`), the keys of a row are one interval.
        """
        return segments(self.term)

    # ---- algebra ----

    def __and__(self, other: Any) -> Mask:
        return self._join("and", other)

    def __or__(self, other: Any) -> Mask:
        return self._join("or", other)

    def __rand__(self, other: Any) -> Mask:
        return Mask.of(other)._join("and", self)

    def __ror__(self, other: Any) -> Mask:
        return Mask.of(other)._join("or", self)

    def __invert__(self) -> Mask:
        return Mask(negate(self.term), self.values, self.sources, self.signature)

    def _join(self, how: str, other: Any) -> Mask:
        right = Mask.of(other)
        values, tensors = self.values + right.values, self.sources + right.sources
        signature = self.signature + right.signature
        same = tuple(next(i for i, first in enumerate(tensors) if first is t) for t in tensors)
        counts = len(self.values), len(self.sources)
        term, params, captures = joined(how, self.term, right.term, counts, same)
        return Mask(
            term,
            tuple(values[i] for i in params),
            tuple(tensors[i] for i in captures),
            tuple(signature[i] for i in captures),
        )

    def __eq__(self, other: object) -> bool:
        """Whether both masks hold the same pairs, whatever the lengths, with their integers and tensors.

        Proven by isl for affine masks. Masks that isl cannot hold are equal when their predicates are
        written alike and their tensors are the same objects.
        """
        if not isinstance(other, Mask):
            return NotImplemented
        if len(self.sources) != len(other.sources):
            return False
        if any(a is not b for a, b in zip(self.sources, other.sources, strict=True)):
            return False
        if self.key == other.key and self.values == other.values:
            return True
        return self._bound.equal(other._bound)

    @cached_property
    def _hash(self) -> int:
        if self.signature:
            return hash(self.signature)
        try:  # equal sets look alike through any window, however they are written
            seen = [self.to_dense(40, 40, b, h).tobytes() for b, h in ((0, 0), (1, 1))]
        except InputError:
            seen = []
        return hash(tuple(seen))

    def __hash__(self) -> int:
        return self._hash

    # ---- geometry and text ----

    @cached_property
    def ir(self) -> IRMask:
        """The mask as an IR value, in which the integers are parameters."""
        return self._to_ir(self.term, tuple(f"p{i}" for i in range(len(self.values))))

    @cached_property
    def _bound(self) -> IRMask:
        numbers = {f"p{i}": v for i, v in enumerate(self.values)}
        return self._to_ir(rename(self.term, numbers), ())

    def _to_ir(self, term: Term, params: tuple[str, ...]) -> IRMask:
        from ..ir.mask import Capture
        from ..ir.mask import Mask as IRMask

        captures = tuple(Capture(f"c{i}", *s) for i, s in enumerate(self.signature))
        return IRMask(to_expr(term), params, captures)

    def to_dense(self, q_len: int, kv_len: int, b: int = 0, h: int = 0) -> np.ndarray:
        """The mask of one batch and query head as a bool array of shape (q_len, kv_len)."""
        import numpy as np

        _check_numbers("to_dense", q_len=q_len, kv_len=kv_len, b=b, h=h)
        q, k = np.arange(q_len)[:, None], np.arange(kv_len)[None, :]
        tensors = [as_numpy(t) for t in self.tensors]
        return np.array(self.ir.evaluate(b, h, q, k, self.values, tensors, q_len, kv_len))

    def analyze(self, q_len: int, kv_len: int, b: int = 0, h: int = 0) -> Geometry:
        """The geometry at these lengths, for one batch and query head: pairs, terms, tiles. Lazy."""
        from ..passes.geometry import analyze

        _check_numbers("analyze", q_len=q_len, kv_len=kv_len, b=b, h=h)
        tensors = tuple(as_numpy(t) for t in self.tensors)
        return analyze(self.ir, q_len, kv_len, self.values, tensors, b, h)

    def plot(
        self,
        path: Any,
        q_len: int,
        kv_len: int,
        tiles: tuple[int, int] = (64, 64),
        *,
        batch: int = 0,
        head: int = 0,
        title: str = "",
    ) -> None:
        """Write a PNG of the mask, its terms in colour, and its tiles of (queries, keys).

        batch, head: which to draw, where masks differ. title: else the mask. Needs the extra `plot`.
        """
        from .plot import plot

        plot(self, path, q_len, kv_len, tiles, batch=batch, head=head, title=title)

    @property
    def text(self) -> str:
        """The mask as IR text; `gossamer.ir.mask.Mask.parse` reads it back."""
        return self.ir.to_text()

    def __repr__(self) -> str:
        bound = "".join(f", p{i}={v}" for i, v in enumerate(self.values))
        bound += "".join(f", c{i}: {d}[{r}]" for i, (d, r) in enumerate(self.signature))
        return f"Mask({show(self.term)}{bound})"

    def __bool__(self) -> bool:
        raise UnsupportedError("a Mask has no truth value: use & | ~ in place of 'and', 'or', 'not'")


def _check_numbers(where: str, **numbers: Any) -> None:
    for name, number in numbers.items():
        try:
            wrong = operator.index(number) < 0
        except TypeError:
            wrong = True
        if wrong:
            raise InputError(f"Mask.{where}.{name}", "an integer of at least 0", repr(number))

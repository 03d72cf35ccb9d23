"""The checked inputs of one attention."""

from __future__ import annotations

import operator
from typing import Any

from ..ir.errors import InputError, MissingDependencyError
from .captured import is_array
from .mask import Mask

ALIGN = 16  # bytes, as `passes.spec` has it
DTYPE_NAMES: dict[Any, str] = {}


def _fill_names() -> dict[Any, str]:
    import torch

    DTYPE_NAMES.update(
        {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}
    )
    return DTYPE_NAMES


def is_aligned(tensor: Any) -> bool:
    """Whether the address and every stride in use, but a last one of 1, are multiples of 16 bytes."""
    *outer, last = zip(tensor.shape, tensor.stride(), strict=True)
    strides = [stride for size, stride in (*outer, *([last] if last[1] != 1 else [])) if size > 1]
    size = tensor.element_size()
    return tensor.data_ptr() % ALIGN == 0 and all(stride * size % ALIGN == 0 for stride in strides)


def as_integer(value: Any) -> int | None:
    """An integer of Python, NumPy or the like as an int; None for truth values and all else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


class Problem:
    """Checked inputs of one attention: its sizes, dtype name and device, and the three tensors.

    paged: key and value are pages, whose length is kv_len. pairs: the extents of b, h, q and k that a mask
    sees, None where sequences differ. one_key_batch: whether key and value came once for all batches.
    contiguous: for each tensor, whether its last dimension has stride 1. aligned: whether every address and
    row lies on a multiple of 16 bytes, which GPU kernels are compiled for
    or not."""

    __slots__ = (
        "batch",
        "contiguous",
        "device",
        "dtype",
        "heads",
        "key",
        "kv_len",
        "one_key_batch",
        "pairs",
        "q_len",
        "qk_size",
        "query",
        "v_size",
        "value",
    )

    def __init__(self, query: Any, key: Any, value: Any, enable_gqa: bool, *, paged: bool = False) -> None:
        self.query, self.key, self.value = query, key, value
        self._check_tensors()
        (self.batch, self.heads, self.q_len, self.qk_size) = query.shape
        kv_batch, kv_heads, self.kv_len, size = key.shape
        self.v_size = value.shape[3]
        if value.shape[:3] != key.shape[:3]:
            raise InputError(
                "attention.value",
                f"(B, Hk, kv_len, Dv) = {tuple(key.shape[:3])} + (Dv,) as key has",
                tuple(value.shape),
            )
        if size != self.qk_size:
            raise InputError(
                "attention.key", f"the query's head size {self.qk_size} in the last dimension", size
            )
        self.one_key_batch = kv_batch != self.batch and not paged
        if self.one_key_batch:
            if kv_batch != 1:
                raise InputError("attention.key", f"batch {self.batch} (the query's) or 1", kv_batch)
            self.key, self.value = (t.expand(self.batch, -1, -1, -1) for t in (self.key, self.value))
        if self.heads != kv_heads:
            self._check_heads(kv_heads, enable_gqa)
        tensors = (self.query, self.key, self.value)
        self.contiguous = tuple(t.stride(3) == 1 or t.shape[3] == 1 for t in tensors)
        self.device = query.device
        self.pairs: tuple[int | None, ...] = (self.batch, self.heads, self.q_len, self.kv_len)

    def _check_tensors(self) -> None:
        try:
            import torch
        except ImportError:
            raise MissingDependencyError("torch", "torch", "gossamer.attention") from None
        names = DTYPE_NAMES or _fill_names()
        query = self.query
        for name, tensor in (("query", query), ("key", self.key), ("value", self.value)):
            where = f"attention.{name}"
            if not isinstance(tensor, torch.Tensor):
                raise InputError(
                    where,
                    "a torch.Tensor",
                    type(tensor).__name__,
                    "Convert with torch.from_numpy or torch.utils.dlpack",
                )
            if tensor.dim() != 4:
                raise InputError(
                    where,
                    "4 dimensions (batch, heads, length, size)",
                    f"{tensor.dim()}: {tuple(tensor.shape)}",
                )
            if tensor.dtype not in names:
                raise InputError(where, "float16, bfloat16, float32 or float64", tensor.dtype)
            if tensor.dtype != query.dtype:
                raise InputError(where, f"the query's dtype {query.dtype}", tensor.dtype, "Cast one of them")
            if tensor.device.type not in ("cpu", "cuda"):
                raise InputError(where, "a tensor on the CPU or a CUDA GPU", tensor.device)
            if tensor.device != query.device:
                fix = f"Pass {name}.to({str(query.device)!r})"
                raise InputError(where, f"a tensor on {query.device}, as the query is", tensor.device, fix)
            if tensor.layout != torch.strided:
                raise InputError(where, "a strided tensor", tensor.layout, "Call .to_dense()")
            if not 1 <= tensor.shape[3] <= 1024:
                raise InputError(where, "a head size from 1 to 1024", tensor.shape[3])
            if tensor.is_neg():
                setattr(self, name, tensor.resolve_neg())
        self.dtype = names[query.dtype]

    @property
    def aligned(self) -> bool:
        tensors = (self.query, self.key, self.value)
        return self.device.type == "cpu" or all(map(is_aligned, tensors))

    def check_mask(self, value: Any) -> None:
        """Raise InputError unless a mask that is a boolean tensor broadcasts to this problem."""
        if is_array(value) and not isinstance(value, Mask):
            wanted, got = self.pairs, tuple(value.shape)
            fits = (m is None or n in (1, m) for n, m in zip(reversed(got), reversed(wanted), strict=False))
            if not all(fits):
                raise InputError("attention.mask", f"a tensor broadcastable to {wanted}", f"shape {got}")

    def _check_heads(self, kv_heads: int, enable_gqa: bool) -> None:
        if not enable_gqa:
            raise InputError(
                "attention.key",
                f"{self.heads} heads, as the query has",
                kv_heads,
                "Pass enable_gqa=True to share key heads" + self._layout_hint(kv_heads),
            )
        if kv_heads == 0 or self.heads % kv_heads:
            raise InputError(
                "attention.key",
                f"a number of heads that divides the query's {self.heads}",
                kv_heads,
                self._layout_hint(kv_heads).lstrip("; "),
            )

    def _layout_hint(self, kv_heads: int) -> str:
        """What to do when heads and lengths look exchanged between query and key."""
        if 1 < self.q_len == kv_heads or 1 < self.heads == self.kv_len:
            return "; what is (batch, length, heads, size), pass as x.transpose(1, 2)"
        return ""

"""SPLAT's three kernels, for people who need the sparse score matrix itself.

    scores = gossamer.sddmm(q, k, mask)           compressed values, one slot an attending pair
    weights = gossamer.sparse_softmax(scores)
    out = gossamer.spmm(weights, v)

Compressed values take a few integers of geometry beside them, never an index array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import InputError, UnsupportedError
from .mask import Mask
from .prepare import allocate
from .problem import Problem

if TYPE_CHECKING:
    import torch

    from ..ir.formats import ACSR


@dataclass(frozen=True, eq=False)
class ACSRTensor:
    """Scores or probabilities of a mask's pairs.

    values: (B, Hq, q_len, slots), in the query's dtype. Terms lie side by side; entry s of a term's
    row is its key first(q) + stride * s. Slots without an entry hold -inf (scores) or 0 (probabilities).
    """

    values: torch.Tensor
    mask: Mask
    kv_len: int

    @property
    def q_len(self) -> int:
        return self.values.shape[2]

    @cached_property
    def layout(self) -> Layout:
        """Where each term lies."""
        return Layout(self.mask, self.q_len, self.kv_len)

    def to_dense(self, fill: float = 0.0) -> torch.Tensor:
        """(B, Hq, q_len, kv_len), pairs that do not attend holding `fill`."""
        rows, slots, keys = self.layout.entries()
        dense = self.values.new_full((*self.values.shape[:3], self.kv_len), fill)
        dense[:, :, rows, keys] = self.values[:, :, rows, slots]
        return dense


class Layout:
    """Slots of a mask's terms at given lengths: base and extents of each, as the kernels name them."""

    def __init__(self, mask: Mask, q_len: int, kv_len: int) -> None:
        from ..passes.decompose import decompose
        from ..passes.normalize import normalize_mask

        self.q_len, self.kv_len = q_len, kv_len
        ir = normalize_mask(mask.ir)
        self.terms: tuple[ACSR, ...] = decompose(ir)  # type: ignore[assignment]
        self.params = dict(zip(ir.params, mask.values, strict=True))
        self.scalars: dict[str, int] = {}
        self.slots = 0
        for index, term in enumerate(self.terms):
            extents = [int(count.max(initial=0)) for _, count in self._lines(term)]
            self.scalars[f"base{index}"] = self.slots
            self.scalars |= {f"wide{index}_{d}": n for d, n in enumerate(extents)}
            self.slots += math.prod(extents)

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, slots and keys of every pair that attends."""
        found: list[tuple[np.ndarray, ...]] = []
        for index, term in enumerate(self.terms):
            row = np.arange(self.q_len)
            slot = np.full(self.q_len, self.scalars[f"base{index}"])
            rows, offset, keys = row, np.zeros_like(row), np.zeros_like(row)
            for d, (first, count) in enumerate(self._lines(term)):
                extent, stride = self.scalars[f"wide{index}_{d}"], term.progressions[d].stride
                step = np.arange(extent)
                inside = step < count[rows][:, None]
                width = term.widths[d - 1] if d else 1
                offset = (offset[:, None] * extent + step)[inside]
                keys = (keys[:, None] * width + first[rows][:, None] + stride * step)[inside]
                rows = np.broadcast_to(rows[:, None], inside.shape)[inside]
            found.append((rows, slot[rows] + offset, keys))
        rows, slots, keys = (
            (np.concatenate(parts) for parts in zip(*found, strict=True))
            if found
            else (np.zeros(0, int),) * 3
        )
        valid = keys < self.kv_len
        return rows[valid], slots[valid], keys[valid]

    def _lines(self, term: ACSR) -> list[tuple[np.ndarray, np.ndarray]]:
        """(first, count) of every row in each dimension, counts clipped to kv_len."""
        from ..ir.evaluate import evaluate

        q = np.arange(self.q_len)
        values: dict[str, Any] = {
            "q": q,
            **self.params,
            **{f"q{d}": c for d, c in enumerate(term.coordinates(q))},
        }
        present = np.broadcast_to(evaluate(term.rows, values), q.shape)
        inner = math.prod(term.widths)
        limits = [-(-self.kv_len // inner), *term.widths]
        lines = []
        for line, limit in zip(term.progressions, limits, strict=True):
            first = np.broadcast_to(evaluate(line.first, values), q.shape).astype(np.int64)
            count = np.broadcast_to(evaluate(line.count, values), q.shape)
            fits = np.maximum((limit - 1 - first) // line.stride + 1, 0)
            lines.append((first, np.where(present, np.clip(count, 0, fits), 0).astype(np.int64)))
        return lines


def sddmm(
    query: torch.Tensor, key: torch.Tensor, mask: Any, *, scale: float | None = None, enable_gqa: bool = False
) -> ACSRTensor:
    """scale * query . key of every pair of an affine mask, compressed.

    query: (B, Hq, q_len, D); key: (B, Hk, kv_len, D); scale: default 1 / sqrt(D). Raises InputError, and
    UnsupportedError for a mask without closed-form terms."""
    bound = Mask.of(mask)
    problem = Problem(query, key, key, enable_gqa)
    layout = Layout(bound, problem.q_len, problem.kv_len)
    values = query.new_full((problem.batch, problem.heads, problem.q_len, layout.slots), -math.inf)
    factor = 1 / math.sqrt(problem.qk_size) if scale is None else float(scale)
    call = {"q": problem.query.detach(), "k": problem.key.detach(), "values": values, "scale": factor}
    _run("sddmm", problem, bound, layout, call)
    return ACSRTensor(values, bound, problem.kv_len)


def sparse_softmax(scores: ACSRTensor) -> ACSRTensor:
    """The softmax of every row over its entries; rows without one stay zeros."""
    _check_acsr("sparse_softmax.scores", scores)
    values = scores.values.clone()
    if values.shape[3]:
        like = values[..., :1]
        _run("softmax", Problem(like, like, like, False), scores.mask, scores.layout, {"values": values})
    return replace(scores, values=values)


def spmm(weights: ACSRTensor, value: torch.Tensor, *, enable_gqa: bool = False) -> torch.Tensor:
    """weights times value: (B, Hq, q_len, Dv) in value's dtype. value: (B, Hk, kv_len, Dv)."""
    _check_acsr("spmm.weights", weights)
    if getattr(value, "dtype", None) != weights.values.dtype:
        got = getattr(value, "dtype", type(value).__name__)
        raise InputError("spmm.value", f"a tensor of the weights' dtype {weights.values.dtype}", got)
    if value.dim() != 4 or value.shape[2] != weights.kv_len:
        raise InputError("spmm.value", f"(B, Hk, {weights.kv_len}, Dv)", tuple(value.shape))
    batch, heads, q_len = weights.values.shape[:3]
    like = value.new_empty(1).expand(batch, heads, q_len, value.shape[3])
    problem = Problem(like, value, value, enable_gqa)
    acc = allocate((batch, heads, q_len, problem.v_size), "f64" if problem.dtype == "f64" else "f32").zero_()
    call = {"values": weights.values.detach(), "v": problem.value.detach(), "acc": acc}
    _run("spmm", problem, weights.mask, weights.layout, call)
    return acc.to(value.dtype)


def _check_acsr(where: str, value: Any) -> None:
    if not isinstance(value, ACSRTensor):
        raise InputError(where, "an ACSRTensor, as gossamer.sddmm returns", type(value).__name__)


def _run(kind: str, problem: Problem, mask: Mask, layout: Layout, call: dict[str, Any]) -> None:
    if problem.device.type != "cpu":
        fix = "Pass tensors on the CPU, or use gossamer.attention, which is fused"
        raise UnsupportedError(f"{kind} on {problem.device} is not built yet. {fix}")
    from ..runtime.driver import get_or_compile

    def make() -> Any:
        from ..passes import splat
        from ..passes.spec import AttentionSpec

        spec = AttentionSpec(
            mask.ir, None, problem.dtype, problem.qk_size, problem.v_size, problem.contiguous
        )
        return getattr(splat, f"lower_{kind}")(spec)

    sizes = () if kind == "softmax" else (problem.qk_size, problem.v_size, problem.contiguous)
    executable = get_or_compile((kind, mask.key, problem.dtype, sizes), make, "cpu")
    params = {f"p{i}": p for i, p in enumerate(mask.values)}
    executable({**call, **params, **layout.scalars}, allocate=allocate)

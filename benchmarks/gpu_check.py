"""Whether an output is right: the error rule of docs/design.md against float64, on the GPU, at any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Dense = Callable[[slice], torch.Tensor]  # rows -> bool (rows, kv_len): who attends
ROWS = 1024  # whose scores are held at once


@dataclass(frozen=True)
class Accuracy:
    """The largest error, and the one allowed: twice that of plain PyTorch in the same dtype, plus one ulp."""

    error: float
    allowed: float

    @property
    def passes(self) -> bool:
        return self.error <= self.allowed


def accuracy(out: torch.Tensor, tensors: Tensors, dense: Dense, scale: float | None = None) -> Accuracy:
    """Judge the first and the last head of an output (B, Hq, q_len, Dv); the rest has to be finite."""
    q, k, v = tensors
    batch, heads, _, size = q.shape
    group = heads // k.shape[1]
    scale = size**-0.5 if scale is None else scale
    if out.shape != (*q.shape[:3], v.shape[3]) or not out.isfinite().all():
        return Accuracy(float("inf"), 0.0)
    error = plain_error = largest = 0.0
    for b, h in {(0, 0), (batch - 1, heads - 1)}:
        queries, keys, values = q[b, h], k[b, h // group], v[b, h // group]
        for first in range(0, q.shape[2], ROWS):
            rows = slice(first, min(first + ROWS, q.shape[2]))
            attends = dense(rows)
            exact = _attend(queries[rows].double(), keys.double(), values.double(), attends, scale)
            plain = _attend(queries[rows], keys, values, attends, scale).double()
            error = max(error, float((out[b, h, rows].double() - exact).abs().max()))
            plain_error = max(plain_error, float((plain - exact).abs().max()))
            largest = max(largest, float(exact.abs().max()))
    return Accuracy(error, 2 * plain_error + torch.finfo(out.dtype).eps * largest)


def gradient_accuracy(
    grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], dense: Dense
) -> Accuracy:
    """Judge the gradients of q, k and v of the first and the last head; tensors: q, k, v and that of the output.

    The largest ratio of an error to what is allowed counts, as (ratio, 1)."""
    worst = 0.0
    batch, heads, length, size = tensors[0].shape
    attends = dense(slice(0, length))
    for b, h in {(0, 0), (batch - 1, heads - 1)}:
        mine = [t[b, h] for t in tensors]
        exact = _gradients([t.double() for t in mine], attends, size**-0.5)
        plain = _gradients(mine, attends, size**-0.5)
        for got, right, near in zip((g[b, h].double() for g in grads), exact, plain, strict=True):
            error, plain_error = (float((x.double() - right).abs().max()) for x in (got, near))
            ulp = torch.finfo(grads[0].dtype).eps * float(right.abs().max())
            worst = max(worst, error / (2 * plain_error + ulp)) if got.isfinite().all() else float("inf")
    return Accuracy(worst, 1.0)


def _gradients(
    tensors: Sequence[torch.Tensor], attends: torch.Tensor, scale: float
) -> Sequence[torch.Tensor]:
    *inputs, grad = tensors
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in inputs)
        out = _attend(q, k, v, attends, scale)
        return torch.autograd.grad(out, (q, k, v), grad)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attends: torch.Tensor, scale: float
) -> torch.Tensor:
    scores = ((q @ k.T) * scale).masked_fill(~attends, -torch.inf)
    return torch.nan_to_num(torch.softmax(scores, -1), 0.0) @ v

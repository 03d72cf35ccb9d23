"""Products of low-rank attention on torch tensors, and the whole of it behind one torch function."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..operators.step_autograd import apply, once_differentiable
from .launch import Kernels, by_heads, plain

Tensors = dict[str, torch.Tensor]
Step = tuple[str, str, str]  # left, right, made
MADE = ("q", "k_low", "v_low")


@dataclass(frozen=True)
class Products:
    """q, k_low and v_low of matrices, heads side by side in columns.

    A left operand (batch, rows, inner) goes with a matrix, and so does a right one (batch, inner, columns).
    names: of inputs. Gradients of what several products read are added up in place."""

    steps: tuple[Step, ...]
    names: tuple[str, ...]
    heads: int

    @cached_property
    def read(self) -> tuple[str, ...]:
        """What gradients need: the operands."""
        return tuple(dict.fromkeys(name for left, right, _ in self.steps for name in (left, right)))

    def run(self, tensors: Tensors) -> Tensors:
        """All that steps read and make."""
        values = dict(tensors)
        for left, right, made in self.steps:
            a, b = values[left], values[right]
            values[made] = a @ b if b.dim() == 2 else torch.bmm(a.expand(b.shape[0], -1, -1), b)
        return values

    def rows(self, values: Tensors) -> tuple[torch.Tensor, ...]:
        """Those of attention: (batch, heads, rows, size)."""
        return tuple(by_heads(values[name], self.heads) for name in MADE)

    def needed(self, needs: tuple[bool, ...]) -> dict[str, bool]:
        """Whether the gradient of each value is, by that of inputs."""
        found = dict(zip(self.names, needs, strict=True))
        for left, right, made in self.steps:
            found[made] = found[left] or found[right]
        return found

    def differentiate(self, values: Tensors, found: Tensors, needed: dict[str, bool]) -> Tensors:
        """The gradients that are needed. found: those of the rows, (batch, rows, columns) each."""
        for left, right, made in reversed(self.steps):
            if made not in found:
                continue
            a, b, grad = values[left], values[right], found.pop(made)
            if b.dim() == 2:
                inner, columns = b.shape
                if needed[right]:
                    _add(found, right, a.reshape(-1, inner).T @ grad.view(-1, columns))
                if needed[left]:
                    known = found.get(left)
                    if known is None:
                        found[left] = grad @ b.T
                    else:
                        known.view(-1, inner).addmm_(grad.view(-1, columns), b.T)
            else:
                if needed[left]:
                    each = torch.bmm(grad, b.mT)
                    _add(found, left, each.sum(0) if len(each) > 1 else each[0])
                if needed[right]:
                    turned, known = a.T.expand(b.shape[0], -1, -1), found.get(right)
                    found[right] = torch.bmm(turned, grad) if known is None else known.baddbmm_(turned, grad)
        return found


def _add(found: Tensors, name: str, grad: torch.Tensor) -> None:
    known = found.get(name)
    found[name] = grad if known is None else known.add_(grad)


@dataclass(frozen=True)
class Layer:
    """Products and attention of calls like one another, which only allocate and launch."""

    products: Products
    kernels: Kernels

    def __call__(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """(batch, rows, heads * size)"""
        if self.kernels.learns:
            return apply(_Layer, self, *tensors)
        return self.forward(tensors)[0]

    def forward(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The output, and what gradients read."""
        products = self.products
        values = products.run(dict(zip(products.names, tensors, strict=True)))
        rows = [values[name] for name in MADE]
        (out,), kept = self.kernels.forward(rows)
        return out, (*(values[name] for name in products.read), *rows, *kept)

    def gradients(
        self, saved: tuple[torch.Tensor, ...], grad: torch.Tensor, needs: tuple[bool, ...]
    ) -> list[torch.Tensor | None]:
        """The gradient of each input that `needs` it."""
        products, grad = self.products, plain(grad)
        count, needed = len(products.read), products.needed(needs)
        values = dict(zip(products.read, saved, strict=False))
        rows = self.kernels.gradients(saved[count:], (grad,), tuple([needed[name] for name in MADE]))
        found = {name: row for name, row in zip(MADE, rows, strict=True) if row is not None}
        found = products.differentiate(values, found, needed)
        return [found.get(name) for name in products.names]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, *tensors: torch.Tensor) -> torch.Tensor:
        out, kept = layer.forward(tensors)
        ctx.layer = layer
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with _as_given(grad.device.type):
            return None, *ctx.layer.gradients(ctx.saved_tensors, grad, ctx.needs_input_grad[1:])


def _as_given(device: str) -> AbstractContextManager[Any]:
    """Products in the dtypes of their operands, where the backward runs under autocast."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def by_head(steps: tuple[Step, ...], tensors: Tensors, heads: int) -> tuple[torch.Tensor, ...]:
    """q, k_low and v_low, by torch and its autograd, of projections that differ by head."""
    values = {"x": tensors["x"].unsqueeze(1)}
    for name, tensor in tensors.items():
        if name.startswith("w_"):
            values[name] = tensor.unflatten(1, (heads, -1)).transpose(0, 1)
        elif name.startswith("proj"):
            values[name] = tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
    for left, right, made in steps:
        values[made] = _product(values[left], values[right])
    return tuple(values[name] for name in MADE)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of (.., heads, rows, inner) and (.., heads, inner, columns). Where a is one for all heads, they
    are columns: one product of large matrices instead of many small ones."""
    if a.shape[-3] == 1 < b.shape[-3]:
        columns = a.squeeze(-3) @ b.transpose(-3, -2).flatten(-2)
        return columns.unflatten(-1, (b.shape[-3], -1)).transpose(-3, -2)
    return a @ b

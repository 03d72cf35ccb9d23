"""How the tensors of an attention in a graph lie: from their dimensions to (B, H, length, size) and back.

Every dimension of a tensor has a *role*: a term over the batch axes a0, a1, ..., the rows q, the keys k and
the sizes d and e. A dimension of role 0 has size 1; `8 * a0 + a1` holds two axes, and `a1 // 4` heads that
four query heads share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..term import Term, children
from .terms import divided, linear


@dataclass(frozen=True)
class Axes:
    """batch: the names of the batch axes, from outside in. The first of several is B, the others are H."""

    batch: tuple[str, ...]

    @property
    def outer(self) -> tuple[str, ...]:
        return self.batch[:1] if len(self.batch) > 1 else ()

    @property
    def heads(self) -> tuple[str, ...]:
        return self.batch[len(self.outer) :]

    def in_indices(self, sizes: Mapping[str, Any]) -> dict[str, Term]:
        """The batch axes as terms of b and h; heads of several axes need sizes that are numbers."""
        found: dict[str, Term] = dict.fromkeys(self.outer, "b")
        rest: Term = "h"
        for name in reversed(self.heads[1:]):
            if not isinstance(sizes[name], int):
                raise ValueError("its heads have several dimensions of sizes that are known at run time only")
            rest, found[name] = divided(rest, sizes[name], {})
        return found | ({self.heads[0]: rest} if self.heads else {})


@dataclass(frozen=True)
class Operand:
    """A tensor's roles, one a dimension; see the module."""

    roles: tuple[Term, ...]

    def sharing(self, axes: Axes) -> tuple[int, ...]:
        """For each batch axis, how many of its places share one of the tensor's: 1, a number, 0 for all."""
        found = dict.fromkeys(axes.batch, 0)
        for role in self.roles:
            for name, _ in parts_of(role):
                if isinstance(name, tuple):
                    found[name[1]] = name[2]
                elif name in found:
                    found[name] = 1
        return tuple(found.values())

    def is_arranged(self, axes: Axes, row: str) -> bool:
        """Whether the tensor is (B or 1, H, length, size) as it is."""
        return is_plain(self.roles, axes, row)

    def arranged(
        self, tensor: torch.Tensor, axes: Axes, row: str, sizes: Mapping[str, int], full: bool
    ) -> Any:
        """The tensor as (B or 1, H, length, size). full: with every head and batch of its own."""
        names: list[Term] = []
        for d in reversed(range(len(self.roles))):
            parts = parts_of(self.roles[d])
            if self.roles[d] == 0:
                tensor = tensor.squeeze(d)
                continue
            if len(parts) == 2:
                tensor = tensor.unflatten(d, (-1, int(parts[1][1] or 1)))
            names[:0] = [axis for axis, _ in parts]
        plain = [name[1] if isinstance(name, tuple) else name for name in names]
        order = [name for name in (*axes.batch, row) if name in plain]
        rest = [name for name in plain if name not in order]
        tensor = tensor.permute([plain.index(name) for name in (*order, *rest)])
        for d, name in enumerate((*axes.batch, row)):
            if name not in plain:
                tensor = tensor.unsqueeze(d)
        count = len(axes.batch)
        if full:
            shared = [n for n in names if isinstance(n, tuple)]
            for name in shared:
                tensor = tensor.repeat_interleave(name[2], axes.batch.index(name[1]))
            tensor = tensor.expand(*(sizes[name] for name in axes.batch), *tensor.shape[count:])
        outer = len(axes.outer)
        heads = tensor.shape[outer:count]
        if len(heads) != 1:
            tensor = tensor.flatten(outer, count - 1) if heads else tensor.unsqueeze(outer)
        return tensor if outer else tensor.unsqueeze(0)


def is_plain(roles: Sequence[Term], axes: Axes, row: str) -> bool:
    """Whether roles are those of (B or 1, H, length, size), H shared by query heads or not."""
    if len(roles) != 4 or len(axes.batch) > 2:
        return False
    heads = [(name, role) for name in axes.heads for role in (roles[1],) if isinstance(role, tuple)]
    shared = any(role[0] == "floordiv" and role[1] == name for name, role in heads)
    return roles[0] in (0, *axes.outer) and (shared or roles[1] in (0, *axes.heads)) and roles[2] in (0, row)


def is_grouped(sharing: Sequence[int], axes: Axes) -> bool:
    """Whether heads that share like this are those of grouped queries: heads next to each other share one."""
    heads = sharing[len(axes.outer) :]
    own = next((i for i, n in enumerate(heads) if n != 1), len(heads))
    return not any(heads[own + 1 :])


def parts_of(role: Term) -> list[tuple[Term, int | None]]:
    """The axes that a role holds, the outer one first, with the size of the inner one; [] for role 0.

    Raises ValueError for a term that is no role."""
    if role == 0:
        return []
    if isinstance(role, str):
        return [(role, None)]
    if (
        isinstance(role, tuple)
        and role[0] == "floordiv"
        and all(not isinstance(c, tuple) for c in children(role))
    ):
        return [(role, None)]
    parts = linear(role)
    if len(parts) == 2 and all(isinstance(t, str) for t in parts):
        (outer, stride), (inner, one) = sorted(parts.items(), key=lambda part: -part[1])
        if one == 1 and stride > 1:
            return [(outer, None), (inner, stride)]
    raise ValueError(f"no role: {role}")


def back(
    out: torch.Tensor, axes: Axes, roles: Sequence[Term], sizes: Mapping[str, int], order: Sequence[int]
) -> torch.Tensor:
    """(B, H, q_len, size) as a tensor of these roles, its dimensions in memory in the given order."""
    out = out.reshape(*(sizes[name] for name in axes.batch), *out.shape[2:])
    names = [*axes.batch, "q", "e"]
    flat = [axis for role in roles for axis, _ in parts_of(role)]
    if "q" not in flat:
        out = out.squeeze(len(axes.batch))
        names.remove("q")
    out = out.permute([names.index(name) for name in flat])
    shape: list[int] = []
    for role in roles:
        extents = [out.shape[flat.index(axis)] for axis, _ in parts_of(role)]
        shape.append(1 if not extents else extents[0] * (extents[1] if len(extents) > 1 else 1))
    out = out.reshape(shape)
    inverse = sorted(range(len(order)), key=lambda d: order[d])
    return out.permute(*order).contiguous().permute(*inverse)


def memory_order(value: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor as they lie in memory, from outside in."""
    strides = value.stride()
    if not all(isinstance(s, int) for s in (*strides, *value.shape)):
        return tuple(range(value.dim())) if value.is_contiguous() else _by_hint(value)
    return tuple(sorted(range(value.dim()), key=lambda d: (-strides[d], d)))


def _by_hint(value: torch.Tensor) -> tuple[int, ...]:
    strides = [s if isinstance(s, int) else s.node.hint for s in value.stride()]
    return tuple(sorted(range(value.dim()), key=lambda d: (-(strides[d] or 0), d)))

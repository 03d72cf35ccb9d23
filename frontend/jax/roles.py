"""How arrays of an attention in a program lie: from their dimensions to (B, length, heads, size) and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from .program import Value


@dataclass(frozen=True)
class Operand:
    """An array, and the role of each dimension: a batch axis, "q", "k", "d" or one of "e0", "e1", ...; "" for
    one of size 1.

    shared: how many places of the last batch axis share one of the array's."""

    value: Value
    roles: tuple[str, ...]
    shared: int = 1

    def arranged(
        self, array: Any, axes: Sequence[str], row: str, own: Sequence[str], sizes: Mapping[str, int]
    ) -> Any:
        """The array as (B, length, heads, size), of all heads that share none of its places.

        axes: those of the batch, of which the first is B and the others are heads. own: those of the size."""
        sizes, roles = dict(sizes), self.roles
        if self.shared > 1:
            sizes[axes[-1]] //= self.shared
        array = jnp.squeeze(array, tuple(d for d, role in enumerate(roles) if not role))
        roles = tuple(role for role in roles if role)
        order = (*axes[:1], row, *axes[1:], *own)
        array = jnp.transpose(array, [roles.index(role) for role in order if role in roles])
        for d, role in enumerate(order):
            if role not in roles:
                array = jnp.expand_dims(array, d)
        array = jnp.broadcast_to(array, [sizes[role] for role in order])
        batch, heads, size = (math.prod(sizes[r] for r in part) for part in (axes[:1], axes[1:], own))
        return array.reshape(batch, sizes[row], heads, size)


def back(
    out: Any,
    roles: Sequence[str],
    axes: Sequence[str],
    own: Sequence[str],
    sizes: Mapping[str, int],
    result: Value,
) -> Any:
    """(B, q_len, heads, size) as a result whose dimensions have these roles."""
    order = (*axes[:1], "q", *axes[1:], *own)
    out = out.reshape([sizes[role] for role in order])
    given = [role for role in roles if role]
    out = jnp.squeeze(out, tuple(d for d, role in enumerate(order) if role not in given))
    left = [role for role in order if role in given]
    out = jnp.transpose(out, [left.index(role) for role in given])
    return out.reshape(result.shape).astype(result.dtype)

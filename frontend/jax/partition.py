"""How XLA divides an attention among devices: by sequences and by heads, each part a call of its own.

XLA's partitioner (Shardy) asks for two things: a rule that names the dimensions of operands and results which
belong together, and the call for the part of one device. A call is divided along what its mask and maps do
not look at, as `b` and `h` count from 0 on every device; along all else its operands are gathered.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from ..capture.terms import names_in
from .call import Call

Roles = tuple[str, ...]  # of the dimensions of an array: "b", "h", "k" (heads of keys), or "" for any other
_ROWS = ("q", "o", "do", "dq")
_KEYS = ("k", "v", "dk", "dv")


@dataclass(frozen=True)
class Division:
    """Along what a call may be divided. operands, results: the roles of their dimensions; sizes: by role."""

    operands: tuple[Roles, ...]
    results: tuple[Roles, ...]
    sizes: Mapping[str, int]

    @property
    def rule(self) -> tuple[str, dict[str, Any]]:
        """For Shardy, with the sizes of its factors."""
        heads, keys = self.sizes.get("h", 1), self.sizes.get("k", 1)
        grouped = 1 < keys < heads
        spelled = {"b": "b", "h": "(k g)" if grouped else "k", "k": "k"}
        count = iter(range(1000))

        def side(arrays: Sequence[Roles]) -> str:
            return ", ".join(
                " ".join(spelled.get(role) or f"x{next(count)}" for role in roles) for roles in arrays
            )

        sizes = {"g": heads // keys} if grouped else {}
        return f"{side(self.operands)} -> {side(self.results)}", sizes

    def axes(self, sharding: Any, mesh: Any) -> dict[str, Any]:
        """The axes of a mesh by role, as the first operand with roles is divided; those that do not divide
        evenly are left out."""
        roles = next(roles for roles in self.operands if any(roles))
        found = {}
        for role, axes in zip(roles, (*sharding.spec, *[None] * len(roles)), strict=False):
            parts = math.prod(mesh.shape[a] for a in (axes if isinstance(axes, tuple) else (axes,)) if a)
            if (
                role
                and parts > 1
                and not any(
                    self.sizes[r] % parts
                    for r in ((role, "k") if role == "h" else (role,))
                    if r in self.sizes
                )
            ):
                found[role] = axes
        return found | ({"k": found["h"]} if "h" in found and "k" in self.sizes else {})


def division_of(call: Call, operands: Mapping[str, Any], results: Mapping[str, Any]) -> Division | None:
    """How a call with these operands and results, by name, is divided; None for one that stays whole."""
    q, k = (operands[name].shape for name in ("q", "k"))
    place = 2 if call.layout == "BTNH" else 1
    looked = set().union(*(names_in(source.term) for _, source in call.sources))
    sums = any(name[2:].isdecimal() for name in results)  # gradients of captured arrays
    if call.packed or call.paged or sums or {"b", "h"} <= looked:
        return None
    sizes = {role: n for role, n in (("b", q[0]), ("h", q[place])) if role not in looked}
    if k[place] == 1 and {"dk", "dv"} & results.keys():
        sizes.pop("h", None)  # these are sums over heads
    if "h" in sizes and k[place] > 1:
        sizes["k"] = k[place]

    def roles(name: str, x: Any) -> Roles:
        found = [""] * len(x.shape)
        if name in (*_ROWS, *_KEYS):
            found[0] = "b" if x.shape[0] == q[0] else ""
            found[place] = "h" if name in _ROWS else "k"
        elif name in ("lse", "dlse", "dsinks"):
            found[:2] = "b", "h"
        elif name == "sinks":
            found[0] = "h"
        elif name in ("kv_lens", "q_offsets"):
            found[0] = "b" if x.shape[0] == q[0] else ""
        return tuple(role if role in sizes else "" for role in found)

    text = ("",)  # of the call is the first operand
    return Division(
        (text, *(roles(*item) for item in operands.items())),
        tuple(roles(*item) for item in results.items()),
        sizes,
    )


def knows_devices(primitive: Any) -> None:
    """Let JAX tell the lowering of a primitive which devices there are, as it tells those of its own."""
    dispatch = sys.modules.get("jax._src.dispatch")
    asking = getattr(dispatch, "prim_requires_devices_during_lowering", None)
    if asking is not None:
        asking.add(primitive)


def are_several(context: Any) -> bool:
    """Whether a program is lowered for several devices of a mesh. Within `shard_map` it is one device's."""
    devices = getattr(context, "device_assignment", None) or ()
    known = not getattr(context, "manual_axes", ()) and getattr(context, "abstract_mesh", None) is not None
    return len(devices) > 1 and known and bool(getattr(jax.config, "jax_use_shardy_partitioner", True))


def divided(function: Callable[..., Any], division: Division) -> Callable[..., Any]:
    """A function of arrays, to a list of arrays, that XLA divides."""

    def partition(mesh: Any, given: Any, made: Any) -> Any:
        first = next(n for n, roles in enumerate(division.operands) if any(roles))
        axes = division.axes(given[first].sharding, mesh)

        def placed(roles: Roles) -> Any:
            return NamedSharding(mesh, PartitionSpec(*(axes.get(role) for role in roles)))

        return mesh, function, list(map(placed, division.results)), tuple(map(placed, division.operands))

    rule, sizes = division.rule
    one = custom_partitioning(function)
    one.def_partition(partition, sharding_rule=rule, **sizes)
    return one

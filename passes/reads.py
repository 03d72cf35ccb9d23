"""reads: when does a captured tensor get indexed outside its bounds?

A read whose index is affine gets a closed-form condition on lengths, sizes and runtime integers under
which some pair reads out of range; the launcher evaluates it at each call, in microseconds, and the
kernel reads unguarded. Other indices (data-dependent ones, and those of scores, which are right for
attending pairs only) are clamped in the kernel, so that nothing outside the tensor is ever touched.

Leaves alone: expressions without captured tensors.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import islpy as isl
import sympy

from ..ir.affine import ISL_LOCK, QuotaExceeded, condition, quota, to_pw_aff
from ..ir.expr import Expr, integer, maximum, minimum, read, readf, to_text
from ..ir.mask import Mask

PARAM = isl.dim_type.param
MAX_OPERATIONS = 500_000  # of isl, for one index; it has no check beyond (kernels stay inside tensors anyway)
SIZES = {"b": "B", "h": "Hq", "q": "q_len", "k": "kv_len"}


@dataclass(frozen=True)
class Check:
    """When `fails` holds, `text` reads outside its tensor.

    fails: over B, Hq, q_len, kv_len, the extents c0_0, ... of tensors, and runtime integers. holds: the
    opposite, for people: of a call that has pairs at all."""

    fails: Expr
    holds: Expr
    text: str


def sizes(tensor: sympy.Symbol, rank: int) -> list[sympy.Symbol]:
    """The extents of a captured tensor, as kernels name them."""
    return [integer(f"{tensor.name}_{d}") for d in range(rank)]


def checks(mask: Mask, expr: Expr, *, attending: bool) -> tuple[Check, ...]:
    """One check for every affine index of every read in expr, where isl finds it in good time.

    attending: expr is evaluated on pairs of the mask only (a score), else on every pair (the mask)."""
    found = []
    with ISL_LOCK:
        # The host knows no `lets`: with them, as with a mask that isl cannot hold, every pair counts.
        domain = _domain(mask if attending and mask.exact and not mask.lets else None)
        for r in _reads(expr):
            for index, size in zip(r.args[1:], sizes(r.args[0], len(r.args) - 1), strict=True):
                with suppress(QuotaExceeded), quota(MAX_OPERATIONS):
                    bad = _outside(index, size, domain)
                    bad = bad and _whatever_is_read(bad, [name for name, _ in mask.lets])
                    if bad is not None and not bad.is_empty():
                        some = domain.project_out_except([*SIZES.values()], [PARAM]).params()
                        holds = bad.complement().gist(some).coalesce()
                        found.append(Check(condition(bad), condition(holds), to_text(r)))
    return tuple(found)


def clamp(expr: Expr, *, attending: bool) -> Expr:
    """expr with every index that may leave its tensor somewhere in a tile kept inside.

    attending: checks cover the pairs of the mask only, while tiles hold others too."""

    def clamped(r: Expr) -> Expr:
        inside = [
            i if is_affine(i) and not attending else minimum(maximum(i, sympy.Integer(0)), size - 1)
            for i, size in zip(r.args[1:], sizes(r.args[0], len(r.args) - 1), strict=True)
        ]
        return r.func(r.args[0], *inside)

    return expr.replace(lambda e: isinstance(e, (read, readf)), clamped)


def is_affine(index: Expr) -> bool:
    """Whether isl can hold the index, so that a check exists for it."""
    return not index.has(read, readf) and to_pw_aff(index) is not None


def every_index(expr: Expr) -> list[tuple[Expr, Expr, int]]:
    """(read, index, dimension) of every index of every read."""
    return [(r, index, d) for r in _reads(expr) for d, index in enumerate(r.args[1:])]


def unchecked(expr: Expr) -> list[tuple[Expr, Expr, int]]:
    """Those that `checks` has no closed form for."""
    return [found for found in every_index(expr) if not is_affine(found[1])]


def _reads(expr: Expr) -> list[Expr]:
    return sorted(expr.atoms(read, readf), key=to_text)


def _domain(mask: Mask | None) -> isl.Set:
    names = ", ".join(["b", "h", *SIZES.values()])
    box = isl.Set(
        f"[{names}] -> {{ [q, k] : 0 <= q < q_len and 0 <= k < kv_len and 0 <= b < B and 0 <= h < Hq }}"
    )
    if mask is None:
        return box
    inside = mask.may.move_dims(isl.dim_type.in_, 1, isl.dim_type.out, 0, 1).domain()
    return box.intersect(inside)


def _outside(index: Expr, size: sympy.Symbol, domain: isl.Set) -> isl.Set | None:
    """The lengths, extents and integers with which some pair of the domain has its index outside."""
    if index.has(read, readf):
        return None
    value, limit, zero = to_pw_aff(index), to_pw_aff(size), to_pw_aff(sympy.Integer(0))
    if value is None or limit is None or zero is None:
        return None
    bad = value.lt_set(zero).union(value.ge_set(limit)).intersect(domain)
    for name in ("b", "h"):
        at = bad.find_dim_by_name(PARAM, name)
        bad = bad.project_out(PARAM, at, 1) if at >= 0 else bad
    return bad.params().coalesce()


def _whatever_is_read(bad: isl.Set, lets: list[str]) -> isl.Set:
    """Where a read is outside for every value of integers that a kernel reads itself; others it clamps."""
    for name in lets:
        at = bad.find_dim_by_name(PARAM, name)
        if at >= 0:
            bad = bad.complement().project_out(PARAM, at, 1).complement().coalesce()
    return bad

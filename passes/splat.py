"""splat: SPLAT's three kernels on compressed values: sddmm, sparse softmax, spmm.

Each ACSR term of the mask owns `width` slots of a row; entry s of row q is the key first(q) + stride * s.
A compressed tensor is [B, Hq, q_len, slots], terms side by side; slots without an entry hold -inf (scores)
or 0 (probabilities). The kernels walk the same tiles as the fused one and turn (row, key) into a slot by
the term's closed form, so nothing is indexed and nothing of size q_len * kv_len exists.

    sddmm    values[q, slot] = scale * q . k            one kernel a term
    softmax  values[q, :] = softmax(values[q, :])       one kernel
    spmm     out[q] = sum over slots of values * v      one kernel a term, accumulating

Source: Gupta et al., SPLAT (2024), with exact integers in place of its affine floats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from ..ir.errors import UnsupportedError
from ..ir.expr import INF, Expr, all_of, exp2, floordiv, integer, maximum, minimum, real, where
from ..ir.formats import ACSR
from ..ir.kernel import (
    Axis,
    Compute,
    Dot,
    For,
    GridDim,
    Kernel,
    Let,
    Load,
    Program,
    Reduce,
    Scalar,
    Span,
    Stmt,
    Store,
    Tensor,
)
from .align import align_mask
from .decompose import decompose
from .folds import LOG2E, LOWEST
from .normalize import normalize_mask
from .scaffold import COL, ROW, B, H, Scaffold
from .schedule import choose
from .spec import SCALE, AttentionSpec
from .tile import plan_loops

VALUES = ("B", "Hq", "q_len", "slots")
CHUNK = 32  # slots a softmax step reads
D, E = integer("d"), integer("e")


@dataclass(frozen=True)
class TermPlan:
    """A term with its loops, and the names of its runtime integers.

    The term starts at slot `base<i>`; dimension d of its entries has `wide<i>_<d>` slots."""

    index: int
    term: ACSR
    over: Scaffold

    @property
    def extents(self) -> tuple[str, ...]:
        return tuple(f"wide{self.index}_{d}" for d in range(len(self.term.progressions)))

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        return tuple(Scalar(name, "i64") for name in (f"base{self.index}", *self.extents))

    def slot(self) -> tuple[list[Stmt], Expr]:
        """Tiles first<d>[i], and the slot of the pair (row, col)."""
        made: list[Stmt] = []
        total: Expr = sympy.Integer(0)
        for d, line in enumerate(self.term.progressions):
            made.append(Compute(f"first{d}", "i32", ("i",), self.over.coordinates(line.first)))
            step = floordiv(self.over.col_names[d] - integer(f"first{d}"), sympy.Integer(line.stride))
            total = step if d == 0 else total * integer(self.extents[d]) + step
        return made, integer(f"base{self.index}") + total


def term_plans(spec: AttentionSpec) -> tuple[TermPlan, ...]:
    """Loops for each term of an affine mask. Raises UnsupportedError where there is no closed form."""
    mask = normalize_mask(spec.mask)
    found = decompose(mask)
    terms = [t for t in found if isinstance(t, ACSR)]
    if not mask.exact or len(terms) < len(found):
        raise UnsupportedError(
            "sddmm, sparse_softmax and spmm need a mask that is a union of ACSR terms; "
            f"{mask} is not. Use gossamer.attention, which runs any mask"
        )
    plans = []
    for index, term in enumerate(terms):
        part = align_mask(mask, (term,), whole=False)[0]
        schedule = replace(choose(spec, part), lists="none")
        plans.append(TermPlan(index, term, Scaffold(part, schedule, plan_loops(part, schedule))))
    return tuple(plans)


def lower_sddmm(spec: AttentionSpec) -> Program:
    """Kernels that fill `values` (preset to -inf) with scale * q . k."""
    return Program(tuple(_sddmm(spec, plan) for plan in term_plans(spec)), text=spec.mask_text)


def lower_spmm(spec: AttentionSpec) -> Program:
    """Kernels that add values . v of each term to `acc` (preset to zeros, f32 or f64)."""
    return Program(tuple(_spmm(spec, plan) for plan in term_plans(spec)), text=spec.mask_text)


def lower_softmax(spec: AttentionSpec) -> Program:
    """One kernel: the softmax of every row of `values`, in place; rows without an entry become zeros."""
    acc = spec.accumulator
    rows, last = 32, integer("slots") - 1
    row = rows * integer("m0") + integer("i")

    def chunk(step: str) -> tuple[Expr, Load]:
        slot = CHUNK * integer(step) + integer("j")
        at = (B, H, minimum(row, integer("q_len") - 1), slot)
        return slot, Load("S", acc, ("i", "j"), "values", at, slot <= last, -INF)

    (_, seen), (slot, again) = chunk("n0"), chunk("n1")
    peak, old, safe = real("peak"), real("m"), real("safe")
    span = (Span(sympy.Integer(0), floordiv(integer("slots") + CHUNK - 1, sympy.Integer(CHUNK))),)
    body: tuple[Stmt, ...] = (
        Compute("m", acc, ("i",), -INF),
        Compute("l", acc, ("i",), sympy.Integer(0)),
        For(
            "n0",
            span,
            (
                seen,
                Reduce("peak", acc, ("i",), "max", real("S"), ("j",)),
                Compute("peak", acc, ("i",), maximum(old, peak), declares=False),
                Compute("safe", acc, ("i",), where(peak < LOWEST[acc], 0, peak)),
                Reduce("gain", acc, ("i",), "sum", exp2((real("S") - safe) * LOG2E), ("j",)),
                Compute(
                    "l", acc, ("i",), real("l") * exp2((old - safe) * LOG2E) + real("gain"), declares=False
                ),
                Compute("m", acc, ("i",), peak, declares=False),
            ),
        ),
        Compute("base", acc, ("i",), where(old < LOWEST[acc], 0, old)),
        Compute("inv", acc, ("i",), sympy.Integer(1) / where(sympy.Eq(real("l"), 0), 1, real("l"))),
        For(
            "n1",
            span,
            (
                again,
                Compute("P", acc, ("i", "j"), exp2((real("S") - real("base")) * LOG2E) * real("inv")),
                Store(
                    "values",
                    (B, H, row, slot),
                    real("P"),
                    ("i", "j"),
                    all_of([row < integer("q_len"), slot <= last]),
                ),
            ),
        ),
    )
    kernel = Kernel(
        name="softmax_acsr_fwd",
        args=(Tensor("values", spec.dtype, VALUES, "inout", 3),),
        grid=(
            GridDim("m0", floordiv(integer("q_len") + rows - 1, sympy.Integer(rows))),
            GridDim("h", integer("Hq")),
            GridDim("b", integer("B")),
        ),
        axes=(Axis("i", rows, rows), Axis("j", CHUNK, CHUNK)),
        lanes="i",
        body=body,
        comment=(f"mask: {spec.mask_text}",),
    )
    return Program((kernel,), text=spec.mask_text)


def _sddmm(spec: AttentionSpec, plan: TermPlan) -> Kernel:
    over, acc = plan.over, spec.accumulator
    first, slot = plan.slot()
    body = [
        _share(),
        *over.make_rows,
        *first,
        Load("Q", acc, ("i", "d"), "q", (B, H, over.safe_row, D)),
        *over.loop(
            [
                *over.mask_cols,
                Load("K", acc, ("j", "d"), "k", (B, integer("hk"), COL, D), over.valid_col),
                Dot("S", acc, ("i", "j"), "Q", "K", "d"),
                Store(
                    "values",
                    (B, H, ROW, slot),
                    real("S") * SCALE,
                    ("i", "j"),
                    all_of([over.valid_row, over.attends]),
                ),
            ]
        ),
    ]
    args = (
        Tensor("q", spec.dtype, ("B", "Hq", "q_len", spec.qk_size), "in", 3 if spec.contiguous[0] else None),
        Tensor("k", spec.dtype, ("B", "Hk", "kv_len", spec.qk_size), "in", 3 if spec.contiguous[1] else None),
        Tensor("values", spec.dtype, VALUES, "out", 3),
        *_integers(spec, plan),
        Scalar("scale", "f64" if acc == "f64" else "f32"),
    )
    axes = (
        Axis("i", over.rows, over.rows),
        Axis("j", over.cols, over.cols),
        Axis("d", spec.qk_size, spec.qk_size),
    )
    return _kernel(f"sddmm_acsr_fwd_{plan.index}", spec, plan, args, axes, body)


def _spmm(spec: AttentionSpec, plan: TermPlan) -> Kernel:
    over, acc = plan.over, spec.accumulator
    first, slot = plan.slot()
    at = (B, H, over.safe_row, E)
    body = [
        _share(),
        *over.make_rows,
        *first,
        Load("O", acc, ("i", "e"), "acc", at),
        *over.loop(
            [
                *over.mask_cols,
                Load(
                    "P", acc, ("i", "j"), "values", (B, H, ROW, slot), all_of([over.valid_row, over.attends])
                ),
                Load("V", acc, ("j", "e"), "v", (B, integer("hk"), COL, E), over.valid_col),
                Dot("O", acc, ("i", "e"), "P", "V", "j", accumulate=True, declares=False),
            ]
        ),
        Store("acc", (B, H, ROW, E), real("O"), ("i", "e"), over.valid_row),
    ]
    args = (
        Tensor("values", spec.dtype, VALUES, "in", 3),
        Tensor("v", spec.dtype, ("B", "Hk", "kv_len", spec.v_size), "in", 3 if spec.contiguous[2] else None),
        Tensor("acc", acc, ("B", "Hq", "q_len", spec.v_size), "inout", 3),
        *_integers(spec, plan),
    )
    axes = (
        Axis("i", over.rows, over.rows),
        Axis("j", over.cols, over.cols),
        Axis("e", spec.v_size, spec.v_size),
    )
    return _kernel(f"spmm_acsr_fwd_{plan.index}", spec, plan, args, axes, body)


def _share() -> Let:
    return Let("hk", floordiv(H, floordiv(integer("Hq"), integer("Hk"))))


def _integers(spec: AttentionSpec, plan: TermPlan) -> tuple[Scalar, ...]:
    return (*(Scalar(name, "i64") for name in spec.params), *plan.scalars)


def _kernel(
    name: str,
    spec: AttentionSpec,
    plan: TermPlan,
    args: tuple[Tensor | Scalar, ...],
    axes: tuple[Axis, ...],
    body: list[Stmt],
) -> Kernel:
    comment = (f"mask: {spec.mask_text}", f"term {plan.index}")
    return Kernel(name, args, plan.over.grid(), axes, "i", tuple(body), comment=comment)

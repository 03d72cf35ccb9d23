"""The pipeline (provisional shape)."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..ir.expr import to_text
from ..ir.kernel import Program
from .align import align_mask
from .decompose import decompose
from .lower import lower_attention
from .normalize import normalize_mask
from .reads import checks
from .schedule import choose
from .spec import AttentionSpec
from .tile import plan_loops


def compile_spec(spec: AttentionSpec, schedule: Any = None) -> Program:
    mask = normalize_mask(spec.mask)
    groups = align_mask(mask, decompose(mask))
    plans = tuple((g, s := choose(spec, g), plan_loops(g, s, spec.monotone)) for g in groups)
    program = lower_attention(spec, plans)
    found = checks(spec.mask, spec.mask.predicate, attending=False)
    if spec.score is not None:
        found += checks(spec.mask, spec.score, attending=True)
    return replace(program, text=spec.mask_text, checks=tuple((to_text(c.fails), c.text) for c in found))

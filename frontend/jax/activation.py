"""Activations and routers that are functions of jax.numpy, as terms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ...ir.errors import TraceError
from ..capture.terms import reads_in, replaced
from ..moe.activation import activation_term
from ..term import Term
from .program import flatten
from .terms import LeftAlone, Reader


def activation_of(activation: Any, gated: bool) -> Term:
    """The term over x0 (and x1) of a name or a function. Raises InputError, TraceError."""
    if not callable(activation) or hasattr(activation, "term"):
        return activation_term(activation, gated=gated)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    given = (number, number) if gated else (number,)
    try:
        closed = jax.make_jaxpr(activation)(*given)
    except (TypeError, AttributeError):
        return activation_term(activation, gated=gated)  # one of torch's, or of methods
    program, reader = flatten(closed), Reader()
    try:
        term = reader.of(program.outputs[0]).term
    except LeftAlone as reason:
        raise TraceError(f"experts.activation: {reason}") from None
    for read in reads_in(term):
        value = reader.leaves[read[1]]
        if value not in program.inputs:
            what = value.op.name if value.op is not None else "an array that it captures"
            raise TraceError(
                f"experts.activation: {what} cannot be captured; use functions of one number each"
            )
        term = replaced(term, read, f"x{program.inputs.index(value)}")
    return term

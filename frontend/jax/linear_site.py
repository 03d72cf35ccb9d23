"""Linear attention of a JAX program, when it runs: from the program's arrays to kernels and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...ir.derivative import derivative
from ...ir.errors import UnsupportedError
from ...ir.expr import real
from ..capture.linear_fit import X
from ..linear.feature_maps import FeatureMap
from ..linear.form import WIDEST
from ..term_expr import to_expr
from ..trace.tensor import dtype_name
from .linear import linear_attention
from .match_linear import LinearAttention
from .problem import FLOATS
from .program import Op, Value
from .roles import back
from .terms import LeftAlone


@dataclass(frozen=True)
class LinearSite:
    """Calls kernels in place of a part of a program. Raises LeftAlone where none computes the same."""

    found: LinearAttention

    kind = "linear attention"

    @property
    def op(self) -> Op:
        """The operation whose result it gives."""
        return self.found.op

    @property
    def hidden(self) -> dict[Value, str]:
        """What must not be used elsewhere."""
        return dict.fromkeys(self.found.inside, "sums")

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        """Query, key and value."""
        return tuple(dict.fromkeys(operand.value for operand in self.found.operands))

    def check(self) -> None:
        """Raises LeftAlone for what kernels do not take."""
        found = self.found
        dtypes = {value.dtype for value in (*self.inputs, found.op.outputs[0])}
        if len(dtypes) != 1 or dtype_name(next(iter(dtypes))) not in FLOATS:
            raise LeftAlone(f"its arrays are of {', '.join(sorted(map(str, dtypes)))}")
        if any(not 1 <= found.sizes[role] <= WIDEST for role in "de"):
            raise LeftAlone(f"its features or its values are wider than {WIDEST}")
        if not math.prod(found.sizes.values()):
            raise LeftAlone("it has no elements")
        if found.causal and found.sizes["q"] != found.sizes["k"]:
            raise LeftAlone("its rows and its keys are not as many, beside a causal mask")
        for value in self.inputs:
            if value.maker is None and value.op is not None:
                raise LeftAlone("it reads what a function with a derivative of its own computes inside")
        for term in found.maps:
            try:
                derivative(to_expr(term, frozenset((X,))), real(X))
            except UnsupportedError as reason:
                raise LeftAlone(str(reason)) from None

    def __call__(self, read: Callable[[Value], Any]) -> Any:
        found = self.found
        axes, sizes = found.axes or ("",), {**found.sizes, "": 1}
        q, k, v = (
            operand.arranged(read(operand.value), axes, row, own, sizes)
            for operand, row, own in zip(found.operands, "qkk", (("d",), ("d",), ("e",)), strict=True)
        )
        q_map, k_map = (FeatureMap((term,)) for term in found.maps)
        options: dict[str, Any] = {"causal": found.causal, "normalize": found.eps is not None}
        out = linear_attention(q, k, v, q_map, key_map=k_map, eps=found.eps or 0.0, **options)
        out = out if found.scale == 1 else out * found.scale
        return back(out, found.out, axes, ("e",), sizes, found.op.outputs[0])

"""How dynamo traces `captured_attention`: each function among its arguments becomes a graph of its own; and
what dynamo is at.

What dynamo offers for this has no public name; all that we use of it is in this file.
"""

from __future__ import annotations

import itertools
import os
import traceback
from contextlib import nullcontext
from typing import Any

import torch
from torch._dynamo import symbolic_convert
from torch._dynamo.exc import unimplemented
from torch._dynamo.variables import ConstantVariable, TensorVariable, higher_order_ops
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ...ir.errors import UnsupportedError
from .report import innermost

_TRACER = os.path.join("_dynamo", "convert_frame.py")
ROLES = ("mask_fn", "score_mod", "score_mod")


class AttentionVariable(higher_order_ops.FlexAttentionHigherOrderVariable):
    """The node while dynamo traces a call of it. FlexAttention's, because its functions are called alike."""

    _HOP_NAME = "gossamer.attention"

    def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        return self._call_function(tx, args, kwargs)

    def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        query, key, value, functions, *rest = args
        pairs = zip(functions.items, ROLES, strict=True)
        found = tuple(self._traced(tx, query, function, role) for function, role in pairs)
        proxies = (*(t.as_proxy() for t in (query, key, value)), found, *(a.as_proxy() for a in rest))
        proxy = tx.output.create_proxy("call_function", self.value, proxies, {})
        return wrap_fx_proxy(tx=tx, proxy=proxy, example_value=None)

    def _traced(self, tx: Any, query: Any, function: VariableTracker, role: str) -> Any:
        """A graph and what it lifted; None and tensors as they are."""
        function = function.realize()
        if isinstance(function, (ConstantVariable, TensorVariable)):
            return function.as_proxy()
        return self.create_wrapped_node(tx, query, function, role)


def register(operator: torch._ops.HigherOrderOperator) -> bool:
    """Let dynamo use `AttentionVariable` for the operator. Raises UnsupportedError."""
    known = getattr(higher_order_ops, "_hop_name_to_variable_class", None)
    if known is None:
        raise UnsupportedError(
            f"gossamer.attention inside torch.compile: torch {torch.__version__} lacks what traces it. "
            "Use torch 2.13, or wrap the call in a function decorated with torch.compiler.disable"
        )
    known[operator.__name__] = AttentionVariable
    return True


def tracing() -> Any:
    """The backend for which dynamo traces a program on this thread; None where it does not."""
    tracer = getattr(symbolic_convert.tls, "current_tx", None)
    if tracer is None:
        return None
    backend = tracer.output.compiler_fn
    return getattr(backend, "compiler_fn", backend)


def end_graphs_at_lists() -> None:
    """While gossamer traces, a list whose length depends on data, as of `bincount(..).tolist()`, ends
    the graph, where dynamo would fail."""
    read = TensorVariable.method_tolist

    def method_tolist(self: Any, tx: Any) -> Any:
        try:
            return read(self, tx)
        except GuardOnDataDependentSymNode:
            if not hasattr(tracing(), "findings"):
                raise
            unimplemented(
                gb_type="Tensor.tolist() of unknown length",
                context=f"call_method {self} tolist",
                explanation="how many numbers there are depends on data",
                hints=[],
            )

    TensorVariable.method_tolist = method_tolist


def pass_on_settings() -> None:
    """Let `torch.compile` ask a backend for the context in which programs are captured, its
    `backend_ctx_ctor`, as `torch._dynamo.optimize` does."""
    wrapper = torch._TorchCompileWrapper
    if not hasattr(wrapper, "backend_ctx_ctor"):
        ask = property(lambda self: getattr(self.compiler_fn, "backend_ctx_ctor", nullcontext))
        wrapper.backend_ctx_ctor = ask  # type: ignore[attr-defined]


def line_of_trace() -> str:
    """file:line of the user's program that dynamo traces."""
    called = itertools.takewhile(lambda f: not f.filename.endswith(_TRACER), traceback.extract_stack())
    return innermost([(f.filename, f.lineno or 0) for f in (*called, *TracingContext.extract_stack())])

"""How dynamo traces `captured_attention`: each function among its arguments becomes a graph of its own.

What dynamo offers for this has no public name; all that we use of it is in this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.variables import higher_order_ops
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy

ROLES = ("mask_fn", "score_mod", "score_mod")


class AttentionVariable(higher_order_ops.FlexAttentionHigherOrderVariable):
    """The node while dynamo traces a call of it. FlexAttention's, because its functions are called alike."""

    _HOP_NAME = "gossamer.attention"

    def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        query, key, value, functions, *rest = args
        found = [
            self._traced(tx, query, function, role)
            for function, role in zip(functions.items, ROLES, strict=True)
        ]
        proxies = (*(t.as_proxy() for t in (query, key, value)), tuple(found), *(a.as_proxy() for a in rest))
        proxy = tx.output.create_proxy("call_function", self.value, proxies, {})
        return wrap_fx_proxy(tx=tx, proxy=proxy, example_value=None)

    def _traced(self, tx: Any, query: Any, function: VariableTracker, role: str) -> Any:
        function = function.realize()
        if function.is_tensor() or (function.is_python_constant() and function.as_python_constant() is None):
            return function.as_proxy()
        return self.create_wrapped_node(tx, query, function, role)


def register(operator: torch._ops.HigherOrderOperator) -> bool:
    """Let dynamo use `AttentionVariable` for the operator."""
    higher_order_ops._hop_name_to_variable_class[operator.__name__] = AttentionVariable
    return True

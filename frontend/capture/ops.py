"""What a node of an FX graph does: one name for an operation, however it is spelled.

`x @ y`, `torch.matmul(x, y)`, `x.matmul(y)` and `aten.matmul.default` are `matmul`. Operations that write
to their first argument keep the name of the operation and say so.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

_SPELLINGS = {
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "truediv": "div",
    "permute_dims": "permute",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "concat": "cat",
    "concatenate": "cat",
    "broadcast_to": "expand",
    "expand_as": "expand",
    "special_softmax": "softmax",
    "type_as": "to",
    "linalg_matmul": "matmul",
}
_IN_PLACE = {f"i{name}": name for name in ("add", "sub", "mul", "truediv", "and", "or", "xor", "matmul")}

# Operations whose result may share memory with their first argument.
_VIEWS = """
    view reshape flatten unflatten expand permute transpose t T mT movedim squeeze unsqueeze getitem
    narrow select slice chunk split tensor_split unbind contiguous to type float double half bfloat16
    bool int long detach view_as reshape_as ravel adjoint diagonal alias positive conj real as_strided
    unfold cpu cuda dropout requires_grad_ lift_fresh
"""
VIEWS = frozenset(_VIEWS.split())


@dataclass(frozen=True)
class Operation:
    """name: of the operation. writes: whether it writes to its first argument."""

    name: str
    writes: bool = False


@cache
def _library(target: Any) -> str | None:
    """The name under which torch or Python's operator module has a function; None for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2] if target.namespace == "aten" else None
    name = getattr(target, "__name__", None)
    if name is None:
        return None
    bases = (
        torch,
        torch.nn.functional,
        operator,
        torch.Tensor,
        torch.special,
        torch.linalg,
    )
    return name if any(getattr(base, name, None) is target for base in bases) else None


def operation(node: fx.Node) -> Operation | None:
    """What a node does; None where it is no operation of torch on tensors."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function" and node.target is getattr:
        name = str(node.args[1])
    elif node.op == "call_function":
        name = _library(node.target)
    else:
        return None
    if name is None:
        return None
    if name in ("setitem", "__setitem__"):
        return Operation("setitem", writes=True)
    writes = "out" in node.kwargs or node.kwargs.get("inplace") is True
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    elif name.endswith("_") and name not in ("and_", "or_", "requires_grad_"):
        name, writes = name[:-1], True
    name = name.removesuffix("_") if name != "requires_grad_" else name
    if name in _IN_PLACE:
        name, writes = _IN_PLACE[name], True
    return Operation(_SPELLINGS.get(name, name), writes)


def value_of(node: fx.Node) -> Any:
    """What a node gives, as the capture saw it: a fake tensor, a number, a tuple of them."""
    found = node.meta.get("example_value")
    return node.meta.get("val") if found is None else found


def arguments(node: fx.Node, *names: str) -> list[Any]:
    """A call's arguments by position or name, None where they are left out."""
    given = [*node.args, *(None for _ in names)][: len(names)]
    return [node.kwargs.get(name, value) for name, value in zip(names, given, strict=True)]

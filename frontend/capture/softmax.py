"""The softmax of a graph, however it is spelled: an operation, or written out.

`e = exp(x - x.amax(d, keepdim=True))` and `e / e.sum(d, keepdim=True)` are a softmax along d, and so are
`log_softmax(x, d).exp()` and `(x - x.logsumexp(d, keepdim=True)).exp()`. Exponentials of scores whose maximum
is not subtracted overflow where a softmax does not, and stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .ops import VIEWS, arguments, operation, value_of

_PASSING = ("detach", "contiguous")


def softmax_of(node: Any) -> tuple[fx.Node, int] | None:
    """(what a node is the softmax of, along which dimension); None where it is none."""
    name = _name(node)
    if name in ("softmax", "log_softmax") or name is None:
        return _along(node, "input") if name == "softmax" else None
    if name == "div" and not node.kwargs:
        return _quotient(*node.args)
    if name == "exp":
        (given,) = node.args or (None,)
        if given is None or not _untouched(given):
            return None
        return _along(given, "input") if _name(given) == "log_softmax" else _less(given, "logsumexp")
    return None


def _quotient(above: Any, below: Any) -> tuple[fx.Node, int] | None:
    """exp(x - max) / its sum."""
    if _name(above) != "exp" or _name(below) != "sum" or arguments(below, "input")[0] is not above:
        return None
    if not (_untouched(above) and _untouched(below)):
        return None
    dim = _kept(below)
    found = _less(above.args[0], "amax", "max")
    same = found is not None and found[1] == dim
    return found if same and value_of(above).requires_grad == value_of(below).requires_grad else None


def _less(given: Any, *shifts: str) -> tuple[fx.Node, int] | None:
    """(x, d), where a node is x less its maximum along d, or another of `shifts`."""
    if _name(given) != "sub" or given.kwargs or len(given.args) != 2 or not _untouched(given):
        return None
    x: Any
    shift: Any
    x, shift = given.args
    if "logsumexp" not in shifts:
        while _name(shift) in _PASSING:
            shift = shift.args[0]
    if _name(shift) in ("getitem", "values") and _name(shift.args[0]) == "max":
        shift = shift.args[0] if shift.args[1] in (0, "values") else None
    if _name(shift) not in shifts or arguments(shift, "input")[0] is not x:
        return None
    if "logsumexp" in shifts and not (_untouched(x) and _untouched(shift)):
        return None
    if "logsumexp" in shifts and value_of(x).requires_grad != value_of(shift).requires_grad:
        return None
    dim = _kept(shift)
    return None if dim is None else (x, dim)


def _kept(node: fx.Node) -> int | None:
    """The one dimension that a reduction keeps with size 1."""
    dim, keepdim = arguments(node, "input", "dim", "keepdim")[1:]
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    rank = value_of(arguments(node, "input")[0]).dim()
    return dim % rank if isinstance(dim, int) and not isinstance(dim, bool) and keepdim is True else None


def _along(node: fx.Node, name: str) -> tuple[fx.Node, int] | None:
    given, dim = arguments(node, name, "dim")
    return (
        (given, dim % value_of(node).dim()) if isinstance(dim, int) and isinstance(given, fx.Node) else None
    )


def _name(node: Any) -> str | None:
    did = operation(node) if isinstance(node, fx.Node) else None
    return None if did is None or did.writes else did.name


def _untouched(node: Any) -> bool:
    """Whether nothing writes to a tensor, or to a view of it."""
    if not isinstance(node, fx.Node):
        return False
    for user in node.users:
        did = operation(user)
        if did is None or not user.args or user.args[0] is not node:
            continue
        if did.writes or (did.name in VIEWS and not _untouched(user)):
            return False
    return True

"""A Mask as the function that PyTorch's own FlexAttention takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..ir.errors import UnsupportedError
from .term import COMPARISONS, FALSE, TRUE, Term

if TYPE_CHECKING:
    from .mask import Mask

_INFIX = {
    **COMPARISONS,
    **{"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "and": "&", "or": "|"},
    **{"bitand": "&", "bitor": "|", "bitxor": "^", "shl": "<<", "shr": ">>"},
}
_CALLS = {
    "abs": "abs({0})",
    "neg": "(-{0})",
    "not": "({0} == False)",
    "xor": "({0} != {1})",
    "min": "where({0} < {1}, {0}, {1})",
    "max": "where({0} > {1}, {0}, {1})",
    "where": "where({0}, {1}, {2})",
}


def mask_mod_of(mask: Mask, q_len: int, kv_len: int) -> Callable[..., Any]:
    """`mask_mod(b, h, q_idx, kv_idx)` in torch operations, of these lengths; its integers are numbers.

    Captured tensors are the mask's own, so they have to be torch's, on the device of the indices
    (`mask.to`). Raises UnsupportedError for an operation that has no such form.

    >>> from gossamer import masks
    >>> import torch
    >>> window = mask_mod_of(masks.sliding_window(2), 8, 8)
    >>> window(0, 0, torch.tensor([3, 4, 7]), torch.tensor(5))
    tensor([True, True, True])
    """
    import torch

    names: dict[str, Any] = {f"p{i}": value for i, value in enumerate(mask.values)}
    names |= {f"c{i}": tensor for i, tensor in enumerate(mask.tensors)}
    names |= {"q_len": q_len, "kv_len": kv_len}
    # Of numbers only, such as the lengths, a condition is known already.
    names["where"] = lambda c, x, y: (x if c else y) if isinstance(c, bool) else torch.where(c, x, y)
    text = f"lambda b, h, q, k: ({_spelled(mask.key[1])}) & (q == q)"
    return eval(text, names)


def _spelled(term: Term) -> str:
    if not isinstance(term, tuple):
        return {TRUE: "True", FALSE: "False"}.get(term, str(term))
    name, *operands = term
    if name == "read":
        return f"{operands[0]}[{', '.join(map(_spelled, operands[1:]))}]"
    if name in _INFIX:
        return f"({f' {_INFIX[name]} '.join(map(_spelled, operands))})"
    if name in _CALLS:
        return _CALLS[name].format(*map(_spelled, operands))
    raise UnsupportedError(f"mask_mod_of: {name} has no form in torch operations")

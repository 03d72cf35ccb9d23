"""torch's TransformerEncoder and TransformerDecoder, which branch on whether a mask is the causal one.

No graph can be captured of that branch. It only finds a hint for kernels that know the causal mask alone:
without it they take the mask as it is, which computes the same. So while gossamer captures a program there is
no hint.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.modules import transformer

from .adapters import capturing

_detect = transformer._detect_is_causal_mask


@functools.wraps(_detect)
def _detect_is_causal_mask(
    mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None
) -> Any:
    if is_causal is None and mask is not None and capturing():
        return False
    return _detect(mask, is_causal, size)


transformer._detect_is_causal_mask = _detect_is_causal_mask

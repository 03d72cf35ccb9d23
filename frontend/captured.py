"""Captured tensors of any library: recognising them, reading them, and deriving one from another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def is_array(value: Any) -> bool:
    """Whether value is a torch, NumPy or JAX array."""
    looks_like_one = all(hasattr(value, name) for name in ("shape", "dtype", "__getitem__"))
    return looks_like_one and not isinstance(value, type)


def as_numpy(array: Any) -> np.ndarray:
    """The contents of an array as NumPy; bfloat16, which NumPy lacks, as float32."""
    import numpy as np

    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if str(array.dtype) == "torch.bfloat16" else array
    return np.asarray(array)


def is_monotone(array: Any) -> bool:
    """Whether entries never decrease along the last dimension: one comparison an entry."""
    return array.shape[-1] < 2 or bool((array[..., 1:] >= array[..., :-1]).all())


def readable(tensor: Any) -> Any:
    """The tensor that a kernel reads for a captured one, with at least one dimension."""
    tensor = tensor.current() if isinstance(tensor, Derived) else tensor
    return tensor if len(tensor.shape) else tensor.reshape(1)


class Derived:
    """A tensor computed from another: again whenever that one was written to.

    torch counts writes to a tensor; for arrays that do not, it is computed at every call.
    """

    def __init__(self, source: Any, compute: Callable[[Any], Any]) -> None:
        self.source, self.compute = source, compute
        self._last: tuple[int, Any] | None = None

    def current(self) -> Any:
        try:
            version = self.source._version
        except (AttributeError, RuntimeError):  # NumPy; torch's inference tensors
            return self.compute(self.source)
        last = self._last
        if last is None or last[0] != version:
            self._last = last = (version, self.compute(self.source))
        return last[1]

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
    """Whether entries are known never to decrease along the last dimension: one comparison an entry.

    Nobody waits for a GPU to find out: what lies there counts as unknown."""
    if getattr(getattr(array, "device", None), "type", "cpu") != "cpu":
        return False
    return array.shape[-1] < 2 or bool((array[..., 1:] >= array[..., :-1]).all())


def readable(tensor: Any, device: Any = None) -> Any:
    """The tensor that a kernel on a torch device reads for a captured one, with at least one dimension.

    device: None for a look at its contents, wherever they are."""
    if isinstance(tensor, Derived):
        tensor = tensor.current()
    elif isinstance(tensor, Constant):
        tensor = tensor.array if device is None else tensor.on(device)
    return tensor if len(tensor.shape) else tensor.reshape(1)


class Constant:
    """A NumPy array that nobody writes to: each device gets one copy of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype
        self._copies: dict[Any, Any] = {}

    def on(self, device: Any) -> Any:
        if device not in self._copies:
            import torch

            self._copies[device] = torch.from_numpy(self.array).to(device)
        return self._copies[device]


class Derived:
    """A tensor computed from another, at every call.

    waits: whether computing it waits for a GPU. Then it is computed there only after torch has counted a
    write to the source: what writes past torch (a kernel given its address, a replayed CUDA graph) goes
    unnoticed. Make a new mask then.
    """

    def __init__(self, source: Any, compute: Callable[[Any], Any], *, waits: bool = False) -> None:
        self.source, self.compute, self.waits = source, compute, waits
        self._last: tuple[int, Any] | None = None

    def current(self) -> Any:
        if not self.waits or getattr(getattr(self.source, "device", None), "type", "cpu") == "cpu":
            return self.compute(self.source)
        try:
            version = self.source._version
        except RuntimeError:  # torch's inference tensors
            return self.compute(self.source)
        last = self._last
        if last is None or last[0] != version:
            self._last = last = (version, self.compute(self.source))
        return last[1]

"""Captured tensors of any library: recognising them, reading them, and deriving one from another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

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


def as_tensor(array: Any) -> Any:
    """The array as a torch tensor, without a copy where there need be none."""
    import torch

    return array if isinstance(array, torch.Tensor) else torch.as_tensor(array)


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


class Derivation(NamedTuple):
    """How one tensor is computed from another. waits: whether that waits for a GPU."""

    compute: Callable[..., Any]
    waits: bool


DERIVATIONS: dict[str, Derivation] = {}
"""By name: what a recipe says means the same in every process."""


def derivation(name: str, compute: Callable[..., Any], *, waits: bool = False) -> str:
    """Register `compute(source, *numbers)`; returns the name."""
    DERIVATIONS[name] = Derivation(compute, waits)
    return name


class Derived:
    """A tensor computed from another, at every call.

    recipe: the name of a derivation, and its further arguments, made of primitives. One that waits for a GPU
    is computed there only after torch has counted a write to the source: what writes past torch (a kernel
    given its address, a replayed CUDA graph) goes unnoticed. Make a new mask then.
    """

    def __init__(self, source: Any, recipe: tuple[Any, ...]) -> None:
        self.source, self.recipe = source, recipe

    def current(self) -> Any:
        name, *arguments = self.recipe
        compute, waits = DERIVATIONS[name]
        if not waits or getattr(getattr(self.source, "device", None), "type", "cpu") == "cpu":
            return compute(self.source, *arguments)
        try:
            version = self.source._version
        except RuntimeError:  # torch's inference tensors
            return compute(self.source, *arguments)
        known = self.source.__dict__.setdefault("_gossamer_derived", {})
        if known.get(self.recipe, (None, None))[0] != version:
            known[self.recipe] = version, compute(self.source, *arguments)
        return known[self.recipe][1]

"""Plans: what a call settles once for all calls like it, so that those only allocate and launch.

A plan holds kernels with sizes, strides and numbers filled in. It is found by a key of everything that
it depends on: the structure and the numbers of mask and score_mod, every option, and of each tensor its
dtype, device, shape, strides and alignment. What memory holds is no part of a plan: addresses are read at
each call, and so are, by the kernels, the contents of captured tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..ir.errors import MissingDependencyError
from .device import precision_of
from .problem import ALIGN

try:
    import torch
    from torch.autograd import forward_ad
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.attention") from None

if TYPE_CHECKING:
    from ..runtime.executable import Bound
    from ..runtime.recent import Recent
    from .mask import Mask
    from .score import ScoreMod

_NUMBERS = (float, int, type(None))
_TENSORS = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Plan:
    """Kernels that wait for memory. outputs: name, shape and dtype of each."""

    bound: Bound
    outputs: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    device: torch.device

    def __call__(self, tensors: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """The outputs for these inputs, by the kernels' names for them."""
        values, made = {**tensors}, []
        for name, shape, dtype in self.outputs:
            values[name] = out = torch.empty(shape, dtype=dtype, device=self.device)
            made.append(out)
        self.bound(values)
        return tuple(made)


class Recalled(NamedTuple):
    """A call, before anybody has checked it, and the plan that an earlier call like it left.

    tensors: what it passes, by the kernels' names. key: that of its plan; None where no plan may serve."""

    tensors: dict[str, Any]
    key: Hashable = None
    plan: Plan | None = None


def recall(
    plans: Recent[Plan],
    tensors: dict[str, Any],
    mask: Mask,
    score: ScoreMod | None,
    scale: Any,
    *options: Hashable,
) -> Recalled:
    """What is known of a call. options: what else decides the result.

    No plan may serve where numbers or memory are hidden from us (a scale in a tensor, transforms of
    functions), nor, on a CPU, for captured tensors and those that say where sequences are, whose contents are
    checked at each call."""
    if torch.compiler.is_compiling():
        return Recalled(tensors)
    try:
        device = tensors["q"].device
        captured = mask.captures or (score is not None and score.captures)
        checked = device.type == "cpu" and bool(captured or tensors.keys() - {"q", "k", "v", "sinks"})
        if mask.captures:
            tensors |= {f"c{i}": tensor for i, tensor in enumerate(mask.tensors_on(device))}
        if score is not None and score.captures:
            tensors |= {f"t{i}": tensor for i, tensor in enumerate(score.tensors_on(device))}
        if checked or type(scale) not in _NUMBERS or forward_ad._current_level >= 0:
            return Recalled(tensors)
        found = (
            mask.key,
            mask.values,
            tuple(tensors),
            score and (score.key, score.values),
            scale,
            options,
            torch.is_grad_enabled(),
            tensors["q"].dtype is torch.float32 and precision_of(device, "f32"),
            *map(_signature, tensors.values()),
        )
        return Recalled(tensors, found, plans.get(found))
    except (AttributeError, RuntimeError, TypeError):
        return Recalled(tensors)


def _signature(t: torch.Tensor) -> tuple[Hashable, ...]:
    """What a plan depends on in a tensor. Raises TypeError or RuntimeError for one that hides its memory."""
    if type(t) not in _TENSORS:
        raise TypeError(type(t))
    return t.dtype, t.device, t.shape, t.stride(), t.data_ptr() % ALIGN, t.requires_grad, t.is_neg()


def serves(values: Mapping[str, Any], tensors: Mapping[str, Any]) -> bool:
    """Whether kernels that were given `values` can be given a later call's tensors as they are."""
    cpu = tensors["q"].device.type == "cpu"
    same = (values[n] is t if cpu else values[n].data_ptr() == t.data_ptr() for n, t in tensors.items())
    return all(same)

"""Plans: what a call settles once for all calls like it, so that those only allocate and launch.

A plan holds kernels with sizes, strides and numbers filled in. It is found by a key of everything that
it depends on: the structure and the numbers of mask and score_mod, every option, and of each tensor its
dtype, device, shape, strides and alignment. What memory holds is no part of a plan: addresses are read at
each call, and so are, by the kernels, the contents of captured tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .device import precision_of, target_of
from .problem import ALIGN
from .term import reads_by_index

if TYPE_CHECKING:
    from ..ir.kernel import Program
    from ..runtime.executable import Bound
    from ..runtime.recent import Recent
    from .form import Call

_NUMBERS = (float, int, type(None))
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_UNREAD = {"q", "k", "v", "sinks", "o", "lse", "do", "dlse"}  # tensors whose contents decide nothing


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
    plan: Any = None


def recall(plans: Recent[Any], tensors: dict[str, Any], call: Call, *more: Hashable) -> Recalled:
    """What is known of a call. tensors: those that are named, query, key and value among them. more: what
    else decides what is done with it.

    No plan may serve where numbers or memory are hidden from us (a scale in a tensor, transforms of
    functions), nor, on a CPU, for captured tensors and those that say where sequences are, whose contents are
    checked at each call."""
    mask, options = call.mask, call.options
    try:
        device = tensors["q"].device
        maps = [(letter, m) for letter, m in (("t", call.score), ("w", call.prob)) if m is not None]
        captured = any(reads_by_index(source.term) for source in (mask, *(m for _, m in maps)))
        checked = device.type == "cpu" and bool(captured or tensors.keys() - _UNREAD)
        if mask.captures:
            tensors |= {f"c{i}": tensor for i, tensor in enumerate(mask.tensors_on(device))}
        for letter, m in maps:
            tensors |= {f"{letter}{i}": tensor for i, tensor in enumerate(m.tensors_on(device))}
        if checked or type(call.scale) not in _NUMBERS:
            return Recalled(tensors)
        found = (
            mask.key,
            mask.values,
            tuple(tensors),
            *((m.key, m.values) for _, m in maps),
            call.scale,
            options,
            call.offset,
            more,
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


def place(t: torch.Tensor) -> tuple[Hashable, ...]:
    """Of a look, what may differ where dtype, device and shape are known to be the same."""
    return t.stride(), t.data_ptr() % ALIGN, t.is_neg()


def serves(values: Mapping[str, Any], tensors: Mapping[str, Any]) -> bool:
    """Whether kernels that were given `values` can be given a later call's tensors as they are."""
    cpu = tensors["q"].device.type == "cpu"
    same = (values[n] is t if cpu else values[n].data_ptr() == t.data_ptr() for n, t in tensors.items())
    return all(same)


def launched(
    what: tuple[Hashable, ...],
    values: Mapping[str, torch.Tensor],
    scalars: Mapping[str, Any],
    outputs: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
    make: Callable[[], Program],
) -> tuple[torch.Tensor, ...]:
    """New outputs of the program that `make` compiles, for these tensors and numbers.

    what: all that the program depends on besides the device; later calls like this one find their plan by it,
    the numbers, and what the tensors look like."""
    from ..runtime.driver import driver, get_or_compile
    from ..runtime.executable import Contiguous
    from .prepare import allocate

    key = (what, *scalars.items(), *((name, _signature(t)) for name, t in values.items()))
    plans = driver().plans
    plan = plans.get(key)
    if plan is None:
        device = next(iter(values.values())).device
        stand_ins = {name: Contiguous(shape) for name, shape, _ in outputs}
        executable = get_or_compile(what, make, target_of(device))
        bound = executable.bind({**values, **scalars, **stand_ins}, allocate=partial(allocate, device=device))
        plan = Plan(bound, tuple(map(tuple, outputs)), device)  # type: ignore[arg-type]
        plans.put(key, plan)
    return plan(values)

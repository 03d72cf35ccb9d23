"""Kernels of linear attention on torch tensors: plans, and gradients behind a torch function."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...runtime.driver import driver
from ...runtime.executable import Contiguous
from ...runtime.knobs import NUM_THREADS
from ...runtime.recent import Recent
from ..device import precision_of
from ..operators.rules import wants_gradient
from ..operators.step_autograd import apply, once_differentiable
from ..plan import _signature, place
from .form import DTYPES, GRADIENTS, NAMES, Settings, linear_executable, shapes_of

if TYPE_CHECKING:
    from ...runtime.executable import Bound

_LAYOUTS = 8  # of gradients that a forward keeps kernels for


class Recalled(NamedTuple):
    """The key of a call, None where nobody may recall it, and what runs calls like it, if there was one."""

    key: Hashable = None
    kernels: Any = None


def recall(settings: Settings, tensors: tuple[Any, ...], *more: Hashable) -> Recalled:
    """What is known of a call, before anybody has checked it. tensors: prepared rows of q and k, v, states.

    more: what else decides whether it is valid."""
    try:
        looks = [_signature(tensor) for tensor in tensors]
        key = ("linear", _facts(settings, tensors[0]), wants_gradient(tensors), more, *looks)
        return Recalled(key, driver().plans.get(key))
    except (AttributeError, RuntimeError, TypeError):
        return Recalled()


def attend(tensors: tuple[Any, ...], settings: Settings, key: Hashable) -> tuple[torch.Tensor, ...]:
    """(o, *new states) of a checked call, whose kernels later calls of its key recall."""
    kernels = Kernels(settings, tensors, learns=wants_gradient(tensors))
    if key is not None:
        driver().plans.put(key, kernels)
    return kernels(tensors)


class Kernels:
    """What calls like one another share: kernels of the forward, and of gradients as these are asked for."""

    def __init__(
        self, settings: Settings, tensors: tuple[Any, ...], *, learns: bool, heads: int | None = None
    ) -> None:
        """heads: where rows are passed and returned as products have them, (batch, rows, heads * size)."""
        self._settings, self.learns, self._heads = settings, learns, heads
        self._names = NAMES[: len(tensors)]
        values = dict(zip(self._names, tensors, strict=True))
        kept = settings.kept if learns else ()
        outputs = self._laid_out(_outputs(values, settings, keeps=learns), ("o",))
        self._forward = _plan(values, outputs, settings, learns, ())
        self._given = tuple(n for n, o in enumerate(outputs) if settings.given(o.name))
        self._saved = tuple(n for n, o in enumerate(outputs) if o.name in kept)
        self._read = (*self._names, *(outputs[n].name for n in self._saved), *GRADIENTS)
        self._gradients: Recent[LinearPlan] = Recent(_LAYOUTS)

    def __call__(self, tensors: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        if self.learns:
            return apply(_Linear, self, *tensors)
        return self._forward(dict(zip(self._names, tensors, strict=True)))

    def forward(self, tensors: Sequence[Any]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """(o, *new states), and what gradients read besides the inputs."""
        found = self._forward(dict(zip(self._names, tensors, strict=True)))
        return tuple(found[n] for n in self._given), tuple(found[n] for n in self._saved)

    def gradients(
        self, saved: tuple[Any, ...], grads: tuple[Any, ...], needed: tuple[bool, ...]
    ) -> list[torch.Tensor | None]:
        """The gradient of each input that is needed. saved: the inputs, and what `forward` keeps."""
        values = dict(zip(self._read, (*saved, *grads), strict=False))
        key = (needed, *map(place, saved), *map(_signature, grads))  # hooks may have moved what was saved
        plan = self._gradients.get(key)
        if plan is None:
            plan = self._gradient_plan(values, needed)
            self._gradients.put(key, plan)
        found = iter(plan(values))
        return [next(found) if need else None for need in needed]

    def _gradient_plan(self, values: dict[str, Any], needed: tuple[bool, ...]) -> LinearPlan:
        wanted = tuple(name for name, need in zip(self._names, needed, strict=True) if need)
        if self._heads is not None:
            rows = (name for name in (*self._names, *GRADIENTS[:1]) if name in values)
            values = values | {name: by_heads(values[name], self._heads) for name in rows}
        outputs = self._laid_out(_slopes(values, wanted), ("dq", "dk", "dv"))
        return _plan(values, outputs, self._settings, True, wanted)

    def _laid_out(self, outputs: tuple[Output, ...], rows: tuple[str, ...]) -> tuple[Output, ...]:
        if self._heads is None:
            return outputs
        return tuple(replace(o, flat=True) if o.name in rows else o for o in outputs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, *tensors: Any) -> tuple[Any, ...]:
        found, kept = kernels.forward(tensors)
        ctx.kernels = kernels
        ctx.save_for_backward(*tensors, *kept)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return None, *ctx.kernels.gradients(ctx.saved_tensors, grads, ctx.needs_input_grad[1:])


def forward(values: dict[str, Any], settings: Settings, *, keeps: bool) -> tuple[torch.Tensor, ...]:
    """What `Settings.results` names, contiguous."""
    return _recalled(values, settings, keeps, ())({**values})


def gradients(
    values: dict[str, Any], settings: Settings, wanted: tuple[str, ...]
) -> tuple[torch.Tensor, ...]:
    """The gradients of the tensors wanted, contiguous. values: those of the call, what was kept, slopes."""
    return _recalled(values, settings, True, wanted)({**values})


def _recalled(values: dict[str, Any], settings: Settings, keeps: bool, wanted: tuple[str, ...]) -> LinearPlan:
    """The plan of a forward, or of the gradients wanted, whose results are contiguous."""
    key = ("linear step", keeps, wanted, _facts(settings, values["q"]))
    key += tuple((name, _signature(t)) for name, t in values.items())
    plan = driver().plans.get(key)
    if plan is None:
        if wanted:
            outputs = _slopes(values, wanted, contiguous=True)
        else:
            outputs = _outputs(values, settings, keeps=keeps, contiguous=True)
        plan = _plan(values, outputs, settings, keeps, wanted)
        driver().plans.put(key, plan)
    return plan


def _facts(settings: Settings, q: Any) -> tuple[Hashable, ...]:
    """What decides about kernels beside how tensors look."""
    threads = NUM_THREADS.get() if q.device.type == "cpu" else 0
    return settings.key, threads, q.dtype is torch.float32 and precision_of(q.device, "f32")


def _outputs(
    values: dict[str, Any], settings: Settings, *, keeps: bool, contiguous: bool = False
) -> tuple[Output, ...]:
    by_length = not contiguous and _by_length(values["q"])
    made = shapes_of(values, settings, keeps=keeps)
    return tuple(
        Output.of(name, shape, getattr(torch, DTYPES[dtype]), name == "o" and by_length)
        for name, shape, dtype in made
    )


def _slopes(
    values: dict[str, Any], wanted: tuple[str, ...], *, contiguous: bool = False
) -> tuple[Output, ...]:
    """Gradients lie in memory as what they are of."""
    of = ((name, values[name]) for name in wanted)
    return tuple(Output.of(f"d{name}", t.shape, t.dtype, not contiguous and _by_length(t)) for name, t in of)


def _by_length(rows: torch.Tensor) -> bool:
    """Whether the heads of a row lie side by side in memory, as a projection leaves them."""
    return rows.dim() == 4 and rows.shape[1] > 1 and rows.stride(1) < rows.stride(2)


@dataclass(frozen=True)
class Output:
    """A result to allocate. flat: as (B, L, H * D), where it is (B, H, L, D) with heads side by side."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    flat: bool = False

    @classmethod
    def of(cls, name: str, shape: Sequence[int], dtype: torch.dtype, by_length: bool = False) -> Output:
        """by_length: (B, L, H, D) in memory, for (B, H, L, D)."""
        shape = tuple(shape)
        if not by_length:
            return cls(name, shape, Contiguous(shape).stride(), dtype)
        _, heads, length, size = shape
        return cls(name, shape, (length * heads * size, size, heads * size, 1), dtype)

    def empty(self, device: torch.device) -> torch.Tensor:
        if self.flat:
            batch, heads, length, size = self.shape
            return torch.empty((batch, length, heads * size), dtype=self.dtype, device=device)
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)

    def stand_in(self) -> torch.Tensor:
        """What kernels are bound to: the same memory, by heads."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class LinearPlan:
    """Kernels with sizes and strides settled, which wait for memory: as `plan.Plan`, with layouts.

    copied: the tensors whose rows no kernel can read as they lie."""

    bound: Bound
    outputs: tuple[Output, ...]
    device: torch.device
    copied: tuple[str, ...]

    def __call__(self, tensors: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        for name in self.copied:
            tensors[name] = plain(tensors[name])
        made = [output.empty(self.device) for output in self.outputs]
        for output, tensor in zip(self.outputs, made, strict=True):
            tensors[output.name] = tensor
        self.bound(tensors)
        return tuple(made)


def by_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, rows, heads * size) as (batch, heads, rows, size)."""
    return rows.view(rows.shape[0], rows.shape[1], heads, -1).transpose(1, 2)


def plain(tensor: Any) -> Any:
    """A tensor that kernels can read: its rows are contiguous, and it is what memory holds."""
    if tensor.stride(-1) == 1 and not tensor.is_neg():
        return tensor
    tensor = tensor.detach().resolve_neg()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _plan(
    values: dict[str, Any],
    outputs: tuple[Output, ...],
    settings: Settings,
    keeps: bool,
    wanted: tuple[str, ...],
) -> LinearPlan:
    from ..prepare import allocate

    given, values = values, {name: plain(tensor) for name, tensor in values.items()}
    copied = tuple(name for name, tensor in given.items() if values[name].data_ptr() != tensor.data_ptr())
    device = values["q"].device
    executable, spans = linear_executable(values, settings, keeps, wanted)
    stand_ins = {output.name: output.stand_in() for output in outputs}
    bound = executable.bind({**values, **stand_ins, **spans}, allocate=partial(allocate, device=device))
    return LinearPlan(bound, outputs, device, copied)

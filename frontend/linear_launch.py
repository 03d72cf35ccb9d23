"""Kernels of linear attention on torch tensors: plans, and gradients behind a torch function."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..runtime.driver import driver, get_or_compile
from ..runtime.executable import Contiguous
from ..runtime.knobs import NUM_THREADS
from ..runtime.recent import Recent
from .device import precision_of, target_of
from .feature_maps import FeatureMap
from .operator_rules import wants_gradient
from .plan import _signature
from .problem import _fill_names, is_aligned

if TYPE_CHECKING:
    from ..ir.kernel import Program
    from ..runtime.executable import Bound

CPU_ROWS, GPU_ROWS = 32, (128, 64)  # of a chunk, else and if causal, as passes/linear_schedule.py has them
PROGRAMS = 528  # that fill a GPU: four for each of its multiprocessors
LEAST = 4  # chunks of a segment at least
_LAYOUTS = 8  # of gradients that a forward keeps kernels for


@dataclass(frozen=True)
class Settings:
    """What a call asks for, besides its tensors."""

    q_map: FeatureMap
    k_map: FeatureMap
    causal: bool
    eps: float | None
    initial: bool
    final: bool

    @property
    def key(self) -> tuple[Any, ...]:
        return self.q_map.key, self.k_map.key, self.causal, self.eps, self.initial, self.final

    @property
    def prepares(self) -> bool:
        """Whether torch makes something of rows before kernels read them."""
        return self.q_map.prepare is not None or self.k_map.prepare is not None

    @property
    def states(self) -> tuple[str, ...]:
        """What the state of all keys is called among results."""
        names = ("new_state", "new_sums") if self.final else ("key_state", "key_sums")
        return names if self.eps is not None else names[:1]

    @property
    def kept(self) -> tuple[str, ...]:
        """The results that gradients read."""
        if not self.causal:
            return self.states
        return ("o", "den") if self.eps is not None else ()


NAMES: tuple[str, ...] = ("q", "k", "v", "state", "sums")
GRADIENTS: tuple[str, ...] = ("do", "dnew_state", "dnew_sums")


class Recalled(NamedTuple):
    """The key of a call, None where nobody may recall it, and what runs calls like it, if there was one."""

    key: Hashable = None
    kernels: Any = None


def recall(settings: Settings, tensors: tuple[Any, ...], *more: Hashable) -> Recalled:
    """What is known of a call, before anybody has checked it. tensors: prepared rows of q and k, v, states.

    more: what else decides whether it is valid."""
    try:
        looks = [_signature(tensor) for tensor in tensors]
        q = tensors[0]
        host = NUM_THREADS.get() if q.device.type == "cpu" else 0
        precision = q.dtype is torch.float32 and precision_of(q.device, "f32")
        key = ("linear", settings.key, wants_gradient(tensors), host, precision, more, *looks)
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

    def __init__(self, settings: Settings, tensors: tuple[Any, ...], *, learns: bool) -> None:
        self._settings, self.learns = settings, learns
        self._names = NAMES[: len(tensors)]
        values = dict(zip(self._names, tensors, strict=True))
        self._kept = settings.kept if learns else ()
        outputs = _results(values, settings, self._kept)
        self._forward = _plan(values, outputs, settings, learns, ())
        self._given = tuple(n for n, o in enumerate(outputs) if o.name == "o" or o.name.startswith("new_"))
        self._saved = tuple(n for n, o in enumerate(outputs) if o.name in self._kept)
        self._read = (*self._names, *(outputs[n].name for n in self._saved), *GRADIENTS)
        self._gradients: Recent[LinearPlan] = Recent(_LAYOUTS)

    def __call__(self, tensors: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        if self.learns:
            return _Linear.apply(self, *tensors)  # type: ignore[return-value]
        return self._forward(dict(zip(self._names, tensors, strict=True)))

    def forward(self, tensors: tuple[Any, ...]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """(o, *new states), and what gradients read besides the inputs."""
        found = self._forward(dict(zip(self._names, tensors, strict=True)))
        return tuple(found[n] for n in self._given), tuple(found[n] for n in self._saved)

    def gradients(
        self, saved: tuple[Any, ...], grads: tuple[Any, ...], needed: tuple[bool, ...]
    ) -> list[torch.Tensor | None]:
        """The gradient of each input that is needed. saved: the inputs, and what `forward` keeps."""
        values = dict(zip(self._read, (*saved, *grads), strict=False))
        key = (needed, *map(_signature, grads))
        plan = self._gradients.get(key)
        if plan is None:
            wanted = tuple(name for name, need in zip(self._names, needed, strict=True) if need)
            outputs = [
                Output.of(f"d{name}", values[name].shape, values[name].dtype, _by_length(values[name]))
                for name in wanted
            ]
            plan = _plan(values, tuple(outputs), self._settings, True, wanted)
            self._gradients.put(key, plan)
        found = iter(plan(values))
        return [next(found) if need else None for need in needed]


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


def _results(values: dict[str, Any], settings: Settings, kept: tuple[str, ...]) -> tuple[Output, ...]:
    """o, what gradients read, and the states that are asked for."""
    q, k, v = (values[name] for name in ("q", "k", "v"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs = [Output.of("o", (*q.shape[:3], v.shape[3]), q.dtype, _by_length(q))]
    if "den" in kept:
        outputs.append(Output.of("den", q.shape[:3], wide))
    if settings.final or "key_state" in kept:
        state = (*k.shape[:2], k.shape[3] * len(settings.k_map.parts), v.shape[3])
        shapes = zip(settings.states, (state, state[:3]), strict=False)
        outputs += [Output.of(name, shape, wide) for name, shape in shapes]
    return tuple(outputs)


def _by_length(rows: torch.Tensor) -> bool:
    """Whether the heads of a row lie side by side in memory, as a projection leaves them."""
    return rows.dim() == 4 and rows.shape[1] > 1 and rows.stride(1) < rows.stride(2)


@dataclass(frozen=True)
class Output:
    """A result to allocate."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, shape: Sequence[int], dtype: torch.dtype, by_length: bool = False) -> Output:
        """by_length: (B, L, H, D) in memory, for (B, H, L, D)."""
        shape = tuple(shape)
        if not by_length:
            return cls(name, shape, Contiguous(shape).stride(), dtype)
        _, heads, length, size = shape
        return cls(name, shape, (length * heads * size, size, heads * size, 1), dtype)

    def empty(self, device: torch.device | str) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


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
            tensors[name] = _plain(tensors[name])
        made = [output.empty(self.device) for output in self.outputs]
        for output, tensor in zip(self.outputs, made, strict=True):
            tensors[output.name] = tensor
        self.bound(tensors)
        return tuple(made)


def _plain(tensor: Any) -> Any:
    """A tensor that kernels can read: its rows are contiguous, and it is what memory holds."""
    tensor = tensor.detach().resolve_neg()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _plan(
    values: dict[str, Any],
    outputs: tuple[Output, ...],
    settings: Settings,
    keeps: bool,
    wanted: tuple[str, ...],
) -> LinearPlan:
    from .prepare import allocate

    plain = {name: _plain(tensor) for name, tensor in values.items()}
    copied = tuple(name for name, tensor in values.items() if plain[name].data_ptr() != tensor.data_ptr())
    values = plain
    q, k, v = (values[name] for name in ("q", "k", "v"))
    target, dtype = target_of(q.device), _fill_names()[q.dtype]
    split = _splits(k, settings.causal)
    spans = {"span_L": _span(q, settings.causal, split), "span_N": _span(k, settings.causal, split)}
    facts = {
        "dtype": dtype,
        "qk_size": q.shape[3],
        "v_size": v.shape[3],
        "causal": settings.causal,
        "eps": settings.eps,
        "initial": settings.initial,
        "final": settings.final,
        "keeps": keeps,
        "grouped": q.shape[1] != k.shape[1],
        "split": split,
        "aligned": q.device.type == "cpu" or all(is_aligned(t) for t in values.values() if t.dim() == 4),
        "precision": precision_of(q.device, dtype),
    }

    def make() -> Program:
        from ..ir.linear import FeatureMap as Features
        from ..passes.linear_pipeline import compile_linear, compile_linear_gradients
        from ..passes.linear_spec import LinearSpec
        from .term_expr import to_expr

        maps = []
        for one in (settings.q_map, settings.k_map):
            parts = tuple(to_expr(part, frozenset(("x0",))) for part in one.parts)
            maps.append(Features(parts, one.softmax))
        spec = LinearSpec(*maps, target=target, **facts)
        return compile_linear_gradients(spec, wanted) if wanted else compile_linear(spec)

    quick = ("linear", settings.q_map.key, settings.k_map.key, wanted, tuple(facts.items()))
    executable = get_or_compile(quick, make, target)
    stand_ins = {output.name: output.empty("meta") for output in outputs}
    bound = executable.bind({**values, **stand_ins, **spans}, allocate=partial(allocate, device=q.device))
    return LinearPlan(bound, outputs, q.device, copied)


def _programs(rows: Any) -> int:
    """How many programs keep the device of a tensor busy."""
    if rows.device.type != "cpu":
        return PROGRAMS
    return NUM_THREADS.get() or os.cpu_count() or 1


def _chunks(rows: Any, causal: bool) -> int:
    return -(-rows.shape[2] // (CPU_ROWS if rows.device.type == "cpu" else GPU_ROWS[causal]))


def _splits(keys: Any, causal: bool) -> bool:
    """Whether keys are cut into segments: not where heads alone fill the device, or there are few keys."""
    heads = keys.shape[0] * keys.shape[1]
    return 2 * heads < _programs(keys) and _chunks(keys, causal) >= 2 * LEAST


def _span(rows: Any, causal: bool, split: bool) -> int:
    """Chunks of a segment of queries or keys."""
    cpu = rows.device.type == "cpu"
    fair = -(-_chunks(rows, causal) * rows.shape[0] * rows.shape[1] // _programs(rows))
    return max(LEAST if split else 1, fair if split or not cpu else -(-fair // 4))

"""Kernels of linear attention on torch tensors: plans, and gradients behind a torch function."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from ..runtime.driver import driver, get_or_compile
from ..runtime.knobs import NUM_THREADS
from .device import precision_of, target_of
from .feature_maps import FeatureMap
from .plan import _signature
from .problem import _fill_names, is_aligned

if TYPE_CHECKING:
    from ..ir.kernel import Program
    from ..runtime.executable import Bound

CPU_ROWS, GPU_ROWS = 32, (128, 64)  # of a chunk, else and if causal, as passes/linear_schedule.py has them
PROGRAMS = 528  # that fill a GPU: four for each of its multiprocessors
LEAST = 4  # chunks of a segment at least


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


NAMES: tuple[str, ...] = ("q", "k", "v", "state", "sums")


def attend(q: Any, k: Any, v: Any, states: tuple[Any, ...], settings: Settings) -> tuple[Any, ...]:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *states)):
        return _Linear.apply(settings, q, k, v, *states)
    return forward(dict(zip(NAMES, (q, k, v, *states), strict=False)), settings, keeps=False)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Any) -> tuple[Any, ...]:
        values = dict(zip(NAMES, tensors, strict=False))
        found = forward(values, settings, keeps=True)
        normalised = settings.eps is not None
        o, den, new = (found[0], found[1:2], found[2:]) if normalised else (found[0], (), found[1:])
        ctx.settings, ctx.count = settings, len(tensors)
        ctx.save_for_backward(*tensors, *((o, *den) if normalised else ()))
        return (o, *new)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        values = dict(zip(NAMES, saved[: ctx.count], strict=False))
        values |= dict(zip(("o", "den"), saved[ctx.count :], strict=False))
        values |= dict(zip(("do", "dnew_state", "dnew_sums"), grads, strict=False))
        asked = zip(NAMES, ctx.needs_input_grad[1:], strict=False)
        wanted = tuple(name for name, needed in asked if needed)
        found = dict(zip(wanted, gradients(values, ctx.settings, wanted), strict=True))
        return (None, *(found.get(name) for name in NAMES[: ctx.count]))


def forward(
    values: dict[str, Any], settings: Settings, *, keeps: bool, contiguous: bool = False
) -> tuple[torch.Tensor, ...]:
    """o, then den if it is kept, then the new states. contiguous: else o lies in memory as the queries do."""
    q, k, v = (values[name] for name in ("q", "k", "v"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs = [Output("o", (*q.shape[:3], v.shape[3]), q.dtype, not contiguous and _by_length(q))]
    normalised = settings.eps is not None
    if keeps and normalised:
        outputs.append(Output("den", tuple(q.shape[:3]), wide))
    if settings.final:
        state = (*k.shape[:2], k.shape[3] * len(settings.k_map.parts), v.shape[3])
        outputs.append(Output("new_state", state, wide))
        if normalised:
            outputs.append(Output("new_sums", state[:3], wide))
    return _launch(values, tuple(outputs), settings, keeps, ())


def gradients(
    values: dict[str, Any], settings: Settings, wanted: tuple[str, ...], *, contiguous: bool = False
) -> tuple[torch.Tensor, ...]:
    """The gradients of the tensors wanted, which lie in memory as these do, or are contiguous."""
    tensors = {name: values[name] for name in wanted}
    outputs = [
        Output(f"d{n}", tuple(t.shape), t.dtype, not contiguous and _by_length(t)) for n, t in tensors.items()
    ]
    return _launch(values, tuple(outputs), settings, True, wanted)


def _by_length(rows: torch.Tensor) -> bool:
    """Whether the heads of a row lie side by side in memory, as a projection leaves them."""
    return rows.dim() == 4 and rows.shape[1] > 1 and rows.stride(1) < rows.stride(2)


@dataclass(frozen=True)
class Output:
    """A result to allocate. by_length: (B, L, H, D) in memory, for (B, H, L, D)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    by_length: bool = False

    def empty(self, device: torch.device | str) -> torch.Tensor:
        if not self.by_length:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        batch, heads, length, size = self.shape
        return torch.empty((batch, length, heads, size), dtype=self.dtype, device=device).transpose(1, 2)


@dataclass(frozen=True)
class LinearPlan:
    """Kernels with sizes and strides settled, which wait for memory: as `plan.Plan`, with layouts."""

    bound: Bound
    outputs: tuple[Output, ...]
    device: torch.device

    def __call__(self, tensors: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        made = {output.name: output.empty(self.device) for output in self.outputs}
        self.bound({**tensors, **made})
        return tuple(made.values())


def _launch(
    values: dict[str, Any],
    outputs: tuple[Output, ...],
    settings: Settings,
    keeps: bool,
    wanted: tuple[str, ...],
) -> tuple[torch.Tensor, ...]:
    values = {name: _plain(tensor) for name, tensor in values.items()}
    q = values["q"]
    dtype = _fill_names()[q.dtype]
    facts = (settings.key, keeps, wanted, precision_of(q.device, dtype), NUM_THREADS.get())
    key = ("linear", facts, tuple((name, _signature(t)) for name, t in values.items()))
    plans = driver().plans
    plan = plans.get(key)
    if plan is None:
        plan = _plan(values, outputs, settings, keeps, wanted)
        plans.put(key, plan)
    return plan(values)


def _plain(tensor: Any) -> Any:
    """A tensor that kernels can read: its rows are contiguous."""
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

    q, k, v = (values[name] for name in ("q", "k", "v"))
    target, dtype = target_of(q.device), _fill_names()[q.dtype]
    # What sums run over: keys, and of gradients queries too.
    span = _span(k, max(k.shape[2], q.shape[2] if wanted else 0), settings.causal)
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
        "split": span > 0,
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
    numbers = {"span": span} if span else {}
    bound = executable.bind({**values, **stand_ins, **numbers}, allocate=partial(allocate, device=q.device))
    return LinearPlan(bound, outputs, q.device)


def _span(k: Any, length: int, causal: bool) -> int:
    """Chunks of a segment; 0 where heads alone keep the device busy, or sequences are short."""
    cpu = k.device.type == "cpu"
    chunks = -(-length // (CPU_ROWS if cpu else GPU_ROWS[causal]))
    programs = (NUM_THREADS.get() or os.cpu_count() or 1) if cpu else PROGRAMS
    heads = k.shape[0] * k.shape[1]
    if 2 * heads >= programs or chunks < 2 * LEAST:
        return 0
    return max(LEAST, -(-chunks * heads // programs))

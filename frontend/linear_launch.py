"""Kernels of linear attention on torch tensors: plans, and gradients behind a torch function."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..runtime.driver import driver, get_or_compile
from ..runtime.executable import Contiguous
from ..runtime.knobs import NUM_THREADS
from ..runtime.recent import Recent
from .device import precision_of, target_of
from .feature_maps import FeatureMap
from .operator_rules import wants_gradient
from .plan import _signature
from .problem import _fill_names, is_aligned
from .step_autograd import once_differentiable

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

    def results(self, *, keeps: bool) -> tuple[str, ...]:
        """What kernels give; `keeps`: for gradients too."""
        kept = self.kept if keeps else ()
        den = ("den",) if "den" in kept else ()
        return ("o", *den, *(self.states if self.final or self.states[0] in kept else ()))

    def given(self, name: str) -> bool:
        """Whether a result is the caller's."""
        return name == "o" or name.startswith("new_")


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

    def __init__(self, settings: Settings, tensors: tuple[Any, ...], *, learns: bool) -> None:
        self._settings, self.learns = settings, learns
        self._names = NAMES[: len(tensors)]
        values = dict(zip(self._names, tensors, strict=True))
        kept = settings.kept if learns else ()
        outputs = _outputs(values, settings, keeps=learns)
        self._forward = _plan(values, outputs, settings, learns, ())
        self._given = tuple(n for n, o in enumerate(outputs) if settings.given(o.name))
        self._saved = tuple(n for n, o in enumerate(outputs) if o.name in kept)
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
            plan = _plan(values, _slopes(values, wanted), self._settings, True, wanted)
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


def shapes_of(
    values: Mapping[str, Any], settings: Settings, *, keeps: bool
) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every result."""
    q, k, v = (values[name] for name in ("q", "k", "v"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    state = (*k.shape[:2], k.shape[3] * len(settings.k_map.parts), v.shape[3])
    shapes = {"o": (*q.shape[:3], v.shape[3]), "den": tuple(q.shape[:3])}
    shapes |= dict(zip(settings.states, (state, state[:3]), strict=False))
    names = settings.results(keeps=keeps)
    return [(name, shapes[name], q.dtype if name == "o" else wide) for name in names]


def _outputs(
    values: dict[str, Any], settings: Settings, *, keeps: bool, contiguous: bool = False
) -> tuple[Output, ...]:
    by_length = not contiguous and _by_length(values["q"])
    made = shapes_of(values, settings, keeps=keeps)
    return tuple(Output.of(name, shape, dtype, name == "o" and by_length) for name, shape, dtype in made)


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

"""From a checked attention to kernels that wait for memory: what they are called with, and which they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from ..ir.errors import InputError, UnsupportedError
from .captured import is_array
from .device import target_of
from .executables import executable_for, is_positive
from .placement import PLAIN as EVEN
from .placement import Placement
from .plan import Plan, _signature
from .reads import check_reads
from .schedules import Request, given, settled
from .softmax import PLAIN, Softmax

if TYPE_CHECKING:
    from ..runtime.driver import Executable
    from .mask import Mask
    from .problem import Problem
    from .score import ScoreMod

TORCH_NAMES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "u8": "uint8",
}


def prepare(
    problem: Problem,
    mask: Mask,
    score: ScoreMod | None,
    scale: float | None,
    extra: tuple[str, ...] = (),
    schedule: Any = None,
    validate: bool = False,
    softmax: Softmax = PLAIN,
    placed: Placement = EVEN,
    known: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Plan, dict[str, Any]]:
    """A plan that gives (out, *extra) for a checked problem, and what to call it with.

    known: captured tensors of this call that were computed already. Compiles the kernel if it is new."""
    if schedule is not None:
        schedule = given(schedule, few=placed.few > 0)
    if validate or problem.device.type == "cpu":
        placed.check_values(problem)
        check_reads(problem, placed, mask, score, softmax.prob)
    values = call_values(problem, mask, score, scale, softmax, known) | placed.values
    positive = is_positive(values["scale"], target_of(problem.device))
    compiled = partial(
        executable_for, problem, mask, score, extra, positive=positive, softmax=softmax, placed=placed
    )

    def planned(executable: Executable) -> Plan:
        return plan_of(executable, values, problem, extra)

    if isinstance(schedule, Request):
        schedule = settled(schedule, problem, compiled, lambda ready: partial(planned(ready), values))
    return planned(compiled(schedule)), values


def call_values(
    problem: Problem,
    mask: Mask,
    score: ScoreMod | None,
    scale: float | None,
    softmax: Softmax = PLAIN,
    known: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """What kernels are called with, by name, outputs aside. known: captured tensors at hand, by name."""
    values: dict[str, Any] = {
        "q": _detached(problem.query),
        "k": _detached(problem.key),
        "v": _detached(problem.value),
        "scale": 1 / math.sqrt(problem.qk_size) if scale is None else number_of(scale),
    }
    if softmax.sinks is not None:
        values["sinks"] = softmax.sinks
    for stem, tensor, source in (("p", "c", mask), ("s", "t", score), ("x", "w", softmax.prob)):
        if source is not None:
            values |= {f"{stem}{i}": number for i, number in enumerate(source.values)}
            names = [f"{tensor}{i}" for i in range(source.captures)]
            here = all(name in known for name in names)
            tensors = [known[n] for n in names] if here else source.tensors_on(problem.device)
            values |= {f"{tensor}{i}": captured(t, problem) for i, t in enumerate(tensors)}
    return values


def number_of(scale: Any) -> float:
    """The scale as a float: a number, or a tensor of one."""
    if getattr(scale, "requires_grad", False):
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "attention.scale requires a gradient, and has none. Pass scale.item(), or multiply the "
                "scores in a score_mod, which captures tensors that learn"
            )
        scale = scale.detach()
    try:
        return float(scale)
    except (TypeError, ValueError, RuntimeError):
        got = f"a tensor of shape {tuple(scale.shape)}" if is_array(scale) else repr(scale)
        raise InputError("attention.scale", "a number", got) from None


def plan_of(executable: Executable, values: dict[str, Any], problem: Problem, extra: tuple[str, ...]) -> Plan:
    """A plan that gives (out, *extra), for calls like the one with these values.

    Calls whose contents are checked each time have no plan by what was passed; they find it here, by what is
    left of that."""
    from ..runtime.executable import Contiguous

    try:
        looks = (_signature(x) if isinstance(x, torch.Tensor) else x for x in values.values())
        key = (extra, tuple(values), *looks)
    except (RuntimeError, TypeError):
        key = None
    plan = None if key is None else executable.plans.get(key)
    if plan is not None:
        return plan
    heads = (problem.batch, problem.heads)
    wide = torch.float64 if problem.dtype == "f64" else torch.float32
    outputs: list[tuple[str, tuple[int, ...], torch.dtype]] = [
        ("o", (*heads, problem.q_len, problem.v_size), problem.query.dtype)
    ]
    for name in extra:
        length = problem.kv_len if name == "column_sums" else problem.q_len
        outputs.append((name, (*heads, length), wide))
    waiting = {name: Contiguous(shape) for name, shape, _ in outputs}
    bound = executable.bind(values | waiting, allocate=partial(allocate, device=problem.device))
    plan = Plan(bound, tuple(outputs), problem.device)
    if key is not None:
        executable.plans.put(key, plan)
    return plan


def captured(tensor: Any, problem: Problem) -> Any:
    """A captured tensor as kernels take it: on the problem's device, booleans as bytes."""
    if not isinstance(tensor, torch.Tensor):
        tensor = torch.as_tensor(tensor)
    if tensor.device != problem.device:
        raise InputError(
            "attention: a captured tensor",
            f"a tensor on {problem.device}, as the query is",
            tensor.device,
            f"Capture tensor.to({str(problem.device)!r})",
        )
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else _detached(tensor)


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def allocate(shape: tuple[int, ...], dtype: str, device: Any = "cpu") -> torch.Tensor:
    """An uninitialised contiguous tensor of a dtype by its name in the IR."""
    return torch.empty(shape, dtype=getattr(torch, TORCH_NAMES[dtype]), device=device)

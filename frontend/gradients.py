"""The gradients of one attention, by kernels that compute its probabilities anew.

What autograd, JAX's custom_vjp and the operators of torch.library share: tensors in, tensors out, nothing
about how a framework asks. Memory beside inputs and results is a number a query row (delta), and for
captured tensors a few copies of those.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..ir.errors import UnsupportedError
from ..runtime.executable import Contiguous
from .device import target_of
from .executables import SLOTS, gradient_executable, is_positive
from .prepare import allocate, call_values
from .problem import is_aligned

if TYPE_CHECKING:
    import torch

    from ..runtime.executable import Bound
    from .mask import Mask
    from .placement import Placement
    from .problem import Problem
    from .score import ScoreMod
    from .softmax import Softmax

INPUTS = ("q", "k", "v", "sinks")
SLOT_BYTES = 1 << 24  # of all copies of one, where a GPU has more than one


def gradients(
    problem: Problem,
    mask: Mask,
    score: ScoreMod | None,
    scale: float | None,
    softmax: Softmax,
    placed: Placement,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    wanted: Collection[str],
    *,
    deterministic: bool | None = None,
) -> dict[str, torch.Tensor]:
    """Gradients by name for a checked problem whose results are known.

    out: (B, Hq, q_len, Dv) and lse: (B, Hq, q_len), of the scores alone, as `attention` gave them. grad_out,
    grad_lse: the gradients of both, of which the latter may be None. wanted: of "q", "k", "v", "sinks",
    "t0", ... (float tensors that the score_mod captured) and "w0", ... (the prob_mod). Each result has its
    input's shape and dtype. deterministic: True refuses sums whose order is open (captured tensors on a
    GPU); all else is the same in every run.

    Raises UnsupportedError for what has no gradient: pages, a captured tensor that is no float or is no part
    of a map, a function without a derivative rule."""
    plan, values = planned(
        problem,
        mask,
        score,
        scale,
        softmax,
        placed,
        known_rows(out, lse, grad_out, grad_lse),
        wanted,
        deterministic,
    )
    return plan(values)


@dataclass(frozen=True)
class GradientPlan:
    """Kernels of gradients that wait for memory.

    made: of each result of theirs its name, shape, dtype, and whether it starts as zeros. found: of each
    gradient its name, how it comes from a result ("", "heads", "slots" or "batch"), shape and dtype."""

    bound: Bound
    made: tuple[tuple[str, tuple[int, ...], torch.dtype, bool], ...]
    found: tuple[tuple[str, str, tuple[int, ...], torch.dtype], ...]
    device: torch.device

    def __call__(self, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The gradients by name; tensors: inputs by the kernels' names for them."""
        import torch

        values = {**tensors}
        for name, shape, dtype, zero in self.made:
            values[name] = (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=self.device)
        self.bound(values)
        return {name: _from(values[f"d{name}"], how, shape, dtype) for name, how, shape, dtype in self.found}


def _from(result: torch.Tensor, how: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if not how:
        return result
    sums: dict[str, tuple[int, ...]] = {"heads": (0, 2), "slots": (0,), "batch": (0,)}
    return result.sum(sums[how]).view(shape).to(dtype)


def known_rows(
    out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Results and their gradients as kernels take them, by name."""
    values = {"o": out.contiguous(), "lse": lse.contiguous(), "do": _rows(grad_out.to(out.dtype))}
    if grad_lse is not None:
        values["dlse"] = grad_lse.to(lse.dtype).contiguous()
    return values


def planned(
    problem: Problem,
    mask: Mask,
    score: ScoreMod | None,
    scale: float | None,
    softmax: Softmax,
    placed: Placement,
    rows: dict[str, torch.Tensor],
    wanted: Collection[str],
    deterministic: bool | None = None,
    known: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[GradientPlan, dict[str, Any]]:
    """A plan that gives gradients, and what to call it with; arguments as `gradients` has them.

    rows: see `known_rows`. known: captured tensors at hand, by name."""
    names = tuple(sorted(wanted))
    captures = tuple(n for n in names if n not in INPUTS)
    if captures and deterministic and problem.device.type != "cpu":
        raise UnsupportedError(
            f"attention.deterministic: gradients of captured tensors ({', '.join(captures)}) add up in any "
            "order on a GPU. Leave deterministic out, or detach them"
        )
    values = call_values(problem, mask, score, scale, softmax, known) | placed.values | rows
    positive = is_positive(float(values["scale"]), target_of(problem.device))
    given = ("o", "lse") if "dlse" in rows else ("o",)
    executable = gradient_executable(problem, mask, score, softmax, placed, positive, names, given)
    results = _results(problem, values, captures, rows["lse"].dtype)
    made = tuple((n, *r) for n, r in results.items() if n in executable.inputs)
    found = tuple(_found(name, problem, softmax, values) for name in names)
    waiting = {name: Contiguous(shape) for name, shape, *_ in made}
    bound = executable.bind(values | waiting, allocate=partial(allocate, device=problem.device))
    return GradientPlan(bound, made, found, problem.device), values


def _found(
    name: str, problem: Problem, softmax: Softmax, values: dict[str, Any]
) -> tuple[str, str, tuple[int, ...], torch.dtype]:
    """How the gradient of an input comes from what kernels store."""
    tensors = {"q": problem.query, "k": problem.key, "v": problem.value, "sinks": softmax.sinks}
    of = tensors[name] if name in tensors else values[name]
    shape = tuple(of.shape)
    if name in ("k", "v") and problem.one_key_batch:
        return name, "batch", (1, *shape[1:]), of.dtype
    how = {"q": "", "k": "", "v": "", "sinks": "heads"}.get(name, "slots")
    return name, how, shape, of.dtype


def _rows(grad: torch.Tensor) -> torch.Tensor:
    """The gradient of the output as kernels read it: unit stride, on a GPU rows on multiples of 16 bytes."""
    import torch

    if grad.stride(3) == 1 and (grad.device.type == "cpu" or is_aligned(grad)):
        return grad
    return grad.clone(memory_format=torch.contiguous_format)


def _results(
    problem: Problem, values: dict[str, Any], captures: tuple[str, ...], wide: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    """(shape, dtype, whether it starts as zeros) of what kernels may store, by their names for it."""
    dtype, rows = problem.query.dtype, tuple(problem.query.shape[:3])
    keys = (problem.batch, *problem.key.shape[1:3])
    made = {
        "dq": ((*rows, problem.qk_size), dtype, False),
        "dk": ((*keys, problem.qk_size), dtype, False),
        "dv": ((*keys, problem.v_size), dtype, False),
        "dsinks": (rows, wide, False),
    }
    for name in captures:
        size = math.prod(values[name].shape)
        few = problem.device.type != "cpu" and size * SLOTS * wide.itemsize > SLOT_BYTES
        made[f"d{name}"] = ((1 if few else SLOTS, max(size, 1)), wide, True)
    return made

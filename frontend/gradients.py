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
from .problem import ALIGN, is_aligned

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
    input's shape and dtype. deterministic: True has sums whose order is open (captured tensors on a GPU)
    add up as integers (`passes/exact_sums.py`); all else is the same in every run.

    Raises UnsupportedError for what has no gradient: pages, a captured tensor that is no float or is no part
    of a map, a function without a derivative rule; and for such sums of f64, or of more than they hold."""
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
    gradient its name, how it comes from a result ("", "heads", "slots", "exact" or "batch"), shape and
    dtype."""

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
    if how == "exact":
        return _from_integers(result.sum(0)).view(shape).to(dtype)
    sums: dict[str, tuple[int, ...]] = {"heads": (0, 2), "slots": (0,), "batch": (0,)}
    return result.sum(sums[how]).view(shape).to(dtype)


def _from_integers(bins: torch.Tensor) -> torch.Tensor:
    """The f64 numbers that superaccumulators (size, BINS) stand for."""
    import torch

    from ..passes.exact_sums import FINITE, INF, LEAST, MINUS_INF, NAN, WIDTH

    exponents = torch.arange(FINITE, device=bins.device) * WIDTH + LEAST
    found = torch.ldexp(bins[:, :FINITE].double(), exponents).sum(1)
    up, down, undefined = (bins[:, n] > 0 for n in (INF, MINUS_INF, NAN))
    found = found.masked_fill(up, math.inf).masked_fill(down, -math.inf)
    return found.masked_fill(undefined | (up & down), math.nan)


def known_rows(
    out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Results and their gradients as kernels take them, by name."""
    values = {"o": out.contiguous(), "lse": _pitched(lse), "do": _rows(grad_out.to(out.dtype))}
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
    exact = bool(captures and deterministic) and adds_in_any_order(problem.device)
    if exact:
        _check_room(problem, captures)
    values = call_values(problem, mask, score, scale, softmax, known) | placed.values | rows
    positive = is_positive(float(values["scale"]), target_of(problem.device))
    given = ("o", "lse") if "dlse" in rows else ("o",)
    aligned = target_of(problem.device) == "cpu" or is_aligned(rows["lse"])
    asked = (names, given, aligned, exact)
    executable = gradient_executable(problem, mask, score, softmax, placed, positive, *asked)
    results = _results(problem, values, captures, rows["lse"].dtype, exact)
    made = tuple((n, *r) for n, r in results.items() if n in executable.inputs)
    found = tuple(_found(name, problem, softmax, values, "exact" if exact else "slots") for name in names)
    waiting = {name: Contiguous(shape) for name, shape, *_ in made}
    bound = executable.bind(values | waiting, allocate=partial(allocate, device=problem.device))
    return GradientPlan(bound, made, found, problem.device), values


def _found(
    name: str, problem: Problem, softmax: Softmax, values: dict[str, Any], captured: str
) -> tuple[str, str, tuple[int, ...], torch.dtype]:
    """How the gradient of an input comes from what kernels store; captured: of a captured tensor."""
    tensors = {"q": problem.query, "k": problem.key, "v": problem.value, "sinks": softmax.sinks}
    of = tensors[name] if name in tensors else values[name]
    shape = tuple(of.shape)
    if name in ("k", "v") and problem.one_key_batch:
        return name, "batch", (1, *shape[1:]), of.dtype
    how = {"q": "", "k": "", "v": "", "sinks": "heads"}.get(name, captured)
    return name, how, shape, of.dtype


def adds_in_any_order(device: torch.device) -> bool:
    """Whether programs of a device add to captured tensors' gradients side by side."""
    return device.type != "cpu"


def _accumulator(wide: torch.dtype, exact: bool) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and the dtype of one element's sum."""
    if not exact:
        return (), wide
    import torch

    from ..passes.exact_sums import BINS

    return (BINS,), torch.int64


def _check_room(problem: Problem, captures: tuple[str, ...]) -> None:
    """Raises UnsupportedError where exact sums might get more numbers than they hold."""
    from ..passes.exact_sums import ROOM

    names = ", ".join(captures)
    if problem.dtype == "f64":
        raise UnsupportedError(
            f"attention.deterministic: sums of captured tensors ({names}) in float64 have no fixed order "
            "on a GPU. Use float32, run on a CPU, or leave deterministic out"
        )
    pairs = math.prod(problem.query.shape[:3]) * problem.kv_len
    if pairs >= ROOM:
        raise UnsupportedError(
            f"attention.deterministic: sums of captured tensors ({names}) hold {ROOM} numbers in a fixed "
            f"order on a GPU; queries times keys are {pairs}. Split the batch, or leave deterministic out"
        )


def _rows(grad: torch.Tensor) -> torch.Tensor:
    """The gradient of the output as kernels read it: unit stride, on a GPU rows on multiples of 16 bytes."""
    import torch

    if grad.stride(3) == 1 and (grad.device.type == "cpu" or is_aligned(grad)):
        return grad
    return grad.clone(memory_format=torch.contiguous_format)


def _pitched(rows: torch.Tensor) -> torch.Tensor:
    """A number a query row as kernels read it: unit stride, on a GPU rows on multiples of 16 bytes."""
    length = rows.shape[-1]
    step = 1 if target_of(rows.device) == "cpu" else ALIGN // rows.element_size()
    if length % step == 0:
        return rows.contiguous()
    made = rows.new_empty((*rows.shape[:-1], -(-length // step) * step))[..., :length]
    return made.copy_(rows)


def _results(
    problem: Problem, values: dict[str, Any], captures: tuple[str, ...], wide: torch.dtype, exact: bool
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
        of_each, kind = _accumulator(wide, exact)
        width = kind.itemsize * math.prod(of_each)
        few = problem.device.type != "cpu" and size * SLOTS * width > SLOT_BYTES
        made[f"d{name}"] = ((1 if few else SLOTS, max(size, 1), *of_each), kind, True)
    return made

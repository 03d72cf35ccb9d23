"""The gradients of one attention, by kernels that compute its probabilities anew.

What autograd, JAX's custom_vjp and the operators of torch.library share: tensors in, tensors out, nothing
about how a framework asks. Memory beside inputs and results is a number a query row (delta), and for
captured tensors a few copies of those.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

from ..ir.errors import UnsupportedError
from ..runtime.driver import get_or_compile
from .attention import allocate, call_values, is_positive
from .captured import is_monotone
from .device import precision_of, target_of
from .kernel import quick_key
from .problem import is_aligned

if TYPE_CHECKING:
    import torch

    from ..ir.kernel import Program
    from ..runtime.executable import Executable
    from .mask import Mask
    from .placement import Placement
    from .problem import Problem
    from .score import ScoreMod
    from .softmax import Softmax

INPUTS = ("q", "k", "v", "sinks")
SLOTS = 16  # copies of the gradient of a captured tensor that programs add to side by side
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
    import torch

    names = tuple(sorted(wanted))
    if not names:
        return {}
    captures = tuple(n for n in names if n not in INPUTS)
    if captures and deterministic and problem.device.type != "cpu":
        raise UnsupportedError(
            f"attention.deterministic: gradients of captured tensors ({', '.join(captures)}) add up in any "
            "order on a GPU. Leave deterministic out, or detach them"
        )
    values = call_values(problem, mask, score, scale, softmax) | placed.values
    given = ("o", "lse") if grad_lse is not None else ("o",)
    values |= {"o": out.contiguous(), "lse": lse.contiguous(), "do": _rows(grad_out, problem)}
    if grad_lse is not None:
        values["dlse"] = grad_lse.to(lse.dtype).contiguous()
    positive = is_positive(values["scale"], target_of(problem.device))
    executable = _executable(problem, mask, score, softmax, placed, positive, names, given)
    made = _results(problem, softmax, values, names, captures, lse.dtype)
    made = {name: tensor for name, tensor in made.items() if name in executable.inputs}
    run = executable.bind(values | made, allocate=partial(allocate, device=problem.device))
    run(values | made)
    found: dict[str, torch.Tensor] = {}
    for name in names:
        of = _input(name, problem, softmax, values)
        grad = made[f"d{name}"]
        if name == "sinks":
            grad = grad.sum((0, 2))
        elif name in captures:
            grad = grad.sum(0).view(of.shape)
        elif name in ("k", "v") and problem.one_key_batch:
            grad = grad.sum(0, keepdim=True)
        found[name] = grad.to(of.dtype)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, grad_out)):
        raise UnsupportedError("attention: gradients of gradients are not built")
    return found


def _rows(grad: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The gradient of the output as kernels read it: unit stride, on a GPU rows on multiples of 16 bytes."""
    grad = grad.to(problem.query.dtype)
    if grad.stride(3) == 1 and (problem.device.type == "cpu" or is_aligned(grad)):
        return grad
    return grad.contiguous() if grad.stride(3) != 1 else grad.clone(memory_format=_contiguous())


def _contiguous() -> Any:
    import torch

    return torch.contiguous_format


def _input(name: str, problem: Problem, softmax: Softmax, values: dict[str, Any]) -> torch.Tensor:
    known = {"q": problem.query, "k": problem.key, "v": problem.value, "sinks": softmax.sinks}
    return known[name] if name in known else values[name]


def _results(
    problem: Problem,
    softmax: Softmax,
    values: dict[str, Any],
    names: tuple[str, ...],
    captures: tuple[str, ...],
    wide: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Tensors for what kernels may store, by their names for them."""
    import torch

    device, dtype = problem.device, problem.query.dtype
    keys = (problem.batch, *problem.key.shape[1:3])
    made = {
        "dq": torch.empty(problem.query.shape, dtype=dtype, device=device),
        "dk": torch.empty((*keys, problem.qk_size), dtype=dtype, device=device),
        "dv": torch.empty((*keys, problem.v_size), dtype=dtype, device=device),
    }
    if "sinks" in names:
        made["dsinks"] = torch.empty(problem.query.shape[:3], dtype=wide, device=device)
    for name in captures:
        size = math.prod(values[name].shape)
        slots = SLOTS if device.type == "cpu" or size * SLOTS * wide.itemsize <= SLOT_BYTES else 1
        made[f"d{name}"] = torch.zeros((slots, max(size, 1)), dtype=wide, device=device)
    return made


def _executable(
    problem: Problem,
    mask: Mask,
    score: ScoreMod | None,
    softmax: Softmax,
    placed: Placement,
    positive: bool,
    names: tuple[str, ...],
    given: tuple[str, ...],
) -> Executable:
    """The compiled kernels: from memory, from disk, or compiled now."""
    target = target_of(problem.device)
    facts = (problem.aligned, precision_of(problem.device, problem.dtype), positive)
    sizes = (problem.dtype, problem.qk_size, problem.v_size, problem.contiguous, True, False, *facts)
    ids = tuple(f"c{i}" for i in mask.segments if is_monotone(mask.tensors[i])) if mask.segments else ()

    def make() -> Program:
        from ..passes.pipeline import compile_spec
        from ..passes.spec import AttentionSpec, Gradient

        more: dict[str, Any] = softmax.spec_fields | placed.spec_fields | {"monotone": frozenset(ids)}
        spec = AttentionSpec(mask.ir, None if score is None else score.ir, *sizes, target=target, **more)
        return compile_spec(spec, gradient=Gradient(names, given))

    key = ("gradient", names, given, quick_key(mask, score, sizes, ids, None, softmax, placed.key))
    return get_or_compile(key, make, target)

"""The compiled kernel of a problem's structure, whatever library its tensors are from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..runtime.driver import get_or_compile
from .captured import is_monotone
from .device import makes_descriptors, precision_of, target_of
from .kernel import quick_key
from .placement import PLAIN as EVEN
from .placement import Placement
from .softmax import PLAIN, Softmax

if TYPE_CHECKING:
    from ..ir.kernel import Program
    from ..runtime.driver import Executable
    from .mask import Mask
    from .problem import Problem
    from .score import ScoreMod

LEAST_SCALE = 2.0**-100  # as `passes.spec` has it
SLOTS = 16  # copies of the gradient of a captured tensor that programs add to side by side


def is_positive(scale: float, target: str) -> bool:
    """Whether kernels may rely on a scale above 0; those of CPUs do not ask."""
    return target.startswith("cpu") or scale >= LEAST_SCALE


def executable_for(
    problem: Problem,
    mask: Mask,
    score: ScoreMod | None,
    extra: tuple[str, ...] = (),
    schedule: Any = None,
    positive: bool = True,
    softmax: Softmax = PLAIN,
    placed: Placement = EVEN,
) -> Executable:
    """The compiled kernel of a problem's structure: from memory, from disk, or compiled now."""
    target = target_of(problem.device)
    sizes = (
        problem.dtype,
        problem.qk_size,
        problem.v_size,
        problem.contiguous,
        "lse" in extra,
        "max" in extra,
        problem.aligned,
        precision_of(problem.device, problem.dtype),
        positive,
    )
    sums, described = "column_sums" in extra, makes_descriptors(problem.device)
    ids = tuple(f"c{i}" for i in mask.segments if is_monotone(mask.tensors[i])) if mask.segments else ()

    def make() -> Program:
        from ..passes.pipeline import compile_spec
        from ..passes.spec import AttentionSpec

        maps = None if score is None else score.ir
        more = (
            softmax.spec_fields
            | placed.spec_fields
            | {"monotone": frozenset(ids), "return_column_sums": sums, "descriptors": described}
        )
        return compile_spec(AttentionSpec(mask.ir, maps, *sizes, target=target, **more), schedule)

    key = quick_key(mask, score, (*sizes, sums), ids, schedule, softmax, placed.key)
    return get_or_compile(key if described else ("no descriptors", key), make, target)


def gradient_executable(
    problem: Problem,
    mask: Mask,
    score: ScoreMod | None,
    softmax: Softmax,
    placed: Placement,
    positive: bool,
    names: tuple[str, ...],
    given: tuple[str, ...],
    aligned: bool,
    exact_sums: bool = False,
) -> Executable:
    """The compiled kernels of gradients by name, from what is given of 'o' and 'lse'.

    aligned: whether rows of the log-sum-exp start on multiples of 16 bytes. exact_sums: as `AttentionSpec`
    has it."""
    target, described = target_of(problem.device), makes_descriptors(problem.device)
    facts = (problem.aligned and aligned, precision_of(problem.device, problem.dtype), positive)
    sizes = (problem.dtype, problem.qk_size, problem.v_size, problem.contiguous, True, False, *facts)
    ids = tuple(f"c{i}" for i in mask.segments if is_monotone(mask.tensors[i])) if mask.segments else ()

    def make() -> Program:
        from ..passes.pipeline import compile_spec
        from ..passes.spec import AttentionSpec, Gradient

        more: dict[str, Any] = softmax.spec_fields | placed.spec_fields
        more |= {"monotone": frozenset(ids), "exact_sums": exact_sums, "descriptors": described}
        spec = AttentionSpec(mask.ir, None if score is None else score.ir, *sizes, target=target, **more)
        return compile_spec(spec, gradient=Gradient(names, given))

    structure = quick_key(mask, score, sizes, ids, None, softmax, placed.key)
    key = ("gradient", names, given, exact_sums, structure)
    return get_or_compile(key if described else ("no descriptors", key), make, target)

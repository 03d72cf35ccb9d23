"""Ahead-of-time use: `gossamer.compile(spec)` gives a Kernel that can be read, called, saved and loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import InputError
from .mask import Mask
from .score import ScoreMod

if TYPE_CHECKING:
    from ..passes.spec import AttentionSpec as IRSpec
    from ..runtime.driver import Executable


DTYPES = ("f16", "bf16", "f32", "f64")
PRECISIONS = ("ieee", "tf32")


@dataclass(frozen=True)
class AttentionSpec:
    """What a kernel depends on; lengths, batch, head counts and a mask's integers are arguments, not here.

    mask: what `gossamer.attention` takes (a Mask, a mask_mod, a BlockMask, a boolean tensor, None).
    score_mod: likewise. dtype: "f16", "bf16", "f32" or "f64". qk_size, v_size: head sizes of query and
    key, and of value (default: the same). contiguous: for query, key and value, whether the last
    dimension has stride 1. return_lse: whether the LSE is an output; return_max:
    beside it, the largest score of every row. aligned: whether query, key and value start on multiples of
    16 bytes, their rows too, as a kernel for a GPU may then ask of them. precision: "ieee" or "tf32" (GPU).
    positive: whether the scale of every call is above 0, which a kernel for a GPU may use.

    >>> from gossamer import masks
    >>> AttentionSpec(masks.causal(), dtype="bf16", qk_size=128).ir.v_size
    128
    """

    mask: Any = None
    score_mod: Any = None
    dtype: str = "f32"
    qk_size: int = 64
    v_size: int | None = None
    contiguous: tuple[bool, bool, bool] = (True, True, True)
    return_lse: bool = False
    return_max: bool = False
    aligned: bool = True
    precision: str = "ieee"
    positive: bool = True

    def __post_init__(self) -> None:
        for name, size in (("qk_size", self.qk_size), ("v_size", self.v_size)):
            given = size is not None or name == "qk_size"  # v_size=None: as qk_size
            if given and not (isinstance(size, int) and 1 <= size <= 1024):
                raise InputError(f"AttentionSpec.{name}", "a head size from 1 to 1024", repr(size))
        flags = self.contiguous
        if not isinstance(flags, tuple) or len(flags) != 3 or not all(isinstance(f, bool) for f in flags):
            raise InputError(
                "AttentionSpec.contiguous", "three truth values, for query, key and value", repr(flags)
            )
        for name, flag in (
            ("return_lse", self.return_lse),
            ("aligned", self.aligned),
            ("positive", self.positive),
        ):
            if not isinstance(flag, bool):
                raise InputError(f"AttentionSpec.{name}", "True or False", repr(flag))
        for name, value, known in (("dtype", self.dtype, DTYPES), ("precision", self.precision, PRECISIONS)):
            if value not in known:
                raise InputError(f"AttentionSpec.{name}", f"one of {', '.join(known)}", repr(value))

    @property
    def sizes(self) -> tuple[Any, ...]:
        size = self.v_size or self.qk_size
        asked = (self.return_lse, self.return_max)
        facts = (self.aligned, self.precision, self.positive)
        return (self.dtype, self.qk_size, size, self.contiguous, *asked, *facts)

    @property
    def ir(self) -> IRSpec:
        """The spec as passes take it. Raises InputError, TraceError."""
        from ..passes.spec import AttentionSpec as IRSpec

        score = ScoreMod.of(self.score_mod)
        return IRSpec(Mask.of(self.mask).ir, None if score is None else score.ir, *self.sizes)

    def quick_key(self) -> tuple[Any, ...]:
        """The structural key by which `gossamer.attention` finds the kernel."""
        return quick_key(Mask.of(self.mask), ScoreMod.of(self.score_mod), self.sizes)


def quick_key(
    mask: Mask,
    score: ScoreMod | None,
    sizes: tuple[Any, ...],
    ids: tuple[str, ...] = (),
    schedule: Any = None,
) -> tuple[Any, ...]:
    """The structural key of an attention kernel: primitives only, the same in every process."""
    return (
        "attention",
        mask.key,
        None if score is None else score.key,
        sizes,
        ids,
        None if schedule is None else repr(schedule),
    )


class Kernel:
    """A compiled attention: one kernel, or several that run in order.

    source: the generated source text. ir: the IR text it was made from. target: as asked for."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable

    @property
    def source(self) -> str:
        return self._executable.source

    @property
    def ir(self) -> str:
        return self._executable.ir

    @property
    def target(self) -> str:
        return self._executable.artifact.manifest.target

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to one file when path ends in `.gossamer`, else to a folder; `gossamer.load` reads either."""
        return self._executable.save(path)

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        mask: Any = None,
        score_mod: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Run on tensors of the target's kind of device, as `gossamer.attention`; returns (out, lse) when
        compiled with return_lse, (out, lse, max) with return_max.

        mask, score_mod: of the structure that was compiled; they bring the runtime integers and the
        captured tensors. Raises InputError when something is not what the kernel was compiled for."""
        from .attention import call_values, is_positive, launch
        from .problem import Problem

        problem = Problem(query, key, value, enable_gqa)
        kind = self.target.partition(":")[0]
        if kind != problem.device.type:
            raise InputError(
                "kernel: query", f"a tensor on a {kind} device, for {self.target}", problem.device
            )
        bound, score = problem.mask_of(mask), ScoreMod.of(score_mod)
        made = self._executable.artifact.manifest.extra
        sizes = (problem.dtype, problem.qk_size, problem.v_size)
        for name, wanted, got in zip(("dtype", "qk_size", "v_size"), made["sizes"], sizes, strict=True):
            if wanted != got:
                raise InputError(f"kernel: {name}", repr(wanted), repr(got), "Compile another spec")
        for name, wanted, got in zip(
            ("query", "key", "value"), made["contiguous"], problem.contiguous, strict=True
        ):
            if wanted and not got:
                raise InputError(
                    f"kernel: {name}", "a last dimension of stride 1", "another stride", "Call .contiguous()"
                )
        if _digest(bound, score) != made["structure"]:
            raise InputError(
                "kernel: mask or score_mod",
                f"the structure {made['text']}",
                repr(bound),
                "Compile another spec",
            )
        rows = tuple(made["rows"])
        values = call_values(problem, bound, score, scale)
        if made["positive"] and not is_positive(values["scale"], self.target):
            raise InputError(
                "kernel: scale", "a number above 0", values["scale"], "Compile with positive=False"
            )
        found = launch(self._executable, values, problem, rows)
        return found if rows else found[0]

    def __repr__(self) -> str:
        names = ", ".join(launch.kernel for launch in self._executable.artifact.manifest.launches)
        return f"Kernel({names}; {self.target})"


def compile(spec: AttentionSpec, target: str = "cpu", schedule: Any = None) -> Kernel:
    """Compile an attention ahead of time; the result also answers `gossamer.attention` once loaded.

    target: "cpu" (this machine), "cpu:znver4", "cuda:sm_90", "hip:gfx942", ... schedule: one Schedule, or
    one a group, in place of the default. Raises InputError for an unknown target, BackendError."""
    if not isinstance(spec, AttentionSpec):
        raise InputError(
            "compile.spec", "an AttentionSpec", type(spec).__name__, "Write AttentionSpec(mask, qk_size=64)"
        )
    from dataclasses import replace

    from ..passes.pipeline import compile_spec
    from ..runtime.driver import Target, driver

    Target.parse(target)  # before the passes spend time on it
    mask, score = Mask.of(spec.mask), ScoreMod.of(spec.score_mod)
    program = compile_spec(replace(spec.ir, target=target), schedule)
    keys = [quick_key(mask, score, spec.sizes, (), schedule)]
    extra = {
        "sizes": list(spec.sizes[:3]),
        "contiguous": list(spec.contiguous),
        "positive": spec.positive,
        "rows": ["lse", "max"][: spec.return_lse + spec.return_max],
        "structure": _digest(mask, score),
        "text": repr(mask),
    }
    return Kernel(driver().compile(program, target, quick_keys=keys, extra=extra))


def load(path: str | os.PathLike[str]) -> Kernel:
    """Load a saved kernel; needs neither a C compiler nor the passes.

    Checksums, format and machine are verified before anything runs, but a binary is code: load only
    what you would also execute. Raises ArtifactError."""
    from ..runtime.driver import load as load_executable

    return Kernel(load_executable(path))


def _digest(mask: Mask, score: ScoreMod | None) -> str:
    from ..runtime.cache import digest_of

    return digest_of(mask.key, None if score is None else score.key)

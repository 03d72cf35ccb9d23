"""Ahead-of-time use: `gossamer.compile(spec)` gives a Kernel that can be read, called, saved and loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import InputError
from .mask import Mask
from .schedules import TUNE, Request, given
from .score import ProbMod, ScoreMod
from .softmax import PLAIN, Softmax

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
    positive: whether the scale of every call is above 0, which a kernel for a GPU may use. prob_mod: as for
    `gossamer.attention`; sinks: the dtype of sinks, or None; dropout: whether there is any;
    return_column_sums: whether those are an output.

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
    prob_mod: Any = None
    sinks: str | None = None
    dropout: bool = False
    return_column_sums: bool = False

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
        for name in ("return_lse", "aligned", "positive", "dropout", "return_column_sums"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"AttentionSpec.{name}", "True or False", repr(getattr(self, name)))
        choices = (
            ("dtype", self.dtype, DTYPES),
            ("sinks", self.sinks, (None, *DTYPES)),
            ("precision", self.precision, PRECISIONS),
        )
        for name, value, known in choices:
            if value not in known:
                raise InputError(f"AttentionSpec.{name}", f"one of {', '.join(map(str, known))}", repr(value))

    @property
    def sizes(self) -> tuple[Any, ...]:
        size = self.v_size or self.qk_size
        asked = (self.return_lse, self.return_max)
        facts = (self.aligned, self.precision, self.positive)
        return (self.dtype, self.qk_size, size, self.contiguous, *asked, *facts)

    @property
    def softmax(self) -> Softmax:
        """What its calls ask of their softmax, without the tensors and numbers that they bring."""
        prob = ProbMod.of(self.prob_mod)
        if self.dropout:
            prob = (prob or ProbMod.identity()).dropped_out(0, 1.0, None)
        return Softmax(None, self.sinks, prob)

    @property
    def ir(self) -> IRSpec:
        """The spec as passes take it. Raises InputError, TraceError."""
        from ..passes.spec import AttentionSpec as IRSpec

        score = ScoreMod.of(self.score_mod)
        more = self.softmax.spec_fields | {"return_column_sums": self.return_column_sums}
        return IRSpec(Mask.of(self.mask).ir, None if score is None else score.ir, *self.sizes, **more)

    def quick_key(self, schedule: Any = None) -> tuple[Any, ...]:
        """The structural key by which `gossamer.attention` finds the kernel."""
        sizes = (*self.sizes, self.return_column_sums)
        return quick_key(Mask.of(self.mask), ScoreMod.of(self.score_mod), sizes, (), schedule, self.softmax)


def quick_key(
    mask: Mask,
    score: ScoreMod | None,
    sizes: tuple[Any, ...],
    ids: tuple[str, ...] = (),
    schedule: Any = None,
    softmax: Softmax = PLAIN,
    placed: tuple[Any, ...] | None = None,
) -> tuple[Any, ...]:
    """The structural key of an attention kernel: primitives only, the same in every process."""
    return (
        "attention",
        mask.key,
        None if score is None else score.key,
        sizes,
        ids,
        None if schedule is None else repr(schedule),
        softmax.key,
        placed,
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
        prob_mod: Any = None,
        sinks: Any = None,
        dropout_p: float = 0.0,
        dropout_seed: Any = None,
    ) -> Any:
        """Run on tensors of the target's kind of device, as `gossamer.attention`; returns (out, lse) when
        compiled with return_lse, (out, lse, max) with return_max, and the column sums last.

        mask, score_mod, prob_mod: of the structure that was compiled; they bring the runtime integers and
        the captured tensors. Raises InputError when something is not what the kernel was compiled for."""
        from .executables import is_positive
        from .prepare import call_values, plan_of
        from .problem import Problem

        problem = Problem(query, key, value, enable_gqa)
        kind = self.target.partition(":")[0]
        if kind != problem.device.type:
            raise InputError(
                "kernel: query", f"a tensor on a {kind} device, for {self.target}", problem.device
            )
        problem.check_mask(mask)
        bound, score = Mask.of(mask), ScoreMod.of(score_mod)
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
        softmax = Softmax.of(problem, sinks, prob_mod, dropout_p, dropout_seed)
        if _digest(bound, score, softmax) != made["structure"]:
            raise InputError(
                "kernel: mask, score_mod, prob_mod, sinks or dropout",
                f"the structure {made['text']}",
                repr(bound),
                "Compile another spec",
            )
        extra = tuple(made["extra"])
        values = call_values(problem, bound, score, scale, softmax)
        if made["positive"] and not is_positive(values["scale"], self.target):
            raise InputError(
                "kernel: scale", "a number above 0", values["scale"], "Compile with positive=False"
            )
        found = plan_of(self._executable, values, problem, extra)(values)
        return found if extra else found[0]

    def __repr__(self) -> str:
        names = ", ".join(launch.kernel for launch in self._executable.artifact.manifest.launches)
        return f"Kernel({names}; {self.target})"


def compile(spec: AttentionSpec, target: str = "cpu", schedule: Any = None) -> Kernel:
    """Compile an attention ahead of time; the result also answers `gossamer.attention` once loaded.

    target: "cpu" (this machine), "cpu:znver4", "cuda:sm_90", "hip:gfx942", ... schedule: one Schedule, or
    one a group, or their text, in place of the default. Raises InputError for an unknown target,
    BackendError."""
    if not isinstance(spec, AttentionSpec):
        raise InputError(
            "compile.spec", "an AttentionSpec", type(spec).__name__, "Write AttentionSpec(mask, qk_size=64)"
        )
    from dataclasses import replace

    from ..passes.pipeline import compile_spec
    from ..runtime.driver import Target, driver

    Target.parse(target)  # before the passes spend time on it
    schedule = given(schedule)
    if isinstance(schedule, Request):
        expected, fix = "a Schedule: nothing can be timed ahead of time", "Pass what gossamer.tune returns"
        raise InputError("compile.schedule", expected, repr(TUNE), fix)
    mask, score, softmax = Mask.of(spec.mask), ScoreMod.of(spec.score_mod), spec.softmax
    program = compile_spec(replace(spec.ir, target=target), schedule)
    results = {"lse": spec.return_lse, "max": spec.return_max, "column_sums": spec.return_column_sums}
    extra = {
        "sizes": list(spec.sizes[:3]),
        "contiguous": list(spec.contiguous),
        "positive": spec.positive,
        "extra": [name for name, asked in results.items() if asked],
        "structure": _digest(mask, score, softmax),
        "text": repr(mask),
    }
    return Kernel(driver().compile(program, target, quick_keys=[spec.quick_key(schedule)], extra=extra))


def load(path: str | os.PathLike[str]) -> Kernel:
    """Load a saved kernel; needs neither a C compiler nor the passes.

    Checksums, format and machine are verified before anything runs, but a binary is code: load only
    what you would also execute. Raises ArtifactError."""
    from ..runtime.driver import load as load_executable

    return Kernel(load_executable(path))


def _digest(mask: Mask, score: ScoreMod | None, softmax: Softmax) -> str:
    from ..runtime.cache import digest_of

    return digest_of(mask.key, None if score is None else score.key, softmax.key)

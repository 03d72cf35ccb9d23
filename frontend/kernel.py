"""Ahead-of-time use: `gossamer.compile(spec)` gives a Kernel that can be read, called, saved and loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from ..passes.spec import AttentionSpec
    from ..runtime.driver import Executable


class Kernel:
    """A compiled attention, or several kernels that make one.

    source: the generated source text. ir: the IR text it was made from. target: as asked for.
    Call it with the same tensors as `gossamer.attention`; values of the mask's integers and captured
    tensors come from `mask=`, a Mask of the same structure as the one it was compiled for."""

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
        return_lse: bool = False,
    ) -> Any:
        """Run on CPU tensors. Raises InputError when they are not what the kernel was compiled for."""
        from .attention import Problem, call_values, launch
        from .mask import Mask
        from .score import ScoreMod

        if not self.target.startswith("cpu"):
            raise UnsupportedError(
                f"a kernel for {self.target} runs from its binary; this machine calls CPU kernels only"
            )
        problem = Problem(query, key, value, enable_gqa)
        made_for = self._executable.artifact.manifest.extra
        got = {
            "dtype": problem.dtype,
            "qk_size": problem.qk_size,
            "v_size": problem.v_size,
            "return_lse": return_lse,
        }
        for name, wanted in made_for.items():
            if name in got and got[name] != wanted:
                raise InputError(f"kernel.{name}", repr(wanted), repr(got[name]), "Compile another spec")
        if any(
            need and not has
            for need, has in zip(made_for.get("contiguous", ()), problem.contiguous, strict=False)
        ):
            raise InputError(
                "kernel",
                "a last dimension of stride 1, as the spec says",
                "other strides",
                "Call .contiguous()",
            )
        score = None if score_mod is None else ScoreMod.of(score_mod)
        return launch(
            self._executable, call_values(problem, Mask.of(mask), score, scale), problem, return_lse
        )

    def __repr__(self) -> str:
        names = ", ".join(launch.kernel for launch in self._executable.artifact.manifest.launches)
        return f"Kernel({names}; {self.target})"


def compile(spec: AttentionSpec, target: str = "cpu", schedule: Any = None) -> Kernel:
    """Compile an attention ahead of time.

    spec: `gossamer.AttentionSpec`. target: "cpu" (this machine), "cpu:znver4", "cuda:sm_90",
    "hip:gfx942", ... schedule: in place of the default. Raises InputError for an unknown target."""
    from dataclasses import replace

    from ..passes.pipeline import compile_spec
    from ..runtime.driver import driver

    program = compile_spec(replace(spec, target=target), schedule)
    return Kernel(driver().compile(program, target))


def load(path: str | os.PathLike[str]) -> Kernel:
    """Load a saved kernel; needs neither a C compiler nor the passes.

    Checksums, format and machine are verified before anything runs, but a binary is code: load only
    what you would also execute. Raises ArtifactError."""
    from ..runtime.driver import load as load_executable

    return Kernel(load_executable(path))

"""From kernels to something callable, compiling only what no cache holds.

    structural key --index--> artifact key --cache--> Artifact --> Executable
         |                                               ^
         +-- miss: passes --> kernels --> backend -------+

The first arrow costs one dictionary look-up in a process that has been here, two small file reads
in one that has not, and the passes and a compiler only where nobody has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .artifact import Artifact
from .cache import Cache, Counts
from .compile import artifact_key, compile_kernels, host_digest, quick_digest
from .counting import COMPILATIONS, LOADS
from .executable import Executable
from .flight import SingleFlight
from .recent import Recent
from .target import Target

if TYPE_CHECKING:  # the IR brings sympy, which running a compiled kernel does not need
    from ..ir.kernel import Program

__all__ = [
    "Driver",
    "Executable",
    "compilations",
    "compile_kernels",
    "counts",
    "driver",
    "get_or_compile",
    "load",
    "loads",
    "reset",
]


_PLANS = 512


class Driver:
    """Compiled programs of this process over one cache. Safe to use from any thread."""

    def __init__(self, cache: Cache | None = None) -> None:
        self.cache = cache or Cache()
        self._ready: dict[Hashable, Executable] = {}
        self._by_artifact: dict[str, Executable] = {}
        self._installed: dict[str, Executable] = {}
        self._flights: SingleFlight[Executable] = SingleFlight()
        self.plans: Recent[Any] = Recent(_PLANS)  # the frontend's, which end with these executables

    def get_or_compile(
        self, quick_key: Hashable, make_program: Callable[[], Program], target: str = "cpu"
    ) -> Executable:
        """The executable of a structural key; make_program runs the passes and is called on a miss only.

        quick_key: nested tuples of text, numbers, booleans and None, which says everything that the
        kernels depend on besides the target. Raises InputError for another key or an unknown target.
        """
        executable = self._ready.get((quick_key, target))
        if executable is not None:
            return executable
        return self._flights.run(
            (quick_key, target), lambda: self._prepare(quick_key, make_program, Target.parse(target))
        )

    def compile(
        self,
        program: Program,
        target: str = "cpu",
        *,
        quick_keys: Iterable[Hashable] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> Executable:
        """The executable of a program that the passes have made, from the cache if it is there.

        quick_keys: the structural keys it answers, here and where its artifact is loaded. extra: JSON
        data of the caller's own for the artifact's manifest. Raises as `get_or_compile` does.
        """
        parsed = Target.parse(target)
        key, executable = self._compile(program, parsed)
        digests = [quick_digest(quick_key, parsed) for quick_key in quick_keys]
        for digest in digests:
            self.cache.link(host_digest(digest, parsed), key)
        artifact = executable.artifact.amended(digests, extra or {})
        return executable if artifact is executable.artifact else Executable(artifact)

    def install(self, artifact: Artifact) -> Executable:
        """Let a loaded artifact answer the structural keys it was compiled for, without any compiler."""
        executable = Executable(artifact)
        self._installed |= dict.fromkeys(artifact.manifest.quick_keys, executable)
        return executable

    def _prepare(
        self, quick_key: Hashable, make_program: Callable[[], Program], target: Target
    ) -> Executable:
        digest = quick_digest(quick_key, target)
        executable = self._installed.get(digest) or self._find(digest, target)
        if executable is None:
            # Held over the passes too: of many processes, one runs them.
            link = host_digest(digest, target)
            with self.cache.exclusive(link):
                executable = self._find(digest, target)
                if executable is None:
                    key, executable = self._compile(make_program(), target, (digest,))
                    self.cache.link(link, key)
        self._ready[quick_key, str(target)] = executable
        return executable

    def _find(self, digest: str, target: Target) -> Executable | None:
        found = self.cache.find(host_digest(digest, target))
        return None if found is None else self._executable(*found)

    def _compile(
        self, program: Program, target: Target, quick_keys: tuple[str, ...] = ()
    ) -> tuple[str, Executable]:
        key = artifact_key(program, target)
        artifact = self.cache.get_or_build(
            key,
            lambda: compile_kernels(
                program.kernels,
                target,
                ir_text=program.text,
                intermediates=program.intermediates,
                checks=program.checks,
                quick_keys=quick_keys,
            ),
        )
        return key, self._executable(key, artifact)

    def _executable(self, key: str, artifact: Artifact) -> Executable:
        return self._by_artifact.setdefault(key, Executable(artifact))


# ---- the driver of this process ----

_driver: Driver | None = None


def driver() -> Driver:
    """The driver that the public functions share; its cache folder is decided at the first use."""
    global _driver
    if _driver is None:
        _driver = Driver()
    return _driver


def reset() -> None:
    """Forget everything held in memory (a test, or after GOSSAMER_CACHE_DIR has changed); disk stays."""
    global _driver
    _driver = None


def get_or_compile(
    quick_key: Hashable, make_program: Callable[[], Program], target: str = "cpu"
) -> Executable:
    """`Driver.get_or_compile` of this process's driver."""
    return driver().get_or_compile(quick_key, make_program, target)


def load(path: str | os.PathLike[str]) -> Executable:
    """Load a saved artifact and let it answer the structural keys it was compiled for.

    Verified before anything of it runs, but a binary is code: load only what you trust. Raises
    ArtifactError.
    """
    return driver().install(Artifact.load(path))


def compilations() -> int:
    """Kernels that this process has given to a compiler."""
    return COMPILATIONS.value


def loads() -> int:
    """Binaries that this process has loaded."""
    return LOADS.value


def counts() -> Counts:
    """Hits and misses of this process's cache."""
    return driver().cache.counts

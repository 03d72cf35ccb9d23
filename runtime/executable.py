"""A compiled program that can be called."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from time import perf_counter
from typing import Any

from ..ir.errors import InputError
from .artifact import Artifact, check_host
from .backends import BACKENDS, Runner
from .counting import LOADS
from .formula import Formula, parse_formula
from .knobs import LOG_TIMINGS, NUM_THREADS, log
from .manifest import Argument

Allocate = Callable[[tuple[int, ...], str], Any]  # (shape, dtype) -> a tensor of the caller's framework


@dataclass(frozen=True)
class _Step:
    run: Runner
    pick: Callable[[Mapping[str, Any]], Sequence[Any]]


class Executable:
    """Runs an artifact's kernels in order; call it from any thread.

    Binaries are loaded on the first call. Raises ArtifactError there if this machine cannot run them.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        manifest = artifact.manifest
        self.inputs = _inputs(artifact)
        self._loading = threading.Lock()
        self._steps: tuple[_Step, ...] = ()
        self._shapes: dict[str, tuple[str, tuple[Formula, ...]]] = {
            t.name: (t.dtype, tuple(parse_formula(e) for e in t.shape)) for t in manifest.intermediates
        }
        self._checks = tuple((parse_formula(check.condition), check) for check in manifest.checks)

    def __call__(
        self, values: Mapping[str, Any], *, allocate: Allocate | None = None, threads: int | None = None
    ) -> None:
        """Run every kernel. values: tensors (outputs included) and scalars by name, as in `inputs`.

        allocate: makes the intermediates, where there are any. threads: of a CPU kernel, else
        GOSSAMER_NUM_THREADS. Raises InputError when a value is missing or a check of the program fails.
        """
        steps = self._steps or self._load()
        if self._checks or self._shapes:
            sizes = self._sizes(values)
            self._check(sizes)
            values = {**values, **self._make_intermediates(sizes, allocate)}
        threads = threads or NUM_THREADS.get()
        for step in steps:
            try:
                arguments = step.pick(values)
            except KeyError:
                raise self._incomplete(values) from None
            step.run(arguments, threads)

    @property
    def ir(self) -> str:
        """IR text of the program and its kernels."""
        return self.artifact.ir

    @property
    def source(self) -> str:
        """Generated source of the kernels."""
        return self.artifact.source

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to one file if path ends in `.gossamer`, else to a folder; `load` reads either back."""
        return self.artifact.save(path)

    def _load(self) -> tuple[_Step, ...]:
        with self._loading:
            if not self._steps:
                start = perf_counter()
                manifest = self.artifact.manifest
                check_host(manifest.requires)
                backend = BACKENDS[manifest.backend]
                steps = []
                for launch in manifest.launches:
                    run = backend.load(launch, self.artifact.parts[launch.binary])
                    LOADS.add()
                    steps.append(_Step(run, _picker([a.source for a in launch.arguments])))
                self._steps = tuple(steps)
                log(LOG_TIMINGS, f"load: {len(steps)} kernels in {(perf_counter() - start) * 1e3:.1f} ms")
        return self._steps

    def _check(self, sizes: Mapping[str, int]) -> None:
        for fails, check in self._checks:
            if fails(sizes):
                where, _, expected = check.message.partition(": expected ")
                expected = expected or f"not {check.condition}"
                named = [name for name in sizes if re.search(rf"\b{name}\b", expected)]
                got = ", ".join(f"{name} = {sizes[name]}" for name in named)
                raise InputError(where, _extents(expected), _extents(got))

    def _make_intermediates(self, sizes: Mapping[str, int], allocate: Allocate | None) -> dict[str, Any]:
        if not self._shapes:
            return {}
        if allocate is None:
            names = ", ".join(self._shapes)
            raise InputError("allocate", f"a function (shape, dtype) -> tensor for {names}", None)
        return {
            name: allocate(tuple(size(sizes) for size in shape), dtype)
            for name, (dtype, shape) in self._shapes.items()
        }

    def _sizes(self, values: Mapping[str, Any]) -> dict[str, int]:
        """The integers of a call: scalars by name, and dimensions by the names the tensors give them."""
        sizes: dict[str, int] = {}
        for name, argument in self.inputs.items():
            if name not in values:
                raise self._incomplete(values)
            value = values[name]
            if argument.kind == "tensor":
                named = zip(argument.shape, value.shape, strict=True)
                sizes |= {dimension: int(size) for dimension, size in named if isinstance(dimension, str)}
            elif isinstance(value, int):
                sizes[name] = value
        return sizes

    def _incomplete(self, values: Mapping[str, Any]) -> InputError:
        missing = ", ".join(name for name in self.inputs if name not in values)
        return InputError(
            f"argument {missing}", f"values for {', '.join(self.inputs)}", f"only {', '.join(values)}"
        )


def _extents(text: str) -> str:
    """Extents of captured tensors as people write them: c0_1 is c0.shape[1]."""
    return re.sub(r"\b([ct]\d+)_(\d+)\b", r"\1.shape[\2]", text)


def _inputs(artifact: Artifact) -> dict[str, Argument]:
    """What a call passes, by name, in order of first use."""
    made = {intermediate.name for intermediate in artifact.manifest.intermediates}
    inputs: dict[str, Argument] = {}
    for launch in artifact.manifest.launches:
        for argument in launch.arguments:
            if argument.source not in made:
                inputs.setdefault(argument.source, argument)
    return inputs


def _picker(names: list[str]) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    if len(names) == 1:
        return lambda values: (values[names[0]],)
    return itemgetter(*names) if names else lambda values: ()

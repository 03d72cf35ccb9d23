"""A compiled program that can be called."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from time import perf_counter
from typing import Any

from ..ir.errors import InputError
from .artifact import Artifact, check_host
from .backends import BACKENDS, Loaded, Runner
from .counting import LOADS
from .formula import Formula, parse_formula
from .knobs import LOG_TIMINGS, log
from .manifest import BYTES, Argument
from .recent import Recent
from .target import Target

_PLANS = 64

Allocate = Callable[[tuple[int, ...], str], Any]  # (shape, dtype) -> a contiguous tensor of the caller's
Made = tuple[str, tuple[int, ...], str]  # name, shape, dtype

Pick = Callable[[Mapping[str, Any]], Sequence[Any]]


@dataclass(frozen=True)
class Bound:
    """A program whose sizes, strides and scalars are settled: only memory differs from call to call."""

    steps: tuple[tuple[Runner, Pick], ...]
    intermediates: tuple[Made, ...]
    allocate: Allocate | None
    lives: tuple[tuple[tuple[Made, ...], tuple[str, ...]], ...] = ()

    def __call__(self, tensors: Mapping[str, Any], threads: int | None = None) -> None:
        """Run every kernel. tensors: inputs and outputs by name, of the sizes and strides that were bound.

        Intermediates live from the first kernel that takes them to the last one: what is freed then is there
        for those that follow. threads: of a CPU kernel, else GOSSAMER_NUM_THREADS."""
        if not self.intermediates:
            for run, pick in self.steps:
                run(pick(tensors), threads)
            return
        assert self.allocate is not None
        values = {**tensors}
        for (run, pick), (first, last) in zip(self.steps, self.lives, strict=True):
            for name, shape, dtype in first:
                values[name] = self.allocate(shape, dtype)
            run(pick(values), threads)
            for name in last:
                del values[name]


@dataclass(frozen=True)
class Contiguous:
    """Stands in `Executable.bind` for a contiguous tensor that is yet to be allocated.

    step: its rows take a multiple of so many elements."""

    shape: tuple[int, ...]
    step: int = 1

    def stride(self, dimension: int | None = None) -> Any:
        return self._strides if dimension is None else self._strides[dimension]

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.allocated[d + 1 :]) for d in range(len(self.shape)))

    @property
    def allocated(self) -> tuple[int, ...]:
        """The shape whose memory it takes."""
        return (*self.shape[:-1], -(-self.shape[-1] // self.step) * self.step) if self.shape else ()

    def data_ptr(self) -> int:
        return 0


class Executable:
    """Runs an artifact's kernels in order; call it from any thread.

    Binaries are loaded on the first call. Raises ArtifactError there if this machine cannot run them.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        manifest = artifact.manifest
        self.inputs = _inputs(artifact)
        self.plans: Recent[Any] = Recent(_PLANS)  # the frontend's, of this executable alone
        self._loading = threading.Lock()
        self._kernels: tuple[tuple[Loaded, Pick], ...] = ()
        self._shapes: dict[str, tuple[str, tuple[Formula, ...]]] = {
            t.name: (t.dtype, tuple(parse_formula(e) for e in t.shape)) for t in manifest.intermediates
        }
        aligns = [(a.source, a.align) for launch in manifest.launches for a in launch.arguments]
        self._steps: dict[str, int] = {
            t.name: max(
                1, max((align for name, align in aligns if name == t.name), default=1) // BYTES[t.dtype]
            )
            for t in manifest.intermediates
        }
        self._checks = tuple((parse_formula(check.condition), check) for check in manifest.checks)

    def __call__(
        self, values: Mapping[str, Any], *, allocate: Allocate | None = None, threads: int | None = None
    ) -> None:
        """Run every kernel. values: tensors (outputs included) and scalars by name, as in `inputs`; on a CPU
        tensors may be NumPy's arrays.

        allocate: makes the intermediates, where there are any. threads: of a CPU kernel, else
        GOSSAMER_NUM_THREADS. Raises InputError when a value is missing or a check of the program fails.
        """
        values = {name: self._taken(name, value) for name, value in values.items()}
        self.bind(values, allocate=allocate)(values, threads)

    def _taken(self, name: str, value: Any) -> Any:
        """A value as kernels take it: an array by its memory."""
        if not hasattr(value, "__array_interface__") or hasattr(value, "data_ptr"):
            return value
        from .strided import Strided

        target = self.artifact.manifest.target
        if Target.parse(target).kind != "cpu":
            raise InputError(f"argument {name}", f"memory of {target}", "a NumPy array")
        return Strided.of(value)

    def bind(self, values: Mapping[str, Any], *, allocate: Allocate | None = None) -> Bound:
        """The program for calls whose tensors have the sizes and strides of these, with these scalars.

        Arguments and errors are those of a call; nothing runs. Outputs may be given as `Contiguous`."""
        kernels = self._kernels or self._load()
        sizes, intermediates = self.settle(values)
        if intermediates and allocate is None:
            names = ", ".join(self._shapes)
            raise InputError("allocate", f"a function (shape, dtype) -> tensor for {names}", None)
        waiting = {name: Contiguous(shape, self._steps[name]) for name, shape, _ in intermediates}
        steps = tuple((kernel.bind({**values, **waiting}, sizes), pick) for kernel, pick in kernels)
        made = tuple((name, waiting[name].allocated, dtype) for name, _, dtype in intermediates)
        return Bound(steps, made, allocate, self._lives(made))

    def settle(self, values: Mapping[str, Any]) -> tuple[dict[str, int], tuple[Made, ...]]:
        """The integers of a call by name, and the intermediates it takes: name, shape, dtype of each.

        Raises InputError when a value is missing or a check of the program fails."""
        sizes = self._sizes(values)
        self._check(sizes)
        made = self._shapes.items()
        return sizes, tuple((n, tuple(size(sizes) for size in shape), dtype) for n, (dtype, shape) in made)

    def _lives(self, made: tuple[Made, ...]) -> tuple[tuple[tuple[Made, ...], tuple[str, ...]], ...]:
        """Of each launch, the intermediates that no earlier one takes, and those that no later one does."""
        taken = [{a.source for a in launch.arguments} for launch in self.artifact.manifest.launches]
        found = []
        for number, names in enumerate(taken):
            before, after = set().union(*taken[:number]), set().union(*taken[number + 1 :])
            here = [one for one in made if one[0] in names]
            first = tuple(one for one in here if one[0] not in before)
            found.append((first, tuple(name for name, *_ in here if name not in after)))
        return tuple(found)

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

    def _load(self) -> tuple[tuple[Loaded, Pick], ...]:
        with self._loading:
            if not self._kernels:
                start = perf_counter()
                manifest = self.artifact.manifest
                check_host(manifest.requires)
                backend = BACKENDS[manifest.backend]
                target = Target.parse(manifest.target)
                kernels = []
                for launch in manifest.launches:
                    kernel = backend.load(launch, self.artifact.parts[launch.binary], target)
                    LOADS.add()
                    kernels.append(
                        (kernel, _picker([a.source for a in launch.arguments if a.kind == "tensor"]))
                    )
                self._kernels = tuple(kernels)
                log(LOG_TIMINGS, f"load: {len(kernels)} kernels in {(perf_counter() - start) * 1e3:.1f} ms")
        return self._kernels

    def _check(self, sizes: Mapping[str, int]) -> None:
        for fails, check in self._checks:
            if fails(sizes):
                where, _, expected = check.message.partition(": expected ")
                expected = expected or f"not {check.condition}"
                named = [name for name in sizes if re.search(rf"\b{name}\b", expected)]
                got = ", ".join(f"{name} = {sizes[name]}" for name in named)
                raise InputError(where, _extents(expected), _extents(got))

    def _sizes(self, values: Mapping[str, Any]) -> dict[str, int]:
        """The integers of a call: scalars by name, and dimensions by the names the tensors give them."""
        sizes: dict[str, int] = {}
        for name, argument in self.inputs.items():
            if name not in values:
                raise self._incomplete(values)
            value = values[name]
            if argument.kind == "tensor":
                if len(value.shape) != len(argument.shape):
                    expected = f"{len(argument.shape)} dimensions ({', '.join(map(str, argument.shape))})"
                    raise InputError(f"argument {name}", expected, tuple(value.shape))
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
    return re.sub(r"\b([ctw]\d+)_(\d+)\b", r"\1.shape[\2]", text)


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

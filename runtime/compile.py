"""Kernels to an artifact: emit, build, and write down how to launch what comes out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..ir.errors import InputError
from . import host
from .artifact import PROGRAM, Artifact
from .backends import BACKENDS, Backend, Compiled
from .cache import digest_of
from .counting import COMPILATIONS
from .knobs import LOG_SOURCE, LOG_TIMINGS, log
from .manifest import FORMAT, Argument, Check, Intermediate, Launch, Manifest, assembly_part
from .target import Target
from .versions import versions

if TYPE_CHECKING:  # the IR brings sympy, which running a compiled kernel does not need
    from ..ir.kernel import Kernel, Program, Scalar, Tensor


def compile_kernels(
    kernels: Sequence[Kernel],
    target: str | Target,
    *,
    ir_text: str = "",
    intermediates: Sequence[Tensor] = (),
    checks: Sequence[tuple[str, str]] = (),
    quick_keys: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> Artifact:
    """Emit and build kernels, in launch order, into an artifact; uses no cache.

    ir_text, intermediates, checks: as in `ir.kernel.Program`. extra: the caller's own JSON data.
    Raises InputError for an unknown target, BackendError when a compiler fails.
    """
    from ..ir.kernel_text import to_text

    target = target if isinstance(target, Target) else Target.parse(target)
    backend = BACKENDS[target.backend]
    parts: dict[str, bytes] = {PROGRAM: ir_text.encode()} if ir_text else {}
    launches = []
    for number, (kernel, built) in enumerate(zip(kernels, _build(kernels, backend, target), strict=True)):
        log(LOG_SOURCE, built.source)
        launch = _launch(kernel, built, f"kernels/{number}_{kernel.name}", backend.suffix)
        parts |= {
            launch.ir: to_text(kernel).encode(),
            launch.source: built.source.encode(),
            launch.binary: built.binary,
        }
        if built.assembly:
            parts[assembly_part(launch)] = built.assembly.encode()
        launches.append(launch)
    manifest = Manifest(
        format=FORMAT,
        gossamer=__version__,
        target=str(target),
        backend=target.backend,
        versions=backend.versions(),
        requires=backend.requirements(target),
        launches=tuple(launches),
        intermediates=tuple(Intermediate(i.name, i.dtype, tuple(map(_text, i.shape))) for i in intermediates),
        checks=tuple(Check(condition, message) for condition, message in checks),
        quick_keys=tuple(quick_keys),
        extra=extra or {},
    )
    return Artifact.of(manifest, parts)


def _build(kernels: Sequence[Kernel], backend: Backend, target: Target) -> list[Compiled]:
    """Every kernel compiled; side by side where the backend's compiler leaves the interpreter lock."""

    def one(kernel: Kernel) -> Compiled:
        start = perf_counter()
        built = backend.compile(kernel, target)
        COMPILATIONS.add()
        log(LOG_TIMINGS, f"compile: {kernel.name} for {target} in {(perf_counter() - start) * 1e3:.0f} ms")
        return built

    if len(kernels) < 2 or not backend.concurrent:
        return [one(kernel) for kernel in kernels]
    with ThreadPoolExecutor(len(kernels)) as pool:
        return list(pool.map(one, kernels))


def quick_digest(quick_key: Hashable, target: Target) -> str:
    """The digest of a structural key, the same in every process, on every machine and for every version."""
    try:
        return digest_of(quick_key, str(target))
    except TypeError as error:
        expected = "nested tuples of text, numbers, booleans and None"
        raise InputError("quick key", expected, f"{quick_key!r} ({error})") from None


def artifact_key(program: Program, target: Target) -> str:
    """sha256 of all that an artifact is made from: IR texts, target (this machine for 'cpu'), versions."""
    from ..ir.kernel_text import to_text

    return host_digest(
        digest_of(program.text, [to_text(kernel) for kernel in program.kernels], str(target)), target
    )


def host_digest(digest: str, target: Target) -> str:
    """A digest that also says who compiles it and, for a CPU, on which machine."""
    here: tuple[Any, ...] = (host.system(), host.machine()) if target.kind == "cpu" else ()
    if target == Target("cpu"):
        here += (sorted(host.features() or ()),)
    return digest_of(digest, here, versions(target.backend))


def _launch(kernel: Kernel, built: Compiled, stem: str, suffix: str) -> Launch:
    return Launch(
        kernel=kernel.name,
        entry=built.entry,
        arguments=tuple(_argument(a) for a in kernel.args),
        grid=tuple(_text(dimension.extent) for dimension in kernel.grid),
        workspace=built.workspace,
        ir=f"{stem}.ir",
        source=f"{stem}.py",
        binary=f"{stem}.{suffix}",
        details=built.details,
    )


def _argument(argument: Tensor | Scalar) -> Argument:
    from ..ir.kernel import Tensor

    name, dtype = argument.name, argument.dtype
    if isinstance(argument, Tensor):
        return Argument(
            name, name, "tensor", dtype, argument.shape, argument.role, argument.unit, argument.align
        )
    return Argument(name, name, "scalar", dtype)


def _text(expr: Any) -> str:
    if isinstance(expr, int | str):
        return str(expr)
    from ..ir.expr import to_text

    return to_text(expr)

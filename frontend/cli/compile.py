"""``gossamer compile``: kernels ahead of time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...ir.errors import InputError
from .options import TARGETS, Debug, MaskText, dtype_of

if TYPE_CHECKING:
    from ...runtime.artifact import Artifact
    from ...runtime.manifest import Launch

SUFFIX = ".gossamer"
_NAMES = {"shared": "shared memory"}


def compile_mask(
    mask: MaskText,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A folder, or a file whose name ends in .gossamer.",
            show_default=False,
        ),
    ],
    target: Annotated[
        list[str], typer.Option("--target", "-t", metavar="TARGET", help=f"{TARGETS} Repeat for several.")
    ] = ["cpu"],  # noqa: B006
    dtype: Annotated[
        list[str], typer.Option("--dtype", metavar="DTYPE", help="f16, bf16, f32 or f64. Repeat for several.")
    ] = ["f32"],  # noqa: B006
    dim: Annotated[
        list[int], typer.Option("--dim", metavar="N", min=1, max=1024, help="Head size. Repeat for several.")
    ] = [64],  # noqa: B006
    v_dim: Annotated[
        int | None,
        typer.Option(
            "--v-dim", metavar="N", min=1, max=1024, help="Head size of values.", show_default="as --dim"
        ),
    ] = None,
    lse: Annotated[
        bool, typer.Option("--lse", help="Also return the log of the sum of exponentials.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compile kernels for a mask ahead of time, for this machine or another.

    Lengths, batch, heads and the integers of the mask (a window's width) are
    arguments of the kernel: one kernel serves all. One artifact is written for
    each target, dtype and head size: to PATH itself when there is one, else to
    files in the folder PATH. An artifact holds a manifest, IR, source, binaries
    and checksums, and gossamer.load(PATH) runs it with no compiler installed.

    \b
    Examples:
      gossamer compile "sliding_window(128)" -o window.gossamer
      gossamer compile causal -t cpu:x86-64-v3 --dtype f16 -o causal/
      gossamer compile "longformer(128, 16)" -t cuda:sm_80 -t cuda:sm_90 \\
          --dtype bf16 --dim 128 -o kernels/

    GPU binaries (cubin, hsaco) need no GPU to be made. """
    from ...runtime.target import Target
    from ..kernel import AttentionSpec
    from ..kernel import compile as compile_spec
    from ..pattern_text import parse_mask
    from . import output as show

    dtypes = [dtype_of(d) for d in dtype]
    for name in target:
        Target.parse(name)
    builds = list(itertools.product(dict.fromkeys(target), dict.fromkeys(dtypes), dict.fromkeys(dim)))
    if len(builds) > 1 and output.suffix == SUFFIX:
        raise InputError("--output", f"a folder for {len(builds)} artifacts", str(output))
    bound = parse_mask(mask)
    written: list[tuple[Path, Artifact]] = []
    with show.steps("compiling", len(builds)) as step:
        for name, kind, size in builds:
            path = output if len(builds) == 1 else output / f"{stem(name, kind, size)}{SUFFIX}"
            step(f"compiling {kind}, head size {size}, for {name}")
            spec = AttentionSpec(bound, None, kind, size, v_dim, return_lse=lse)
            kernel = compile_spec(spec, name)
            written.append((kernel.save(path), load_written(path)))
    for path, artifact in written:
        print_manifest(path, artifact)
    show.text(f"\nTo run one: gossamer.load({str(written[0][0])!r})")


def stem(target: str, dtype: str, dim: int) -> str:
    """The file name of one of several artifacts.

    >>> stem("cuda:sm_90", "bf16", 128)
    'attention_bf16_128_cuda-sm_90'
    """
    return f"attention_{dtype}_{dim}_{target.replace(':', '-')}"


def load_written(path: Path) -> Artifact:
    """Read back what was written, so that what is reported is what is there."""
    from ...runtime.artifact import Artifact

    return Artifact.load(path, foreign=True)


def print_manifest(path: Path, artifact: Artifact) -> None:
    """A summary of an artifact."""
    from . import output as show

    manifest = artifact.manifest
    total = sum(len(data) for data in artifact.parts.values())
    show.heading(str(path))
    made = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    show.text(f"target    {manifest.target} ({manifest.backend}), made with {made}")
    needs = [manifest.requires.system, manifest.requires.machine, *manifest.requires.features]
    if any(needs):
        show.text(f"needs     {' '.join(filter(None, needs))}")
    show.text(f"size      {show.size(total)} in {len(artifact.parts)} parts")
    table = show.table("kernel", "binary", "grid", "details", right=(1,))
    for launch in manifest.launches:
        binary = show.size(len(artifact.parts[launch.binary]))
        table.add_row(launch.kernel, binary, ", ".join(launch.grid), _details(launch))
    show.console().print(table)


def _details(launch: Launch) -> str:
    own = [f"{_NAMES.get(name, name)} {value}" for name, value in launch.details.items()]
    return ", ".join([*([f"workspace {launch.workspace} B"] if launch.workspace else []), *own])

"""The command line ``gossamer``: its commands, and what happens to errors.

Each command is one file of this folder, which imports what it needs when it runs: `--help` is
quick. Errors that gossamer raises on purpose are one line and exit code 2; `--debug` shows where they
come from.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ... import __version__
from ...ir.errors import GossamerError
from .bench import bench
from .cache import app as cache
from .compile import compile_mask
from .doctor import doctor
from .explain import explain
from .options import Debug, debugging
from .plot import plot_mask


class Commands(TyperGroup):
    """The commands, with errors and warnings said in one line."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except (GossamerError, OSError) as error:
                if debugging(ctx) or isinstance(error, BrokenPipeError):
                    raise
                typer.echo(f"error: {_line(error)}", err=True)
                raise typer.Exit(2) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, GossamerError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


HELP = """A compiler for sparse attention kernels: say which pairs attend, get one fast kernel.

Start with

\b
  gossamer doctor                          what works on this machine
  gossamer explain "sliding_window(128)"   what the compiler makes of a mask
  gossamer plot "longformer(64, 16)" -o mask.png

A mask is a pattern of gossamer.masks, or several joined by & | ~ and
parentheses; IR text; a function of a Python file; or a 0/1 matrix:

\b
  "sliding_window(128) | global_tokens(64)"
  "neighborhood((32, 64), (13, 13), edges='clip')"
  "mask(p0=128) { k <= q and q - k <= p0 }"
  my_masks.py:document_mask
  matrix.npy
"""

app = typer.Typer(
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gossamer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Debug = False,
) -> None:
    pass


app.command("explain")(explain)
app.command("compile")(compile_mask)
app.command("plot")(plot_mask)
app.command("bench")(bench)
app.add_typer(cache, name="cache")
app.command("doctor")(doctor)


def main() -> None:
    try:
        app()
    except BrokenPipeError:  # the reader of a pipe has gone: `gossamer explain ... | head`
        sys.stderr.close()
        sys.exit(141)

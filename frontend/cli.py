"""The command line ``gossamer``."""

from typing import Annotated

import typer

from .. import __version__

app = typer.Typer(no_args_is_help=True, help="A compiler for sparse attention and MoE kernels.")


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
) -> None:
    pass


def main() -> None:
    app()

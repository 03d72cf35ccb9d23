"""``gossamer cache``: the compiled kernels on disk."""

from __future__ import annotations

import typer

from .options import Debug

app = typer.Typer(
    no_args_is_help=True,
    help="Look at, check or empty the cache of compiled kernels on disk.\n\n"
    "It lies in the folder GOSSAMER_CACHE_DIR and holds at most GOSSAMER_CACHE_SIZE bytes (1G); the kernels "
    "least recently used go first. Emptying it is always safe: kernels are compiled again when needed.",
)


@app.command()
def info(debug: Debug = False) -> None:
    """Where the cache is and how full.

    \b
    Example:
      gossamer cache info
    """
    from ...runtime import cache
    from . import output as show

    found = cache.info()
    show.text(f"folder     {found.folder}")
    show.text(f"artifacts  {found.artifacts}")
    share = f", {found.size / found.limit:.1%}" if found.limit else ""
    show.text(f"size       {show.size(found.size)} of {show.size(found.limit)}{share}")


@app.command("list")
def list_kernels(debug: Debug = False) -> None:
    """The kernels in the cache, most recently used first.

    \b
    Example:
      gossamer cache list
    """
    import time

    from ...runtime import cache
    from . import output as show

    with show.working("reading the cache"):
        found = cache.list_artifacts()
    if not found:
        show.text("the cache is empty")
        return
    table = show.table("key", "target", "size", "last used", "kernels", right=(2,))
    for item in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.entry.used))
        table.add_row(
            item.entry.key[:12], item.target, show.size(item.entry.size), used, ", ".join(item.kernels)
        )
    show.console().print(table)


@app.command()
def clear(debug: Debug = False) -> None:
    """Remove every kernel from the cache.

    \b
    Example:
      gossamer cache clear
    """
    from ...runtime import cache
    from . import output as show

    with show.working("emptying the cache"):
        removed = cache.clear()
    show.text(f"removed {removed} artifact{'s' * (removed != 1)}")


@app.command()
def verify(debug: Debug = False) -> None:
    """Read every kernel, check its checksum, and remove what is damaged or left over.

    Exit code 1 when something had to be removed.

    \b
    Example:
      gossamer cache verify
    """
    from ...runtime import cache
    from . import output as show

    with show.working("checking the cache"):
        intact, removed = cache.verify()
    show.text(f"{intact} intact, {removed} removed")
    if removed:
        raise typer.Exit(1)

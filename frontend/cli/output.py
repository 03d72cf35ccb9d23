"""What commands print: headings, tables, progress, numbers for people."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

WIDTH = 110  # columns where the output is no terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console() -> Console:
    """Standard output. Made anew each time, so that redirections count."""
    from rich.console import Console

    out = Console(highlight=False, soft_wrap=True)
    if not out.is_terminal:
        out.width = max(out.width, WIDTH)
    return out


@cache
def _to_errors() -> Any:
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def working(what: str) -> Iterator[Any]:
    """Show a spinner and the time while something of unknown length runs; nothing where nobody looks.

    Yields a function that changes the text."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_to_errors(), transient=True, disable=not _watched()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda text: progress.update(task, description=text)


@contextmanager
def steps(what: str, total: int) -> Iterator[Any]:
    """Show a progress bar over a known number of steps. Yields step(description), called before each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_to_errors(), transient=True, disable=not _watched()) as progress:
        task = progress.add_task(what, total=total)
        started = 0

        def step(description: str) -> None:
            nonlocal started
            progress.update(task, description=description, completed=started)
            started += 1

        yield step


def _watched() -> bool:
    return bool(_to_errors().is_terminal) and "CI" not in os.environ


def heading(text: str) -> None:
    out = console()
    out.print()
    out.rule(f"[bold]{text}", align="left", style="dim")


def text(body: str) -> None:
    """Print text as it is: no markup, no wrapping."""
    console().print(body, markup=False)


def code(source: str, language: str) -> None:
    """Print source text, coloured on a terminal and as it is elsewhere."""
    from rich.syntax import Syntax

    out = console()
    if out.is_terminal:
        out.print(Syntax(source, language, background_color="default"))
    else:
        out.print(source, markup=False)


def table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    """An empty table; the columns at the positions `right` are aligned to the right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i in right else "left", overflow="fold")
    return made


def seconds(value: float) -> str:
    """A duration with three digits and a unit.

    >>> seconds(0.00123), seconds(2.5e-7), seconds(12)
    ('1.23 ms', '0.25 µs', '12 s')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def size(count: float) -> str:
    """A number of bytes.

    >>> size(512), size(3 << 20)
    ('512 B', '3.0 MiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"

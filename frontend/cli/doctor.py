"""``gossamer doctor``: what works on this machine."""

from __future__ import annotations

import typer

from .options import Debug

_STYLES = {"ok": "green", "missing": "yellow", "broken": "red"}


def doctor(debug: Debug = False) -> None:
    """Check what works on this machine, and say what to install where something does not.

    Backends are tried for real: a small attention is compiled and run on the
    CPU, and one is compiled for a GPU (none is needed). Exit code 0 when the
    default backend works, 1 when it does not; parts that are optional and
    absent do no harm.

    \b
    Example:
      gossamer doctor
    """
    from ..doctor import BROKEN, MISSING, OK, checks
    from . import output as show

    todo = list(checks())
    found = []
    with show.steps("checking", len(todo)) as step:
        for check in todo:
            step(f"checking {check.name}")
            found.append(check.run(check.name))
    table = show.table("", "", "")
    for finding in found:
        style = _STYLES[finding.status]
        detail = finding.detail.replace("[", r"\[")
        table.add_row(finding.name, f"[{style}]{finding.status}", detail)
    show.console().print(table)
    fixes = [f for f in found if f.fix and f.status in (MISSING, BROKEN)]
    for finding in fixes:
        show.text(f"{finding.name}: {finding.fix}")
    failed = [c.name for c, f in zip(todo, found, strict=True) if c.default and f.status != OK]
    if failed:
        show.text(f"\nthe default backend does not work: {', '.join(failed)}")
        raise typer.Exit(1)
    show.text(("\n" if fixes else "") + "the default backend works: gossamer.attention runs on this CPU")

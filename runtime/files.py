"""Files written whole: a reader sees the old content or the new, never a part of either."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".tmp-"  # how the names of files in the making begin


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name, flush it to the disk and rename it; on OSError nothing is left.

    Makes the folder where it is missing. The file gets the permissions that the umask leaves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{os.urandom(8).hex()}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise

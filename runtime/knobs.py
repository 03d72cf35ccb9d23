"""The environment variables gossamer reads: all of them, typed, in one place.

`docs/environment.md` describes each; a test compares it with this file. A variable is read when it
is needed, so a program may set it at any time before the first kernel. An empty value counts as unset.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from ..ir.errors import InputError

T = TypeVar("T")


class Knob(Generic[T]):
    """One variable: `get()` is its value, parsed, or the default. Raises InputError on a bad value."""

    def __init__(self, name: str, parse: Callable[[str], T], default: Callable[[], T], expected: str) -> None:
        self.name, self.expected = name, expected
        self._parse, self._default = parse, default
        self._seen: tuple[str, T] | None = None

    def get(self) -> T:
        text = os.environ.get(self.name)
        if not text:
            return self._default()
        if self._seen is not None and self._seen[0] == text:
            return self._seen[1]
        try:
            value = self._parse(text)
        except ValueError:
            fix = f"Set it to {self.expected}, or unset it."
            raise InputError(f"environment variable {self.name}", self.expected, repr(text), fix) from None
        self._seen = text, value
        return value


def _integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < lowest or (highest is not None and value > highest):
            raise ValueError(text)
        return value

    return parse


def _bytes(text: str) -> int:
    """'65536', '64K', '512M' or '2G' as a number of bytes."""
    shift = {"K": 10, "M": 20, "G": 30}.get(text[-1].upper(), 0)
    return _integer(0)(text[:-1] if shift else text) << shift


def _user_cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("gossamer", appauthor=False))


def _own_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


CACHE_DIR: Knob[Path] = Knob(
    "GOSSAMER_CACHE_DIR", lambda text: Path(text).expanduser().absolute(), _user_cache, "a folder"
)
CACHE_SIZE: Knob[int] = Knob(
    "GOSSAMER_CACHE_SIZE", _bytes, lambda: 1 << 30, "a number of bytes such as 65536, 512M or 2G"
)
NUM_THREADS: Knob[int] = Knob("GOSSAMER_NUM_THREADS", _integer(1), _own_cores, "an integer of at least 1")
LOG: Knob[int] = Knob("GOSSAMER_LOG", _integer(0, 4), lambda: 0, "an integer from 0 to 4")
WORKSPACE: Knob[int] = Knob(
    "GOSSAMER_WORKSPACE", _bytes, lambda: 2 << 30, "a number of bytes such as 65536, 512M or 2G"
)

KNOBS: tuple[Knob, ...] = (CACHE_DIR, CACHE_SIZE, NUM_THREADS, WORKSPACE, LOG)

# The rungs of GOSSAMER_LOG; each includes those below it.
LOG_CACHE, LOG_TIMINGS, LOG_IR, LOG_SOURCE = 1, 2, 3, 4


def log(level: int, text: str) -> None:
    """Print a line to standard error if GOSSAMER_LOG asks for this level."""
    if LOG.get() >= level:
        print(f"gossamer: {text}", file=sys.stderr)

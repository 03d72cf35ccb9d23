"""Bytes by key in a folder that processes, ranks and machines share.

    objects/<key>       sha256 of the rest, then the rest; replaced as a whole, checked when read
    index/<digest>      the key that a quick key's digest stands for
    locks/<name>        held (flock) while somebody builds; the system drops it with its process

Every file is written under another name, flushed and renamed, so a reader sees all of it or none. A
folder that is full, read-only or in the way is no error: one CacheWarning, then nothing is stored.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ..ir.errors import CacheWarning
from .files import TEMPORARY, write_whole
from .knobs import LOG_CACHE, log

if os.name == "posix":
    import fcntl

_LOCKING = os.name == "posix"  # elsewhere each process may build for itself; files stay whole
_LAYOUT = "v1"  # another number for another layout: old and new gossamers then share a folder in peace
_DIGEST = 32
_STALE_SECONDS = 3600  # a temporary file this old was left by a writer that was killed


@dataclass(frozen=True)
class Entry:
    """One stored object: bytes on disk, and when it was last used, in seconds since 1970."""

    key: str
    size: int
    used: float


class Store:
    """`folder` holds the files; `limit` bounds their bytes (0: nothing is ever read or stored)."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._objects, self._index, self._locks = (
            folder / _LAYOUT / n for n in ("objects", "index", "locks")
        )
        self._warned = False

    def read(self, key: str, *, touch: bool = True) -> bytes | None:
        """The object, or None if absent; a damaged one is removed with a CacheWarning. touch: it is a use."""
        path = self._objects / key
        data = self._read(path)
        if data is None:
            return None
        content = data[_DIGEST:]
        if sha256(content).digest() != data[:_DIGEST]:
            self.discard(key, "does not match its checksum")
            return None
        if touch:
            with suppress(OSError):
                os.utime(path)
        return content

    def write(self, key: str, content: bytes) -> None:
        """Store an object, then remove the least recently used ones until all fit the limit."""
        if len(content) + _DIGEST > self.limit:
            log(LOG_CACHE, f"cache: {key[:12]} is larger than the limit of {self.limit} bytes; not stored")
            return
        if self._write(self._objects / key, sha256(content).digest() + content):
            self._evict(keep=key)

    def discard(self, key: str, reason: str) -> None:
        """Remove a damaged object and say so."""
        with suppress(OSError):
            (self._objects / key).unlink()
        message = f"discarded {key[:12]} from the kernel cache {self.folder}: it {reason}"
        warnings.warn(message, CacheWarning, stacklevel=3)

    def resolve(self, digest: str) -> str | None:
        """The key that a digest was linked to, or None."""
        data = self._read(self._index / digest)
        return data.decode() if data is not None and re.fullmatch(rb"[0-9a-f]{64}", data) else None

    def link(self, digest: str, key: str) -> None:
        """Let a digest stand for a key."""
        if self.limit:
            self._write(self._index / digest, key.encode())

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a lock among processes; without a usable folder, none is held."""
        held = self._acquire(name) if self.limit and _LOCKING else None
        try:
            yield
        finally:
            if held is not None:
                # Unlinked while held: whoever waits for the old file sees that and opens the new one.
                with suppress(OSError):
                    (self._locks / name).unlink()
                fcntl.flock(held, fcntl.LOCK_UN)  # also for a copy that a forked child may hold
                os.close(held)

    def entries(self) -> list[Entry]:
        """All objects, most recently used first."""
        files = [(f.name, s) for f, s in _files(self._objects) if not f.name.startswith(TEMPORARY)]
        entries = [Entry(name, status.st_size, status.st_mtime) for name, status in files]
        return sorted(entries, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove every object and link; returns how many objects there were."""
        for file, _ in _files(self._index):
            _unlink(file.path)
        return sum(_unlink(file.path) for file, _ in _files(self._objects))

    def tidy(self) -> None:
        """Remove links to absent objects and what killed writers left behind."""
        keys = {entry.key for entry in self.entries()}
        for file, _ in _files(self._index):
            if self.resolve(file.name) not in keys:
                _unlink(file.path)
        for folder in (self._objects, self._index):
            for file, status in _files(folder):
                if file.name.startswith(TEMPORARY) and status.st_mtime < time.time() - _STALE_SECONDS:
                    _unlink(file.path)

    def _evict(self, keep: str) -> None:
        entries = self.entries()
        total = sum(entry.size for entry in entries)
        if total <= self.limit:
            return
        for entry in reversed(entries):
            if total <= self.limit:
                break
            if entry.key != keep and _unlink(self._objects / entry.key):
                log(LOG_CACHE, f"cache: evicted {entry.key[:12]}, {entry.size} bytes")
                total -= entry.size
        self.tidy()

    def _read(self, path: Path) -> bytes | None:
        if not self.limit:
            return None
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._unusable(error)
            return None

    def _write(self, path: Path, data: bytes) -> bool:
        try:
            write_whole(path, data)
        except OSError as error:
            self._unusable(error)
            return False
        return True

    def _acquire(self, name: str) -> int | None:
        path = self._locks / name
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                self._unusable(error)
                return None
            try:
                _wait_for(handle, name)
                if _is_open_as(handle, path):
                    return handle
            except OSError as error:
                os.close(handle)
                self._unusable(error)
                return None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _unusable(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the kernel cache {self.folder} cannot be used ({error.strerror}); kernels stay in memory. "
                "Free space there, or name another folder in GOSSAMER_CACHE_DIR",
                CacheWarning,
                stacklevel=3,
            )


def _wait_for(handle: int, name: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log(LOG_CACHE, f"cache: {name[:12]} is being built by another process, waiting")
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_open_as(handle: int, path: Path) -> bool:
    """True if the open file is still the one at path, not one that its last holder unlinked."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _files(folder: Path) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
    """The files of a folder; those that vanish meanwhile, and an absent folder, are skipped."""
    try:
        listing = list(os.scandir(folder))
    except OSError:
        return
    for file in listing:
        with suppress(OSError):
            yield file, file.stat()


def _unlink(path: str | Path) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True

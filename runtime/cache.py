"""The cache of compiled kernels: in memory, and on disk in the folder GOSSAMER_CACHE_DIR.

A key is the sha256 of what an artifact is made from. A *quick* digest stands for a key: it is made
from a structural key without any compiler, so a fresh process reads the link, then the artifact,
and is done. Processes that miss the same thing wait for one of them to build it; so do threads. What
cannot be stored (a full or read-only folder) is kept in memory; what cannot be trusted (a damaged
file) is discarded with a CacheWarning and built again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256

from ..ir.errors import ArtifactError
from .artifact import Artifact
from .flight import SingleFlight
from .knobs import CACHE_DIR, CACHE_SIZE, LOG_CACHE, log
from .store import Entry, Store


def digest_of(*values: object) -> str:
    """sha256 of JSON values (text, numbers, booleans, None, tuples of them), the same in every process.

    >>> digest_of("a", (1, 2))[:12] == digest_of("a", [1, 2])[:12] != digest_of("a", (1, 2.0))[:12]
    True
    """
    return sha256(json.dumps(values, allow_nan=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Counts:
    """What a cache did: hits in memory, hits on disk, misses (each was built)."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0


class Cache:
    """Artifacts by key. Safe for threads and processes; see the module's notes."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store or Store(CACHE_DIR.get(), CACHE_SIZE.get())
        self._memory: dict[str, Artifact] = {}
        self._links: dict[str, str] = {}
        self._flights: SingleFlight[Artifact] = SingleFlight()
        self._counting = threading.Lock()
        self._counts = {"memory_hits": 0, "disk_hits": 0, "misses": 0}

    @property
    def counts(self) -> Counts:
        """A snapshot of the counters."""
        with self._counting:
            return Counts(**self._counts)

    def get(self, key: str) -> Artifact | None:
        """The artifact of a key, from memory or disk, or None."""
        artifact = self._memory.get(key)
        if artifact is not None:
            self._count("memory_hits")
            return artifact
        artifact = self._from_disk(key)
        if artifact is not None:
            self._count("disk_hits")
            artifact = self._memory.setdefault(key, artifact)
        return artifact

    def get_or_build(self, key: str, build: Callable[[], Artifact]) -> Artifact:
        """The artifact of a key, built where it is nowhere: once among all threads and processes.

        What `build` raises reaches every thread that waits for it, and is not remembered.
        """
        return self.get(key) or self._flights.run(key, lambda: self._build(key, build))

    def find(self, quick: str) -> tuple[str, Artifact] | None:
        """The key and artifact that a quick digest stands for, or None."""
        key = self._links.get(quick) or self.store.resolve(quick)
        artifact = self.get(key) if key is not None else None
        return (key, artifact) if key is not None and artifact is not None else None

    def link(self, quick: str, key: str) -> None:
        """Let a quick digest stand for a key."""
        self._links[quick] = key
        self.store.link(quick, key)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold a lock among processes (threads of one process use a SingleFlight)."""
        with self.store.lock(name):
            yield

    def _build(self, key: str, build: Callable[[], Artifact]) -> Artifact:
        with self.store.lock(key):
            artifact = self.get(key)  # another process may have built it while we waited
            if artifact is not None:
                return artifact
            self._count("misses")
            log(LOG_CACHE, f"cache: {key[:12]} is new, building")
            artifact = self._memory[key] = build()
            self.store.write(key, artifact.to_bytes())
            return artifact

    def _from_disk(self, key: str) -> Artifact | None:
        data = self.store.read(key)
        if data is None:
            return None
        try:
            artifact = Artifact.from_bytes(data)
        except ArtifactError as error:
            self.store.discard(key, f"is no artifact of this version: {error}")
            return None
        log(LOG_CACHE, f"cache: {key[:12]} read from {self.store.folder}")
        return artifact

    def _count(self, name: str) -> None:
        with self._counting:
            self._counts[name] += 1


# ---- the command line ``gossamer cache`` ----


@dataclass(frozen=True)
class Info:
    """Where the disk cache is, how many artifacts it holds, and bytes used of bytes allowed."""

    folder: str
    artifacts: int
    size: int
    limit: int


@dataclass(frozen=True)
class Listed:
    """One artifact on disk: what it was compiled for, its kernels, and where it is in the order of use."""

    entry: Entry
    target: str
    kernels: tuple[str, ...]


def _store() -> Store:
    return Store(CACHE_DIR.get(), CACHE_SIZE.get())


def info() -> Info:
    """The disk cache in numbers."""
    store = _store()
    entries = store.entries()
    return Info(str(store.folder), len(entries), sum(entry.size for entry in entries), store.limit)


def list_artifacts() -> list[Listed]:
    """The artifacts on disk, most recently used first; damaged ones are discarded with a CacheWarning."""
    store = _store()
    listed = []
    for entry in store.entries():
        artifact = _intact(store, entry.key)
        if artifact is not None:
            kernels = tuple(launch.kernel for launch in artifact.manifest.launches)
            listed.append(Listed(entry, artifact.manifest.target, kernels))
    return listed


def clear() -> int:
    """Empty the disk cache; returns how many artifacts it held."""
    return _store().clear()


def verify() -> tuple[int, int]:
    """Read every artifact and remove what is damaged or left over; returns (intact, removed)."""
    store = _store()
    keys = [entry.key for entry in store.entries()]
    intact = sum(_intact(store, key) is not None for key in keys)
    store.tidy()
    return intact, len(keys) - intact


def _intact(store: Store, key: str) -> Artifact | None:
    data = store.read(key, touch=False)
    if data is None:
        return None
    try:
        return Artifact.from_bytes(data)
    except ArtifactError as error:
        store.discard(key, f"is no artifact of this version: {error}")
        return None

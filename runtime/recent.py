"""A dictionary that forgets its oldest entries."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """At most `limit` values by key. Any thread may read and write; reading takes no lock."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: dict[Hashable, T] = {}
        self._writing = threading.Lock()
        self.get = self._values.get

    def put(self, key: Hashable, value: T) -> None:
        """Enter a value; the one that was entered first goes when there are too many."""
        with self._writing:
            self._values[key] = value
            if len(self._values) > self._limit:
                del self._values[next(iter(self._values))]

    def clear(self) -> None:
        """Forget all values."""
        with self._writing:
            self._values.clear()

    def __len__(self) -> int:
        return len(self._values)

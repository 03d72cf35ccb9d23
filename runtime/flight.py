"""One build shared by all threads that want it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class _Interrupted(Exception):
    """The thread that was building left (KeyboardInterrupt, SystemExit); another one takes over."""


class SingleFlight(Generic[T]):
    """`run(key, work)`: the first thread works, those that come meanwhile wait for its outcome.

    An exception of the work reaches all of them. Nothing is remembered once it is over.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Future[T]] = {}

    def run(self, key: Hashable, work: Callable[[], T]) -> T:
        slot = (os.getpid(), key)  # a forked child has no thread that would finish its parent's work
        while True:
            with self._lock:
                flight = self._flights.get(slot)
                mine = flight is None
                if flight is None:
                    flight = self._flights[slot] = Future()
            if mine:
                return self._lead(slot, flight, work)
            try:
                return flight.result()
            except _Interrupted:
                continue

    def _lead(self, slot: Hashable, flight: Future[T], work: Callable[[], T]) -> T:
        try:
            value = work()
        except BaseException as error:
            self._land(slot)
            flight.set_exception(error if isinstance(error, Exception) else _Interrupted())
            raise
        self._land(slot)
        flight.set_result(value)
        return value

    def _land(self, slot: Hashable) -> None:
        with self._lock:
            del self._flights[slot]

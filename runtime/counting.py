"""Counters of what happens in this process; tests assert with them that nothing was compiled."""

import threading


class Counter:
    """A number that any thread may raise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0

    def add(self, amount: int = 1) -> None:
        with self._lock:
            self._value += amount

    @property
    def value(self) -> int:
        return self._value


COMPILATIONS = Counter()  # kernels given to a compiler
LOADS = Counter()  # binaries loaded

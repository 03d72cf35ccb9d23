"""A pool of threads that shares one call's work, and the memory each of them works in.

Threads sleep between calls, so that they never spin against another library's pool. The caller does
not wait for a helper that has not started: it takes the shares that are left itself. Small calls are
therefore over before a second core has woken up.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from itertools import count
from queue import SimpleQueue

Task = Callable[[int], None]  # runs one share, given its number


class _Job:
    """Shares 0 .. shares - 1 of one call: handed out one at a time, to whoever asks."""

    def __init__(self, task: Task, shares: int) -> None:
        self.task, self.shares = task, shares
        self.next = count().__next__  # one step in C: atomic under the interpreter's lock
        self.lock = threading.Lock()
        self.left = shares
        self.done = threading.Lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def work(self) -> None:
        while (share := self.next()) < self.shares:
            try:
                if self.error is None:
                    self.task(share)
            except BaseException as error:
                self.error = error
            with self.lock:
                self.left -= 1
                last = not self.left
            if last:
                self.done.release()


class Pool:
    """Threads that are started when first needed and live until `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def run(self, task: Task, shares: int, threads: int) -> None:
        """task(0), ..., task(shares - 1) on the calling thread and up to threads - 1 others.

        The first error is raised here, after the shares that had started have ended."""
        job = _Job(task, shares)
        helpers = 0 if self._closed else min(threads, shares) - 1
        if helpers > len(self._threads):
            self._grow(helpers)
        for _ in range(helpers):
            self._jobs.put(job)
        try:
            job.work()
            job.done.acquire()
        except BaseException as error:
            job.error = error  # an interrupt: shares that have not started are left out
            raise
        # A helper may meet the job later. What the task holds is the caller's, and ends with the call.
        del job.task
        if job.error is not None:
            raise job.error

    def _grow(self, size: int) -> None:
        with self._lock:
            for number in range(len(self._threads), size):
                thread = threading.Thread(
                    target=_serve, args=(self._jobs,), name=f"gossamer-{number}", daemon=True
                )
                thread.start()
                self._threads.append(thread)

    def close(self) -> None:
        """Ends the threads, after the shares they are at. Calls run on their own threads from then on.

        An interpreter that shuts down kills threads where they next ask for its lock; inside of C++ that
        ends the process with an abort."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, []
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.join()


def _serve(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.work()


POOL = Pool()
atexit.register(POOL.close)


def _forget() -> None:
    # A forked child has none of its parent's threads.
    POOL.__init__()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

"""tuning: which of a few ways to compute one thing is fastest here, timed once and remembered.

    question  what is computed, on which device, by which versions, in which bucket of sizes
    choice    text that names a way, and a function that runs it
    answer    the text of the fastest, kept in memory and under GOSSAMER_CACHE_DIR/tuning

Threads and processes that ask the same question wait for one of them to time it. A choice that cannot be
compiled or launched here is passed over. Nothing is ever timed unless somebody asks for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass
from time import perf_counter

from ..ir.errors import BackendError, GossamerError
from .cache import digest_of
from .flight import SingleFlight
from .knobs import CACHE_DIR, CACHE_SIZE, LOG_TIMINGS, log
from .store import Store

LIMIT = 8  # choices that are timed for one question
STORED = 1 << 24  # bytes of answers on disk

Run = Callable[[], object]
Timer = Callable[[Run], float]  # seconds that one run takes


@dataclass(frozen=True)
class Answer:
    """The fastest choice and its seconds; timed: (choice, seconds) of all that ran."""

    choice: str
    seconds: float
    timed: tuple[tuple[str, float], ...]


class Tuning:
    """Answers over one store. Safe to use from any thread."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store or Store(CACHE_DIR.get() / "tuning", min(STORED, CACHE_SIZE.get()))
        self._answers: dict[str, Answer] = {}
        self._flights: SingleFlight[Answer] = SingleFlight()

    def find(self, question: Hashable) -> Answer | None:
        """The answer that memory or disk holds. question: nested tuples of text, numbers and None."""
        return self._find(digest_of(question))

    def ask(
        self,
        question: Hashable,
        choices: Callable[[], Iterable[tuple[str, Run]]],
        timer: Timer,
        *,
        again: bool = False,
    ) -> Answer:
        """The answer to a question, timing its choices if nobody has.

        choices: (text, run) pairs, called only when they are timed; at most `LIMIT` are. again: time
        them even if there is an answer. Raises what the last choice raised when none of them runs."""
        digest = digest_of(question)
        known = None if again else self._find(digest)
        return known or self._flights.run(digest, lambda: self._time(digest, choices, timer, again))

    def _find(self, digest: str) -> Answer | None:
        answer = self._answers.get(digest)
        if answer is None:
            data = self.store.read(digest)
            answer = None if data is None else _parse(data)
            if answer is not None:
                self._answers[digest] = answer
        return answer

    def _time(
        self, digest: str, choices: Callable[[], Iterable[tuple[str, Run]]], timer: Timer, again: bool
    ) -> Answer:
        with self.store.lock(digest):
            known = None if again else self._find(digest)  # another thread or process may have been faster
            if known is not None:
                return known
            timed = _timed(choices(), timer)
            choice, seconds = min(timed, key=lambda pair: pair[1])
            answer = self._answers[digest] = Answer(choice, seconds, timed)
            self.store.write(digest, json.dumps(asdict(answer)).encode())
            return answer


def _timed(choices: Iterable[tuple[str, Run]], timer: Timer) -> tuple[tuple[str, float], ...]:
    found: list[tuple[str, float]] = []
    failure: GossamerError = BackendError("tuning: there is nothing to time")
    for _, (text, run) in zip(range(LIMIT), choices, strict=False):
        try:
            seconds = timer(run)
        except BackendError as error:
            log(LOG_TIMINGS, f"tuning: {text} does not run here: {error}")
            failure = error
            continue
        log(LOG_TIMINGS, f"tuning: {seconds * 1e3:.4f} ms for {text}")
        found.append((text, seconds))
    if not found:
        raise failure
    return tuple(found)


def _parse(data: bytes) -> Answer | None:
    """The answer that another process wrote; None for what an older layout holds."""
    try:
        fields = json.loads(data)
        return Answer(fields["choice"], fields["seconds"], tuple((c, s) for c, s in fields["timed"]))
    except (ValueError, TypeError, KeyError):
        return None


def bucket(*sizes: int) -> tuple[int, ...]:
    """Sizes that share answers: each up to the next power of two."""
    return tuple(max(0, size - 1).bit_length() for size in sizes)


def wall_clock(run: Run, *, least: float = 0.02, repeats: int = 5) -> float:
    """Seconds of one run: the least of a few repeats by the clock, after one that is not counted."""
    run()
    best, spent, done = math.inf, 0.0, 0
    while done < repeats or (spent < least and done < 100):
        start = perf_counter()
        run()
        taken = perf_counter() - start
        best, spent, done = min(best, taken), spent + taken, done + 1
    return best


def cuda_events(run: Run, *, rounds: int = 5, each: int = 10) -> float:
    """Seconds of one run on the current GPU: the median of rounds of launches between two events."""
    import torch

    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(each):
            run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / each / 1e3)
    return sorted(times)[rounds // 2]


# ---- the answers of this process ----

_tuning: Tuning | None = None


def tuning() -> Tuning:
    """The answers that the public functions share; their folder is decided at the first use."""
    global _tuning
    if _tuning is None:
        _tuning = Tuning()
    return _tuning


def reset() -> None:
    """Forget the answers held in memory (a test, or after GOSSAMER_CACHE_DIR has changed); disk stays."""
    global _tuning
    _tuning = None

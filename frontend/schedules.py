"""What `schedule=` of an attention may be, and `gossamer.tune`.

A Schedule, one a group, their text, or "tune": the fastest of a few on this device, timed once and
remembered under GOSSAMER_CACHE_DIR for all processes and for all sizes up to the next powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..ir.errors import InputError, ParseError, UnsupportedError

if TYPE_CHECKING:
    from ..ir.plan import Schedule
    from ..runtime.driver import Executable
    from ..runtime.tuning import Answer, Timer
    from .problem import Problem

TUNE = "tune"
EXPECTED = 'a gossamer.Schedule, a tuple of them, the text of either, or "tune"'


@dataclass
class Request:
    """A wish to time schedules; found: the answer, once an attention has been called with it."""

    timer: Timer | None = None
    again: bool = False
    found: tuple[Schedule, ...] = ()


def tune(
    query: Any,
    key: Any,
    value: Any,
    *,
    timer: Callable[[Callable[[], object]], float] | None = None,
    **keywords: Any,
) -> Schedule | tuple[Schedule, ...]:
    """Time at most 8 schedules of an attention on these tensors, and remember the fastest.

    keywords: those of `gossamer.attention`, without schedule. timer: seconds that a call of its argument
    takes; by default the clock on a CPU, events on a GPU. The answer holds for this device, these versions,
    the structure of the mask, and sizes up to the next powers of two; `schedule="tune"` uses it in any
    process. Returns the Schedule, or one a group. Raises as `gossamer.attention` does."""
    import torch

    from ..runtime.driver import driver
    from .attention import attention

    if "schedule" in keywords:
        raise InputError("tune.schedule", "no schedule", repr(keywords["schedule"]), "Leave it out")
    if timer is not None and not callable(timer):
        raise InputError("tune.timer", "a function of a function, or None", repr(timer))
    request = Request(None if timer is None else _checked(timer), again=True)
    with torch.no_grad():
        attention(query, key, value, schedule=request, **keywords)
    driver().plans.clear()  # those of schedule="tune" may hold an older answer
    return request.found[0] if len(request.found) == 1 else request.found


def _checked(timer: Timer) -> Timer:
    """The timer of a user, whose seconds are checked."""

    def timed(run: Callable[[], object]) -> float:
        seconds = timer(run)
        if not isinstance(seconds, Real) or isinstance(seconds, bool) or not seconds >= 0:
            raise InputError("tune.timer", "a function that returns seconds", f"{seconds!r} from it")
        return float(seconds)

    return timed


def given(schedule: Any, few: bool = False) -> Any:
    """A schedule argument as a tuple of Schedules, or None or a Request. Raises InputError.

    few: whether it is for few queries against many keys, which programs may share."""
    from ..ir.plan import Schedule

    if schedule is None or isinstance(schedule, Request):
        return schedule
    if isinstance(schedule, str):
        return Request() if schedule == TUNE else given(_parsed(schedule), few)
    items = schedule if isinstance(schedule, tuple) else (schedule,)
    for one in items or [()]:
        if not isinstance(one, Schedule):
            raise InputError("attention.schedule", EXPECTED, repr(one))
        if one.split and not few:
            expected = "split=False but for calls of at most 16 queries against at least 1024 keys"
            raise InputError("attention.schedule", expected, str(one))
    return items


def _parsed(text: str) -> Any:
    from ..ir.attributes import load

    try:
        return load(text)
    except ParseError as error:
        raise InputError("attention.schedule", EXPECTED, repr(text), str(error)) from None


def settled(
    request: Request,
    problem: Problem,
    compiled: Callable[[Any], Executable],
    planned: Callable[[Executable], Callable[[], object]],
) -> tuple[Schedule, ...]:
    """The schedules that a request is answered with, timing them if nobody has.

    compiled: the executable of schedules (None: the defaults). planned: runs one on the problem."""
    from ..ir.attributes import dump
    from ..runtime.artifact import PROGRAM
    from ..runtime.tuning import bucket, cuda_events, tuning, wall_clock
    from ..runtime.versions import versions

    default = compiled(None)
    manifest = default.artifact.manifest
    sizes = bucket(problem.q_len, problem.kv_len, problem.batch * problem.heads)
    question = (_device_name(problem), versions(manifest.backend), manifest.parts[PROGRAM], sizes)
    timer = request.timer or (wall_clock if problem.device.type == "cpu" else cuda_events)
    shortlists: list[Sequence[Schedule]] = []

    def choices() -> Iterator[tuple[str, Callable[[], object]]]:
        shortlists.extend(_shortlists(default))
        for schedules in _programs(shortlists):
            yield dump(schedules), _runner(compiled, planned, schedules)

    answer = tuning().ask(question, choices, timer, again=request.again)
    request.found = _best(answer)
    return request.found


def _runner(
    compiled: Callable[[Any], Executable],
    planned: Callable[[Executable], Callable[[], object]],
    schedules: Any,
) -> Callable[[], object]:
    """Runs an attention with these schedules; compiles it the first time."""
    ready = cache(lambda: planned(compiled(schedules)))
    return lambda: ready()()


def _device_name(problem: Problem) -> str:
    """What answers are kept apart by, beside the target: the name of a GPU, or this machine's processor."""
    if problem.device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(problem.device)
    from ..runtime import host

    return f"{host.machine()}, {','.join(sorted(host.features() or ()))}"


def _shortlists(default: Executable) -> list[tuple[Schedule, ...]]:
    """The schedules worth timing, for each group of an attention; read off the text of its program."""
    from ..ir.graph_text import parse
    from ..passes.build import spec_of
    from ..passes.schedule import shortlist
    from ..runtime.artifact import PROGRAM
    from ..runtime.tuning import LIMIT

    graph = parse(default.artifact.text(PROGRAM))
    if len(graph.ops) != 1:
        kinds = ", ".join(op.kind for op in graph.ops)
        raise UnsupportedError(f'schedule="tune": several passes over the keys ({kinds}) are not tuned yet')
    [op] = graph.ops
    spec = spec_of(graph, op)
    return [shortlist(spec, group, LIMIT) for group in op.attr("groups")]


def _programs(shortlists: Sequence[Sequence[Schedule]]) -> Iterator[tuple[Schedule, ...]]:
    """The defaults, then one group after the other with its alternatives, evenly as far as the limit goes."""
    from ..runtime.tuning import LIMIT

    default = tuple(found[0] for found in shortlists)
    yield default
    for i, found in enumerate(shortlists):
        for schedule in found[1 : 1 + (LIMIT - 1) // len(shortlists)]:
            yield (*default[:i], schedule, *default[i + 1 :])


@lru_cache(maxsize=256)
def _best(answer: Answer) -> tuple[Schedule, ...]:
    """The fastest schedule of every group: groups run one after the other, so that each gain stays."""
    from ..ir.attributes import load

    timed = sorted(((seconds, load(text)) for text, seconds in answer.timed), key=lambda pair: pair[0])
    default = load(answer.timed[0][0])
    return tuple(
        next(schedules[i] for _, schedules in timed if _changes_only(schedules, default, i))
        for i in range(len(default))
    )


def _changes_only(schedules: Sequence[Schedule], default: Sequence[Schedule], i: int) -> bool:
    return all(s == d for j, (s, d) in enumerate(zip(schedules, default, strict=True)) if j != i)

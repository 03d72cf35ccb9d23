"""Tuning: a few schedules are timed once, and every later call, in any process, takes the fastest."""

import subprocess
import sys
import threading

import pytest

import gossamer
from gossamer import masks
from gossamer.ir.attributes import load
from gossamer.ir.errors import BackendError, CacheWarning, InputError
from gossamer.ir.plan import Schedule
from gossamer.runtime import driver, tuning
from gossamer.runtime.store import Store
from gossamer.runtime.tuning import LIMIT, Answer, Tuning, bucket, wall_clock

torch = pytest.importorskip("torch")


@pytest.fixture
def answers(tmp_path):
    return Tuning(Store(tmp_path, 1 << 20))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of this test's own, before and after which nothing is held in memory."""
    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(tmp_path))
    driver.reset()
    tuning.reset()
    yield tmp_path
    driver.reset()
    tuning.reset()


def ways(seconds):
    """Choices named by their seconds, and a timer that believes them."""
    return lambda: [(str(s), lambda s=s: s) for s in seconds]


def believe(run):
    return run()


class Count:
    """A timer that takes every schedule to be slower than the one before, but for one, and counts."""

    def __init__(self, fastest=0):
        self.fastest, self.calls = fastest, 0

    def __call__(self, run):
        run()
        self.calls += 1
        return 0.5 if self.calls - 1 == self.fastest else 1.0 + self.calls


# ---- questions and answers ----


def test_the_fastest_choice_is_the_answer(answers):
    found = answers.ask(("a", 1), ways([3.0, 1.0, 2.0]), believe)
    assert found == Answer("1.0", 1.0, (("3.0", 3.0), ("1.0", 1.0), ("2.0", 2.0)))
    assert answers.find(("a", 1)) == found and answers.find(("a", 2)) is None


def test_a_question_is_timed_once(answers, tmp_path):
    answers.ask("q", ways([1.0]), believe)
    for same in (answers, Tuning(Store(tmp_path, 1 << 20))):  # memory, then disk
        assert same.ask("q", ways([0.1]), believe).choice == "1.0"
    assert answers.ask("q", ways([0.1]), believe, again=True).choice == "0.1"
    assert Tuning(Store(tmp_path, 1 << 20)).find("q").choice == "0.1"


def test_few_choices_are_timed(answers):
    assert len(answers.ask("q", ways(range(100, 1, -1)), believe).timed) == LIMIT


def test_choices_that_do_not_run_are_passed_over(answers):
    def fails():
        raise BackendError("too large")

    choices = [("bad", fails), ("good", lambda: 1.0)]
    assert answers.ask("q", lambda: choices, believe).timed == (("good", 1.0),)
    with pytest.raises(BackendError, match="too large"):
        answers.ask("other", lambda: choices[:1], believe)
    assert answers.find("other") is None


def test_threads_share_one_timing(answers):
    timed, start = [], threading.Barrier(4)

    def choices():
        timed.append(1)
        return [("a", lambda: 1.0)]

    def ask():
        start.wait()
        answers.ask("q", choices, believe)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timed == [1]


def test_a_damaged_answer_is_timed_again(answers, tmp_path):
    answers.ask("q", ways([1.0]), believe)
    [file] = (tmp_path / "v1" / "objects").iterdir()
    file.write_bytes(b"x" * 50)
    with pytest.warns(CacheWarning, match="checksum"):
        assert Tuning(Store(tmp_path, 1 << 20)).ask("q", ways([2.0]), believe).choice == "2.0"


def test_sizes_share_answers_up_to_powers_of_two():
    assert bucket(1025, 2048) == bucket(2048, 1025) == (11, 11)
    assert bucket(1024) == (10,) and bucket(0, 1, 2) == (0, 0, 1)


def test_wall_clock_runs_what_it_times():
    calls = []
    assert wall_clock(lambda: calls.append(1), least=0, repeats=3) >= 0
    assert len(calls) == 4


# ---- gossamer.tune ----


def tensors(length=64, heads=2):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, heads, length, 32, generator=generator) for _ in range(3)]


def test_tuned_calls_give_the_same_result(folder, monkeypatch):
    monkeypatch.setattr(tuning, "LIMIT", 4)
    inputs, mask = tensors(), masks.sliding_window(9)
    expected = gossamer.attention(*inputs, mask=mask, backend="reference")
    timer = Count(fastest=2)
    chosen = gossamer.tune(*inputs, mask=mask, timer=timer)
    assert isinstance(chosen, Schedule) and timer.calls == 4
    for schedule in (chosen, str(chosen), "tune"):
        found = gossamer.attention(*inputs, mask=mask, schedule=schedule)
        torch.testing.assert_close(found, expected)


def test_a_new_length_of_the_bucket_times_nothing(folder, monkeypatch):
    mask = masks.sliding_window(9)
    monkeypatch.setattr(tuning, "LIMIT", 2)
    gossamer.tune(*tensors(64), mask=mask, timer=Count(fastest=1))
    monkeypatch.setattr(tuning, "wall_clock", None)  # calling it would fail
    compiled = driver.compilations()
    for length in (64, 50, 33):
        gossamer.attention(*tensors(length), mask=mask, schedule="tune")
        gossamer.attention(*tensors(length), mask=masks.sliding_window(3), schedule="tune")
    assert driver.compilations() == compiled
    with pytest.raises(TypeError):
        gossamer.attention(*tensors(65), mask=mask, schedule="tune")


def test_the_clock_decides_on_a_cpu(folder, monkeypatch):
    monkeypatch.setattr(tuning, "LIMIT", 3)
    inputs = tensors(256)
    chosen = gossamer.tune(*inputs, mask=masks.causal())
    [answer] = tuning.tuning()._answers.values()
    assert load(answer.choice) == (chosen,)
    assert answer.seconds == min(seconds for _, seconds in answer.timed) > 0


def test_groups_are_tuned_one_by_one(folder):
    """Alternatives of a group are timed beside the defaults of the others, and each group keeps its best."""
    inputs, mask = tensors(96), masks.strided(8, 4)
    seen = []

    def timer(run):
        run()
        seen.append(len(seen))
        return {0: 9.0, 2: 5.0, 5: 6.0}.get(seen[-1], 10.0)

    chosen = gossamer.tune(*inputs, mask=mask, timer=timer)
    [answer] = tuning.tuning()._answers.values()
    programs = [load(text) for text, _ in answer.timed]
    assert len(chosen) == 2 and len(programs) <= LIMIT
    assert chosen == (programs[2][0], programs[5][1])
    expected = gossamer.attention(*inputs, mask=mask, backend="reference")
    torch.testing.assert_close(gossamer.attention(*inputs, mask=mask, schedule="tune"), expected)


PROCESS = """
import torch, gossamer
from gossamer import masks
from gossamer.runtime import driver, tuning
def no_timer(*_): raise SystemExit("timed again")
tuning.wall_clock = no_timer
q = torch.ones(1, 2, 64, 32)
gossamer.attention(q, q, q, mask=masks.sliding_window(9), schedule="tune")
assert driver.compilations() == 0
"""


def test_another_process_uses_the_answer(folder, monkeypatch):
    monkeypatch.setattr(tuning, "LIMIT", 2)
    gossamer.tune(*tensors(), mask=masks.sliding_window(9), timer=Count(fastest=1))
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bad_requests():
    inputs = tensors()
    with pytest.raises(
        InputError, match=r"attention.schedule: expected a gossamer.Schedule, .* or \"tune\"; got"
    ):
        gossamer.attention(*inputs, schedule="Schedule(rows=1")
    with pytest.raises(InputError, match=r"attention.schedule: .*; got '.*wide=1\)'\. .*wide"):
        gossamer.attention(*inputs, schedule="Schedule(rows=(32,), cols=(64,), wide=1)")
    with pytest.raises(InputError, match=r"attention.schedule: .*; got \(\)"):
        gossamer.attention(*inputs, schedule=())
    with pytest.raises(InputError, match=r"attention.schedule: expected split=False .*; got Schedule\("):
        gossamer.attention(*inputs, schedule=Schedule((32,), (64,), lists="none", split=True))
    with pytest.raises(InputError, match=r"tune.timer: expected a function .*; got 3"):
        gossamer.tune(*inputs, timer=3)
    for seconds in (None, "fast", -1.0, float("nan")):
        with pytest.raises(InputError, match=r"tune.timer: expected a function that returns seconds"):
            gossamer.tune(*inputs, timer=lambda run, seconds=seconds: seconds)
    with pytest.raises(InputError, match=r"tune.schedule: expected no schedule"):
        gossamer.tune(*inputs, schedule="tune")
    with pytest.raises(InputError, match=r"compile.schedule: .* ahead of time"):
        gossamer.compile(gossamer.AttentionSpec(masks.causal()), schedule="tune")

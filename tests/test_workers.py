"""The pool that shares a kernel call's work among threads."""

import os
import threading
import time
import weakref

import pytest

from gossamer.runtime.workers import Pool


def test_every_share_runs_once():
    pool, seen = Pool(), []
    pool.run(seen.append, shares=50, threads=4)
    assert sorted(seen) == list(range(50))


def test_helpers_help():
    pool, threads = Pool(), set()

    def task(share):
        threads.add(threading.get_ident())
        time.sleep(0.02)

    pool.run(task, shares=8, threads=3)
    assert threading.get_ident() in threads
    assert len(threads) == 3


def test_a_call_does_not_wait_for_helpers_that_are_busy():
    pool, release = Pool(), threading.Event()
    blocked = threading.Thread(target=pool.run, args=(lambda share: release.wait(), 2, 2))
    blocked.start()
    seen = []
    pool.run(seen.append, shares=2, threads=2)
    assert sorted(seen) == [0, 1]
    release.set()
    blocked.join()


def test_an_error_in_any_share_reaches_the_caller_and_the_pool_lives_on():
    pool = Pool()

    def task(share):
        if share == 3:
            raise ValueError("share 3")

    for _ in range(3):
        with pytest.raises(ValueError, match="share 3"):
            pool.run(task, shares=8, threads=2)
    seen = []
    pool.run(seen.append, shares=4, threads=2)
    assert sorted(seen) == [0, 1, 2, 3]


def test_callers_on_many_threads_share_the_pool():
    pool, totals = Pool(), []

    def caller(n):
        seen = []
        for _ in range(50):
            pool.run(seen.append, shares=n, threads=2)
        totals.append(len(seen) == 50 * n)

    callers = [threading.Thread(target=caller, args=(n,)) for n in range(1, 9)]
    for c in callers:
        c.start()
    for c in callers:
        c.join()
    assert totals == [True] * 8


def test_what_a_task_holds_ends_with_its_call():
    pool, started, release = Pool(), threading.Semaphore(0), threading.Event()
    busy = threading.Thread(target=pool.run, args=(lambda share: started.release() or release.wait(), 2, 2))
    busy.start()
    started.acquire()
    started.acquire()  # the pool's one thread is in here, and leaves the next job in the queue
    held = {1}
    alive = weakref.ref(held)
    pool.run(lambda share, held=held: held, shares=2, threads=2)
    del held
    dead = alive() is None
    release.set()
    busy.join()
    assert dead


def test_a_closed_pool_has_no_threads_and_runs_calls_on_the_callers():
    pool, seen = Pool(), set()
    pool.run(lambda share: time.sleep(0.01), shares=8, threads=3)
    before = [t for t in threading.enumerate() if t in pool._threads]
    assert len(before) == 2
    pool.close()
    assert not any(t.is_alive() for t in before)
    pool.run(lambda share: seen.add(threading.get_ident()), shares=4, threads=3)
    assert seen == {threading.get_ident()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_starts_threads_of_its_own():
    from gossamer.runtime.workers import POOL

    POOL.run(lambda share: time.sleep(0.01), shares=4, threads=2)
    child = os.fork()
    if not child:
        seen = []
        POOL.run(lambda share: seen.append(share) or time.sleep(0.01), shares=4, threads=2)
        os._exit(0 if sorted(seen) == [0, 1, 2, 3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

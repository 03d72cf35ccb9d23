"""The kernel cache: shared by threads and processes, and no accident to it breaks a program."""

import errno
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gossamer.ir.errors import CacheWarning
from gossamer.runtime import cache as cache_module
from gossamer.runtime import store as store_module
from gossamer.runtime.artifact import Artifact
from gossamer.runtime.cache import Cache, digest_of
from gossamer.runtime.flight import SingleFlight
from gossamer.runtime.manifest import FORMAT, Launch, Manifest, Requirements
from gossamer.runtime.store import Store

ROOMY = 1 << 20
KEY, OTHER = "a" * 64, "b" * 64


def make_artifact(name: str = "scale") -> Artifact:
    launch = Launch(name, name, (), (), 0, "k.ir", "k.py", "k.o")
    manifest = Manifest(FORMAT, "0.1.0", "cpu", "tvm", {}, Requirements(), (launch,))
    return Artifact.of(manifest, {"k.ir": name.encode(), "k.py": b"pass", "k.o": bytes(64)})


def object_file(folder: Path, key: str = KEY) -> Path:
    return folder / "v1" / "objects" / key


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", ROOMY)


@pytest.fixture(autouse=True)
def no_surprise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        yield


# ---- what is stored comes back, or is known to be gone ----


def test_stored_object_comes_back(store: Store) -> None:
    assert store.read(KEY) is None
    store.write(KEY, b"content")
    assert store.read(KEY) == b"content"
    store.write(KEY, b"newer")
    assert Store(store.folder, ROOMY).read(KEY) == b"newer"


def test_link_leads_to_a_key(store: Store) -> None:
    assert store.resolve(OTHER) is None
    store.link(OTHER, KEY)
    assert store.resolve(OTHER) == KEY
    (store.folder / "v1" / "index" / OTHER).write_bytes(b"half a k")
    assert store.resolve(OTHER) is None


@pytest.mark.parametrize("at", [0, 31, 32, -1])
def test_flipped_byte_is_discarded_with_a_warning(at: int, store: Store) -> None:
    store.write(KEY, b"content")
    flip(object_file(store.folder), at)
    with pytest.warns(CacheWarning, match=r"discarded aaaaaaaaaaaa .* does not match its checksum"):
        assert store.read(KEY) is None
    assert not object_file(store.folder).exists()


@pytest.mark.parametrize("size", [0, 10, 32])
def test_truncated_object_is_discarded_with_a_warning(size: int, store: Store) -> None:
    store.write(KEY, b"content")
    os.truncate(object_file(store.folder), size)
    with pytest.warns(CacheWarning):
        assert store.read(KEY) is None


def test_damaged_artifact_is_built_again(store: Store) -> None:
    Cache(store).get_or_build(KEY, make_artifact)
    flip(object_file(store.folder), 100)
    cache = Cache(store)
    with pytest.warns(CacheWarning):
        assert cache.get_or_build(KEY, make_artifact) == make_artifact()
    assert (cache.counts.disk_hits, cache.counts.misses) == (0, 1)
    assert Cache(store).get(KEY) == make_artifact()


def test_artifact_of_another_format_is_built_again(store: Store) -> None:
    store.write(KEY, b"from another version")
    with pytest.warns(CacheWarning, match="is no artifact of this version"):
        assert Cache(store).get_or_build(KEY, make_artifact) == make_artifact()


# ---- bounded ----


def test_least_recently_used_objects_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path, 3 * (100 + 32))
    keys = [character * 64 for character in "abcd"]
    for age, key in enumerate(keys[:3]):
        store.write(key, bytes(100))
        store.link(key, key)
        os.utime(object_file(tmp_path, key), (1000 + age, 1000 + age))
    assert store.read("a" * 64) is not None  # used now, so that b is the oldest
    store.write(keys[3], bytes(100))
    assert {entry.key[0] for entry in store.entries()} == {"a", "c", "d"}
    assert [store.resolve(key) is not None for key in keys] == [True, False, True, False]


def test_object_over_the_limit_is_not_stored(tmp_path: Path) -> None:
    store = Store(tmp_path, 100)
    store.write(KEY, bytes(50))
    store.write(OTHER, bytes(500))
    assert [entry.key for entry in store.entries()] == [KEY]


def test_limit_of_zero_touches_no_disk(tmp_path: Path) -> None:
    cache = Cache(Store(tmp_path / "cache", 0))
    for _ in range(2):
        assert cache.get_or_build(KEY, make_artifact) == make_artifact()
    cache.link(OTHER, KEY)
    assert cache.find(OTHER) == (KEY, make_artifact())
    assert (cache.counts.memory_hits, cache.counts.misses) == (2, 1)
    assert not (tmp_path / "cache").exists()


# ---- folders that cannot be used: one warning, then memory ----


def works_from_memory(store: Store) -> None:
    cache = Cache(store)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for key in (KEY, OTHER, KEY, OTHER):
            assert cache.get_or_build(key, lambda key=key: make_artifact(key)) == make_artifact(key)
            cache.link(digest_of(key), key)
            assert cache.find(digest_of(key)) == (key, make_artifact(key))
    assert [w.category for w in caught] == [CacheWarning]
    assert "kernels stay in memory" in str(caught[0].message)
    assert "GOSSAMER_CACHE_DIR" in str(caught[0].message)
    assert cache.counts.misses == 2


def refuse(number: int) -> Callable[..., object]:
    def function(*arguments: object, **keywords: object) -> object:
        raise OSError(number, os.strerror(number))

    return function


def test_full_disk_warns_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    works_from_memory(store)
    assert list((store.folder / "v1" / "objects").iterdir()) == []


def test_read_only_folder_warns_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS))
    works_from_memory(store)


def test_read_only_folder_still_gives_what_it_holds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(store).get_or_build(KEY, make_artifact)
    for function in ("utime", "replace", "unlink"):
        monkeypatch.setattr(os, function, refuse(errno.EROFS))
    cache = Cache(store)
    assert cache.get_or_build(KEY, make_artifact) == make_artifact()
    assert cache.counts.disk_hits == 1


def test_file_in_place_of_the_folder_warns_once(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    works_from_memory(Store(tmp_path / "cache", ROOMY))


def test_file_system_without_locks_warns_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module.fcntl, "flock", refuse(errno.ENOLCK))
    works_from_memory(store)


WRITE_OVER_A_QUOTA = """
import resource, sys, warnings
from gossamer.runtime.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
store = Store(__import__("pathlib").Path(sys.argv[1]), 1 << 20)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    store.write("a" * 64, bytes(100_000))
    store.write("b" * 64, bytes(100))
print(len(caught), store.read("a" * 64), len(store.read("b" * 64)))
"""


def test_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    process = start_python(WRITE_OVER_A_QUOTA, tmp_path)
    assert process.communicate()[0].strip() == "1 None 100"
    assert [file.name for file in object_file(tmp_path).parent.iterdir()] == [OTHER]


# ---- killed processes ----

STALL_IN_A_WRITE = """
import os, sys, time, pathlib
from gossamer.runtime.store import Store
def stall(handle):
    print("writing", flush=True)
    time.sleep(600)
os.fsync = stall
store = Store(pathlib.Path(sys.argv[1]), 1 << 20)
with store.lock("a" * 64):
    store.write("a" * 64, bytes(100_000))
"""


def test_killed_writer_leaves_nothing_harmful(store: Store) -> None:
    process = start_python(STALL_IN_A_WRITE, store.folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    waiter = ThreadPoolExecutor(1).submit(Cache(store).get_or_build, KEY, make_artifact)
    process.kill()
    assert waiter.result() == make_artifact()  # the lock went with its holder
    process.communicate()
    assert Cache(store).get(KEY) == make_artifact()
    (leftover,) = [f for f in object_file(store.folder).parent.iterdir() if f.name != KEY]
    store.tidy()
    assert leftover.exists()  # for all we know its writer lives
    os.utime(leftover, (1000, 1000))
    store.tidy()
    assert not leftover.exists()
    assert list((store.folder / "v1" / "locks").iterdir()) == []


# ---- many processes ----

BUILD_THREE = """
import os, sys, pathlib
from gossamer.runtime.artifact import Artifact
from gossamer.runtime.cache import Cache
from gossamer.runtime.manifest import FORMAT, Manifest, Requirements
from gossamer.runtime.store import Store
folder, marker = map(pathlib.Path, sys.argv[1:])
def build(name):
    with open(marker, "a") as file:
        file.write(name + "\\n")
    return Artifact.of(Manifest(FORMAT, "0.1.0", name, "tvm", {}, Requirements(), ()), {"k.o": bytes(10_000)})
cache = Cache(Store(folder, 1 << 20))
sys.stdin.readline()
for name in ("first", "second", "third"):
    key = name[0] * 64
    assert cache.get_or_build(key, lambda: build(name)).manifest.target == name
print("done")
"""


def test_sixteen_processes_build_each_kernel_once(tmp_path: Path) -> None:
    processes = [start_python(BUILD_THREE, tmp_path / "cache", tmp_path / "marker") for _ in range(16)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == ["done\n"] * 16
    assert (tmp_path / "marker").read_text().split() == ["first", "second", "third"]
    assert list((tmp_path / "cache" / "v1" / "locks").iterdir()) == []


COUNT_UP = """
import sys, pathlib
from gossamer.runtime.store import Store
folder, number = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
store = Store(folder, 1 << 20)
for _ in range(200):
    with store.lock("counter"):
        number.write_text(str(int(number.read_text()) + 1))
"""


def test_lock_excludes_while_its_file_comes_and_goes(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    processes = [start_python(COUNT_UP, tmp_path / "cache", tmp_path / "number") for _ in range(4)]
    assert [process.communicate() and process.returncode for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "800"


def test_digest_is_the_same_in_every_process() -> None:
    key = ("attention", "causal", (64, 1.5, None, True), "é")
    code = f"from gossamer.runtime.cache import digest_of; print(digest_of({key!r}))"
    assert start_python(code).communicate()[0].strip() == digest_of(key)
    assert len({digest_of(k) for k in (key, (*key, 1), ("1",), (1,), (1.0,), (True,), ((1,),))}) == 7


# ---- many threads ----


def in_threads(count: int, work: Callable[[], object]) -> list[object]:
    ready = threading.Barrier(count)

    def run() -> object:
        ready.wait()
        return work()

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(run) for _ in range(count)]
    return [future.exception() or future.result() for future in futures]


def test_threads_share_one_build(store: Store) -> None:
    cache, built = Cache(store), []

    def build() -> Artifact:
        built.append(1)
        return make_artifact()

    results = in_threads(32, lambda: cache.get_or_build(KEY, build))
    assert built == [1]
    assert len({id(result) for result in results}) == 1


class CountedKey:
    """A key that knows how often it was looked up."""

    def __init__(self) -> None:
        self.looked_up = 0
        self.enough = threading.Event()

    def __hash__(self) -> int:
        self.looked_up += 1
        if self.looked_up == 1 + 8:  # the builder enters it, eight threads ask for it
            self.enough.set()
        return 1


def test_exception_reaches_every_waiter_and_is_forgotten() -> None:
    flights: SingleFlight[str] = SingleFlight()
    key, calls = CountedKey(), []

    def fail() -> str:
        calls.append(1)
        key.enough.wait()
        raise ValueError("no kernel")

    results = in_threads(8, lambda: flights.run(key, fail))
    assert calls == [1]
    assert [str(result) for result in results] == ["no kernel"] * 8
    assert flights.run(key, lambda: "fine") == "fine"


def test_failed_build_is_not_cached(store: Store) -> None:
    cache = Cache(store)

    def fail() -> Artifact:
        raise ValueError("no kernel")

    for _ in range(2):
        with pytest.raises(ValueError, match="no kernel"):
            cache.get_or_build(KEY, fail)
    assert cache.get_or_build(KEY, make_artifact) == make_artifact()


def test_waiter_takes_over_from_an_interrupted_builder() -> None:
    flights: SingleFlight[str] = SingleFlight()
    started, leave = threading.Event(), threading.Event()

    def interrupted() -> str:
        started.set()
        leave.wait()
        raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(flights.run, "key", interrupted)
        started.wait()
        second = pool.submit(flights.run, "key", lambda: "built")
        leave.set()
        assert second.result() == "built"
    assert isinstance(first.exception(), KeyboardInterrupt)


# ---- the command line's functions ----


def test_info_list_verify_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("GOSSAMER_CACHE_SIZE", "1M")
    assert cache_module.info() == cache_module.Info(str(tmp_path / "cache"), 0, 0, 1 << 20)
    assert (cache_module.list_artifacts(), cache_module.verify(), cache_module.clear()) == ([], (0, 0), 0)

    cache = Cache()
    for age, key in enumerate((KEY, OTHER)):
        cache.get_or_build(key, lambda key=key: make_artifact(f"kernel_{key[0]}"))
        cache.link(digest_of(key), key)
        os.utime(object_file(tmp_path / "cache", key), (1000 + age, 1000 + age))
    assert [(listed.kernels, listed.target) for listed in cache_module.list_artifacts()] == [
        (("kernel_b",), "cpu"),
        (("kernel_a",), "cpu"),
    ]
    assert [entry.used for entry in cache.store.entries()] == [1001, 1000]  # looking is not using
    assert cache_module.info().artifacts == 2
    assert cache_module.verify() == (2, 0)

    flip(object_file(tmp_path / "cache"), 50)
    with pytest.warns(CacheWarning):
        assert cache_module.verify() == (1, 1)
    assert cache.store.resolve(digest_of(KEY)) is None
    assert cache.store.resolve(digest_of(OTHER)) == OTHER
    assert cache_module.clear() == 1
    assert cache_module.info().artifacts == 0

"""Environment variables: typed, few, and documented as they are."""

import re
from pathlib import Path

import pytest

from gossamer.ir.errors import InputError
from gossamer.runtime import knobs

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "environment.md").read_text()


def test_page_documents_every_variable_and_no_other() -> None:
    assert re.findall(r"^\| `(GOSSAMER_\w+)` \|", PAGE, re.MULTILINE) == [k.name for k in knobs.KNOBS]
    assert set(re.findall(r"GOSSAMER_\w+", PAGE)) == {k.name for k in knobs.KNOBS}
    assert len(knobs.KNOBS) < 10


def test_code_names_no_other_variable() -> None:
    folders = ("ir", "passes", "codegen", "runtime", "frontend")
    texts = [file.read_text() for folder in folders for file in (ROOT / folder).glob("*.py")]
    assert set(re.findall(r"GOSSAMER_\w+", "".join(texts))) == {k.name for k in knobs.KNOBS}


@pytest.mark.parametrize(
    ("knob", "text", "value"),
    [
        (knobs.CACHE_DIR, "/a/b", Path("/a/b")),
        (knobs.CACHE_SIZE, "65536", 65536),
        (knobs.CACHE_SIZE, "0", 0),
        (knobs.CACHE_SIZE, "64k", 65536),
        (knobs.CACHE_SIZE, "2G", 2 << 30),
        (knobs.NUM_THREADS, "3", 3),
        (knobs.LOG, "4", 4),
    ],
)
def test_value_is_read(knob: knobs.Knob, text: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(knob.name, text)
    assert knob.get() == value
    assert knob.get() == value


def test_relative_cache_folder_is_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE_DIR", "here")
    assert knobs.CACHE_DIR.get() == Path.cwd() / "here"


@pytest.mark.parametrize(
    ("knob", "text", "expected"),
    [
        (knobs.CACHE_SIZE, "lots", "a number of bytes such as 65536, 512M or 2G"),
        (knobs.CACHE_SIZE, "-1", "a number of bytes such as 65536, 512M or 2G"),
        (knobs.NUM_THREADS, "0", "an integer of at least 1"),
        (knobs.LOG, "5", "an integer from 0 to 4"),
        (knobs.LOG, "verbose", "an integer from 0 to 4"),
    ],
)
def test_bad_value_names_the_variable(
    knob: knobs.Knob, text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(knob.name, text)
    message = (
        f"environment variable {knob.name}: expected {expected}; got '{text}'. Set it to {expected}, or unset"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        knob.get()


@pytest.mark.parametrize("empty", [True, False])
def test_unset_or_empty_is_the_default(empty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for knob in knobs.KNOBS:
        monkeypatch.setenv(knob.name, "") if empty else monkeypatch.delenv(knob.name, raising=False)
    assert knobs.CACHE_DIR.get().name == "gossamer"
    assert (knobs.CACHE_SIZE.get(), knobs.LOG.get()) == (1 << 30, 0)
    assert knobs.NUM_THREADS.get() >= 1


def test_log_prints_what_its_level_asks_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GOSSAMER_LOG", "2")
    for level in (knobs.LOG_CACHE, knobs.LOG_TIMINGS, knobs.LOG_IR, knobs.LOG_SOURCE):
        knobs.log(level, f"level {level}")
    assert capsys.readouterr().err == "gossamer: level 1\ngossamer: level 2\n"

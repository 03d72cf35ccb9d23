"""Every example of ir/README.md: sessions are run, texts are read, verified and spelled again."""

import doctest
import re
from pathlib import Path

import pytest

import gossamer
from gossamer import testing

README = (Path(gossamer.__file__).parent / "ir" / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def example(level: str) -> str:
    """The first example of a level."""
    return next(text for name, text in BLOCKS if name == level)


@pytest.mark.parametrize(("level", "text"), BLOCKS, ids=[level for level, _ in BLOCKS])
def test_example_reads_and_spells(level: str, text: str) -> None:
    value = testing.parse(text)
    testing.verify(value)
    assert testing.to_text(value).strip() == text.strip()


def test_every_level_has_an_example() -> None:
    assert [level for level, _ in BLOCKS] == ["mask", "score", "graph", "kernel"]


def test_sessions_run() -> None:
    names = {"example": example}
    parsed = doctest.DocTestParser().get_doctest(README, names, "ir/README.md", "ir/README.md", 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    out: list[str] = []
    runner.run(parsed, out=out.append)
    assert runner.tries > 10 and runner.failures == 0, "".join(out)

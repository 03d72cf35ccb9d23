"""Every example of README.md and docs/*.md is run, and prints what stands below it.

A page's ```python blocks run in order in one namespace. A ```text block right after one is what it
printed: `...` stands for what was left out, white space may be broken anywhere. Of the ```sh blocks,
commands of `gossamer` run in a folder of their own, and targets of `make` must exist.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n?(\n?)", re.DOTALL | re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def blocks(page: Path) -> Iterator[tuple[str, str, int, bool]]:
    """(language, text, line, whether it follows the block before at once) of every fenced block."""
    text, end = page.read_text(), -1
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield found[1], found[2], line, not text[end : found.start()].strip()
        end = found.end()


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_examples(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if re.search(r"^import jax$", page.read_text(), re.MULTILINE):
        pytest.importorskip("jax_tvm_ffi")
    if "torch._dynamo" in page.read_text():  # which counts what a process has compiled
        dynamo = pytest.importorskip("torch._dynamo")
        dynamo.reset()
        dynamo.utils.counters.clear()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    printed, runs = "", False
    for language, text, line, follows in blocks(page):
        if language == "text" and follows and runs:
            same = doctest.OutputChecker().check_output(text, printed, FLAGS)
            assert same, f"{named(page)}:{line} expected\n{text}\ngot\n{printed}"
        runs = language == "python"
        if runs:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):  # line numbers are those of the page
                exec(compile("\n" * line + text, str(page), "exec"), names)
            printed = out.getvalue()


COMMANDS = [
    (page, c) for page in PAGES for kind, text, *_ in blocks(page) if kind == "sh" for c in text.splitlines()
]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{named(p)}:{c}" for p, c in COMMANDS])
def test_commands(page: Path, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = shlex.split(command, comments=True)
    if words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[:1] == ["python"]:
        assert (ROOT / words[1]).is_file()
    if words[:1] == ["gossamer"] and words[1] not in ("doctor", "bench"):  # these look at the machine
        from typer.testing import CliRunner

        from gossamer.frontend.cli.main import app

        monkeypatch.chdir(tmp_path)
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link, _ in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []

"""The examples run, at a small size, from any folder."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(folder: Path, name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    tested = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tested] == []


def test_longformer_bytes(tmp_path: Path) -> None:
    picture = tmp_path / "mask.png"
    said = run(tmp_path, "longformer_bytes.py", "--bytes", "300", "--picture", str(picture))
    (line,) = [line for line in said.splitlines() if line.startswith("largest difference")]
    difference = line.partition(": ")[2].partition(",")[0]
    assert float(difference) < 1e-4
    assert "term 0" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_quickstart(tmp_path: Path) -> None:
    said = run(tmp_path, "quickstart.py")
    titles = ["capture", "IR: ", "IR after", "kernel: ", "largest error"]
    places = [said.index(f"---- {title}") for title in titles]
    assert places == sorted(places)
    assert "kernel @attention" in said


def test_train_bytes(tmp_path: Path) -> None:
    picture = tmp_path / "losses.png"
    small = ("--steps", "8", "--length", "70", "--batch", "2")
    said = run(tmp_path, "train_bytes.py", *small, "--picture", str(picture))
    assert "the curves agree within noise" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_flex_drop_in(tmp_path: Path) -> None:
    said = run(tmp_path, "flex_drop_in.py", "--length", "300")
    assert "BlockMask(shape=(1, 1, 300, 300)" in said
    assert "output (1, 8, 300, 64)" in said


def test_whole_model(tmp_path: Path) -> None:
    said = run(tmp_path, "whole_model.py", "--layers", "1", "--length", "200", "--rounds", "1")
    assert "compiled attention at" in said and "compiled experts at" in said and "left" not in said
    assert float(said.partition("relative to their norms: ")[2].split()[0]) < 1e-4


@pytest.mark.parametrize(
    "name", ["longformer_bytes.py", "flex_drop_in.py", "train_bytes.py", "whole_model.py"]
)
def test_examples_explain_their_options(name: str, tmp_path: Path) -> None:
    assert "--help" in run(tmp_path, name, "--help")

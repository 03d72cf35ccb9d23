"""gossamer.testing: passes are run, checked, compared; from outside the repository too."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from gossamer import testing
from gossamer.ir.errors import InputError, MissingDependencyError, ParseError, VerifyError
from gossamer.ir.graph import Graph, Op
from gossamer.passes import pipeline

GRAPH = """
graph @f(%a: f32[n, 4], %b: f32[4, n]) {
  %c = matmul %a, %b : f32[n, n]
  %d = softmax %c : f32[n, n]
  return %d
}
"""
KERNEL = """
kernel @double(x: f32[n] in, y: f32[n] out) grid(t: (n + 3) // 4) axes(i: 4) lanes i {
  let base = 4 * t
  tile X: f32[i] = load x[base + i] where base + i < n else 0
  for u in 0 .. 1 {
    tile T: f32[i] = X + i
    X = T + X - i
  }
  store y[base + i] = X over i where base + i < n
}
"""


def doubled(graph: Graph) -> Graph:
    """A pass: softmax twice."""

    def twice(op: Op) -> list[Op] | None:
        if op.kind != "softmax":
            return None
        name, out = f"{op.output.name}_{len(graph.ops)}", op.output
        return [replace(op, outputs=(replace(out, name=name),)), Op("softmax", (name,), (out,))]

    return graph.map_ops(twice)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        (GRAPH, "Graph"),
        (KERNEL, "Kernel"),
        ("# a comment\n" + KERNEL, "Kernel"),
        ("program {\n}\n", "Program"),
        ("mask(p0) { q - k <= p0 }", "Mask"),
        ("score() { 2 * score }", "ScoreMap"),
    ],
)
def test_parse_reads_every_level(text: str, level: str) -> None:
    value = testing.parse(text)
    assert type(value).__name__ == level
    assert testing.parse(testing.to_text(value)) == value
    testing.verify(value)


def test_other_values_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected a graph, kernel, program, mask or score map, .* got int"):
        testing.to_text(3)  # type: ignore[arg-type]


def test_parse_names_what_it_expects() -> None:
    with pytest.raises(
        ParseError, match="expected text that starts with graph, kernel, program, mask, score"
    ):
        testing.parse("module {}")


def test_run_pass_checks_what_goes_in_and_comes_out() -> None:
    after = testing.run_pass(GRAPH, doubled)
    assert [op.kind for op in after.ops] == ["matmul", "softmax", "softmax"]
    with pytest.raises(VerifyError, match="%b is used before it is made"):
        testing.run_pass(GRAPH.replace(", %b: f32[4, n]", ""), doubled)
    with pytest.raises(VerifyError, match="%c is used before it is made"):
        testing.run_pass(GRAPH, lambda g: replace(g, ops=g.ops[1:]))
    with pytest.raises(VerifyError, match="attrs: axis"):
        testing.run_pass(GRAPH, lambda g: g.map_ops(_reduced))


def _reduced(op: Op) -> Op | None:
    return replace(op, kind="reduce").with_attrs(op="sum") if op.kind == "softmax" else None


def test_run_pass_wants_values_that_come_back_from_text() -> None:
    with pytest.raises(AssertionError, match="does not come back from its text"):
        testing.run_pass(GRAPH, lambda g: g.map_ops(lambda op: op.with_attrs(note=[1]) and _noted(op)))


def _noted(op: Op) -> Op:
    class Loud(str):
        """A string that is not equal to its text."""

        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            return self is other

    return op.with_attrs(note=Loud("x"))


def test_run_pass_and_pipeline_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def noted(name: str):
        def run(graph: Graph) -> Graph:
            seen.append(name)
            return doubled(graph)

        return run

    passes = [(name, noted(name)) for name in ("one", "two", "three")]
    monkeypatch.setattr(pipeline, "PIPELINE", passes, raising=False)
    assert len(testing.run_pass(GRAPH, "two").of_kind("softmax")) == 2
    assert len(testing.run_pipeline(GRAPH, stop="two").of_kind("softmax")) == 4
    testing.run_pipeline(GRAPH, start="two")
    assert seen == ["two", "one", "two", "two", "three"]
    with pytest.raises(InputError, match=r"expected a pass of the pipeline \(one, two, three\); got 'four'"):
        testing.run_pass(GRAPH, "four")
    with pytest.raises(InputError, match="expected two at or before one; got one -> two -> three"):
        testing.run_pipeline(GRAPH, start="two", stop="one")


def test_assert_same_ignores_names() -> None:
    testing.assert_same(GRAPH, GRAPH.replace("%c", "%scores").replace("%a", "%left"))
    renamed = (
        KERNEL.replace("base", "start").replace("X", "Tile").replace("u in", "w in").replace("[i]", "[lane]")
    )
    renamed = renamed.replace("i: 4", "lane: 4").replace("lanes i", "lanes lane").replace("+ i", "+ lane")
    renamed = (
        renamed.replace("- i", "- lane")
        .replace("over i", "over lane")
        .replace("t: (", "cell: (")
        .replace("* t", "* cell")
    )
    testing.assert_same(KERNEL, renamed)
    testing.assert_same(
        "mask(p0) { q - k <= p0 }", "mask(p0) { q <= k + p0 }".replace("q <= k + p0", "q - k <= p0")
    )


def test_assert_same_shows_a_diff() -> None:
    with pytest.raises(AssertionError) as error:
        testing.assert_same(KERNEL, KERNEL.replace("X + i", "X + 2 * i"))
    lines = str(error.value).splitlines()
    assert lines[0] == "not the same up to renaming:"
    assert "-    tile t1: f32[a0] = a0 + t0" in lines and "+    tile t1: f32[a0] = 2 * a0 + t0" in lines
    with pytest.raises(AssertionError, match="-kernel @double") as error:
        testing.assert_same(KERNEL, KERNEL.replace("@double", "@triple"))
    with pytest.raises(AssertionError, match="expected values of one level; got Graph and Kernel"):
        testing.assert_same(GRAPH, KERNEL)


def test_assert_same_sees_which_name_is_meant() -> None:
    one = GRAPH.replace("return %d", "return %c")
    with pytest.raises(AssertionError, match="-  return %v3"):
        testing.assert_same(GRAPH, one)


def test_assert_equivalent() -> None:
    testing.assert_equivalent(KERNEL, KERNEL.replace("X + i", "i + X"))
    with pytest.raises(AssertionError, match="y and y differ"):
        testing.assert_equivalent(KERNEL, KERNEL.replace("X + i", "X + 2 * i"))
    with pytest.raises(AssertionError, match="d and d differ"):
        testing.assert_equivalent(GRAPH, testing.run_pass(GRAPH, doubled))


def test_interpret_takes_text() -> None:
    x = np.arange(6, dtype=np.float32)
    assert testing.interpret(KERNEL, {"x": x})["y"].tolist() == (2 * x).tolist()


def test_random_arguments_fit() -> None:
    made = testing.random_arguments(testing.parse(GRAPH), lengths={"n": 3})
    assert made["a"].shape == (3, 4) and made["b"].shape == (4, 3) and made["a"].dtype == np.float32
    again = testing.random_arguments(testing.parse(GRAPH), lengths={"n": 3})
    np.testing.assert_array_equal(made["a"], again["a"])


@settings(max_examples=20, deadline=None)
@given(testing.masks(max_length=60))
def test_drawn_masks_come_back_and_are_dense_somewhere(mask) -> None:
    assert testing.parse(testing.to_text(mask)) == mask.ir
    assert mask.to_dense(37, 60).shape == (37, 60)


@settings(max_examples=15, deadline=None)
@given(testing.graphs())
def test_drawn_graphs_are_the_same_under_other_names(graph: Graph) -> None:
    testing.assert_same(graph, graph.renamed({name: f"z_{name}" for name in graph.values}))


@settings(max_examples=8, deadline=None)
@given(testing.kernels())
def test_drawn_kernels_are_the_same_under_canonical_names(kernel) -> None:
    from gossamer.ir.rename import canonical

    testing.assert_same(kernel, canonical(kernel))
    arguments = testing.random_arguments(kernel, lengths={"n": 5, "m": 9})
    testing.assert_equivalent(kernel, canonical(kernel), arguments)


def test_strategies_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gossamer\[dev\]'"):
        testing.kernels()


def test_works_from_outside_the_repository(tmp_path: Path) -> None:
    code = f"""
from gossamer import testing

def test_pass():
    graph = testing.parse({GRAPH!r})
    testing.assert_same(testing.run_pass(graph, lambda g: g), graph)
"""
    (tmp_path / "test_mine.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

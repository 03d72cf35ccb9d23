"""Comparisons with columns alone on one side: the same truth, one operation an element."""

import itertools

import pytest
import sympy

from gossamer.ir.expr import integer, parse
from gossamer.passes.compare import separated

NAMES = {name: integer(name) for name in ("row", "col", "row0", "col0", "p0")}
CASES = (
    "row - col <= p0",
    "col - row < 9",
    "abs(row - col) <= 3 or 0 < p0",
    "2 * row + p0 == 2 * col",
    "-col0 > row0 - 6",
    "abs(row - col) <= p0",
    "9 > abs(row - col)",
    "row * col <= p0",
    "row <= p0",
)


@pytest.mark.parametrize("text", CASES)
def test_same_truth_and_columns_on_one_side(text):
    before = parse(text, NAMES)
    after = separated(before, lambda s: s.name[:3] == "col")
    names = sorted(before.free_symbols | after.free_symbols, key=str)
    for values in itertools.product((-7, -2, 0, 1, 3, 8), repeat=len(names)):
        at = dict(zip(names, values, strict=True))
        assert bool(before.xreplace(at)) == bool(after.xreplace(at))
    for comparison in after.atoms(sympy.core.relational.Relational):
        sides = [{s.name[:3] for s in side.free_symbols} for side in comparison.args]
        mixed = any({"row", "col"} <= side for side in sides)
        assert not mixed or text.startswith("row * col")

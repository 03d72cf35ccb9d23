"""gossamer.jit: attention found in programs however they spell it, and left alone where it is something else."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import gossamer
from gossamer.frontend import graph_site
from gossamer.runtime.driver import compilations

_SPEC = importlib.util.spec_from_file_location(
    "gossamer_tests_jit_programs", Path(__file__).with_name("jit_programs.py")
)
PROGRAMS = sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(PROGRAMS)
SPELLINGS, inputs = PROGRAMS.SPELLINGS, PROGRAMS.inputs
INF = math.inf


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def bounds(monkeypatch):
    """What the attentions found were bound to: masks, scales, maps."""
    found = []
    bound = graph_site.Site.bound

    def noted(self, *args):
        found.append(bound(self, *args))
        return found[-1]

    monkeypatch.setattr(graph_site.Site, "bound", noted)
    return found


def check(program, *args, sites=1, **kwargs):
    """The compiled program against the original, in float32 and float64; the report of the first."""
    exact = program(*args, **kwargs)
    f = gossamer.jit(program)
    ours = f(*args, **kwargs)
    report = f.report()
    assert [len(report.compiled), len(report.left)] == [sites, 0], report
    assert ours.shape == exact.shape and ours.stride() == exact.stride() and ours.dtype == exact.dtype
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13, equal_nan=True)
    narrow = [a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.float64 else a for a in args]
    plain, ours = program(*narrow, **kwargs), f(*narrow, **kwargs)
    allowed = 2 * (plain - exact).abs().nan_to_num().max() + torch.finfo(torch.float32).eps * exact.abs().nan_to_num().max()
    assert (ours.isnan() == exact.isnan()).all()
    assert (ours - exact).abs().nan_to_num().max() <= allowed
    return report


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    report = check(SPELLINGS[name], *inputs(torch.float64))
    assert "jit_programs.py:" in str(report) and str(report).startswith("compiled attention at ")


CLOSED = ["sliding_window", "band_of_triangles", "matmul_tril", "blocks_and_strides", "alibi", "in_place"]


@pytest.mark.parametrize("name", CLOSED)
def test_masks_of_the_graph_are_closed_forms(name, bounds):
    gossamer.jit(SPELLINGS[name])(*inputs(torch.float32))
    (bound,) = bounds
    assert bound.captures == () and bound.mask != "true"
    assert bound.empty == "none"  # isl has proven that every row has a key


def test_a_dense_sliding_window_becomes_one_progression_a_row(bounds):
    gossamer.jit(SPELLINGS["sliding_window"])(*inputs(torch.float32))
    mask = gossamer.Mask(bounds[0].mask, bounds[0].values)
    (term,) = mask.analyze(20, 20).terms
    assert "acsr" in str(term) or "ACSR" in type(term).__name__
    assert mask == gossamer.masks.sliding_window(4, 0)

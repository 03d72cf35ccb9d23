"""Gradients of captured tensors that add up as integers: exact, and the same in any order."""

import math
import re

import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.codegen.triton import emit
from gossamer.frontend.gradients import _from_integers
from gossamer.frontend.score import ScoreMod
from gossamer.ir.errors import UnsupportedError
from gossamer.passes.exact_sums import BINS
from gossamer.passes.pipeline import compile_spec
from gossamer.passes.spec import AttentionSpec, Gradient
from gossamer.runtime.gpu import compile_ahead
from gossamer.runtime.triton_interpreter import run_interpreted
from gossamer.tests.gradient_cases import check_gradients


@pytest.fixture
def in_any_order(monkeypatch):
    """Has a CPU add up the gradients of captured tensors as GPUs do where these must not vary."""
    from gossamer.frontend import gradients

    monkeypatch.setattr(gradients, "adds_in_any_order", lambda device: True)


ORDERS = {
    "pairs": lambda t: lambda s, b, h, q, k: s + t[q - k + 90],
    "keys": lambda t: lambda s, b, h, q, k: s * t[k],
    "rows": lambda t: lambda s, b, h, q, k: s + t[q],
    "one": lambda t: lambda s, b, h, q, k: s * t[h],
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_rule(name, dtype, in_any_order):
    t = torch.randn(180, dtype=torch.float64)
    check_gradients(
        81, 90, masks.strided(8, 5), captures=[t], score=ORDERS[name], dtype=dtype, deterministic=True
    )


@pytest.mark.parametrize("power", [-149, -126, -100, 0, 90, 127])
def test_exact_for_all_exponents(power, in_any_order):
    """The probability of a lone key is 1: the gradient of its factor is that of the output times v."""
    q, k = torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8)
    v = torch.zeros(1, 1, 5, 8)
    v[..., 0] = torch.tensor([0.5, -0.25, 0.5, 0.125, 0.125]).ldexp(torch.tensor(power))
    t = torch.ones(1, requires_grad=True)
    out = gossamer.attention(
        q, k, v, mask=lambda b, h, q, k: q == k, prob_mod=lambda p, b, h, i, j: p * t[0], deterministic=True
    )
    (found,) = torch.autograd.grad(out.sum(), t)
    assert float(found) == float(v.double().sum().float())


def test_infinities_and_nan(in_any_order):
    inf, nan = math.inf, math.nan
    v = torch.tensor([1.0, inf, 2.0, -inf, 3.0, nan, inf, -inf])
    t = torch.ones(8, requires_grad=True)
    out = gossamer.attention(
        torch.zeros(1, 1, 8, 1),
        torch.zeros(1, 1, 8, 1),
        v.view(1, 1, 8, 1),
        mask=lambda b, h, q, k: q == k,
        prob_mod=lambda p, b, h, i, j: p * t[i // 2],
        deterministic=True,
    )
    (found,) = torch.autograd.grad(out.sum(), t)
    assert found[:2].tolist() == [inf, -inf] and found[2:4].isnan().all() and not found[4:].any()


def test_limits_are_errors(in_any_order, monkeypatch):
    t = torch.ones(3, requires_grad=True)

    def call(dtype):
        q = torch.randn(1, 1, 5, 4, dtype=dtype)
        out = gossamer.attention(q, q, q, score_mod=lambda s, b, h, i, j: s * t[0], deterministic=True)
        out.sum().backward()

    with pytest.raises(UnsupportedError, match="in float64 have no fixed order"):
        call(torch.float64)
    monkeypatch.setattr("gossamer.passes.exact_sums.ROOM", 25)
    with pytest.raises(UnsupportedError, match=r"hold 25 numbers .* queries times keys are 25"):
        call(torch.float32)


def test_torchs_own_flag_asks_for_it(in_any_order):
    t = torch.ones(3, dtype=torch.float64, requires_grad=True)
    q = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        out = gossamer.attention(q, q, q, score_mod=lambda s, b, h, i, j: s * t[0])
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(UnsupportedError, match="in float64 have no fixed order"):
        out.sum().backward()


# ---- on GPUs ----


def captures_kernel(score, exact):
    """The kernel that adds up the gradient of the one tensor that a score_mod captured."""
    spec = AttentionSpec(
        gossamer.Mask.of(masks.causal()).ir,
        ScoreMod.of(score).ir,
        dtype="f32",
        qk_size=16,
        v_size=16,
        return_lse=True,
        target="cuda:sm_90",
        exact_sums=exact,
    )
    return compile_spec(spec, gradient=Gradient(("t0",))).kernels[-1]


def test_in_tritons_interpreter():
    """Both kinds of sums over the same pairs; runs whose programs start in any order agree to the bit."""
    n, t = 70, torch.randn(300)
    q, k, v, do = (torch.randn(1, 2, n, 16) for _ in range(4))
    scores = (q @ k.mT) / 4 + t[torch.arange(n)[:, None] - torch.arange(n) + 150]
    scores = scores.masked_fill(~torch.ones(n, n).tril().bool(), -math.inf)
    known = dict(q=q, k=k, v=v, do=do, lse=scores.logsumexp(-1), norm=torch.zeros(1, 2, n), t0=t)
    known["delta"] = (scores.softmax(-1) @ v * do).sum(-1)

    def run(exact):
        kernel = captures_kernel(lambda s, b, h, q, k: s + t[q - k + 150], exact)
        shape, dtype = ((3, 300, BINS), torch.int64) if exact else ((3, 300), torch.float32)
        sums = torch.zeros(shape, dtype=dtype)
        run_interpreted(emit(kernel), known | {"dt0": sums, "scale": 0.25})
        return _from_integers(sums.sum(0)) if exact else sums.sum(0)

    exact, rounded = run(True), run(False)
    torch.testing.assert_close(exact, rounded.double(), rtol=1e-5, atol=1e-5)
    assert exact.abs().max() > 0.1


def test_compiles_ahead_of_time():
    t = torch.randn(300)
    score = lambda s, b, h, q, k: s + t[q - k + 150] * t[q] * t[k] * t[5]  # noqa: E731
    binary = compile_ahead(emit(captures_kernel(score, True)), "cuda:sm_90")
    assert re.search(r"atom\.\S*add\.u64", binary.assembly)

"""Where gradients stop, and what slopes are where functions have none: as in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gossamer
import gossamer.jax
from gossamer import masks
from gossamer.frontend.score import ScoreMod
from gossamer.ir.derivative import derivative
from gossamer.ir.evaluate import evaluate
from gossamer.ir.expr import real
from gossamer.ir.kernel_text import to_text
from gossamer.passes.pipeline import compile_spec
from gossamer.passes.spec import AttentionSpec, Gradient

from .gradient_cases import check_gradients

# ---- slopes at kinks: functions of the score alone, at points where some have none ----

KINKS: dict[str, Callable[[Any], Any]] = {
    "relu": torch.relu,
    "clamp from below": lambda s: s.clamp(min=0),
    "clamp from above": lambda s: torch.clamp(s, max=0.5),
    "clamp": lambda s: s.clamp(0, 0.5),
    "clamp with crossed bounds": lambda s: s.clamp(1, -1),
    "clamp_min, clamp_max": lambda s: torch.clamp_min(s, 0) + torch.clamp_max(s, 0.5),
    "elu": lambda s: F.elu(s, alpha=0.5),
    "softplus": lambda s: F.softplus(s, beta=2.0, threshold=1.0),
    "abs": torch.abs,
    "maximum and minimum": lambda s: torch.maximum(s, s * 0.5) * torch.minimum(s * s, s),
    "detach": lambda s: s * s.detach() + s.data,
}


@pytest.mark.parametrize("name", KINKS)
def test_slopes_at_kinks(name: str) -> None:
    made = KINKS[name]
    expr = ScoreMod.trace(lambda s, b, h, q, k: made(s)).ir.expr
    x = torch.tensor([-1.0, 0.0, 0.25, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(made(x).sum(), x)
    found = evaluate(derivative(expr, real("score")), {"score": x.detach().numpy()})
    np.testing.assert_allclose(np.broadcast_to(found, x.shape), slopes.numpy(), atol=1e-15)


@pytest.mark.parametrize("name", KINKS)
def test_nan_goes_where_torch_lets_it(name: str) -> None:
    expr = ScoreMod.trace(lambda s, b, h, q, k: KINKS[name](s)).ir.expr
    x = torch.tensor([np.nan, np.inf, -np.inf, 0.0], dtype=torch.float64)
    np.testing.assert_allclose(evaluate(expr, {"score": x.numpy()}), KINKS[name](x).numpy())


# ---- values that gradients do not pass ----


def _decorated(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return torch.no_grad()(lambda x: x * x)(s) + s


def _with_no_grad(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    with torch.no_grad():
        half = s * 0.5
    return half * s


def _with_inference_mode(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    with torch.inference_mode():
        grown = torch.exp(s)
        with torch.inference_mode(False):
            kept = s * 2
    return grown + kept


@pytest.mark.parametrize("modes", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_only_the_functions_own_switch_counts(modes: Callable[[], Any]) -> None:
    stopped = {
        _decorated: "score() { score + stop_gradient(score ** 2) }",
        _with_no_grad: "score() { score * stop_gradient(0.5 * score) }",
        _with_inference_mode: "score() { 2 * score + stop_gradient(exp(score)) }",
    }
    for function, text in stopped.items():
        with modes():
            found = ScoreMod.trace(function)
            assert ScoreMod.trace(lambda s, b, h, q, k: s * 2).text == "score() { 2 * score }"
        assert found.text == text
        assert type(found.ir).parse(found.text) == found.ir


def test_masks_and_integers_have_nothing_to_stop() -> None:
    limits = torch.arange(4.0)
    mask = gossamer.Mask.trace(lambda b, h, q, k: limits.detach()[h] + q.detach() >= k)
    assert "stop_gradient" not in str(mask)


def _partly_stopped(t: Any, p: Any, unused: Any, fixed: Any) -> Any:
    def score_mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        with torch.no_grad():
            scale = t[q] * 0.3
            weight = fixed[h, k % 2]
        return s * (1 + scale) + t[k] + s.detach() * p[h] + 0 * unused[h] + weight * fixed.detach()[h, 0]

    return score_mod


def test_gradients_pass_the_rest_only() -> None:
    captures = [torch.randn(shape, dtype=torch.float64) for shape in ((90,), (2,), (2,), (2, 2))]
    *_, unused, fixed = check_gradients(
        61, 90, masks.causal(), captures=captures, score=_partly_stopped, dtype=torch.float64
    )
    assert not unused.any() and not fixed.any()


def test_a_map_may_be_linear_in_value_and_not_in_slope() -> None:
    weights = torch.randn(2, dtype=torch.float64)
    prob = lambda w: lambda p, b, h, q, k: p * w[h] + 2 * p.detach()  # noqa: E731
    check_gradients(40, 40, masks.causal(), captures=[weights], prob=prob, dtype=torch.float64, sinks=True)


def test_captures_without_any_gradient_get_zeros() -> None:
    unused = torch.randn(2, dtype=torch.float64)
    score = lambda t: lambda s, b, h, q, k: s + 0 * t[h]  # noqa: E731
    found = check_gradients(20, 20, masks.causal(), captures=[unused], score=score, dtype=torch.float64)
    assert not found[3].any()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.gain = nn.Parameter(torch.randn(20)), nn.Parameter(torch.randn(2))

    def score_mod(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        with torch.no_grad():
            scale = self.table[i] * 0.3
        return torch.relu(s.detach() * self.gain[h]) + s * scale + self.table.detach()[j]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return gossamer.attention(q, k, v, mask=masks.causal(), score_mod=self.score_mod)


def test_torch_compile() -> None:
    layer = Layer()
    inputs = [torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3)]
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        wanted = (*inputs, *layer.parameters())
        found.append(torch.autograd.grad(run(*inputs).square().sum(), wanted, materialize_grads=True))
    assert not found[0][3].any() and found[0][4].any()
    torch.testing.assert_close(found[1], found[0])


def test_jax_programs() -> None:
    def attend(q: Any, k: Any, v: Any, gain: Any) -> Any:
        scores = q @ jnp.swapaxes(k, -1, -2) * 0.25
        scores = scores + jax.lax.stop_gradient(scores) * gain[:, None, None]
        return jax.nn.softmax(scores, -1) @ v

    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2, 20, 16)), jnp.float32) for _ in range(3))
    inputs = (q, k, v, jnp.asarray([0.5, -0.3]))
    compiled = gossamer.jax.jit(attend)

    def slopes(run: Callable[..., Any]) -> Any:
        return jax.grad(lambda *x: jnp.square(run(*x)).sum(), (0, 1, 2, 3))(*inputs)

    found, expected = slopes(compiled), slopes(attend)
    assert len(compiled.report().compiled) == 1
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


# ---- what gradients of several reads have in common ----


def _mixture(count: int) -> Callable[[Any], Any]:
    """Of Gaussians of the distance: weights, centres and widths by head."""

    def made(t: Any) -> Any:
        def score_mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            each = ((t[h, m, 0], (q - k - t[h, m, 1]) ** 2 / (2 * t[h, m, 2] ** 2 + 1)) for m in range(count))
            return s + torch.log(sum(torch.exp(w) * torch.exp(-d) for w, d in each) + 1e-3)

        return score_mod

    return made


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
def test_functions_are_computed_once_a_tile(target: str) -> None:
    counts = []
    for count in (1, 2, 4):
        score = ScoreMod.trace(_mixture(count)(torch.randn(2, count, 3))).ir
        spec = AttentionSpec(masks.causal().ir, score, "f32", 16, 16, return_lse=True, target=target)
        *_, kernel = compile_spec(spec, gradient=Gradient(("t0",))).kernels
        counts.append(to_text(kernel).count("exp("))
    assert counts == [4, 8, 16]  # two in the scores, two in all gradients, of each Gaussian


def test_shared_functions() -> None:
    parameters = torch.randn(2, 1, 3, dtype=torch.float64)
    check_gradients(33, 50, masks.causal(), captures=[parameters], score=_mixture(1))

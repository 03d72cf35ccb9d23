"""The pass `differentiate`, its fusion, and the meaning of both in NumPy, against PyTorch's gradients."""

import numpy as np
import pytest
import sympy
import torch

from gossamer import masks
from gossamer.frontend.kernel import AttentionSpec
from gossamer.ir.derivative import derivative
from gossamer.ir.errors import UnsupportedError
from gossamer.ir.evaluate import evaluate
from gossamer.ir.expr import integer, parse, real
from gossamer.ir.graph_interpret import interpret
from gossamer.ir.graph_text import parse as parse_graph
from gossamer.ir.graph_text import to_text
from gossamer.passes.build import build
from gossamer.passes.differentiate import differentiate
from gossamer.passes.fuse_gradients import fuse_gradients

FORMS = [
    "y * tanh(x / y)",
    "min(x, y) * x + max(x, 2 * y)",
    "where(q > 2, x * x, abs(x))",
    "sqrt(x * x + 1) / y",
    "pow(x * x + 1, y)",
    "sigmoid(2 * x) * exp(-x) + exp2(x) * log2(x * x + 1)",
    "log(1 + x * x) * floor(y) + erf(x) * trunc(3 * y)",
    "sin(x) * cos(2 * x) + tan(x / 9)",
    "cast(f32, x) * x",
]


@pytest.mark.parametrize("text", FORMS)
def test_derivatives_are_those_of_differences(text):
    names = {"x": real("x"), "y": real("y"), "q": integer("q")}
    expr = parse(text, names)
    slope = derivative(expr, real("x"))
    rng = np.random.default_rng(np.random.randint(2**31))
    x, y, q = rng.normal(size=64), rng.uniform(0.5, 2, 64), rng.integers(0, 5, 64)
    step = 1e-6
    ends = (evaluate(expr, {"x": x + s, "y": y, "q": q}, floats=np.float64) for s in (step, -step))
    high, low = ends
    wanted = (high - low) / (2 * step)
    got = np.broadcast_to(evaluate(slope, {"x": x, "y": y, "q": q}, floats=np.float64), x.shape)
    near = np.abs(high + low) < 1e3
    smooth = 1e-5 if "cast" not in text else 1.0
    np.testing.assert_allclose(got[near], wanted[near], rtol=smooth, atol=smooth)


def test_a_function_without_a_rule_says_so():
    odd = sympy.gamma(real("x"))
    with pytest.raises(UnsupportedError, match="derivative"):
        derivative(odd, real("x"))


B, HQ, HK, M, N, D = 2, 4, 2, 17, 19, 16


class Case:
    """One attention in float64 with everything that can have a gradient, and PyTorch's gradients of it."""

    def __init__(self, *, linear, sinks):
        generator = torch.Generator().manual_seed(torch.seed())

        def leaf(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        t, w = leaf(HQ), leaf(40)
        score = lambda s, b, h, q, k: s.tanh() * 3 + t[h] * (q - k) * 0.1  # noqa: E731
        prob = lambda p, b, h, q, k: (p if linear else p * p) * w[(q - k).abs()]  # noqa: E731
        spec = AttentionSpec(
            masks.sliding_window(5),
            score_mod=lambda *a: score(*a),
            prob_mod=lambda *a: prob(*a),
            dtype="f64",
            qk_size=D,
            sinks="f64" if sinks else None,
            return_lse=True,
        )
        self.graph = build(spec.ir)
        self.leaves = {
            "q": leaf(B, HQ, M, D),
            "k": leaf(B, HK, N, D),
            "v": leaf(B, HK, N, D),
            "t0": t,
            "w0": w,
        }
        if sinks:
            self.leaves["sinks"] = leaf(HQ)
        q, k, v = (self.leaves[n] for n in "qkv")
        k, v = (x.repeat_interleave(HQ // HK, 1) for x in (k, v))
        h, at, to = torch.arange(HQ)[:, None, None], torch.arange(M)[:, None], torch.arange(N)
        attends = (at - to).abs() <= 5
        scores = score(0.3 * (q @ k.mT), 0, h, at, to).masked_fill(~attends, -torch.inf)
        lse = total = scores.logsumexp(-1)
        if sinks:
            total = torch.logaddexp(lse, self.leaves["sinks"][:, None])
        p = (scores - total[..., None]).exp()
        o = torch.where(attends, prob(p, 0, h, at, to), 0) @ v
        do, dlse = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (o, lse))
        torch.autograd.backward([o, lse], [do, dlse])
        numbers = {"p0": 5, "p1": 5, "scale": 0.3}
        tensors = {**self.leaves, "lse": lse, "o": o, "do": do, "dlse": dlse}
        self.values = numbers | {name: x.detach().numpy() for name, x in tensors.items()}

    def check(self, graph):
        found = interpret(graph, {v.name: self.values[v.name] for v in graph.inputs})
        for name, got in found.items():
            got = got.sum((0, 2)) if name == "dsinks" else got
            np.testing.assert_allclose(got, self.leaves[name[1:]].grad.numpy(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "nonlinear"])
def test_gradients_are_exact(linear, sinks):
    case = Case(linear=linear, sinks=sinks)
    for wanted in (list(case.leaves), ["q"], ["k"], ["v"], ["t0"], ["w0"], ["t0", "w0", "v"]):
        graph = differentiate(case.graph, wanted, ["o", "lse"])
        assert parse_graph(to_text(graph)) == graph
        case.check(graph)
        fused = fuse_gradients(graph)
        assert parse_graph(to_text(fused)) == fused
        assert all(op.kind.startswith(("grad_", "row_norm")) for op in fused.ops)
        case.check(fused)


def test_linear_probabilities_need_no_pass_for_delta():
    plain, squared = Case(linear=True, sinks=False), Case(linear=False, sinks=False)
    kinds = [
        [op.kind for op in fuse_gradients(differentiate(c.graph, ["q", "k"], ["o"])).ops]
        for c in (plain, squared)
    ]
    rest = ["grad_rows", "grad_columns"]
    assert kinds == [rest, ["row_norm", "grad_delta", *rest]]


def test_what_has_no_gradient_says_so():
    graph = build(AttentionSpec(masks.causal(), return_lse=True, return_max=True).ir)
    with pytest.raises(UnsupportedError, match="largest"):
        differentiate(graph, ["q"], ["max", "o"])

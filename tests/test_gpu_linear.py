"""Linear attention on a GPU: the error rule, gradients, states, and FLuRKA."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")
import gossamer  # noqa: E402
from gossamer import feature_maps  # noqa: E402

pytestmark = pytest.mark.gpu

from gossamer.tests import linear_cases as CASES  # noqa: E402


def same(case, tolerance, **more):
    """Kernels on the GPU and the formula in float64 on the CPU, forward and gradients, by relative size."""
    tensors = list(case.tensors(0).values())
    exact = [t.double().requires_grad_() for t in tensors]
    leaves = [t.cuda().requires_grad_() for t in tensors]
    expected = CASES.dense(case, *exact)
    found = CASES.call(case, *leaves, **more)
    weights = [torch.randn(e.shape, dtype=torch.float64) for e in expected]
    wanted = torch.autograd.grad(sum((e * w).sum() for e, w in zip(expected, weights, strict=True)), exact)
    total = sum((f.double() * w.cuda()).sum() for f, w in zip(found, weights, strict=True))
    grads = torch.autograd.grad(total, leaves)
    for one, other in zip((*found, *grads), (*expected, *wanted), strict=True):
        error = float((one.detach().cpu().double() - other.detach()).abs().max())
        assert error <= tolerance * float(other.detach().abs().max()), (error, one.shape)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 0.03), (torch.float16, 0.01), (torch.float32, 1e-5), (torch.float64, 1e-12)],
    ids=str,
)
def test_against_the_formula(dtype, tolerance, causal):
    case = CASES.Case(300, heads=4, key_heads=2, size=64, v_size=48, batch=2, causal=causal, dtype=dtype)
    same(case, tolerance)
    same(dataclasses.replace(case, normalize=False, length=77), tolerance)


def test_segments_side_by_side():
    same(CASES.Case(2500, heads=1, key_heads=1, size=64, v_size=64, dtype=torch.bfloat16), 0.03)


def test_hedgehog():
    weight = feature_maps.orthogonal_projection(32, 32)
    case = CASES.Case(200, size=32, v_size=32)
    q, k, v = case.tensors(0).values()
    maps = feature_maps.hedgehog(weight), feature_maps.hedgehog(weight.cuda())
    expected = gossamer.linear_attention(q, k, v, maps[0], causal=True, backend="reference")
    found = gossamer.linear_attention(q.cuda(), k.cuda(), v.cuda(), maps[1], causal=True)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_flurka():
    x, e = torch.randn(2, 512, 128), torch.randn(64, 512) / 512**0.5
    weights = [torch.randn(128, 128) / 128**0.5 for _ in range(3)]
    q, k, v = ((x @ w).unflatten(2, (4, -1)).transpose(1, 2) for w in weights)
    scores = CASES.phi("relu", q) @ CASES.phi("relu", e @ k).mT
    expected = (scores @ (e @ v) / (scores.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(2)
    given = (t.cuda() for t in (x, *weights, e))
    found = gossamer.flurka(*given, heads=4, feature_map="relu").cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

"""gossamer.jit: linear attention found however programs spell it, and never where it is something else."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import gossamer
from gossamer.frontend.checking import judged
from gossamer.tests import ids
from gossamer.tests import linear_programs as PROGRAMS

SPELLINGS, inputs = PROGRAMS.SPELLINGS, PROGRAMS.inputs


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(call, given):
    leaves = [t.clone().requires_grad_() for t in given]
    out = call(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def same(f, program, given):
    for found, wanted in zip(run(f, given), run(program, given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    program = SPELLINGS[name]
    f = gossamer.jit(program)
    same(f, program, inputs())
    report = f.report()
    assert len(report.compiled) == 1 and not report.left, report
    assert str(report).startswith("compiled linear attention at ") and "linear_programs.py:" in str(report)
    with torch.no_grad():
        given = inputs(33)
        torch.testing.assert_close(f(*given), program(*given), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["running_sums", "matmul_of_states"])
def test_rounding(name):
    program = SPELLINGS[name]
    f = gossamer.jit(program)

    def see(judge, seed):
        given = inputs(dtype=torch.float32, seed=seed)
        exact = program(*(t.double() for t in given))
        judge.see("out", f(*given), exact.numpy(), program(*given))

    with torch.no_grad():
        judged(see)


# ---- mistakes, and relatives ----


def phi(x):
    return F.elu(x) + 1


def masked(q, k, v, diagonal=0, of=phi, eps=1e-3, by=None, rows=False, again=None):
    q, k = phi(q), of(k)
    scores = (q @ k.mT).tril(diagonal)
    weights = scores if by is None else (q @ by(k).mT).tril(diagonal)
    total = weights.sum(-2 if rows else -1, keepdim=True)
    total = total.mT if rows else total
    return scores @ (v if again is None else again(v)) / (total + eps)


def states(q, k, v, within=0.0, least=None, transposed=False, wide=False):
    q, k = phi(q), phi(k)
    total = q @ (k.sum(-2, keepdim=True) + within).mT
    if least is not None:
        total = total.clamp(min=least)
    kv = k.mT @ v
    out = q @ (kv.mT if transposed else kv)
    return out / (total.sum(1, keepdim=True) if wide else total)


CHANGED = [
    (masked, dict(of=lambda x: torch.exp(x) + 0.5), 1, 0),  # another map of keys
    (masked, dict(again=lambda v: v * 2 + 1), 1, 0),
    (masked, dict(diagonal=-1), 0, 1),
    (masked, dict(diagonal=1), 0, 1),
    (masked, dict(by=lambda k: k + 1), 1, 0),  # sums alone: the denominator is torch's
    (masked, dict(rows=True), 1, 0),
    (masked, dict(eps=-0.5), 1, 0),
    (states, dict(), 1, 0),
    (states, dict(within=1e-3), 1, 0),
    (states, dict(least=25.0), 1, 0),
    (states, dict(wide=True), 1, 0),
    (states, dict(transposed=True), 1, 0),  # keys and values exchanged, over another sum
]


@pytest.mark.parametrize(("program", "changes", "compiled", "left"), CHANGED, ids=ids.text)
def test_changed_programs_are_computed_as_they_are_written(program, changes, compiled, left):
    given = inputs()

    def changed(q, k, v):
        return program(q, k, v, **changes)

    f = gossamer.jit(changed)
    with torch.no_grad():
        torch.testing.assert_close(f(*given), changed(*given), rtol=1e-8, atol=1e-10)
    report = f.report()
    assert [len(report.compiled), len(report.left)] == [compiled, left], report


def test_causal_sums_over_all_scores():
    def program(q, k, v):
        q, k = phi(q), phi(k)
        return (q @ k.mT).tril() @ v / (q @ k.sum(-2, keepdim=True).mT)

    f = gossamer.jit(program)
    same(f, program, inputs())
    assert len(f.report().compiled) == 1


def test_sums_that_are_written_to_in_place():
    def program(q, k, v):
        q, k = phi(q), phi(k)
        kv = k.mT @ v
        kv[:, 0] = 0.5
        return q @ kv / (q @ k.sum(-2, keepdim=True).mT)

    f = gossamer.jit(program)
    with torch.no_grad():
        torch.testing.assert_close(f(*inputs()), program(*inputs()))
    assert not f.report().compiled


def test_what_stops_gradients_is_left_alone():
    def program(q, k, v):
        q, k = phi(q), phi(k)
        return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT).detach()

    f = gossamer.jit(program)
    same(f, program, inputs())


def test_products_of_matrices_are_no_attention():
    a, b, c = torch.randn(20, 8), torch.randn(8, 12), torch.randn(12, 5)
    x = torch.randn(2, 20, 8)
    f = gossamer.jit(lambda x: (torch.relu(a) @ b @ c, torch.relu(x) @ b @ c, x @ x.mT @ x))
    f(x)
    assert not f.report().compiled and not f.report().left


def test_attention_is_still_attention():
    f = gossamer.jit(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v)
    with torch.no_grad():
        f(*inputs())
    assert [part.kind for part in f.report().compiled] == ["attention"]

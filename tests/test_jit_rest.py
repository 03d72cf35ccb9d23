"""gossamer.jit(rest=...): what is left of programs, compiled by another backend."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import gossamer
from gossamer.ir.errors import InputError


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.up = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.mT * 8**-0.5).masked_fill(~causal, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + F.gelu(self.up(x))


def model(layers=4):
    return nn.Sequential(*(Layer() for _ in range(layers))).double()


def run(call, x, parameters):
    x = x.clone().requires_grad_()
    out = call(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *parameters])]


def test_results_and_gradients():
    plain, x = model(3), torch.randn(2, 20, 16, dtype=torch.float64)
    f = gossamer.jit(plain, rest="aot_eager")
    parameters = list(plain.parameters())
    for found, wanted in zip(run(f, x, parameters), run(plain, x, parameters), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    assert len(f.report().compiled) == 3 and not f.report().left
    with torch.no_grad():
        x = torch.randn(2, 33, 16, dtype=torch.float64)
        torch.testing.assert_close(f(x), plain(x), rtol=1e-9, atol=1e-10)


def test_pieces_of_identical_layers_are_compiled_once():
    made = []

    @torch._dynamo.register_backend(name="gossamer_test_watched")
    def watched(graph, inputs):
        made.append(graph)
        return graph.forward

    f = gossamer.jit(model(5), rest="gossamer_test_watched")
    with torch.no_grad():
        f(torch.randn(2, 20, 16, dtype=torch.float64))
    assert len(f.report().compiled) == 5
    assert len(made) == 3  # before the first attention, between two, behind the last


def test_inductor():
    plain, x = model(1), torch.randn(2, 20, 16, dtype=torch.float64)
    f = torch.compile(plain, backend="gossamer", options={"rest": "inductor"})
    with torch.no_grad():
        torch.testing.assert_close(f(x), plain(x), rtol=1e-9, atol=1e-10)


def test_experts_between_pieces():
    gate, up, down = (torch.randn(4, 16, 8, dtype=torch.float64) for _ in range(3))

    def program(x, logits):
        weights, ids = logits.softmax(-1).topk(2)
        gates = torch.zeros_like(logits).scatter(1, ids, weights)
        y = x * 2
        h = F.silu(torch.einsum("th,ehi->tei", y, gate)) * torch.einsum("th,ehi->tei", y, up)
        return torch.einsum("te,teh->th", gates, torch.einsum("tei,ehi->teh", h, down)).tanh() + x

    given = torch.randn(13, 16, dtype=torch.float64), torch.randn(13, 4, dtype=torch.float64)
    f = gossamer.jit(program, rest="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(f(*given), program(*given), rtol=1e-9, atol=1e-10)
    assert len(f.report().compiled) == 1


def test_a_backend_that_does_not_exist():
    with pytest.raises(InputError, match=r"gossamer\.jit\.rest: expected a backend .* got 'fast'"):
        gossamer.jit(model(), rest="fast")

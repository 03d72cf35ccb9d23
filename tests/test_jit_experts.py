"""gossamer.jit: mixtures of experts found however programs spell them, left alone where they are others."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import gossamer
from gossamer.frontend.capture.compile import compile_graph

T, H, INNER, EXPERTS, TOP = 13, 16, 24, 4, 2


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Expert(nn.Module):
    def __init__(self, bias=False, gated=True):
        super().__init__()
        self.w1, self.w2 = nn.Linear(H, INNER, bias), nn.Linear(INNER, H, bias)
        self.w3 = nn.Linear(H, INNER, bias) if gated else None

    def forward(self, x):
        h = F.silu(self.w1(x))
        return self.w2(h if self.w3 is None else h * self.w3(x))


class Block(nn.Module):
    """A router, and both kinds of experts: modules of their own, and stacks of matrices."""

    def __init__(self, how, **options):
        super().__init__()
        self.how = how
        self.router = nn.Linear(H, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert(**options) for _ in range(EXPERTS))
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, H) / 4)
        self.up = nn.Parameter(torch.randn(EXPERTS, H, INNER) / 4)
        self.gate = nn.Parameter(torch.randn(EXPERTS, H, INNER) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, H, INNER) / 4)

    def forward(self, x):
        weights, ids = F.softmax(self.router(x), -1).topk(TOP)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.how(self, x, ids, weights)


# ---- as programs write them ----


def loop_of_modules(block, x, ids, weights):
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=EXPERTS).permute(2, 1, 0)
    for e in range(EXPERTS):
        places, tokens = torch.where(mask[e])
        rows = x[None, tokens].reshape(-1, H)
        out.index_add_(0, tokens, (block.experts[e](rows) * weights[tokens, places, None]).to(x.dtype))
    return out


def loop_of_stacks(block, x, ids, weights):
    out = torch.zeros(x.shape[0], H, dtype=x.dtype)
    for e in range(EXPERTS):
        tokens, places = torch.where(ids == e)
        gate, up = F.linear(x[tokens], block.gate_up[e]).chunk(2, dim=-1)
        rows = (F.gelu(gate) * up) @ block.down[e].t()
        out = out.index_add(0, tokens, weights[tokens, places].unsqueeze(-1) * rows)
    return out + x


def loop_with_nonzero(block, x, ids, weights):
    out = x.new_zeros(x.shape)
    for e, expert in enumerate(block.experts):
        tokens, places = (ids == e).nonzero(as_tuple=True)
        out.index_add_(0, tokens, expert(x.index_select(0, tokens)) * weights[tokens, places, None])
    return out


def loop_that_adds_to_rows(block, x, ids, weights):
    weights, ids = F.softmax(block.router(x), -1).topk(TOP)
    weights /= weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for e, expert in enumerate(block.experts):
        tokens, places = torch.where(ids == e)
        out[tokens] += weights[tokens, places, None] * expert(x[tokens])
    return out


def interleaved_halves(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        tokens, places = torch.where(ids == e)
        both = F.linear(x[tokens], block.gate_up[e])
        gate, up = both[..., ::2].clamp(max=1.0), both[..., 1::2]
        rows = F.linear((up + 1) * gate * torch.sigmoid(1.7 * gate), block.down[e])
        out.index_add_(0, tokens, rows * weights[tokens, places, None])
    return out


def all_tokens_one_hot(block, x, ids, weights):
    gates = (F.one_hot(ids, EXPERTS).to(x.dtype) * weights[..., None]).sum(1)
    h = F.silu(torch.einsum("th,ehi->tei", x, block.gate)) * torch.einsum("th,ehi->tei", x, block.up)
    outs = torch.einsum("tei,ehi->teh", h, block.down)
    return torch.einsum("te,teh->th", gates, outs)


def all_tokens_scattered(block, x, ids, weights):
    gates = torch.zeros(x.shape[0], EXPERTS, dtype=x.dtype).scatter(1, ids, weights)
    gate, up = torch.einsum("th,eoh->eto", x, block.gate_up).chunk(2, dim=-1)
    return torch.einsum("eth,te->th", (F.silu(gate) * up) @ block.down.mT, gates)


def all_tokens_combined(block, x, ids, weights):
    gates = torch.einsum("tke,tk->te", F.one_hot(ids, EXPERTS).to(x.dtype), weights)
    h = torch.relu(x @ block.gate)
    return torch.einsum("te,eth->th", gates, torch.matmul(h, block.down.transpose(1, 2)))


def squared_weights(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e, expert in enumerate(block.experts):
        tokens, places = torch.where(ids == e)
        out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, places, None] ** 2)
    return out


def rows_by_booleans(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e, expert in enumerate(block.experts):
        chosen = (ids == e).any(-1)
        weight = torch.where(ids == e, weights, 0).sum(-1, keepdim=True)
        out = torch.where(chosen[:, None], out + expert(x) * weight, out)
    return out


def scattered_rows(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e, expert in enumerate(block.experts):
        tokens, places = torch.where(ids == e)
        rows = expert(x[tokens]) * weights[tokens, places, None]
        out.scatter_add_(0, tokens[:, None].expand(-1, H), rows)
    return out


SPELLINGS = [
    loop_of_modules,
    loop_of_stacks,
    loop_with_nonzero,
    loop_that_adds_to_rows,
    interleaved_halves,
    all_tokens_one_hot,
    all_tokens_scattered,
    all_tokens_combined,
    squared_weights,
    rows_by_booleans,
    scattered_rows,
]


def run(block, call, x):
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = call(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


def check(block, sites=1):
    """Output and gradients in float64, the output in float32 by the error rule; then another length."""
    block, x = block.double(), torch.randn(T, H, dtype=torch.float64)
    f = gossamer.jit(block)
    torch.testing.assert_close(run(block, f, x), run(block, block, x), rtol=1e-9, atol=1e-10)
    report = f.report()
    assert [len(report.compiled), len(report.left)] == [sites, 1 - sites], report
    with torch.no_grad():
        longer = torch.randn(2 * T, H, dtype=torch.float64)
        torch.testing.assert_close(f(longer), block(longer), rtol=1e-9, atol=1e-10)
        exact, block = block(x), block.float()
        plain, ours = block(x.float()), f(x.float())
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed
    return report


@pytest.mark.parametrize("how", SPELLINGS, ids=lambda how: how.__name__)
def test_spelling(how):
    report = check(Block(how))
    assert str(report).startswith("compiled experts at ") and "test_jit_experts.py:" in str(report)


@pytest.mark.parametrize("options", [dict(bias=True), dict(gated=False)], ids=str)
def test_other_experts(options):
    check(Block(loop_of_modules, **options))


def test_matrices_of_modules_are_put_together_again_when_they_change():
    block, x = Block(loop_of_modules).eval(), torch.randn(T, H)
    f = gossamer.jit(block)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(f(x), block(x))
            block.get_parameter("experts.1.w1.weight").mul_(2)
            block.get_parameter("experts.2.w2.weight").data = torch.randn(H, INNER)


# ---- what is left alone ----


def detached(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e, expert in enumerate(block.experts):
        tokens, places = torch.where(ids == e)
        rows = expert.w2(F.silu(expert.w1(x[tokens])).detach())
        out.index_add_(0, tokens, rows * weights[tokens, places, None])
    return out


def exchanged(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e, expert in enumerate(block.experts):
        tokens, places = torch.where(ids == e)
        out.index_add_(0, places, expert(x[tokens]) * weights[tokens, places, None])
    return out


def of_other_tokens(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e, expert in enumerate(block.experts):
        tokens, places = torch.where(ids == e)
        out.index_add_(0, tokens, expert(x[tokens // 2]) * weights[tokens, places, None])
    return out


def onto_something(block, x, ids, weights):
    out = x * 2
    for e, expert in enumerate(block.experts):
        tokens, places = torch.where(ids == e)
        out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, places, None])
    return out


def seen_before_its_end(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e, expert in enumerate(block.experts):
        tokens, places = torch.where(ids == e)
        out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, places, None])
        if e == 2:
            early = out * 1
    return out + early


def an_expert_twice(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e in (0, 1, 1, 3):
        tokens, places = torch.where(ids == e)
        out.index_add_(0, tokens, block.experts[e](x[tokens]) * weights[tokens, places, None])
    return out


def larger_ids(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e, expert in enumerate(block.experts):
        tokens, places = torch.where(ids >= e)
        out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, places, None])
    return out


def normalised_rows(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e, expert in enumerate(block.experts):
        tokens, places = torch.where(ids == e)
        rows = expert.w2(F.softmax(expert.w1(x[tokens]), -1))
        out.index_add_(0, tokens, rows * weights[tokens, places, None])
    return out


def overwritten_rows(block, x, ids, weights):
    out = torch.zeros_like(x)
    for e, expert in enumerate(block.experts):
        tokens, places = torch.where(ids == e)
        first = expert.w1(x[tokens])
        first[:, 3] = 0.5
        out.index_add_(0, tokens, expert.w2(F.silu(first)) * weights[tokens, places, None])
    return out


def half_the_columns(block, x, ids, weights):
    gates = torch.zeros(x.shape[0], EXPERTS, dtype=x.dtype).scatter(1, ids, weights)
    h = torch.relu(torch.einsum("th,eoh->eto", x, block.gate_up)[..., :INNER])
    return torch.einsum("eth,te->th", h @ block.down.mT, gates)


LEFT = {
    detached: "stands detach",
    exchanged: "not of the tokens",
    of_other_tokens: "not of the tokens",
    onto_something: "not zeros",
    seen_before_its_end: "used elsewhere",
    an_expert_twice: "comes twice",
    larger_ids: "no mixture of experts that is known",
    normalised_rows: "between its products",
    overwritten_rows: "written in place",
    half_the_columns: "in part",
}


@pytest.mark.parametrize("how", LEFT, ids=lambda how: how.__name__)
def test_left_alone(how):
    block, x = Block(how).double(), torch.randn(T, H, dtype=torch.float64)
    f = gossamer.jit(block)
    torch.testing.assert_close(run(block, f, x), run(block, block, x), rtol=1e-12, atol=1e-12)
    report = f.report()
    assert not report.compiled and len(report.left) == 1, report
    assert report.left[0].kind == "experts" and LEFT[how] in report.left[0].why, report


def test_choices_that_are_no_routers_are_not_reported():
    matrix = torch.randn(H, 9, dtype=torch.float64)

    def keys(x):  # attention to the nearest keys, and numbers that are sampled at the end
        best = (x @ x.mT).topk(3).indices
        near = torch.zeros(x.shape[0], x.shape[0], dtype=x.dtype).scatter(1, best, 1.0)
        values, ids = ((near @ x) @ matrix).topk(2)
        return values.softmax(-1), ids

    f, x = gossamer.jit(keys), torch.randn(T, H, dtype=torch.float64)
    torch.testing.assert_close(f(x)[0], keys(x)[0])
    assert "experts" not in str(f.report())


def test_a_changed_activation_or_order_is_computed_as_it_is_written():
    def odd(block, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            tokens, places = torch.where(ids == EXPERTS - 1 - e)
            expert = block.experts[e]
            h = torch.tanh(expert.w3(x[tokens])) - 2 * expert.w1(x[tokens])
            out.index_add_(0, tokens, expert.w2(h) * weights[tokens, places, None])
        return out

    check(Block(odd))


def test_torch_compile_captures_loops_too():
    block, x = Block(loop_of_modules).eval(), torch.randn(T, H)
    seen = []

    def spied(graph):
        compiled, parts = compile_graph(graph)
        seen.extend(parts)
        return compiled, parts

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("gossamer.frontend.capture.jit.compile_graph", spied)
        found = torch.compile(block, backend="gossamer", fullgraph=True)(x)
        torch.testing.assert_close(found, block(x))
    assert [type(part).__name__ for part in seen] == ["Compiled"]
    assert not torch._dynamo.config.capture_dynamic_output_shape_ops


def test_rows_that_are_added_to_twice_keep_the_last():
    def twice(block, x, ids, weights):
        out, ids = torch.zeros_like(x), ids // 2
        for e, expert in enumerate(block.experts):
            tokens, places = torch.where(ids == e)
            out[tokens] += weights[tokens, places, None] * expert(x[tokens])
        return out

    block, x = Block(twice).double(), torch.randn(T, H, dtype=torch.float64)
    with torch.no_grad():
        f = gossamer.jit(block)
        torch.testing.assert_close(f(x), block(x), rtol=1e-12, atol=1e-12)
    assert not f.report().compiled


def test_loops_over_the_experts_that_have_tokens():
    def counted(block, x, ids, weights):
        out = torch.zeros_like(x)
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()
        for e, expert in enumerate(block.experts):
            if counts[e]:
                tokens, places = torch.where(ids == e)
                out[tokens] += weights[tokens, places, None] * expert(x[tokens])
        return out

    block, x = Block(counted).double(), torch.randn(T, H, dtype=torch.float64)
    f = gossamer.jit(block)
    with torch.no_grad():
        torch.testing.assert_close(f(x), block(x), rtol=1e-12, atol=1e-12)
    assert any(part.kind == "graph" and "test_jit_experts.py" in part.where for part in f.report().left)

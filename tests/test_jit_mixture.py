"""gossamer.jit: loops over experts and sums over all of them come down to one form, or stay as they are."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import gossamer

H, INNER, E, K = 16, 24, 3, 2
FLAT, BATCH = (13, H), (2, 7, H)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(H, INNER, bias=False), nn.Linear(INNER, H, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)))


class Block(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.router = nn.Linear(H, E, bias=False)
        self.ex = nn.ModuleList(Expert() for _ in range(E))
        self.shared = Expert()
        self.W1 = nn.Parameter(torch.randn(E, H, INNER) / 4)
        self.W2 = nn.Parameter(torch.randn(E, INNER, H) / 4)

    def forward(self, x):
        return self.how(self, x)


def route(b, x):
    w, ids = F.softmax(b.router(x), -1).topk(K)
    return w / w.sum(-1, keepdim=True), ids


def rows_by_masks(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for e in range(E):
        m = ids == e
        t = m.any(-1)
        ww = (w * m).sum(-1)
        out[t] += ww[t, None] * b.ex[e](x[t])
    return out


def one_choice_after_the_other(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for k in range(K):
        for e in range(E):
            m = ids[:, k] == e
            out[m] += w[m, k : k + 1] * b.ex[e](x[m])
    return out


def columns_of_one_nonzero(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for e in range(E):
        nz = (ids == e).nonzero()
        out.index_put_((nz[:, 0],), b.ex[e](x[nz[:, 0]]) * w[nz[:, 0], nz[:, 1]][:, None], accumulate=True)
    return out


def rows_of_a_transposed_nonzero(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for e in range(E):
        t, p = torch.nonzero(ids == e).T
        out.index_add_(0, t, b.ex[e](x[t]) * w[t, p, None])
    return out


def a_row_of_each_choice_filled(b, x):
    w, ids = route(b, x)
    xr = x.repeat_interleave(K, dim=0)
    y = torch.empty_like(xr)
    f = ids.view(-1)
    for i, e in enumerate(b.ex):
        y[f == i] = e(xr[f == i]).to(y.dtype)
    return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


def all_tokens_and_a_residual(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for e in range(E):
        ww = (w * (ids == e)).sum(-1, keepdim=True)
        out = out + ww * b.ex[e](x)
    return x + out + b.shared(x)


def stacked_and_gathered(b, x):
    w, ids = route(b, x)
    y = torch.stack([e(x) for e in b.ex], dim=1)
    y = y.gather(1, ids.unsqueeze(-1).expand(-1, -1, H))
    return (y * w.unsqueeze(-1)).sum(1)


def stacked_and_weighed(b, x):
    w, ids = route(b, x)
    y = torch.stack([e(x) for e in b.ex])
    g = F.one_hot(ids, E).to(x.dtype)
    g = (g * w[..., None]).sum(-2)
    return torch.einsum("ebsh,bse->bsh", y, g)


def batches_of_all_tokens(b, x):
    w, ids = route(b, x)
    g = (F.one_hot(ids, E).to(x.dtype) * w[..., None]).sum(-2)
    h = F.gelu(torch.einsum("bsh,ehi->bsei", x, b.W1))
    y = torch.einsum("bsei,eih->bseh", h, b.W2)
    return torch.einsum("bseh,bse->bsh", y, g)


def one_choice_written_over_a_copy(b, x):
    p = F.softmax(b.router(x), -1)
    ids = p.argmax(-1)
    pm = p.max(-1).values.unsqueeze(-1)
    oh = F.one_hot(ids, E)
    nxt = x.clone()
    for i, e in enumerate(b.ex):
        t = oh[:, :, i].bool()
        nxt[t] = e(x[t])
    return pm * nxt


def chosen_by_where(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for e in range(E):
        m = ids == e
        ww = (w * m).sum(-1)
        out = torch.where(m.any(-1)[:, None], out + b.ex[e](x) * ww[:, None], out)
    return out


def gates_masked(b, x):
    p = F.softmax(b.router(x), -1)
    _, ids = p.topk(K)
    m = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids, True)
    g = p.masked_fill(~m, 0.0)
    g = g / g.sum(-1, keepdim=True)
    out = 0
    for e in range(E):
        out = out + g[..., e : e + 1] * b.ex[e](x)
    return out


def the_last_experts_only(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for e in range(1, 3):
        t, p = torch.where(ids == e)
        out[t] += b.ex[e](x[t]) * w[t, p, None]
    return out


def rows_of_gates_above_zero(b, x):
    w, ids = route(b, x)
    g = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter_(1, ids, w)
    out = torch.zeros_like(x)
    for e in range(E):
        idx = torch.nonzero(g[:, e] > 0).squeeze(-1)
        out[idx] += g[idx, e].unsqueeze(-1) * b.ex[e](x[idx])
    return out


def added_to_a_view(b, x):
    w, ids = route(b, x.view(-1, H))
    out = torch.zeros_like(x)
    fo = out.view(-1, H)
    fx = x.view(-1, H)
    for e in range(E):
        t, p = torch.where(ids == e)
        fo.index_add_(0, t, b.ex[e](fx[t]) * w[t, p, None])
    return out * 2


def the_first_of_each_expert(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    pos = F.one_hot(ids.view(-1), E).cumsum(0).gather(1, ids.view(-1, 1)).view_as(ids)
    keep = pos <= 5
    for e in range(E):
        t, p = torch.where((ids == e) & keep)
        out.index_add_(0, t, b.ex[e](x[t]) * w[t, p, None])
    return out


SPELLINGS = {
    rows_by_masks: FLAT,
    one_choice_after_the_other: FLAT,
    columns_of_one_nonzero: FLAT,
    rows_of_a_transposed_nonzero: FLAT,
    a_row_of_each_choice_filled: FLAT,
    all_tokens_and_a_residual: BATCH,
    stacked_and_gathered: FLAT,
    stacked_and_weighed: BATCH,
    batches_of_all_tokens: BATCH,
    one_choice_written_over_a_copy: BATCH,
    chosen_by_where: FLAT,
    gates_masked: BATCH,
    the_last_experts_only: FLAT,
    rows_of_gates_above_zero: FLAT,
    added_to_a_view: BATCH,
    the_first_of_each_expert: FLAT,
}


def run(block, call, x):
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = call(x)
    (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in block.parameters())]


def report_of(how, shape):
    """What is found, where output and gradients are the program's."""
    block, x = Block(how).double(), torch.randn(*shape, dtype=torch.float64)
    f = gossamer.jit(block)
    for ours, theirs in zip(run(block, f, x), run(block, block, x), strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    return f.report()


@pytest.mark.parametrize("how", SPELLINGS, ids=lambda how: how.__name__)
def test_spelling(how):
    report = report_of(how, SPELLINGS[how])
    assert [p.kind for p in report.compiled] == ["experts"] and not report.left, report


def test_other_lengths_and_a_single_token():
    block = Block(rows_by_masks).double()
    f = gossamer.jit(block)
    with torch.no_grad():
        for tokens in (13, 21, 1):
            x = torch.randn(tokens, H, dtype=torch.float64)
            torch.testing.assert_close(f(x), block(x), rtol=1e-9, atol=1e-10)
    assert f.report().compiled and not f.report().left, f.report()


# ---- what is left as it is ----


def the_same_expert_twice_a_token(b, x):
    w, ids = route(b, x)
    ids = ids // 2
    out = torch.zeros_like(x)
    for e in range(2):
        m = (ids == e).any(-1)
        out[m] += w[m, 0, None] * b.ex[e](x[m])
    return out


def rows_set_twice(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for e in range(E):
        m = (ids == e).any(-1)
        out[m] = w[m, 0, None] * b.ex[e](x[m])
    return out


def other_rows_changed_between(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for e in range(E):
        m = (ids == e).any(-1)
        n = (ids == (e + 1) % E).any(-1)
        out[m] += w[m, 0, None] * b.ex[e](x[m])
        out[n] += 0.5
    return out


def scaled_between(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for e in range(E):
        m = (ids == e).any(-1)
        out[m] += w[m, 0, None] * b.ex[e](x[m])
        out *= 2
    return out


def rows_of_other_tokens(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for e in range(E):
        t, p = torch.where(ids == e)
        out[t - 1] += w[t, p, None] * b.ex[e](x[t])
    return out


def a_sum_seen_early(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    s = []
    for e in range(E):
        m = (ids == e).any(-1)
        out[m] += w[m, 0, None] * b.ex[e](x[m])
        s.append(out.clone())
    return out + s[1]


def an_expert_left_out(b, x):
    w, ids = route(b, x)
    f = ids.view(-1)
    xr = x.repeat_interleave(K, 0)
    y = torch.ones_like(xr)
    for e in range(E - 1):
        y[f == e] = b.ex[e](xr[f == e])
    return (y.view(-1, K, H) * w[..., None]).sum(1)


def another_activation(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    for e in range(E):
        t, p = torch.where(ids == e)
        ex = b.ex[e]
        h = ex.w1(x[t])
        h = F.gelu(h) if e == 1 else F.silu(h)
        out[t] += w[t, p, None] * ex.w2(h)
    return out


def weights_of_other_experts(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    g = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter_(1, ids, w)
    for e in range(E):
        t, _ = torch.where(ids == e)
        out[t] += g[t, (e + 1) % E, None] * b.ex[e](x[t])
    return out


def rows_used_again(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    last = None
    for e in range(E):
        t, p = torch.where(ids == e)
        y = b.ex[e](x[t])
        out[t] += w[t, p, None] * y
        last = y
    return out + last.sum(0)


def tokens_written_between(b, x):
    w, ids = route(b, x)
    out = torch.zeros_like(x)
    x = x.clone()
    for e in range(E):
        t, p = torch.where(ids == e)
        out[t] += w[t, p, None] * b.ex[e](x[t])
        x[t] *= 0.5
    return out


def gates_that_are_not_zero(b, x):
    logits = b.router(x)
    top, ids = logits.topk(K, dim=-1)
    z = torch.full_like(logits, -5.0)
    g = F.softmax(z.scatter(-1, ids, top), -1)
    return sum(g[:, e, None] * b.ex[e](x) for e in range(E))


LEFT = {
    the_same_expert_twice_a_token: "no mixture",
    rows_set_twice: "no mixture",
    other_rows_changed_between: "",
    scaled_between: "",
    rows_of_other_tokens: "",
    a_sum_seen_early: "used elsewhere",
    an_expert_left_out: "something else",
    another_activation: "compute something different",
    weights_of_other_experts: "several indices",
    rows_used_again: "used elsewhere",
    tokens_written_between: "different tokens",
    gates_that_are_not_zero: "no mixture",
}


@pytest.mark.parametrize("how", LEFT, ids=lambda how: how.__name__)
def test_left_alone(how):
    report = report_of(how, FLAT)
    assert not report.compiled and [p.kind for p in report.left] == ["experts"], report
    assert LEFT[how] in report.left[0].why, report


@pytest.mark.parametrize("stops", ["weights", "tokens", "expert"])
def test_gradients_that_stop_inside(stops):
    def loop(b, x):
        w, ids = route(b, x)
        out = torch.zeros_like(x)
        for e in range(E):
            t, p = torch.where(ids == e)
            rows, weights = x[t], w[t, p, None]
            rows = rows.detach() if stops == "tokens" else rows
            weights = weights.detach() if stops == "weights" else weights
            with torch.set_grad_enabled(stops != "expert" or e != 1):
                rows = b.ex[e](rows)
            out[t] += weights * rows
        return out

    report_of(loop, FLAT)


def test_ids_and_weights_that_are_computed_again_behind_the_experts():
    def loop(b, x):
        w, ids = route(b, x)
        out = torch.zeros_like(x)
        for e in range(E):
            t, p = torch.where(ids == e)
            out.index_add_(0, t, b.ex[e](x[t]) * w[t, p, None])
        return out + w.to(x.dtype, copy=True).sum() * ids.clone()[:, :1]

    assert report_of(loop, FLAT).compiled

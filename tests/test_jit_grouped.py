"""gossamer.jit: experts by `grouped_mm` in bfloat16, the dtype in which torch captures it."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import gossamer
from gossamer.tests import ids

T, H, INNER, EXPERTS, TOP = 40, 16, 32, 4, 2


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- how often each expert is chosen ----


def by_histogram(flat):
    return torch.histc(flat.float(), bins=EXPERTS, min=0, max=EXPERTS - 1).cumsum(0).to(torch.int32)


def by_one_hot(flat):
    return F.one_hot(flat, EXPERTS).sum(0).cumsum(0, dtype=torch.int32)


def by_comparison(flat):
    return (flat[:, None] == torch.arange(EXPERTS)).sum(0).cumsum(0).int()


def by_bincount(flat):
    return torch.bincount(flat, minlength=EXPERTS).cumsum(0).to(torch.int32)


def swiglu(both):
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


# ---- as programs write them ----


def added(
    x, ids, weights, first, second, offs_of=by_histogram, act=swiglu, descending=False, beside=False,
    by_token=True, alpha=1, shifted=0,
):  # fmt: skip
    flat = ids.reshape(-1)
    order = torch.argsort(flat, descending=descending)
    tokens, offs = order // TOP, offs_of((flat + shifted) % EXPERTS if shifted else flat)
    inner = act(torch._grouped_mm(x[tokens if by_token else order % x.shape[0]], first, offs=offs))
    rows = F.grouped_mm(inner, second, offs=offs)
    scale = weights.reshape(-1) if beside else weights.reshape(-1)[order]
    return torch.zeros_like(x).index_add_(0, tokens, rows * scale.unsqueeze(-1), alpha=alpha)


def scattered(x, ids, weights, first, second):
    order = torch.argsort(ids.view(-1), stable=True)
    tokens, offs = torch.div(order, TOP, rounding_mode="floor"), by_comparison(ids.view(-1))
    inner = swiglu(torch._grouped_mm(x.index_select(0, tokens), first.mT.contiguous().mT, offs=offs))
    rows = torch._grouped_mm(inner, second, offs=offs) * weights.flatten()[order][:, None]
    return torch.zeros_like(x).scatter_add(0, tokens[:, None].expand(-1, H), rows)


def put_back(x, ids, weights, first, second, back=True):
    flat = ids.flatten()
    _, order = flat.sort(stable=True)
    offs = by_one_hot(flat)
    inner = swiglu(torch._grouped_mm(x.repeat_interleave(TOP, 0)[order], first, offs=offs))
    rows = F.grouped_mm(inner, second, offs=offs)[order.argsort() if back else order]
    return (rows.view(-1, TOP, H) * weights[..., None]).sum(1)


def weighed_first(x, ids, weights, first, second):
    order = torch.argsort(ids.view(-1))
    offs = by_bincount(ids.view(-1))
    rows = x[:, None].expand(-1, TOP, -1).reshape(-1, H)[order]
    rows = F.grouped_mm(swiglu(torch._grouped_mm(rows, first, offs=offs)), second, offs=offs)
    rows = rows * weights.flatten()[order][:, None]
    return rows[torch.argsort(order)].view(-1, TOP, H).sum(1)


def exact(x, ids, weights, first, second, act=swiglu):
    """The formula in float64."""
    x, weights, first, second = (t.double() for t in (x, weights, first, second))
    rows = torch.einsum("tki,tkih->tkh", act(torch.einsum("th,tkhi->tki", x, first[ids])), second[ids])
    return torch.einsum("tkh,tk->th", rows, weights)


def inputs(tokens=T):
    g = torch.Generator().manual_seed(0)
    shapes = [(tokens, H), (tokens, TOP), (EXPERTS, H, 2 * INNER), (EXPERTS, INNER, H)]
    x, weights, first, second = (torch.randn(s, generator=g).div(2).bfloat16() for s in shapes)
    ids = torch.rand(tokens, EXPERTS, generator=g).topk(TOP).indices
    return x, ids, weights, first, second


def judge(found, plain, wanted):
    allowed = 2 * (plain - wanted).abs().max() + torch.finfo(torch.bfloat16).eps * wanted.abs().max()
    assert (found - wanted).abs().max() <= allowed


def run(call, given):
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in given]
    out = call(*leaves)
    weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    floats = [t for t in leaves if t.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), floats)]


@pytest.mark.parametrize("how", [added, scattered, put_back, weighed_first], ids=lambda how: how.__name__)
def test_spelling(how):
    given = inputs()

    def program(x, ids, weights, *matrices):
        torch._check(x.shape[0] == ids.shape[0] == weights.shape[0])  # as those of a router have
        return how(x, ids, weights, *matrices)

    f = gossamer.jit(program)
    for found, plain, wanted in zip(run(f, given), run(how, given), run(exact, given), strict=True):
        judge(found, plain, wanted)
    assert str(f.report()).startswith("compiled experts at ") and "test_jit_grouped.py:" in str(f.report())
    with torch.no_grad():
        longer = inputs(T + 7)
        judge(f(*longer), how(*longer), exact(*longer))
    assert not f.report().left


def geglu(both):
    return F.gelu(both[..., :INNER]) * (both[..., INNER:] + 1)


def overwritten(x, ids, weights, first, second):
    order = torch.argsort(ids.reshape(-1))
    offs = by_histogram(ids.reshape(-1))
    rows = torch._grouped_mm(swiglu(torch._grouped_mm(x[order // TOP], first, offs=offs)), second, offs=offs)
    rows[3] = 1.0
    rows = rows * weights.reshape(-1)[order][:, None]
    return torch.zeros_like(x).index_add_(0, order // TOP, rows)


def test_rows_that_are_written_to_in_place():
    f = gossamer.jit(overwritten)
    with torch.no_grad():
        assert torch.equal(f(*inputs()), overwritten(*inputs()))
    assert not f.report().compiled


def test_another_activation_is_computed_as_it_is_written():
    given = inputs()
    with torch.no_grad():
        f = gossamer.jit(added)
        judge(f(*given, act=geglu), added(*given, act=geglu), exact(*given, act=geglu))
    assert len(f.report().compiled) == 1


LEFT = [
    (added, dict(shifted=1), "not sorted, or counted"),
    (added, dict(descending=True), "not in the order of their experts"),
    (added, dict(beside=True), "not scaled by the weights"),
    (added, dict(by_token=False), "not of the tokens of its choices"),
    (added, dict(alpha=2), "or scaled"),
    (added, dict(act=lambda both: swiglu(both.softmax(-1))), "between its products"),
    (added, dict(offs_of=lambda flat: (by_histogram(flat) + 8) // 8 * 8), "no running sum"),
    (put_back, dict(back=False), "not put back"),
]


@pytest.mark.parametrize(("how", "changes", "why"), LEFT, ids=ids.text)
def test_left_alone(how, changes, why):
    given = inputs()
    f = gossamer.jit(how)
    with torch.no_grad():
        assert torch.equal(f(*given, **changes), how(*given, **changes))
    report = f.report()
    assert not report.compiled and len(report.left) == 1, report
    assert report.left[0].kind == "experts" and why in report.left[0].why, report

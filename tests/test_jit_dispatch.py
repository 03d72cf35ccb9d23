"""gossamer.jit: experts that take tokens from slots of capacities, and those whose slots are others."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import gossamer
from gossamer.tests import ids

T, H, INNER, EXPERTS = 21, 16, 24, 4


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A router, and experts of slots (E, C, H)."""

    def __init__(self, how, capacity=7, **changes):
        super().__init__()
        self.how, self.capacity, self.changes = how, capacity, changes
        self.router = nn.Linear(H, EXPERTS, bias=False)
        self.gate = nn.Parameter(torch.randn(EXPERTS, H, INNER) / 4)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, H) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, H) / 4)

    def experts(self, slots, act=F.silu, crossed=False):
        gate = torch.bmm(slots, self.gate)
        up = torch.einsum("ech,ehi->eci", slots, self.gate if crossed else self.up.mT)
        return torch.einsum("eci,eih->ech", act(gate) * up, self.down)

    def forward(self, x):
        return self.how(self, x, self.router(x), **self.changes)


# ---- as programs write them ----


def gshard(block, x, logits, behind=True, dropped=True, axis=0, act=F.silu):
    """The top two in turn, each counted on its own: DeepSpeed's and fairscale's gates."""
    gates, capacity = logits.softmax(1), block.capacity
    first = gates.argmax(1)
    mask1 = F.one_hot(first, num_classes=EXPERTS)
    second = logits.masked_fill(mask1.bool(), float("-inf")).argmax(1)
    mask2 = F.one_hot(second, num_classes=EXPERTS)
    place1 = torch.cumsum(mask1, dim=axis) - 1
    place2 = torch.cumsum(mask2, dim=0) - 1
    if behind:
        place2 += torch.sum(mask1, dim=0, keepdim=True)
    if dropped:
        mask1 *= torch.lt(place1, capacity)
    mask2 *= torch.lt(place2, capacity)
    at1, at2 = (place1 * mask1).sum(1), (place2 * mask2).sum(1)
    one, two = mask1.to(x.dtype), mask2.type_as(x)
    weight1, weight2 = torch.einsum("se,se->s", gates, one), torch.einsum("se,se->s", gates, two)
    total = torch.clamp(weight1 + weight2, min=torch.finfo(x.dtype).eps)
    weight1, weight2 = weight1 / total, weight2 / total
    slot1, slot2 = F.one_hot(at1, capacity).to(x.dtype), F.one_hot(at2, capacity).to(x.dtype)
    combine = torch.einsum("se,sc->sec", weight1[:, None] * one, slot1)
    combine = combine + torch.einsum("se,sc->sec", torch.einsum("s,se->se", weight2, two), slot2)
    slots = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
    return torch.einsum("sec,ecm->sm", combine, block.experts(slots, act))


def choices_first(block, x, logits, late=0):
    """All first choices before all second ones, in one count; matmuls of flattened slots."""
    tokens, capacity = x.shape[0], block.capacity
    top, ids = logits.topk(2)
    probs = torch.full_like(logits, float("-inf")).scatter_(-1, ids, top).softmax(-1)
    mask = F.one_hot(ids, EXPERTS).permute(1, 0, 2)
    rank = (mask.reshape(2 * tokens, EXPERTS).cumsum(0) - 1).reshape(2, tokens, EXPERTS)
    mask = mask * torch.lt(rank, capacity)
    at = (mask * rank).sum(-1)
    weights = (mask * probs[None]).unsqueeze(3) * F.one_hot(at, capacity + late).unsqueeze(2)[..., late:]
    combine = weights.sum(0)
    slots = combine.bool().permute(1, 2, 0).type_as(x) @ x
    return combine.view(tokens, -1) @ block.experts(slots).view(-1, H)


def tokens_first(
    block, x, logits, strict=True, weighted=True, moved=0, crossed=False, dtype=None, counted=None
):
    """Both choices of a token, then those of the next; conditions on an arange."""
    tokens, capacity = x.shape[0], block.capacity
    weights, ids = logits.softmax(-1).topk(2)
    hot = F.one_hot(ids.reshape(-1), EXPERTS)
    if dtype is not None:
        hot = hot.to(dtype)
    at = hot.cumsum(0) - hot if counted is None else counted(hot).cumsum(0)
    at = (at * hot).sum(-1).view(tokens, 2)
    keep = at < capacity if strict else at <= capacity
    slot = (torch.arange(capacity) == at[..., None]) & keep[..., None]
    spread = F.one_hot(ids, EXPERTS).to(x.dtype)[..., None] * slot.to(x.dtype)[:, :, None]
    dispatch = spread.sum(1)
    shifted = torch.arange(capacity) == at[..., None] + moved
    spread = F.one_hot(ids, EXPERTS).to(x.dtype)[..., None] * shifted.to(x.dtype)[:, :, None]
    combine = torch.einsum("tkec,tk->tec", spread, weights) if weighted else spread.sum(1)
    slots = torch.einsum("tec,th->ech", dispatch, x)
    return torch.einsum("ech,tec->th", block.experts(slots, crossed=crossed), combine)


def switch(block, x, logits):
    """One choice, counted in floats from 1 on."""
    capacity = block.capacity
    gate, ids = logits.softmax(-1).max(-1)
    mask = F.one_hot(ids, EXPERTS).to(x.dtype)
    place = torch.cumsum(mask, dim=0) * mask
    mask = mask * (place <= capacity).to(x.dtype)
    place = ((place - 1) * mask).sum(-1)
    combine = (gate * mask.sum(-1))[:, None, None] * mask[:, :, None]
    combine = combine * F.one_hot(place.long(), capacity)[:, None, :]
    slots = torch.einsum("tec,th->ech", (combine != 0).to(x.dtype), x)
    return torch.einsum("tec,ech->th", combine, block.experts(slots))


def run(block, call, x):
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = call(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


def check(block, sites=1, lengths=()):
    """Output and gradients in float64; then other lengths."""
    block, x = block.double(), torch.randn(T, H, dtype=torch.float64)
    f = gossamer.jit(block)
    for one, other in zip(run(block, f, x), run(block, block, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    report = f.report()
    assert [len(report.compiled), len(report.left)] == [sites, 1 - sites], report
    with torch.no_grad():
        for tokens in lengths:
            x = torch.randn(tokens, H, dtype=torch.float64)
            torch.testing.assert_close(f(x), block(x), rtol=1e-9, atol=1e-10)
    assert [len(f.report().compiled), len(f.report().left)] == [sites, 1 - sites], f.report()
    return report


@pytest.mark.parametrize("how", [gshard, choices_first, tokens_first, switch], ids=lambda how: how.__name__)
def test_spelling(how):
    report = check(Block(how), lengths=(T + 9, T + 14))
    assert str(report).startswith("compiled experts at ") and "test_jit_dispatch.py:" in str(report)


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        (gshard, dict(act=torch.tanh)),
        (gshard, dict(dropped=False, capacity=2 * T)),
        (tokens_first, dict(strict=False)),  # slots say what is kept
        (tokens_first, dict(weighted=False)),
        (tokens_first, dict(crossed=True)),  # gate and up are one matrix
        (tokens_first, dict(dtype=torch.float32)),
        (tokens_first, dict(capacity=2)),
        (choices_first, dict(late=1)),  # the first slots are never taken
    ],
    ids=ids.text,
)
def test_changed_programs_are_computed_as_they_are_written(how, changes):
    check(Block(how, **changes))


LEFT = [
    (gshard, dict(behind=False), "two choices may take the same slot"),
    (gshard, dict(axis=1, dropped=False, capacity=40), "its slots are not counted by expert"),
    (tokens_first, dict(counted=lambda hot: hot.roll(1, 1)), "do not count conditions"),
    (tokens_first, dict(counted=lambda hot: hot * (hot.cumsum(0) > 1)), "may leave out the choice"),
    (tokens_first, dict(counted=lambda hot: 2 * hot), "do not count conditions"),
    (tokens_first, dict(moved=1), "may hold another token"),
    (tokens_first, dict(dtype=torch.bfloat16), "no running counts"),
]


class Groups(Block):
    """Tokens (G, S, H), each group with slots of its own."""

    def forward(self, x):
        return self.how(self, x, self.router(x).softmax(-1), **self.changes)

    def experts(self, slots, rows):
        inner = torch.einsum(f"{rows}h,ehi->{rows}i", slots, self.gate)
        return torch.einsum(f"{rows}i,eih->{rows}h", F.relu(inner), self.down)


def top_two_by_group(block, x, gates, rows="egc", axis=1, behind=True, flipped=False):
    capacity = block.capacity
    mask1 = F.one_hot(gates.argmax(-1), EXPERTS)
    mask2 = F.one_hot(gates.masked_fill(mask1.bool(), -1.0).argmax(-1), EXPERTS)
    place1, place2 = mask1.cumsum(axis) - 1, mask2.cumsum(axis) - 1
    if behind:
        place2 = place2 + mask1.sum(1, keepdim=True)
    combine = 0
    for mask, place in ((mask1, place1), (mask2, place2)):
        mask = mask * (place < capacity)
        slot = F.one_hot((place * mask).sum(-1), capacity).to(x.dtype)
        combine = combine + ((gates * mask).sum(-1)[..., None] * mask)[..., None] * slot[:, :, None]
    dispatch = combine.bool().to(x.dtype)
    dispatch = dispatch.flip(0) if flipped else dispatch
    slots = torch.einsum(f"gsec,gsh->{rows}h", dispatch, x)
    return torch.einsum(f"gsec,{rows}h->gsh", combine, block.experts(slots, rows))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(), None),
        (dict(rows="gec"), None),
        (dict(axis=0), "not counted by expert"),
        (dict(behind=False), "the same slot"),
        (dict(flipped=True), "which is an expert"),
    ],
    ids=ids.text,
)
def test_groups(changes, why):
    block, x = Groups(top_two_by_group, 5, **changes).double(), torch.randn(3, T, H, dtype=torch.float64)
    f = gossamer.jit(block)
    for ours, theirs in zip(run(block, f, x), run(block, block, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    report = f.report()
    assert [len(report.compiled), len(report.left)] == ([1, 0] if why is None else [0, 1]), report
    assert why is None or why in report.left[0].why


@pytest.mark.parametrize(("how", "changes", "why"), LEFT, ids=ids.text)
def test_left_alone(how, changes, why):
    report = check(Block(how, **changes), sites=0)
    assert report.left[0].kind == "experts" and why in report.left[0].why, report


def test_it_takes_no_tensor_of_slots():
    block, x = Block(gshard).eval(), torch.randn(T, H)
    f = gossamer.jit(block)
    with torch.no_grad():
        f(x)
        with torch.profiler.profile(record_shapes=True) as watched:
            f(x)
    shapes = [shape for event in watched.events() for shape in event.input_shapes]
    assert shapes and not any(len(shape) == 3 and shape[-1] == block.capacity for shape in shapes)

"""Routers of many kinds against torch: cosines, two levels, experts that choose, tables of ids, entropy."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer.ir.errors import InputError  # noqa: E402
from gossamer.tests import ids as names  # noqa: E402


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def slopes_agree(mine, theirs, *inputs):
    """Both functions of the inputs have the same gradients."""
    found = []
    for function in (mine, theirs):
        given = [t.clone().requires_grad_() for t in inputs]
        value = function(*given)
        drawn = random(*value.shape, seed=9, dtype=value.dtype)
        found.append(torch.autograd.grad((value * drawn).sum(), given))
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-4)


def cosine(x, vectors, temperature):
    f = torch.nn.functional
    return f.normalize(x, dim=1) @ f.normalize(vectors, dim=1).T * temperature.clamp(max=4.6051702).exp()


@pytest.mark.parametrize("start", [0.5, 7.0])
def test_cosine(start):
    x, vectors, temperature = random(37, 70), random(12, 70, seed=1), torch.tensor([start])
    found = gossamer.route(x, 3, expert_vectors=vectors, temperature=temperature)
    logits = cosine(x, vectors, temperature)
    weights, ids = logits.softmax(-1).topk(3)
    close(found.logits, logits)
    assert torch.equal(found.topk_ids.long(), ids)
    close(found.topk_weights, weights / weights.sum(-1, keepdim=True))

    def mine(*given):
        chosen = gossamer.route(given[0], 3, expert_vectors=given[1], temperature=given[2])
        return torch.cat((chosen.topk_weights, chosen.logits), 1)

    def theirs(*given):
        logits = cosine(*given)
        weights = logits.softmax(-1).gather(1, ids)
        return torch.cat((weights / weights.sum(-1, keepdim=True), logits), 1)

    slopes_agree(mine, theirs, x, vectors, temperature)


def two_levels(logits, group_logits):
    within = logits.unflatten(1, (group_logits.shape[1], -1)).softmax(-1)
    return (within * group_logits.softmax(-1)[..., None]).flatten(1)


@pytest.mark.parametrize("top_groups", [1, 4])
def test_two_levels(top_groups):
    logits, group_logits = 3 * random(29, 12), random(29, 4, seed=1)
    settings = {"top_groups": top_groups, "renormalize": False, "scale": 2.0}
    found = gossamer.route(logits, 3, group_logits=group_logits, **settings)
    scores = two_levels(logits, group_logits)
    open_ = torch.zeros(29, 4).scatter(1, group_logits.topk(top_groups)[1], 1).bool().repeat_interleave(3, 1)
    ids = scores.masked_fill(~open_, -1).topk(3)[1]
    assert torch.equal(found.topk_ids.long(), ids)
    close(found.topk_weights, 2 * scores.gather(1, ids))
    slopes_agree(
        lambda *given: gossamer.route(given[0], 3, group_logits=given[1], **settings).topk_weights,
        lambda *given: 2 * two_levels(*given).gather(1, ids),
        logits,
        group_logits,
    )


@pytest.mark.parametrize("tokens", [1, 37, 1100])
@pytest.mark.parametrize("capacity", [None, 5])
def test_experts_choose(tokens, capacity):
    logits = random(tokens, 6).round(decimals=1 if tokens > 37 else 8)  # equal scores, too
    found = gossamer.route(logits, 2, router="expert_choice", capacity=capacity)
    rows = min(tokens, -(-tokens * 2 // 6) if capacity is None else capacity)
    scores = logits.softmax(-1)
    weights, order = scores.T.float().sort(dim=1, descending=True, stable=True)
    assert found.counts.tolist() == [rows] * 6
    tokens_of = found.token_ids.view(6, rows).long()
    close(scores.T.gather(1, tokens_of).sort(1, descending=True)[0], weights[:, :rows])
    assert (tokens_of.diff() > 0).all()
    if tokens == 37:
        assert torch.equal(tokens_of, order[:, :rows].sort(1)[0])
    close(found.weights, scores.T.gather(1, tokens_of).reshape(-1))
    assert found.expert_ids.tolist() == [e for e in range(6) for _ in range(rows)]


def test_layers_of_experts_that_choose():
    x, up, down = random(40, 16), random(6, 24, 16, seed=1) / 4, random(6, 16, 12, seed=2) / 4

    def mine(logits, x, up, down):
        return gossamer.moe(x, logits, up, down, top_k=2, router="expert_choice")

    def theirs(logits, x, up, down):
        scores = logits.softmax(-1)
        chosen = torch.zeros(6, 40).scatter(1, scores.T.topk(14)[1], 1).T
        gate, value = torch.einsum("th,ech->tec", x, up).chunk(2, -1)
        each = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * value, down)
        return (each * (scores * chosen)[..., None]).sum(1)

    given = (2 * random(40, 6, seed=3), x, up, down)
    close(mine(*given), theirs(*given))
    exact = gossamer.moe(x, given[0], up, down, top_k=2, router="expert_choice", backend="reference")
    close(exact, theirs(*given))
    slopes_agree(mine, theirs, *given)
    chosen = gossamer.route(given[0], 2, router="expert_choice")
    halved = chosen.replace(weights=chosen.weights / 2)
    close(2 * gossamer.experts(x, halved, None, up, down, validate=True), mine(*given))


@pytest.mark.parametrize("order", ["token", "choice"])
@pytest.mark.parametrize("tokens", [37, 300])
def test_which_rows_a_capacity_keeps(order, tokens):
    logits, capacity = random(tokens, 6), tokens // 4
    found = gossamer.route(logits, 3, capacity=capacity, capacity_order=order).topk_ids
    ids = gossamer.route(logits, 3).topk_ids
    queue = ids.reshape(-1) if order == "token" else ids.T.reshape(-1)
    seen, kept = [0] * 6, []
    for asked in queue.tolist():
        kept.append(asked if seen[asked] < capacity else -1)
        seen[asked] += 1
    expected = torch.tensor(kept)
    expected = expected.view(-1, 3) if order == "token" else expected.view(3, -1).T
    assert torch.equal(found.long(), expected) and (found < 0).any()


def test_gradients_pass_a_capacity():
    logits = random(50, 6)
    ids = gossamer.route(logits, 2).topk_ids.long()

    def theirs(given):
        weights = given.softmax(-1).gather(1, ids)
        return weights / weights.sum(-1, keepdim=True)

    slopes_agree(lambda given: gossamer.route(given, 2, capacity=9).topk_weights, theirs, logits)


@pytest.mark.parametrize("capacity", [None, 4])
def test_tables_of_ids(capacity):
    logits = random(20, 4)
    table = torch.tensor([[4, 5, 6, 7], [4, 4, 2, 8]], dtype=torch.int32)
    requests = torch.arange(20) % 4 - 1  # -1 and 2 have no table
    settings = {"remap": table, "request_ids": requests, "num_experts": 9, "capacity": capacity}
    found = gossamer.route(logits.requires_grad_(), 2, **settings)
    ids = logits.topk(2)[1]
    known = (requests >= 0) & (requests < 2)
    expected = torch.where(known[:, None], table.long()[requests.clamp(0, 1)[:, None], ids], ids)
    if capacity is not None:
        for expert in range(9):
            late = (expected.reshape(-1) == expert).nonzero()[capacity:]
            expected.view(-1)[late] = -1
    assert torch.equal(found.topk_ids.long(), expected) and found.num_experts == 9
    found.topk_weights.square().sum().backward()
    mine, logits.grad = logits.grad, None
    weights = logits.softmax(-1).gather(1, ids)
    (weights / weights.sum(-1, keepdim=True)).square().sum().backward()
    close(mine, logits.grad)


@pytest.mark.parametrize("index", [1.0, 1.1])
def test_tokens_of_large_entropy_take_all(index):
    logits = random(60, 8) * torch.linspace(0.1, 6, 60)[:, None]
    settings = {"top_p": 0.6, "min_k": 2, "entropy_threshold": 0.8, "entropy_index": index}
    found = gossamer.route(logits, 8, renormalize=False, **settings).topk_ids
    scores = logits.softmax(-1)
    if index == 1:
        entropy = -(scores * scores.log()).sum(-1)
    else:
        entropy = (1 - (scores**index).sum(-1)) / (index - 1)
    best, ids = scores.sort(descending=True)
    kept = (best.cumsum(-1) - best < 0.6) | (torch.arange(8) < 2) | (entropy >= 0.8)[:, None]
    assert torch.equal(found.long(), torch.where(kept, ids, -1))
    counts = kept.sum(1)
    assert counts.min() >= 2 and (counts == 8).any() and (counts < 8).any()
    if index != 1:
        close(gossamer.entropy_loss(logits, index), entropy.mean())


def test_parts_of_the_best():
    logits = random(30, 8)
    found = gossamer.route(logits, 8, relative_threshold=0.5, renormalize=False).topk_ids
    scores, ids = logits.softmax(-1).sort(descending=True)
    assert torch.equal(found.long(), torch.where(scores >= 0.5 * scores[:, :1], ids, -1))


def test_experts_that_are_known():
    modality = torch.tensor([0, 1, 1, -1, 2, 0])
    chosen = gossamer.Routing.known(modality, 3)
    assert chosen.counts.tolist() == [2, 2, 1] and chosen.token_ids[:5].tolist() == [0, 5, 1, 2, 4]
    with pytest.raises(InputError, match=r"Routing\.expert_ids"):
        gossamer.Routing.known(modality[:, None], 3)


@pytest.mark.parametrize("options", [{}, {"capacity": 3}, {"router": "expert_choice"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_no_tokens(options, dtype):
    logits = random(9, 4).to(dtype).requires_grad_()
    weights = gossamer.route(logits, 2, **options).weights
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weights.square().sum().backward()
    assert logits.grad.dtype == dtype and logits.grad.abs().sum() > 0
    none = gossamer.route(logits[:0], 2, **options)
    assert none.weights.shape == (0,) and none.counts.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "expert_choice", "top_p": 0.5}, "where experts choose"),
        ({"router": "expert_choice", "groups": 2}, "where experts choose"),
        ({"capacity": 2, "capacity_order": "best"}, r"route\.capacity_order"),
        ({"min_k": 1}, r"route\.min_k"),
        ({"entropy_threshold": 0.9}, r"route\.entropy_threshold"),
        ({"expert_vectors": torch.zeros(4, 9)}, r"route\.expert_vectors"),
        ({"expert_vectors": torch.zeros(4, 8).half()}, r"route\.expert_vectors"),
        ({"expert_vectors": torch.zeros(4, 8), "temperature": torch.zeros(2)}, r"route\.temperature"),
        ({"group_logits": torch.zeros(6, 2)}, r"route\.group_logits"),
        ({"group_logits": torch.zeros(5, 3)}, r"route\.groups"),
        ({"group_logits": torch.zeros(5, 2), "router": "sigmoid"}, r"route\.group_logits"),
        ({"remap": torch.zeros(1, 8, dtype=torch.int32)}, r"route\.request_ids"),
        ({"remap": torch.zeros(1, 8), "request_ids": torch.zeros(5).int()}, r"route\.remap"),
        ({"num_experts": 9}, r"route\.num_experts"),
        ({"router": "expert_choice", "scale": 2.0}, "where experts choose"),
        ({"router": "expert_choice", "min_k": 1}, "where experts choose"),
        ({"temperature": 3.0}, r"route\.temperature: expected expert_vectors beside it"),
        ({"scale": math.nan}, r"route\.scale: expected a finite number; got nan"),
        ({"scale": "a"}, r"route\.scale: expected a finite number; got a"),
        ({"top_p": 1.5}, r"route\.top_p: expected a number from 0 to 1; got 1.5"),
        ({"relative_threshold": -0.5}, r"route\.relative_threshold: expected a number from 0 to 1"),
        ({"threshold": math.nan}, r"route\.threshold: expected a finite number"),
        ({"top_p": 0.5, "entropy_threshold": math.inf}, r"route\.entropy_threshold: expected a finite"),
        ({"router": "random", "seed": 2**63}, r"route\.seed: expected an integer of 64 bits"),
        ({"router": "random", "seed": 0.5}, r"route\.seed"),
        ({"router": "random", "token_ids": torch.zeros(5)}, r"route\.token_ids: expected int32 or int64"),
        ({"router": "random", "token_ids": [0] * 5}, r"route\.token_ids: expected a torch.Tensor; got list"),
    ],
    ids=str,
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        gossamer.route(torch.zeros(5, 8), 2, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": False},
        {"router": "sigmoid"},
        {"router": "softmax_of_topk"},
        {"router": torch.tanh},
    ],
    ids=names.text,
)
def test_what_is_not_a_number_stays_in_its_token_and_shows(options):
    logits = random(40, 12)
    logits[6, 3] = torch.nan
    chosen, others = gossamer.route(logits, 3, **options), torch.arange(40) != 6
    assert chosen.topk_weights[6].isnan().any() and not chosen.topk_weights[others].isnan().any()
    if "router" in options:  # elsewhere all of its scores are NaN
        assert chosen.topk_ids[6, 0] == 3  # as torch.topk has it
        assert chosen.topk_ids[6, 1:].tolist() == logits[6].nan_to_num(-9).topk(2)[1].tolist()

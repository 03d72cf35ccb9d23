"""Routers that drop, limit, draw or are traced, and the losses of routers."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer.ir.errors import InputError, TraceError  # noqa: E402


def logits(tokens=37, experts=12):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(1))


def test_top_p_keeps_the_best_until_they_add_up():
    found = gossamer.route(logits(), 6, top_p=0.6, renormalize=False)
    scores, ids = logits().softmax(-1).topk(6, -1)
    kept = scores.cumsum(-1) - scores < 0.6
    assert torch.equal(found.topk_ids.long(), torch.where(kept, ids, -1))
    torch.testing.assert_close(found.topk_weights, torch.where(kept, scores, 0.0), rtol=1e-5, atol=1e-6)
    assert found.counts.sum() == kept.sum() and 37 < kept.sum() < 6 * 37


def test_threshold():
    found = gossamer.route(logits(), 5, router="sigmoid", threshold=0.7)
    scores, ids = logits().sigmoid().topk(5, -1)
    kept = scores >= 0.7
    weights = torch.where(kept, scores, 0.0)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    assert torch.equal(found.topk_ids.long(), torch.where(kept, ids, -1))
    torch.testing.assert_close(found.topk_weights, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capacity", [0, 1, 5, 40])
@pytest.mark.parametrize("tokens", [37, 700])
def test_capacity_takes_the_first(capacity, tokens):
    found = gossamer.route(logits(tokens), 2, capacity=capacity).topk_ids
    free = gossamer.route(logits(tokens), 2).topk_ids
    seen = [0] * 12
    for kept, asked in zip(found.reshape(-1).tolist(), free.reshape(-1).tolist(), strict=True):
        assert kept == (asked if seen[asked] < capacity else -1)
        seen[asked] += 1


def test_random_routes_follow_the_seed():
    one, again, other = (gossamer.route(logits(400), 2, router="random", seed=s) for s in (3, 3, 4))
    assert torch.equal(one.topk_ids, again.topk_ids) and not torch.equal(one.topk_ids, other.topk_ids)
    assert (one.topk_ids[:, 0] != one.topk_ids[:, 1]).all()
    assert one.counts.min() > 30  # 67 on average


def test_hashed_routes_follow_the_ids():
    words = torch.randint(0, 9, (100,))
    found = gossamer.route(logits(100), 1, router="random", token_ids=words)
    for word in range(9):
        assert len(found.topk_ids[words == word].unique()) <= 1
    assert len(found.topk_ids.unique()) > 3


def test_traced_routers():
    found = gossamer.route(logits(), 3, router=lambda logit: torch.tanh(logit / 2) + 1.5)
    scores = torch.tanh(logits() / 2) + 1.5
    weights, ids = scores.topk(3, -1)
    assert torch.equal(found.topk_ids.long(), ids)
    torch.testing.assert_close(
        found.topk_weights, weights / weights.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(TraceError):
        gossamer.route(logits(), 3, router=lambda logit: logit if logit > 0 else -logit)


def test_gradients_pass_by_what_is_dropped():
    given = logits().requires_grad_()
    found = gossamer.route(given, 4, top_p=0.5)
    found.topk_weights.square().sum().backward()
    scores, ids = logits().softmax(-1).topk(4, -1)
    other = logits().requires_grad_()
    weights = other.softmax(-1).gather(1, ids) * (scores.cumsum(-1) - scores < 0.5)
    (weights / weights.sum(-1, keepdim=True)).square().sum().backward()
    torch.testing.assert_close(given.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.5, "threshold": 0.1}, "one of them at most"),
        ({"capacity": -1}, r"route\.capacity"),
        (
            {"token_ids": torch.zeros(37, dtype=torch.int64)},
            "expected router 'random' beside them; got 'softmax'",
        ),
        ({"top_p": 0.5, "router": "softmax_of_topk"}, r"route\.top_p"),
    ],
    ids=str,
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        gossamer.route(logits(), 2, **options)


# ---- losses ----


@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_loss_is_that_of_transformers(masked):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    given = logits(20, 6)
    ids = given.softmax(-1).topk(2, -1)[1]
    mask = (torch.arange(20) % 3 > 0).view(2, 10).long() if masked else None
    expected = mixtral.load_balancing_loss_func((given,), 6, 2, mask)
    found = gossamer.load_balance_loss(given, ids, None if mask is None else mask.reshape(-1))
    torch.testing.assert_close(found, expected)


def test_losses_are_least_where_all_is_even():
    even = torch.zeros(12, 6)
    ids = torch.arange(12).reshape(12, 1) % 6
    assert gossamer.load_balance_loss(even, ids).item() == pytest.approx(1.0)
    assert gossamer.importance_loss(even).item() == pytest.approx(0.0)
    assert gossamer.z_loss(even).item() == pytest.approx(torch.tensor(6.0).log().item() ** 2)
    skewed = logits(12, 6).requires_grad_()
    (gossamer.importance_loss(skewed) + gossamer.z_loss(skewed)).backward()
    assert gossamer.importance_loss(skewed) > 0 and skewed.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_16_bits_are_summed_in_float32(dtype):
    given = (3 * logits(5000, 8)).to(dtype)
    ids = torch.arange(10000).reshape(5000, 2) % 8
    assert gossamer.load_balance_loss(given, ids).item() == pytest.approx(2.0, rel=1e-5)
    for loss in (gossamer.importance_loss, gossamer.z_loss, gossamer.entropy_loss):
        found = loss(given)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(loss(given.double()).item(), rel=1e-3)


def test_masks_of_losses():
    given, seen = logits(12, 6), torch.arange(12) % 3 > 0
    for loss in (gossamer.importance_loss, gossamer.z_loss, gossamer.entropy_loss):
        torch.testing.assert_close(loss(given, mask=seen.reshape(2, 6)), loss(given[seen]))
        assert loss(given[:0]) == 0 and loss(given, mask=torch.zeros(12)) == 0


@pytest.mark.parametrize("options", [{}, {"capacity": 3}, {"router": "expert_choice"}], ids=str)
def test_load_balance_loss_of_a_routing(options):
    given, mask = logits(20, 6), torch.arange(20) % 3 > 0
    chosen = gossamer.route(given, 2, **options)
    rows = int(chosen.counts.sum())
    taken = torch.zeros(20, 6).index_put(
        (chosen.token_ids[:rows].long(), chosen.expert_ids[:rows].long()), torch.ones(rows)
    )
    for seen in (None, mask):
        share = taken.mean(0) if seen is None else taken[seen].mean(0)
        chance = (given if seen is None else given[seen]).softmax(-1).mean(0)
        found = gossamer.load_balance_loss(given, chosen, seen)
        torch.testing.assert_close(found, 6 * (share * chance).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk_ids": torch.zeros(5, 1).long()}, r"shape \(12, top_k\), or a Routing; got \(5, 1\)"),
        ({"topk_ids": None}, "or a Routing; got NoneType"),
        ({"topk_ids": gossamer.Routing.known(torch.zeros(3).long(), 6)}, "a Routing of 12 tokens among 6"),
        ({"mask": torch.ones(3)}, "a number for each of 12 tokens"),
        ({"router_logits": torch.zeros(6)}, r"floats \(tokens, experts\)"),
    ],
    ids=str,
)
def test_bad_input_of_losses(options, message):
    given = {"router_logits": torch.zeros(12, 6), "topk_ids": torch.zeros(12, 1).long()}
    with pytest.raises(InputError, match=message):
        gossamer.load_balance_loss(**(given | options))

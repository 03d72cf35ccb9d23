"""Sinks, dropout, prob_mod and column sums on a GPU."""

import functools

import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.frontend.checking import check_attention

pytestmark = pytest.mark.gpu


from gossamer.tests import attention_cases as CASES  # noqa: E402

tensors = functools.partial(CASES.tensors, device="cuda", dtype=torch.bfloat16, size=64)

MASKS = {
    "full": masks.full(),
    "window": masks.sliding_window(40, 9),
    "strided": masks.strided(16, 9),
    "longformer": masks.longformer(30, 5),
    "documents": masks.document(CASES.UNSORTED),
    "half the rows": gossamer.Mask.trace(lambda b, h, q, k: (q % 2 == 0) & (k <= q)),
}
TABLE = torch.rand(4, 300)

PROB_MODS = {
    "half": lambda p, b, h, q, k: p * 0.5,
    "by head and key": lambda table: lambda p, b, h, q, k: p * table[h, k],
    "threshold": lambda p, b, h, q, k: torch.where(p > 0.01, p, 0.0),
    "square": lambda p, b, h, q, k: p * p,
}


@pytest.fixture(params=MASKS)
def mask(request):
    return MASKS[request.param].to("cuda")


@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "f32"])
def test_sinks(mask, narrow):
    options = {} if narrow else {"dtype": torch.float32, "size": 32}
    q, k, v = tensors(161, 300, batch=2, heads=4, kv_heads=2, **options)
    sinks = 2 * torch.randn(4, device="cuda")
    out, lse = check_attention(q, k, v, mask=mask, enable_gqa=True, sinks=sinks)
    plain, without = gossamer.attention(q, k, v, mask=mask, enable_gqa=True, return_lse=True)
    assert torch.equal(lse, without) and not torch.equal(out, plain)


def test_sinks_of_rows_without_pairs_give_zeros():
    q, k, v = tensors(90, 80)
    sinks = torch.randn(2, device="cuda")
    out, lse = check_attention(q, k, v, mask=lambda b, h, q, k: k > q + 20, sinks=sinks)
    assert (out[:, :, 60:] == 0).all() and (lse[:, :, 60:] == -torch.inf).all()


@pytest.mark.parametrize("name", PROB_MODS)
def test_prob_mods(name, mask):
    prob_mod = PROB_MODS[name](TABLE.to("cuda")) if name == "by head and key" else PROB_MODS[name]
    check_attention(*tensors(161, 300, heads=4), mask=mask, prob_mod=prob_mod)


def test_column_sums(mask):
    q, k, v = tensors(161, 300, heads=4, kv_heads=2)
    check_attention(q, k, v, mask=mask, enable_gqa=True, return_column_sums=True)
    *_, sums = gossamer.attention(q, k, v, mask=mask, enable_gqa=True, return_column_sums=True)
    rows = (gossamer.attention(q, k, v, mask=mask, enable_gqa=True, return_lse=True)[1] > -torch.inf).sum(-1)
    torch.testing.assert_close(sums.sum(-1), rows.float(), atol=1e-3, rtol=1e-3)


def test_dropout(mask):
    q, k, v = tensors(161, 300, heads=4)
    check_attention(q, k, v, mask=mask, dropout_p=0.3, dropout_seed=7)
    first, second, other = (
        gossamer.attention(q, k, v, mask=mask, dropout_p=0.3, dropout_seed=seed) for seed in (7, 7, 8)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_dropout_drops_the_same_pairs_on_every_device():
    q, k, _ = tensors(100, 128, dtype=torch.float32, size=32)
    v = torch.eye(128, device="cuda").expand(1, 2, -1, -1)  # so that the output is the probabilities
    options = {"mask": masks.sliding_window(50), "dropout_p": 0.4, "dropout_seed": 123}
    found = gossamer.attention(q, k, v, **options).cpu()
    wanted = gossamer.attention(q.cpu(), k.cpu(), v.cpu(), backend="reference", **options)
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_seeds_in_tensors_change_what_a_graph_drops():
    q, k, v = tensors(200, 200)
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    gossamer.attention(q, k, v, dropout_p=0.5, dropout_seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gossamer.attention(q, k, v, dropout_p=0.5, dropout_seed=seed)
    seen = []
    for number in (1, 2, 1):
        seed.fill_(number)
        graph.replay()
        seen.append(out.clone())
        assert torch.equal(out, gossamer.attention(q, k, v, dropout_p=0.5, dropout_seed=number))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])

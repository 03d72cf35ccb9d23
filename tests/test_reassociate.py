"""reassociate: chains of products in the cheapest order; FLuRKA, whose projections it orders."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer import testing
from gossamer.ir.errors import InputError, VerifyError
from gossamer.ir.graph import Graph, Op, Value
from gossamer.passes.reassociate import explain, orders, reassociate

LOW = """
graph @low(%x: f32[B, 1, S, C], %wk: f32[H, C, D], %wv: f32[H, C, D], %e: f32[1, R, S]) {
  %k = matmul %x, %wk : f32[B, H, S, D]
  %kl = matmul %e, %k : f32[B, H, R, D]
  %v = matmul %x, %wv : f32[B, H, S, D]
  %vl = matmul %e, %v : f32[B, H, R, D]
  return %kl, %vl
}
"""
FEW = {"B": 2, "S": 64, "C": 8, "H": 2, "D": 4, "R": 4}
MANY = FEW | {"S": 8, "R": 64}


def test_rewrites_and_shares():
    after = testing.run_pass(LOW, reassociate, sizes=FEW)
    assert [(op.inputs, op.output.shape[-2:]) for op in after.ops] == [
        (("e", "x"), ("R", "C")),
        (("e_x", "wk"), ("R", "D")),
        (("e_x", "wv"), ("R", "D")),
    ]
    testing.assert_equivalent(LOW, after)


def test_leaves_alone_what_is_cheapest_already():
    graph = testing.parse(LOW)
    assert testing.run_pass(graph, reassociate, sizes=MANY) is graph


def test_a_shared_product_is_counted_once():
    """Alone each chain would rather begin with x w; together they share e x."""
    sizes = FEW | {"S": 16, "C": 16, "H": 1, "D": 8, "R": 9, "B": 1}
    graph = testing.parse(LOW)
    single = Graph("one", graph.inputs, graph.ops[:2], ("kl",))
    assert testing.run_pass(single, reassociate, sizes=sizes) is single
    assert len(testing.run_pass(graph, reassociate, sizes=sizes).ops) == 3


def test_leaves_alone_what_is_used_elsewhere():
    graph = testing.parse(LOW)
    kept = Graph(graph.name, graph.inputs, graph.ops, (*graph.outputs, "k"))
    after = testing.run_pass(kept, reassociate, sizes=FEW)
    assert after.producer("kl").inputs == ("e", "k") and after.producer("vl").inputs == ("e_x", "wv")


def test_explain_lists_every_order():
    text = explain(testing.parse(LOW), sizes=FEW)
    assert text.splitlines()[0].endswith("(e x) wk; (e x) wv") and len(text.splitlines()) == 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=6), st.booleans())
def test_any_chain_keeps_its_meaning_and_never_costs_more(extents, from_the_right):
    names = [f"a{n}" for n in range(len(extents) - 1)]
    inputs = tuple(Value(n, "f64", pair) for n, pair in zip(names, pairwise(extents), strict=True))
    order = list(reversed(inputs)) if from_the_right else list(inputs)
    ops, done = [], order[0]
    for n, value in enumerate(order[1:]):
        pair = (value, done) if from_the_right else (done, value)
        made = Value(f"p{n}", "f64", (pair[0].shape[0], pair[1].shape[1]))
        ops.append(Op("matmul", tuple(v.name for v in pair), (made,)))
        done = made
    graph = Graph("chain", inputs, tuple(ops), (done.name,))
    after = testing.run_pass(graph, reassociate, sizes={})
    testing.assert_equivalent(graph, after)
    least = min(order.flops for order in orders(graph, sizes={}))
    assert orders(after, sizes={})[0].flops == least


def test_rejects_unknown_extents():
    with pytest.raises(InputError, match="a value for S"):
        reassociate(testing.parse(LOW), sizes={n: v for n, v in FEW.items() if n != "S"})


def test_extents_of_a_batch_are_the_same_or_one():
    text = LOW.replace("e: f32[1, R, S]", "e: f32[3, R, S]").replace("H", "2")
    with pytest.raises(VerifyError, match="one batch extent"):
        testing.run_pass(text, reassociate, sizes=FEW)


# ---- FLuRKA ----

torch = pytest.importorskip("torch")
import gossamer  # noqa: E402
from gossamer import feature_maps  # noqa: E402
from gossamer.frontend.linear import low_rank  # noqa: E402


def dense(x, wq, wk, wv, e, f, heads, phi, eps=1e-6):
    q, k, v = ((x @ w).unflatten(2, (heads, -1)).transpose(1, 2) for w in (wq, wk, wv))
    fq, fk = phi(q), phi(e @ k)
    scores = fq @ fk.mT
    return (scores @ (f @ v) / (scores.sum(-1, keepdim=True) + eps)).transpose(1, 2).flatten(2)


def layer(by_head, length=40, channels=12, heads=4, rank=8):
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape):
        made = torch.randn(shape, generator=drawn, dtype=torch.float64) / shape[-1] ** 0.5
        return made.requires_grad_()

    projections = ((heads, rank, length) if by_head else (rank, length),) * 2
    weights = [normal(channels, heads * size) for size in (3, 3, 5)]
    return [normal(2, length, channels), *weights, *(normal(*shape) for shape in projections)]


FOURIER = feature_maps.random_fourier(feature_maps.orthogonal_projection(3, 3, dtype=torch.float64))
VARIANTS = {"relu": lambda t: t.relu() + 1e-3, "elu": lambda t: torch.nn.functional.elu(t) + 1}


@pytest.mark.parametrize("variant", ["relu", "elu", "random fourier"])
def test_flurka(variant):
    given = layer(by_head=variant == "relu")
    features, phi = (variant, VARIANTS[variant]) if variant in VARIANTS else (FOURIER, FOURIER)
    out = gossamer.flurka(*given, heads=4, feature_map=features, eps=1.0)
    expected = dense(*given, heads=4, phi=phi, eps=1.0)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), given)
    wanted = torch.autograd.grad((expected * weights).sum(), given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_one_projection_for_keys_and_values_is_computed_once():
    x, *weights, e, _ = layer(by_head=False)
    assert (
        gossamer.flurka_orders(x, *weights, e, heads=4)
        .splitlines()[0]
        .endswith("(proj_k x) w_k; (proj_k x) w_v")
    )
    torch.testing.assert_close(
        gossamer.flurka(x, *weights, e, heads=4), gossamer.flurka(x, *weights, e, e, heads=4)
    )


def test_a_projection_by_head_is_better_applied_to_keys():
    """Heads times as many rows of e x would cost more than keys first."""
    x, *weights, e, f = layer(by_head=True, channels=48, heads=4)
    first = gossamer.flurka_orders(x, *weights, e, f, heads=4).splitlines()[0]
    assert first.endswith("proj_k (x w_k); proj_v (x w_v)")


def test_results_lie_as_projections_do():
    x, *weights, e, _ = layer(by_head=False)
    assert gossamer.flurka(x, *weights, e, heads=4).is_contiguous()


def check_gradients(given):
    """Outputs and gradients of those that want one, against the formula, twice: the second call recalls."""
    expected = dense(*(given if len(given) == 6 else (*given, given[-1])), heads=4, phi=VARIANTS["elu"])
    leaves = [t for t in given if t.requires_grad]
    for _ in range(2):
        out = gossamer.flurka(*given, heads=4)
        torch.testing.assert_close(out, expected)
        for weights in (torch.randn_like(out), torch.ones(()).double().expand_as(out)):
            found = torch.autograd.grad(out, leaves, weights, retain_graph=True)
            wanted = torch.autograd.grad(expected, leaves, weights, retain_graph=True)
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (4,), (0, 2), (1, 4)], ids=str)
def test_some_gradients(wanted):
    """Of one projection for both, by which two products go back to x and to it."""
    given = [t.detach().requires_grad_(n in wanted) for n, t in enumerate(layer(by_head=False)[:5])]
    check_gradients(given)


@pytest.mark.parametrize("sizes", [{"length": 5, "rank": 64}, {"length": 40}], ids=str)
def test_one_batch_and_either_order(sizes):
    """With more ranks than rows, keys come first, and the projection is read twice."""
    x, *weights, e, _ = layer(by_head=False, **sizes)
    check_gradients([x.detach()[:1].requires_grad_(), *weights, e])
    check_gradients([x, *weights, e])


def test_tensors_of_any_layout():
    """As those of torch.nn.Linear are, turned."""
    given = [t.detach().mT.contiguous().mT.requires_grad_() for t in layer(by_head=False)]
    check_gradients(given)


def test_calls_like_others_are_not_checked_again(monkeypatch):
    given = layer(by_head=False)
    with torch.no_grad():
        first = gossamer.flurka(*given, heads=4)
        monkeypatch.setattr(low_rank, "_check", None)
        assert torch.equal(gossamer.flurka(*given, heads=4), first)
    for changed in ({"heads": True}, {"heads": 4.0}, {"heads": 4, "eps": 2.0}):
        with pytest.raises(TypeError):  # another call, which would have been checked
            gossamer.flurka(*given, **changed)


def test_autocast():
    """Products in bfloat16 then, as torch has them, and gradients in the dtypes of what they are of."""
    given = [t.detach().float().requires_grad_() for t in layer(by_head=False)]
    gossamer.flurka(*given, heads=4)
    with torch.autocast("cpu", torch.bfloat16):
        out = gossamer.flurka(*given, heads=4)
        assert out.dtype == torch.bfloat16
        out = gossamer.flurka(*given, heads=4)
        found = torch.autograd.grad(out.float().sum(), given)
    assert all(f.dtype == torch.float32 for f in found)
    out = gossamer.flurka(*given, heads=4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(out, given, torch.ones_like(out), retain_graph=True)
    outside = torch.autograd.grad(out, given, torch.ones_like(out))
    assert all(map(torch.equal, inside, outside))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(40, 12)}, "3 dimensions"),
        ({"w_k": torch.zeros(11, 12)}, "12 rows, the channels of x"),
        ({"w_v": torch.zeros(12, 10)}, "4 heads share equally"),
        ({"proj_k": torch.zeros(8, 39)}, r"\(rank, 40\) or \(4, rank, 40\)"),
        ({"proj_v": torch.zeros(7, 40)}, "rank 8, as proj_k has"),
        ({"proj_k": torch.zeros(8, 40).double()}, "x's dtype"),
        ({"heads": 0}, "at least 1"),
        ({"causal": True}, "options eps, normalize"),
    ],
)
def test_bad_input(changed, message):
    weights = dict(zip(("w_q", "w_k", "w_v"), torch.zeros(3, 12, 12), strict=True))
    fine = {"x": torch.zeros(2, 40, 12), **weights, "proj_k": torch.zeros(8, 40), "heads": 4}
    with pytest.raises(InputError, match=message):
        gossamer.flurka(**fine | changed)

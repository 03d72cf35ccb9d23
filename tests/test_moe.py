"""gossamer.experts, moe and route on the CPU: against float64, for layouts and routings of every kind."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer.frontend.moe.activation import clamped_swiglu  # noqa: E402
from gossamer.runtime.driver import compilations  # noqa: E402
from gossamer.tests import moe_cases as CASES  # noqa: E402

Case, activated, check, plain = CASES.Case, CASES.activated, CASES.check, CASES.plain

SIZES = [(1, 1), (5, 3)]  # experts, top_k


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SIZES),
    st.sampled_from([0, 1, 7, 130]),
    st.sampled_from(["any", "one", "repeated", "some", "nowhere"]),
    st.integers(0, 99),
)
def test_any_routing(sizes, tokens, kind, seed):
    experts, top_k = sizes
    case = Case(tokens=tokens, experts=experts, top_k=top_k)
    ids = case.routing(seed, -1, experts + 1)[0]
    match kind:
        case "one":  # all tokens to one expert, each once
            ids = torch.where(torch.arange(top_k) == seed % top_k, seed % experts, torch.full_like(ids, -1))
        case "repeated":  # one expert several times in a token's list
            ids = ids[:, :1].expand(-1, top_k)
        case "some":  # most experts get nothing
            ids = torch.where(ids % 3 == 0, ids, -7)
        case "nowhere":  # ids of experts that are elsewhere
            ids = torch.where(ids < 0, ids, ids + experts)
    found = check(case, seed, ids=ids)
    if kind == "nowhere":
        assert not found.any()


@pytest.mark.parametrize(
    "case",
    [
        Case(transposed=True),
        Case(transposed=True, interleaved=True, biased=True, activation=clamped_swiglu()),
        Case(biased=True),
        Case(gated=False, activation="relu2"),
        Case(gated=False, activation="gelu", biased=True, hidden=7, inner=5),
        Case(hidden=257, inner=33),
        Case(hidden=600, inner=300, tokens=40),
        Case(ids_dtype=torch.int32, activation="geglu_tanh"),
        Case(activation=lambda gate, up: torch.nn.functional.gelu(gate) * (up + 0.5)),
        Case(gated=False, activation=lambda x: torch.relu(x) ** 2),
        *(Case(dtype=dtype, tokens=50) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    ],
    ids=repr,
)  # fmt: skip
def test_layouts_activations_and_dtypes(case):
    check(case)


@pytest.mark.parametrize("expert", [0, 3])
def test_all_tokens_to_one_expert(expert):
    case = Case(tokens=100, top_k=1)
    check(case, ids=torch.full((100, 1), expert))


def test_an_expert_twice_in_one_token_counts_twice():
    case = Case(tokens=5, top_k=3)
    check(case, ids=torch.tensor([[1, 1, 1]] * 5))


def test_every_expert_for_every_token():
    case = Case(tokens=6, experts=40, top_k=40)
    check(case, ids=torch.arange(40).repeat(6, 1))


def test_dropped_ids_leave_zeros():
    case = Case(tokens=4)
    ids = torch.tensor([[-1, 4], [4, 4], [0, -1], [1, 2]])
    found = check(case, ids=ids)
    assert torch.equal(found[:2], torch.zeros(2, case.hidden))


def test_weights_of_any_float_dtype_and_any_strides():
    case = Case(tokens=20)
    layer, x = case.layer(), case.x()
    ids, weights = case.routing()
    expected = gossamer.experts(x, ids, weights.bfloat16().float(), **layer)
    views = {
        name: value.transpose(1, 2).contiguous().transpose(1, 2)
        for name, value in layer.items()
        if name[-4:] == "proj"
    }
    wide = torch.empty(20, 2 * case.hidden)[:, ::2].copy_(x)
    found = gossamer.experts(wide, ids.T.contiguous().T, weights.bfloat16(), **(layer | views))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_token():
    case = Case(tokens=40)
    layer, x = case.layer(), case.x()
    ids, weights = case.routing()
    clean = gossamer.experts(x, ids, weights, **layer)
    x[17] = torch.nan
    found = gossamer.experts(x, ids, weights, **layer)
    assert found[17].isnan().all()
    others = torch.arange(40) != 17
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("tokens", [3, 40, 130])  # 1, 20 and 65 rows an expert: kernels of every kind
@pytest.mark.parametrize("bad", ["x", "weights"])
def test_nan_stays_in_the_gradients_of_its_token(tokens, bad):
    case = Case(tokens=tokens)
    layer, (ids, weights) = case.layer(), case.routing()

    def gradients(spoilt):
        x, w = (t.clone() for t in (case.x(), weights))
        if spoilt:
            (x if bad == "x" else w)[1] = torch.nan
        leaves = x.requires_grad_(), w.requires_grad_()
        out = gossamer.experts(x, ids, w, **layer)
        return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))

    others = torch.arange(tokens) != 1
    for spoilt, clean in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(spoilt[others], clean[others])
        assert clean.isfinite().all()


def test_results_do_not_depend_on_the_run():
    case = Case(tokens=200, experts=8, top_k=4)
    layer, x = case.layer(), case.x()
    ids, weights = case.routing()
    first = gossamer.experts(x, ids, weights, **layer)
    assert all(torch.equal(first, gossamer.experts(x, ids, weights, **layer)) for _ in range(3))


def test_a_new_number_of_tokens_compiles_nothing():
    for tokens in (1, 31):  # 1 and 15 rows an expert
        check(Case(tokens=tokens))
    before = compilations()
    for tokens in (2, 3, 17, 30):
        check(Case(tokens=tokens))
    assert compilations() == before


def test_far_elements_are_addressed_in_64_bits():
    # Two experts whose matrices begin 2**31 elements apart, in memory that is never touched in between.
    case = Case(experts=2, tokens=6, top_k=1, dtype=torch.float16)
    layer = case.layer()
    near = layer["gate_up_proj"]
    far = torch.empty(2**31 + near[0].numel(), dtype=torch.float16)
    spread = far.as_strided(near.shape, (2**31, near.stride(1), 1))
    spread.copy_(near)
    x, (ids, weights) = case.x(), case.routing()
    expected = gossamer.experts(x, ids, weights, **layer)
    assert torch.equal(gossamer.experts(x, ids, weights, **(layer | {"gate_up_proj": spread})), expected)


@pytest.mark.parametrize("name", ["x", "down_proj"])
def test_far_rows_and_gradients_of_far_matrices(name):
    case = Case(experts=2, tokens=2 if name == "x" else 6, top_k=1, dtype=torch.float16)
    given = case.layer() | {"x": case.x()}
    ids, weights = case.routing()
    near = given[name]
    far = torch.empty(2**31 + near[0].numel(), dtype=torch.float16)
    given[name] = far.as_strided(near.shape, (2**31, *near.stride()[1:])).copy_(near)

    def results(x, **layer):
        x = x.detach().requires_grad_()
        out = gossamer.experts(x, ids, weights, **layer)
        return out, *torch.autograd.grad(out.sum(), x)

    for found, expected in zip(results(**given), results(**(given | {name: near})), strict=True):
        assert torch.equal(found, expected)


# ---- routing ----


def _route(
    logits, top_k, router="softmax", renormalize=True, correction_bias=None, groups=1, top_groups=1, scale=1.0
):
    """route, in torch."""
    scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "softmax_of_topk": logits}[router]
    choice = scores if correction_bias is None else scores + correction_bias
    if groups > 1:
        ranks = choice.view(len(logits), groups, -1).topk(2, -1)[0].sum(-1)
        open_ = torch.zeros_like(ranks).scatter(1, ranks.topk(top_groups, -1)[1], 1).bool()
        choice = choice.masked_fill(~open_.repeat_interleave(choice.shape[1] // groups, 1), -torch.inf)
    ids = choice.topk(top_k, -1)[1]
    weights = scores.gather(1, ids)
    if router == "softmax_of_topk":
        weights = weights.softmax(-1)
    elif renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * scale


@pytest.mark.parametrize("experts", [16, 20])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": False},
        {"router": "softmax_of_topk"},
        {"router": "sigmoid", "scale": 2.5, "correction_bias": True},
        {"router": "sigmoid", "groups": 4, "top_groups": 2, "correction_bias": True},
    ],
    ids=str,
)
def test_routers(options, experts):
    logits = torch.randn(37, experts, generator=torch.Generator().manual_seed(3))
    if "correction_bias" in options:
        options = options | {"correction_bias": torch.randn(experts)}
    found = gossamer.route(logits, 4, **options)
    ids, weights = _route(logits, 4, **options)
    assert torch.equal(found.topk_ids.long(), ids)
    torch.testing.assert_close(found.topk_weights, weights, rtol=1e-5, atol=1e-6)


def test_moe_is_route_then_experts():
    case = Case(tokens=30, experts=8, top_k=3)
    layer, x = case.layer(), case.x()
    logits = torch.randn(30, 8)
    found = gossamer.moe(x, logits, layer["gate_up_proj"], layer["down_proj"], top_k=3, renormalize=False)
    ids, weights = _route(logits, 3, renormalize=False)
    torch.testing.assert_close(
        found.double(), plain(case, x, ids, weights, layer, torch.float64), rtol=1e-4, atol=1e-5
    )


def test_a_routing_can_be_read_edited_and_passed_on():
    case = Case(tokens=50, top_k=2)
    layer, x = case.layer(), case.x()
    ids, weights = case.routing(lowest=-1, highest=case.experts + 1)
    chosen = gossamer.Routing.from_topk(ids, weights, case.experts)
    flat = ids.reshape(-1).numpy()
    kept = np.flatnonzero((flat >= 0) & (flat < case.experts))
    order = kept[np.argsort(flat[kept], kind="stable")]
    n = len(order)
    assert chosen.counts.tolist() == [int((flat == e).sum()) for e in range(case.experts)]
    assert chosen.token_ids[:n].tolist() == (order // 2).tolist()
    assert chosen.expert_ids[:n].tolist() == flat[order].tolist()
    assert torch.equal(chosen.weights[:n], weights.reshape(-1)[torch.from_numpy(order)])
    same = gossamer.experts(x, chosen, None, **layer)
    assert torch.equal(same, gossamer.experts(x, ids, weights, **layer))
    halved = chosen.replace(weights=chosen.weights / 2)
    assert halved.topk_ids is None
    torch.testing.assert_close(gossamer.experts(x, halved, None, validate=True, **layer), same / 2)


def test_a_token_may_have_any_number_of_experts():
    case = Case(tokens=4, experts=3, top_k=3)
    layer, x = case.layer(), case.x()
    chosen = gossamer.Routing(
        token_ids=torch.tensor([0, 2, 2, 0, 2, 7], dtype=torch.int32),  # the last row belongs to nobody
        expert_ids=torch.tensor([0, 0, 1, 2, 2, 9], dtype=torch.int32),
        weights=torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0, torch.nan]),
        counts=torch.tensor([2, 1, 2]),
        num_tokens=4,
    )
    ids = torch.tensor([[0, 2, -1], [-1, -1, -1], [0, 1, 2], [-1, -1, -1]])
    weights = torch.tensor([[0.5, 0.25, 0], [0, 0, 0], [1.0, 2.0, 3.0], [0, 0, 0]])
    found = gossamer.experts(x, chosen, None, validate=True, **layer)
    torch.testing.assert_close(
        found, plain(case, x, ids, weights, layer, torch.float32), rtol=1e-5, atol=1e-6
    )


def test_the_reference_backend_agrees():
    case = Case(tokens=20, biased=True, transposed=True, interleaved=True, activation=clamped_swiglu())
    layer, x = case.layer(), case.x()
    ids, weights = case.routing()
    found = gossamer.experts(x, ids, weights, backend="reference", **layer)
    torch.testing.assert_close(found, gossamer.experts(x, ids, weights, **layer), rtol=1e-5, atol=1e-5)
    assert activated(case, torch.randn(3, 24)).shape == (3, 12)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.nn.functional.silu, "swiglu"),  # silu(input, inplace=False): not silu(gate, up)
        (torch.nn.functional.gelu, "geglu"),  # without a signature of its own
        (torch.nn.GELU(approximate="tanh"), "geglu_tanh"),
        (lambda gate: gate.relu(), "reglu"),
        (torch.mul, lambda gate, up: gate * up),
    ],
    ids=["silu", "gelu", "module", "lambda", "mul"],
)
def test_functions_of_one_argument_are_multiplied_by_up(function, name):
    case = Case(tokens=5)
    given = (case.x(), *case.routing())
    found, expected = (
        gossamer.experts(*given, **(case.layer() | {"activation": act})) for act in (function, name)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("router", ["softmax", "expert_choice"])
def test_lists_that_are_changed_in_place_count(router):
    case = Case(tokens=20)
    layer, x = case.layer(), case.x()
    chosen = gossamer.route(torch.randn(20, 4), 2, router=router)
    before = gossamer.experts(x, chosen, None, **layer)
    assert not chosen.is_list
    chosen.weights.mul_(-2)
    assert chosen.is_list
    torch.testing.assert_close(gossamer.experts(x, chosen, None, **layer), -2 * before)
    assert copy.deepcopy(chosen).is_list and pickle.loads(pickle.dumps(chosen)).is_list
    with torch.inference_mode():
        chosen = gossamer.route(torch.randn(20, 4), 2, router=router)
        chosen.weights.zero_()
        assert not gossamer.experts(x, chosen, None, **layer).any()


def test_rows_may_be_given_to_other_experts():
    case = Case(tokens=20)
    layer, x = case.layer(), case.x()
    ids, weights = case.routing()
    chosen = gossamer.Routing.from_topk(ids, weights, 4)
    moved = chosen.replace(expert_ids=(chosen.expert_ids + 2) % 4 - (chosen.expert_ids == 3).int() * 9)
    expected = torch.where(ids == 3, -1, (ids + 2) % 4)
    assert moved.counts.tolist() == [int((expected == e).sum()) for e in range(4)]
    found = gossamer.experts(x, moved, None, **layer, validate=True)
    torch.testing.assert_close(found, gossamer.experts(x, expected, weights, **layer))


def test_lists_that_name_what_is_not_there_read_nothing_else():
    case = Case(tokens=20, dtype=torch.float64)
    layer, x = case.layer(), case.x().requires_grad_()
    chosen = gossamer.Routing.from_topk(*case.routing(), 4)
    for name in ("gate_up_proj", "down_proj"):
        layer[name].requires_grad_()
    far = chosen.replace(token_ids=chosen.token_ids + 2**28)
    many = chosen.replace(counts=chosen.counts + 5000)
    less = chosen.replace(counts=chosen.counts - 5000)
    for routing in (far, less):
        out = gossamer.experts(x, routing, None, **layer)
        gradients = torch.autograd.grad(out.sum(), (x, layer["gate_up_proj"], layer["down_proj"]))
        assert not out.any() and not any(g.any() for g in gradients)
    assert gossamer.experts(x, many, None, **layer).isfinite().all()

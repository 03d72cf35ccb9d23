"""`gossamer.linear_attention` on a CPU: against the dense formula, its gradients, states and errors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
import gossamer  # noqa: E402
from gossamer import feature_maps  # noqa: E402
from gossamer.ir.errors import InputError, TraceError, UnsupportedError  # noqa: E402
from gossamer.tests import linear_cases as CASES  # noqa: E402

Case, check = CASES.Case, CASES.check


def both(x):
    return torch.exp(x * 0.5), torch.exp(x * -0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    check(Case(dtype=dtype, heads=4, v_size=24))


def test_gradients_in_bfloat16():
    check(Case(dtype=torch.bfloat16, heads=4, v_size=24), gradients=True)


FUNCTIONS = {"sigmoid": torch.sigmoid, "both": both}


@pytest.mark.parametrize("name", ["relu", "identity", *FUNCTIONS])
def test_feature_maps(name):
    feature_map = FUNCTIONS.get(name, name)
    check(Case(feature_map=feature_map, normalize=feature_map != "identity", dtype=torch.float64))


def test_gradients_without_denominators():
    check(Case(normalize=False, dtype=torch.float64, initial=True), gradients=True)


def test_maps_with_numbers_of_their_own():
    slope = 0.5
    check(Case(feature_map=lambda x: torch.where(x > 0, x, x * slope).exp(), dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 140), st.integers(1, 70), st.sampled_from([(2, 1), (4, 2), (3, 1)]), st.integers(1, 3))
@pytest.mark.parametrize("causal", [True, False])
def test_any_lengths_and_heads(causal, length, keys, heads, batch):
    keys = length if causal else keys
    case = Case(length, keys, *heads, 5, 3, batch, causal, initial=causal, dtype=torch.float64)
    check(case)
    check(case, gradients=True)


@pytest.mark.parametrize("causal", [True, False])
def test_segments_side_by_side(causal, monkeypatch):
    """One head keeps few workers busy: its sequence is cut, with an odd number of chunks in the last part."""
    monkeypatch.setenv("GOSSAMER_NUM_THREADS", "4")
    case = Case(421, heads=1, key_heads=1, causal=causal, initial=causal)
    check(case)
    if causal:
        check(case, gradients=True)


def test_a_state_goes_on_where_it_ended():
    case = Case(90, heads=4)
    q, k, v = case.tensors(0).values()
    whole, *state = CASES.call(case, q, k, v)
    first, *mid = CASES.call(case, *(t[:, :, :37] for t in (q, k, v)))
    parts = [first]
    for at in (*range(37, 40), slice(40, 90)):
        at = slice(at, at + 1) if isinstance(at, int) else at
        out, *mid = CASES.call(case, *(t[:, :, at] for t in (q, k, v)), tuple(mid))
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    for one, other in zip(mid, state, strict=True):
        torch.testing.assert_close(one, other)


MAPS = {
    "hedgehog": lambda w: feature_maps.hedgehog(w, w.new_ones(1, w.shape[-1])),
    "positive": feature_maps.positive,
    "random fourier": feature_maps.random_fourier,
    "hashing": feature_maps.hashing,
}


@pytest.mark.parametrize("name", MAPS)
def test_prepared_maps(name):
    made = MAPS[name](feature_maps.orthogonal_projection(8, 5, heads=2, dtype=torch.float64))
    check(Case(size=8, feature_map=made, dtype=torch.float64, eps=1.0))


def test_weights_of_a_map_get_gradients():
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(q, k, v, w):
        return gossamer.linear_attention(q, k, v, feature_maps.hedgehog(w), causal=True)

    assert torch.autograd.gradcheck(run, (q, k, v, weight))


def test_gradcheck_of_everything():
    q, k, v = (
        torch.randn(1, n, 7, s, dtype=torch.float64, requires_grad=True) for n, s in ((4, 5), (2, 5), (2, 3))
    )
    state = torch.rand(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    sums = torch.rand(1, 2, 5, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, *states):
        out, new = gossamer.linear_attention(
            q, k, v, causal=True, eps=1e-3, initial_state=states, return_state=True, enable_gqa=True
        )
        return out, *new

    assert torch.autograd.gradcheck(run, (q, k, v, state, sums))


def test_separate_maps():
    check(Case(feature_map="relu", key_map=torch.exp, dtype=torch.float64))


def test_hash_codes_count_planes():
    weight = torch.randn(8, 6)
    features = feature_maps.hashing(weight)
    x, y = torch.randn(2, 5, 8)
    same = ((x @ weight < 0)[:, None] == (y @ weight < 0)).sum(-1)
    assert torch.equal(features(x) @ features(y).T, same.float())


def test_positive_features_approach_the_exponential_kernel():
    x, y = torch.randn(2, 3, 4, dtype=torch.float64) / 4
    projection = feature_maps.orthogonal_projection(4, 20000, dtype=torch.float64)
    made = feature_maps.positive(projection)
    torch.testing.assert_close(made(x) @ made(y).T, (x @ y.T).exp(), rtol=0.1, atol=0)


def test_strides_and_other_layouts():
    case = Case(dtype=torch.float64)
    q, k, v = case.tensors(0).values()
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    columns = v.mT.contiguous().mT
    torch.testing.assert_close(CASES.call(case, *turned, columns)[0], CASES.call(case, q, k, v)[0])


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (1, 2, 0, 4)], ids=str)
def test_nothing(shape):
    q = torch.randn(shape, requires_grad=True)
    out, (state, sums) = gossamer.linear_attention(q, q, q, causal=True, return_state=True)
    assert out.shape == shape and state.shape == (*shape[:2], 4, 4) and sums.shape == (*shape[:2], 4)
    out.sum().backward()
    assert not state.any() and q.grad.shape == shape


def test_no_keys_give_zeros():
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 0, 4)
    assert not gossamer.linear_attention(q, k, k).any()


def test_the_reference_backend():
    case = Case(dtype=torch.float64, initial=True)
    check(case, backend="reference")
    check(case, gradients=True, backend="reference")


def test_nan_stays_in_its_head_and_behind_it():
    q, k, v = Case().tensors(0).values()
    expected = gossamer.linear_attention(q, k, v, causal=True)
    v[:, 0, 40] = torch.nan
    found = gossamer.linear_attention(q, k, v, causal=True)
    assert torch.equal(found[:, 1], expected[:, 1])
    assert torch.equal(found[:, 0, :32], expected[:, 0, :32]) and found[:, 0, 40:].isnan().all()


ZEROS = {name: torch.zeros(1, 2, 6, 4) for name in ("query", "key", "value")}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": torch.zeros(2, 6, 4)}, "4 dimensions"),
        ({"query": [1.0]}, "a torch.Tensor; got list"),
        ({"key": torch.zeros(1, 2, 6, 5)}, "size 4, as the query has; got 5"),
        ({"value": torch.zeros(1, 2, 5, 4)}, r"\(1, 2, 6\) \+ \(Dv,\)"),
        ({"key": torch.zeros(1, 2, 6, 4).double()}, "query's dtype"),
        ({"query": torch.zeros(1, 4, 6, 4)}, "enable_gqa=True"),
        ({"query": torch.zeros(1, 3, 6, 4), "enable_gqa": True}, "divides the query's 3"),
        ({"query": torch.zeros(1, 2, 5, 4), "causal": True}, "length 5, as the query has, with causal"),
        ({"query": torch.zeros(3, 2, 6, 4)}, "batch 3"),
        ({"feature_map": "softmax"}, "one of elu, relu, identity, exp; got 'softmax'"),
        ({"feature_map": 3}, "got 3"),
        ({"feature_map": both, "key_map": "elu"}, "as many features of an element"),
        ({"feature_map": feature_maps.hashing(torch.zeros(4, 3))}, None),
        ({"feature_map": feature_maps.hashing(torch.zeros(4, 3)), "key_map": both}, "one size for q and k"),
        ({"eps": -1.0}, "at least 0"),
        ({"backend": "cuda"}, "one of auto, tvm"),
        ({"backend": "triton"}, "cuda tensors for 'triton'"),
        ({"initial_state": torch.zeros(1, 2, 4, 4)}, r"\(state, sums\)"),
        (
            {"initial_state": (torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4))},
            r"\(1, 2, 4, 4\) of torch.float32",
        ),
    ],
)
def test_bad_input(changed, message):
    if message is None:
        gossamer.linear_attention(**ZEROS | changed)
        return
    with pytest.raises(InputError, match=message):
        gossamer.linear_attention(**ZEROS | changed)


def test_what_cannot_be_captured():
    with pytest.raises(TraceError):
        gossamer.linear_attention(*ZEROS.values(), lambda x: x if x > 0 else -x)
    table = torch.ones(4)
    with pytest.raises(UnsupportedError, match="reads tensors"):
        gossamer.linear_attention(*ZEROS.values(), lambda x: x * table[0])


def test_torch_func_grad_is_what_autograd_gives():
    q, k, v = (t.detach() for t in Case().tensors(0).values())
    found = torch.func.grad(lambda x: gossamer.linear_attention(x, k, v).sum())(q)
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(
        found, torch.autograd.grad(gossamer.linear_attention(leaf, k, v).sum(), leaf)[0]
    )


def test_a_projection_is_a_tensor():
    with pytest.raises(InputError, match=r"\(D, R\) or \(heads, D, R\)"):
        feature_maps.hedgehog(torch.zeros(3))

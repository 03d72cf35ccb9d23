"""gossamer.jit: attention found however programs spell it, and left alone where it is something else."""

import copy
import math
import pickle

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import gossamer
from gossamer.frontend.capture import site as graph_site
from gossamer.runtime.driver import compilations
from gossamer.tests import jit_programs as PROGRAMS

SPELLINGS, inputs = PROGRAMS.SPELLINGS, PROGRAMS.inputs
INF = math.inf


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def bounds(monkeypatch):
    """What the attentions found were bound to: masks, scales, maps."""
    found = []
    bound = graph_site.Site.bound

    def noted(self, *args):
        found.append(bound(self, *args))
        return found[-1]

    monkeypatch.setattr(graph_site.Site, "bound", noted)
    return found


def check(program, *args, sites=1, **kwargs):
    """The compiled program against the original, in float32 and float64; the report of the first."""
    exact = program(*args, **kwargs)
    f = gossamer.jit(program)
    ours = f(*args, **kwargs)
    report = f.report()
    assert [len(report.compiled), len(report.left)] == [sites, 0], report
    assert ours.shape == exact.shape and ours.stride() == exact.stride() and ours.dtype == exact.dtype
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13, equal_nan=True)
    narrow = [a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.float64 else a for a in args]
    plain, ours = program(*narrow, **kwargs), f(*narrow, **kwargs)
    allowed = (
        2 * (plain - exact).abs().nan_to_num().max()
        + torch.finfo(torch.float32).eps * exact.abs().nan_to_num().max()
    )
    assert (ours.isnan() == exact.isnan()).all()
    assert (ours - exact).abs().nan_to_num().max() <= allowed
    return report


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    report = check(SPELLINGS[name], *inputs(torch.float64))
    assert "jit_programs.py:" in str(report) and str(report).startswith("compiled attention at ")


CLOSED = ["sliding_window", "band_of_triangles", "matmul_tril", "blocks_and_strides", "alibi", "in_place"]


@pytest.mark.parametrize("name", CLOSED)
def test_masks_of_the_graph_are_closed_forms(name, bounds):
    gossamer.jit(SPELLINGS[name])(*inputs(torch.float32))
    (bound,) = bounds
    assert bound.captures == () and bound.mask != "true"
    assert bound.empty == "none"  # isl has proven that every row has a key


def test_a_dense_sliding_window_becomes_one_progression_a_row(bounds):
    gossamer.jit(SPELLINGS["sliding_window"])(*inputs(torch.float32))
    mask = gossamer.Mask(bounds[0].mask, bounds[0].values)
    (term,) = mask.analyze(20, 20).terms
    assert "acsr" in str(term) or "ACSR" in type(term).__name__
    assert mask == gossamer.masks.sliding_window(4, 0)


# ---- masks from outside ----


def test_masks_given_as_tensors():
    def boolean(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def added(q, k, v, mask):
        return (q @ k.mT * 0.3 + mask).softmax(-1) @ v

    def padding(q, k, v, mask):
        extended = (1.0 - mask[:, None, None, :].to(q.dtype)) * -1e9
        return (q @ k.mT * 0.3 + extended).softmax(-1) @ v

    tensors = inputs(torch.float64)
    generator = torch.Generator().manual_seed(1)
    pairs = torch.rand(2, 1, 20, 20, generator=generator) < 0.4
    check(boolean, *tensors, pairs)
    check(added, *tensors, torch.randn(4, 20, 20, generator=generator, dtype=torch.float64))
    lengths = torch.tensor([20, 13])
    check(padding, *tensors, (torch.arange(20) < lengths[:, None]).long())


def test_rows_without_keys_give_what_the_original_gives():
    def infinite(q, k, v, lengths):
        kept = torch.arange(20) < lengths[:, None, None, None]
        return (q @ k.mT).masked_fill(~kept, -INF).softmax(-1) @ v

    def finite(q, k, v, lengths):
        kept = torch.arange(20) < lengths[:, None, None, None]
        return (q @ k.mT).masked_fill(~kept, torch.finfo(q.dtype).min).softmax(-1) @ v

    def fused(q, k, v, lengths):
        kept = torch.arange(20) < lengths[:, None, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept)

    lengths = torch.tensor([0, 7])
    for program in (infinite, finite, fused):
        check(program, *inputs(torch.float64), lengths)


class Buffered(torch.nn.Module):
    """Causal attention by a mask that the module keeps, for up to 32 positions."""

    def __init__(self, added):
        super().__init__()
        mask = torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32)
        mask = torch.where(mask == 0, -INF, 0.0).double() if added else mask
        self.added = added
        self.register_buffer("mask", mask)

    def forward(self, q, k, v):
        mask = self.mask[:, :, : q.shape[2], : k.shape[2]]
        scores = q @ k.mT / 8**0.5
        scores = scores + mask.to(q.dtype) if self.added else scores.masked_fill(mask == 0, -INF)
        return scores.softmax(-1) @ v


@pytest.mark.parametrize("added", [False, True])
def test_a_buffer_is_recovered_and_looked_at_again_when_written(added, bounds):
    module = Buffered(added)
    q, k, v = inputs(torch.float64)
    f = gossamer.jit(module)
    torch.testing.assert_close(f(q, k, v), module(q, k, v))
    assert gossamer.Mask(bounds[-1].mask, bounds[-1].values) == gossamer.masks.causal()
    assert bounds[-1].captures == () and bounds[-1].empty == "none"
    with torch.no_grad():  # a window of 3 from now on
        window = torch.ones(32, 32).tril().triu(-2)
        module.mask.copy_(torch.where(window == 0, -INF, 0.0) if added else window)
    torch.testing.assert_close(f(q, k, v), module(q, k, v))
    assert gossamer.Mask(bounds[-1].mask, bounds[-1].values) == gossamer.masks.sliding_window(2, 0)


def test_a_buffer_that_is_exchanged_is_looked_at_again():
    module = Buffered(False)
    q, k, v = inputs(torch.float64)
    f = gossamer.jit(module)
    for window in (20, 3, 5, 2):
        module.mask.data = torch.ones(1, 1, 32, 32).tril().triu(-window)  # which changes no version
        torch.testing.assert_close(f(q, k, v), module(q, k, v))


def test_a_captured_matrix_is_recovered(bounds):
    mask = torch.ones(20, 20, dtype=torch.bool).tril()

    def program(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    check(program, *inputs(torch.float64))
    assert gossamer.Mask(bounds[-1].mask, bounds[-1].values) == gossamer.masks.causal()


# ---- FlexAttention ----


def test_flex_attention():
    bias = torch.randn(4, 20, 20, dtype=torch.float64)
    window = torch.tensor(6)

    def score_mod(score, b, h, q, k):
        return torch.tanh(score / 4) * 4 + bias[h, q, k].to(score.dtype)

    block_mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < window), None, None, 20, 20, "cpu")

    def program(q, k, v):
        return flex_attention(q, k[:, :2], v[:, :2], score_mod, block_mask, scale=0.3, enable_gqa=True) * 2

    q, k, v = inputs(torch.float64)
    k2, v2 = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    i = torch.arange(20)
    near = (i[:, None] >= i) & (i[:, None] - i < 6)
    scores = (torch.tanh(q @ k2.mT * 0.3 / 4) * 4 + bias).masked_fill(~near, -INF)
    f = gossamer.jit(program)
    torch.testing.assert_close(f(q, k, v), scores.softmax(-1) @ v2 * 2)
    assert len(f.report().compiled) == 1 and not f.report().left


# ---- what is left alone ----


def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def part_of_the_keys(q, k, v):
    return (q @ k.mT).softmax(-1)[..., :10] @ v[..., :10, :]


def part_of_the_scores(q, k, v):
    return (q @ k.mT)[..., :10].softmax(-1) @ v[..., :10, :]


def weights_returned(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v, p


def scores_used(q, k, v):
    s = q @ k.mT
    return s.softmax(-1) @ v + s.mean()


def mask_from_scores(q, k, v):
    s = q @ k.mT
    return s.masked_fill(s < s.mean(-1, keepdim=True), -INF).softmax(-1) @ v


def dropout_in_training(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.5, training=True) @ v


def fused_dropout(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)


def keys_that_depend_on_queries(q, k, v):
    return torch.einsum("bhqk,bhkqd->bhqd", (q @ k.mT).softmax(-1), v[:, :, :, None] * q[:, :, None])


def transposed_scores_added(q, k, v):
    s = q @ k.mT
    return (s + s.mT).softmax(-1) @ v


LEFT = {
    softmax_over_queries: "not summed over the keys",
    part_of_the_keys: "in part",
    part_of_the_scores: "in part",
    weights_returned: "used elsewhere",
    scores_used: "used elsewhere",
    mask_from_scores: "depends on its scores",
    dropout_in_training: "dropout",
    fused_dropout: "dropout",
    keys_that_depend_on_queries: "depend on the query",
    transposed_scores_added: "other places",
}


@pytest.mark.parametrize("program", LEFT, ids=lambda p: p.__name__)
def test_left_alone(program):
    f = gossamer.jit(program)
    torch.manual_seed(0)
    ours = f(*inputs(torch.float64))
    torch.manual_seed(0)
    torch.testing.assert_close(ours, program(*inputs(torch.float64)), rtol=0, atol=0)
    report = f.report()
    assert not report.compiled and len(report.left) == 1
    assert LEFT[program] in report.left[0].why, report
    assert str(report).startswith("left attention at ") and "test_jit.py:" in str(report)


def no_shift(q, k, v):
    e = (q @ k.mT).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def other_sum(q, k, v):
    s = q @ k.mT
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / (e.sum(-1, keepdim=True) + 1)) @ v


def other_dimension(q, k, v):
    s = q @ k.mT
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-2, keepdim=True)) @ v


def overwritten_exponentials(q, k, v):
    s = q @ k.mT
    e = (s - s.amax(-1, keepdim=True)).exp()
    total = e.sum(-1, keepdim=True)
    e[..., :3].zero_()
    return (e / total) @ v


@pytest.mark.parametrize("program", [no_shift, other_sum, other_dimension, overwritten_exponentials])
def test_what_is_no_softmax_by_hand(program):
    f = gossamer.jit(program)
    given = inputs(torch.float64)
    torch.testing.assert_close(f(*given), program(*given), rtol=0, atol=0)
    assert not f.report().compiled


def test_a_mask_of_the_sign_of_scores_is_a_score_map():
    def program(q, k, v):
        s = q @ k.mT
        return torch.where(s > 0, s, 0.1 * s).softmax(-1) @ v

    check(program, *inputs(torch.float64))


def test_data_dependent_branches_break_the_capture_and_are_reported():
    def program(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if out.sum().item() > 1e9:
            return out
        return F.scaled_dot_product_attention(out, k, v)

    f = gossamer.jit(program)
    tensors = inputs(torch.float64)
    torch.testing.assert_close(f(*tensors), program(*tensors))
    report = f.report()
    assert len(report.compiled) == 2
    assert [part.kind for part in report.left] == ["graph"]


def test_an_entry_point_of_torch_compile():
    gossamer.jit  # noqa: B018  an installed gossamer registers itself by its entry point
    assert "gossamer" in torch._dynamo.list_backends()
    program = SPELLINGS["matmul_tril"]
    f = torch.compile(program, backend="gossamer")
    before = compilations()
    torch.testing.assert_close(f(*inputs(torch.float64)), program(*inputs(torch.float64)))
    assert compilations() >= before


# ---- sizes and windows at run time ----


def test_another_length_compiles_nothing():
    program = SPELLINGS["sliding_window"]
    f = gossamer.jit(program, dynamic=True)
    q, k, v = inputs(torch.float64)
    torch.testing.assert_close(f(q, k, v), program(q, k, v))
    before = compilations()
    for n in (7, 13, 19):
        some = [x[:, :, :n].contiguous() for x in (q, k, v)]
        torch.testing.assert_close(f(*some), program(*some))
    assert compilations() == before


def test_windows_given_as_integers_use_one_kernel():
    def program(q, k, v, window):
        i = torch.arange(q.shape[2])
        near = (i[:, None] - i < window) & (i[:, None] >= i)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near)

    f = gossamer.jit(program)
    tensors = inputs(torch.float64)
    torch.testing.assert_close(f(*tensors, 4), program(*tensors, 4))
    before = compilations()
    for window in (7, 9, 12):
        torch.testing.assert_close(f(*tensors, window), program(*tensors, window))
    assert compilations() == before


def test_layers_with_windows_of_their_own_use_one_kernel():
    def program(q, k, v):
        i = torch.arange(q.shape[2])
        for window in (3, 6, 9, 12):
            near = (i[:, None] - i < window) & (i[:, None] >= i)
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
        return q

    before = compilations()
    check(program, *inputs(torch.float64), sites=4)
    assert compilations() - before <= 2  # float64 and float32


# ---- torch's own modules ----


def test_modules_of_torch():
    torch.manual_seed(0)
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dtype=torch.float64)
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64).eval()

    def attend(x):
        return attention(x, x, x, need_weights=False)[0]

    def cross(x):
        return attention(x[:, :7], x, x * 2, attn_mask=torch.ones(7, 20, dtype=torch.bool).triu(3))[0]

    for program in (attend, cross, layer.eval(), torch.nn.TransformerEncoder(layer, 1).eval()):
        torch._dynamo.reset()
        f = gossamer.jit(program)
        torch.testing.assert_close(f(x), program(x))
        assert len(f.report().compiled) == 1 and not f.report().left, f.report()


@pytest.mark.parametrize("window", [None, 3])
def test_encoders_of_torch_with_masks(window):
    encoder = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, dtype=torch.float64),
        2,
        enable_nested_tensor=False,
    ).eval()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(20, dtype=torch.float64)
    if window is not None:
        mask = mask.masked_fill(torch.ones(20, 20).tril(-window).bool(), -INF)
    f = gossamer.jit(encoder)
    with torch.enable_grad():  # without gradients torch computes a layer in one operation
        torch.testing.assert_close(f(x, mask=mask), encoder(x, mask=mask))
    assert [len(f.report().compiled), len(f.report().left)] == [2, 0], f.report()


def test_modules_of_torch_are_left_alone_where_something_would_be_lost():
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 20, 32)

    def weights(x):
        return attention(x, x, x)[1]

    def both(x):
        return attention(x, x, x)

    for program in (weights, both):
        f = gossamer.jit(program)
        torch.testing.assert_close(f(x), program(x), rtol=0, atol=0)
        assert not f.report().compiled and "used elsewhere" in str(f.report()), f.report()


@pytest.mark.parametrize("which", ["keys", "causal", "both", "no_keys", "biases"])
def test_masks_of_layers_that_torch_computes_in_one_operation(which):
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dtype=torch.float64).eval()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    padded = torch.arange(20) >= torch.tensor([[20], [0 if which == "no_keys" else 13]])
    given = {"src_key_padding_mask": padded} if which in ("keys", "both", "no_keys") else {}
    if which in ("causal", "both"):
        given["src_mask"] = torch.ones(20, 20).triu(1).bool()
    if which == "biases":  # which the operation takes for a mask
        given["src_mask"] = torch.randn(20, 20, dtype=torch.float64).triu(1)
    f = gossamer.jit(layer)
    torch.testing.assert_close(f(x, **given), layer(x, **given), equal_nan=True)
    assert [len(f.report().compiled), len(f.report().left)] == [1, 0], f.report()


# ---- probabilities that are changed ----


def test_probabilities_masked_again_give_zeros_where_there_are_no_keys():
    def again(q, k, v, lengths):
        kept = torch.arange(20) < lengths[:, None, None, None]
        p = (q @ k.mT).masked_fill(~kept, -INF).softmax(-1)
        return p.masked_fill(~kept, 0.0) @ v

    check(again, *inputs(torch.float64), torch.tensor([0, 7]))


def test_changed_probabilities_are_left_alone_where_rows_may_be_empty():
    def halved(q, k, v, lengths):
        kept = torch.arange(20) < lengths[:, None, None, None]
        p = (q @ k.mT).masked_fill(~kept, -INF).softmax(-1)
        return torch.where(torch.arange(20) < 10, p, 0.0) @ v

    f = gossamer.jit(halved)
    given = *inputs(torch.float64), torch.tensor([0, 7])
    torch.testing.assert_close(f(*given), halved(*given), equal_nan=True)
    assert "rows without keys" in str(f.report())


# ---- gradients that stop ----


def detached_probabilities(q, k, v, bias):
    return (q @ k.mT + bias).softmax(-1).detach() @ v


def detached_scores(q, k, v, bias):
    return ((q @ k.mT).detach() + bias).softmax(-1) @ v


def detached_bias(q, k, v, bias):
    return (q @ k.mT + (bias * 2).detach()).softmax(-1) @ v


def probabilities_without_gradients(q, k, v, bias):
    with torch.no_grad():
        p = (q @ k.mT + bias).softmax(-1)
    return p @ v


def bias_without_gradients(q, k, v, bias):
    with torch.no_grad():
        bias = bias * 2
    return (q @ k.mT + bias).softmax(-1) @ v


STOPS = [
    detached_probabilities,
    detached_scores,
    detached_bias,
    probabilities_without_gradients,
    bias_without_gradients,
]


@pytest.mark.parametrize("program", STOPS, ids=lambda p: p.__name__)
def test_gradients_stop_where_they_did(program):
    def gradients(f):
        given = [*inputs(torch.float64), torch.randn(20, 20, dtype=torch.float64, generator=generator)]
        given = [x.requires_grad_() for x in given]
        f(*given).square().sum().backward()
        return [x.grad if x.grad is not None else torch.zeros_like(x) for x in given]

    with torch.enable_grad():
        generator = torch.Generator().manual_seed(0)
        wanted = gradients(program)
        generator = torch.Generator().manual_seed(0)
        f = gossamer.jit(program)
        torch.testing.assert_close(gradients(f), wanted, rtol=1e-9, atol=1e-11)
    assert len(f.report().compiled) == ("bias" in program.__name__), f.report()


def masked_for_good(q, k, v, mask):
    return (q @ k.mT * 0.3).masked_fill(~mask, -INF).softmax(-1) @ v


def masked_by_adding(q, k, v, mask):
    kept = mask.to(q.dtype)
    return (q @ k.mT * 0.3 + (1 - kept) * torch.finfo(q.dtype).min).softmax(-1) @ v


def masked_in_place_of_scores(q, k, v, mask):
    return (q @ k.mT * 0.3).masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) @ v


def masked_below_a_cap(q, k, v, mask):
    kept = mask.to(q.dtype)
    return (torch.tanh(q @ k.mT) + (1 - kept) * torch.finfo(q.dtype).min).softmax(-1) @ v


EMPTY = [masked_for_good, masked_by_adding, masked_in_place_of_scores, masked_below_a_cap]


@pytest.mark.parametrize("program", EMPTY, ids=lambda p: p.__name__)
def test_gradients_of_rows_without_keys(program):
    q, k, v = inputs(torch.float64)
    mask = torch.arange(20) < torch.tensor([0, 7])[:, None, None, None]
    grad = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(3))
    f = gossamer.jit(program)
    with torch.enable_grad():
        for keys in (slice(None), slice(2)):  # heads of their own, and shared ones
            given = [q.detach().clone(), *(x[:, keys].detach().clone() for x in (k, v))]
            given = [x.requires_grad_() for x in given]
            shared = [given[0], *(x.repeat_interleave(4 // x.shape[1], 1) for x in given[1:])]
            ours, wanted = (torch.autograd.grad(g(*shared, mask), given, grad) for g in (f, program))
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert len(f.report().compiled) == 1, f.report()


def test_an_output_that_is_written_to_has_gradients():
    def residual(q, k, v):
        out = (q @ k.mT).softmax(-1) @ v
        out += q
        return out

    f = gossamer.jit(residual)
    with torch.enable_grad():
        given = [x.requires_grad_() for x in inputs(torch.float64)]
        ours, wanted = (torch.autograd.grad(g(*given).square().sum(), given) for g in (f, residual))
    torch.testing.assert_close(ours, wanted)
    assert len(f.report().compiled) == 1


def test_copies_of_a_module_report_for_themselves():
    module = Buffered(False)
    f = gossamer.jit(module)
    for again in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        given = inputs(torch.float64)
        torch.testing.assert_close(again(*given), module(*given))
        assert len(again.report().compiled) == 1
    assert not f.report().compiled


class WithDropout(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.3)

    def forward(self, q, k, v):
        return self.drop((q @ k.mT * 0.3).softmax(-1)) @ v


def test_dropout_of_a_module_is_left_alone_while_it_trains():
    module, given = WithDropout(), torch.randn(3, 1, 2, 20, 8).unbind()
    f = gossamer.jit(module)
    results = []
    for call in (f, module):
        torch.manual_seed(3)
        results.append(call(*given))
    assert torch.equal(*results)
    (left,) = f.report().left
    assert "dropout in training" in left.why and "test_jit.py:" in left.where
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(f(*given), module(*given))
    assert len(f.report().compiled) == 1


def overwritten_scores(q, k, v):
    scores = q @ k.mT
    scores[..., 0] = -5.0
    return scores.softmax(-1) @ v


def overwritten_probabilities(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    weights[..., 0] = 0.0
    return weights @ v


@pytest.mark.parametrize("program", [overwritten_scores, overwritten_probabilities])
def test_a_part_that_is_overwritten_is_left_alone(program):
    given = torch.randn(3, 1, 2, 20, 8).unbind()
    f = gossamer.jit(program)
    with torch.no_grad():
        assert torch.equal(f(*given), program(*given))
    assert not f.report().compiled and len(f.report().left) == 1

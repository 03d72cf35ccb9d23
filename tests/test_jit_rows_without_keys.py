"""gossamer.jit: what programs do about rows without keys, and sinks before the scores."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import gossamer

B, H, S, D = 2, 3, 20, 16
INF = float("-inf")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def filled(q, k, mask, fill=INF):
    return (q @ k.mT / 4).masked_fill(~mask, fill)


def no_nans(q, k, v, mask):
    return torch.nan_to_num(filled(q, k, mask).softmax(-1)) @ v


def no_nans_behind_an_added_mask(q, k, v, mask):
    scores = q @ k.mT / 4 + torch.zeros(S, S, dtype=q.dtype).masked_fill(~mask, INF)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def where_a_row_has_keys(q, k, v, mask):
    return torch.where(mask.any(-1, keepdim=True), filled(q, k, mask).softmax(-1), 0.0) @ v


def rows_filled(q, k, v, mask):
    return filled(q, k, mask).softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0) @ v


def finite_fill(q, k, v, mask):
    scores = filled(q, k, mask, -1e9)
    return torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), torch.zeros_like(scores)) @ v


def with_sinks(q, k, first):
    sinks = torch.linspace(-1, 1, H, dtype=q.dtype).view(1, -1, 1, 1).expand(B, -1, S, 1)
    scores = q @ k.mT / 4
    return torch.cat([sinks, scores] if first else [scores, sinks], -1).softmax(-1)


def sinks_first(q, k, v, mask):
    return with_sinks(q, k, True)[..., 1:] @ v


def other_nans(q, k, v, mask):
    return torch.nan_to_num(filled(q, k, mask).softmax(-1), nan=1.0) @ v


def where_a_column_has_queries(q, k, v, mask):
    return torch.where(mask.any(-2, keepdim=True), filled(q, k, mask).softmax(-1), 0.0) @ v


def of_another_mask(q, k, v, mask):
    return torch.where(mask.flip(0).any(-1, keepdim=True), filled(q, k, mask).softmax(-1), 0.0) @ v


def the_last_score_cut_off(q, k, v, mask):
    return with_sinks(q, k, True)[..., :-1] @ v


def the_first_score_cut_off(q, k, v, mask):
    return with_sinks(q, k, False)[..., 1:] @ v


def dropout(q, k, v, mask):
    return F.dropout((q @ k.mT / 4).softmax(-1), 0.1, training=True) @ v


def fused_dropout(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


# Why they are left, without gradients and with them; None: compiled.
PROGRAMS = {
    no_nans: (None, None),
    no_nans_behind_an_added_mask: (None, "gradients are NaN"),
    where_a_row_has_keys: (None, None),
    rows_filled: (None, None),
    finite_fill: (None, None),
    sinks_first: (None, None),
    other_nans: ("not summed over the keys",) * 2,
    where_a_column_has_queries: ("rows without keys",) * 2,
    of_another_mask: ("rows without keys",) * 2,
    the_last_score_cut_off: ("rearranged",) * 2,
    the_first_score_cut_off: ("rearranged",) * 2,
    dropout: ("dropout in training",) * 2,
    fused_dropout: ("dropout in training",) * 2,
}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_program(program, grad):
    mask = torch.rand(S, S) > 0.4
    mask[3] = False  # a row without keys
    given = torch.randn(3, B, H, S, D, dtype=torch.float64)
    slopes, f = torch.randn(B, H, S, D, dtype=torch.float64), gossamer.jit(program)
    found = []
    for call in (f, program):
        torch.manual_seed(1)
        q, k, v = (x.clone().requires_grad_(grad) for x in given)
        out = call(q, k, v, mask)
        if grad:
            out.backward(slopes)
        found.append([out.detach(), q.grad, k.grad, v.grad] if grad else [out])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9, equal_nan=True)
    report, why = f.report(), PROGRAMS[program][grad]
    if why is None:
        assert [part.kind for part in report.compiled] == ["attention"] and not report.left, report
    else:
        assert not report.compiled and why in report.left[0].why, report

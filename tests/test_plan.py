"""Repeated calls are launched from plans: they see everything that changed since the first one."""

import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.frontend.captured import DERIVATIONS, Derivation
from gossamer.frontend.problem import Problem
from gossamer.frontend.reference import reference_attention
from gossamer.ir.errors import InputError
from gossamer.runtime.driver import compilations, driver, reset
from gossamer.runtime.recent import Recent

WINDOW = masks.sliding_window(7, 3)


@pytest.fixture(autouse=True)
def fresh():
    reset()
    yield
    reset()


def tensors(q_len=30, kv_len=40, batch=1, heads=2, size=16):
    shapes = (batch, heads, q_len, size), (batch, heads, kv_len, size), (batch, heads, kv_len, size)
    return tuple(torch.randn(shape) for shape in shapes)


def expected(q, k, v, mask, scale=None):
    return reference_attention(Problem(q, k, v, False), gossamer.Mask.of(mask), None, scale)[0]


def check(q, k, v, mask=WINDOW, scale=None):
    out = gossamer.attention(q, k, v, mask=mask, scale=scale)
    torch.testing.assert_close(out, expected(q, k, v, mask, scale), rtol=1e-5, atol=1e-5)
    return out


def test_a_second_call_has_a_plan_and_new_outputs():
    first, second = (check(*tensors()) for _ in range(2))
    assert len(driver().plans) == 1
    assert first.data_ptr() != second.data_ptr()


def test_contents_and_storage_are_read_at_each_call():
    q, k, v = tensors()
    check(q, k, v)
    q.mul_(3)
    check(q, k, v)
    k.data = torch.randn_like(k)
    check(q, k, v)
    assert len(driver().plans) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[:, :, :20], k, v),
        lambda q, k, v: (q, k[:, :, 5:], v[:, :, 5:]),
        lambda q, k, v: (q.transpose(2, 3).contiguous().transpose(2, 3), k, v),
        lambda q, k, v: (q, k.flip(3).mT.contiguous().mT, v),
        lambda q, k, v: (q[..., ::2], k[..., ::2], v),
        lambda q, k, v: (q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)),
        lambda q, k, v: (q.expand(3, -1, -1, -1), k, v),
        lambda q, k, v: (q.double(), k.double(), v.double()),
        lambda q, k, v: (q, k, torch.complex(v, v).conj().imag),
        lambda q, k, v: (torch.nn.Parameter(q, requires_grad=False), k, v),
    ],
)
def test_tensors_that_differ_have_plans_of_their_own(change):
    given = tensors()
    check(*given)
    check(*change(*given))
    check(*change(*given))
    check(*given)


def test_numbers_that_a_mask_captures_are_read_at_each_call():
    q, k, v = tensors()
    width = 3

    def near(b, h, q_idx, kv_idx):
        return (q_idx - kv_idx).abs() <= width

    for width in (3, 9, 3, 0):  # noqa: B007
        check(q, k, v, near)
    before = compilations()
    width = 14
    check(q, k, v, near)
    assert compilations() == before


def test_scales_are_told_apart():
    given = tensors()
    scale = torch.tensor(0.5)
    for value in (0.1, 0.2, None, 1, scale, scale.mul_(3), 0.1):
        check(*given, scale=value)


@pytest.mark.parametrize("sorted_", [True, False])
def test_contents_of_captured_tensors_are_read_at_each_call(sorted_):
    given = tensors(40, 40)
    ids = torch.arange(40) // 6
    mask = masks.document(ids)
    check(*given, mask)
    ids.copy_(torch.arange(40) // 9 if sorted_ else torch.arange(40) % 3)
    check(*given, mask)


def test_gradients_are_known_after_a_plan_was_made():
    q, k, v = tensors()
    check(q, k, v)
    assert gossamer.attention(q.requires_grad_(), k, v, mask=WINDOW).requires_grad
    with torch.no_grad():
        check(q, k, v)
        check(q, k, v)
    assert gossamer.attention(q, k, v, mask=WINDOW).requires_grad


def test_dropout_and_maps_of_probabilities_have_plans():
    q, k, v = tensors()
    halved = lambda prob, b, h, q_idx, kv_idx: prob * 0.5  # noqa: E731
    plans = driver().plans
    gossamer.attention(q, k, v, prob_mod=halved, dropout_p=0.5)
    before = len(plans)
    first, second = (gossamer.attention(q, k, v, prob_mod=halved, dropout_p=0.5) for _ in range(2))
    assert len(plans) == before
    assert not torch.equal(first, second)


def test_tables_are_checked_at_each_call():
    q, k, v = tensors()
    check(q, k, v, torch.rand(30, 40) > 0.5)
    with pytest.raises(InputError, match="broadcastable"):
        gossamer.attention(q, k, v, mask=torch.rand(31, 40) > 0.5)


@pytest.mark.parametrize("bad", [None, "q", [1, 2]])
def test_what_is_no_tensor_is_named(bad):
    q, k, v = tensors()
    check(q, k, v)
    with pytest.raises(InputError, match=r"query: expected a torch\.Tensor"):
        gossamer.attention(bad, k, v, mask=WINDOW)
    with pytest.raises(InputError, match=r"value: expected a torch\.Tensor"):
        gossamer.attention(q, k, bad, mask=WINDOW)


def test_options_that_cannot_be_hashed_are_named():
    with pytest.raises(InputError, match=r"attention\.backend"):
        gossamer.attention(*tensors(), backend=["auto"])


def test_on_a_gpu_captured_tensors_have_plans_too(fake):
    q, k, v = tensors(32, 32)
    bias = torch.randn(2)

    def biased(score, b, h, q_idx, kv_idx):
        return score + bias[h]

    for _ in range(3):
        gossamer.attention(q, k, v, score_mod=biased)
        bias = torch.randn(2)
    assert len({done.arguments for done in fake.launched}) == 3
    places = [done.arguments for done in fake.launched]
    assert len({p[12] for p in places}) >= 2  # the address of the bias


def test_the_oldest_plan_goes_first():
    recent = Recent(2)
    for n in range(4):
        recent.put(n, str(n))
    assert (len(recent), recent.get(1), recent.get(2), recent.get(3)) == (2, None, "2", "3")


def test_selections_are_computed_once_a_call(monkeypatch):
    q = torch.randn(1, 1, 64, 16)
    indices = torch.zeros(1, 1, 4, 1, dtype=torch.int64)
    mask = masks.selected(indices, 64, rows=16, keys=16)
    [table] = mask.sources
    made, (compute, waits) = [], DERIVATIONS[table.recipe[0]]
    counted = Derivation(lambda *given: made.append(compute(*given)) or made[-1], waits)
    monkeypatch.setitem(DERIVATIONS, table.recipe[0], counted)
    for chosen in (0, 3):
        indices.data.numpy()[...] = chosen  # a write that torch does not count
        gossamer.attention(q, q, q, mask=mask)
    assert len(made) == 2 and not torch.equal(*made)

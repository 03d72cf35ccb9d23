"""Models made of linear attention, local products and summaries, against their dense formulas."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
import gossamer  # noqa: E402
from gossamer.ir.errors import InputError  # noqa: E402


def rows(*sizes, length, heads=2, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, length, s, generator=g, dtype=torch.float64).to(dtype) for s in sizes]


def elu(x):
    return torch.nn.functional.elu(x) + 1


# ---- relative positions ----


def relative(q, k, v, bias, causal, normalize=True, eps=1e-6):
    reach, at = (bias.shape[-1] - 1) // 2, torch.arange(q.shape[2])
    distance = (at - at[:, None]).clamp(-reach, reach)
    scores = (elu(q) @ elu(k).mT) * bias[..., distance + reach].exp()
    scores = scores.tril() if causal else scores
    return scores @ v / (scores.sum(-1, keepdim=True) + eps) if normalize else scores @ v


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(0, 40), st.booleans(), st.booleans(), st.booleans())
def test_relative_positions(length, reach, causal, by_head, windows):
    method = "window" if windows else "fft"
    q, k, v = rows(5, 5, 3, length=length)
    shape = (2, 2 * reach + 1) if by_head else (2 * reach + 1,)
    bias = torch.randn(shape, dtype=torch.float64)
    found = gossamer.relative_linear_attention(q, k, v, bias, causal=causal, method=method)
    torch.testing.assert_close(found, relative(q, k, v, bias, causal), rtol=1e-9, atol=1e-9)


def test_a_whole_toeplitz_matrix():
    q, k, v = rows(5, 5, 3, length=50)
    bias = torch.randn(99, dtype=torch.float64)
    for method in ("window", "fft"):
        found = gossamer.relative_linear_attention(q, k, v, bias, method=method, normalize=False)
        torch.testing.assert_close(found, relative(q, k, v, bias, False, normalize=False))


@pytest.mark.parametrize("method", ["window", "fft"])
def test_gradients_of_relative_positions(method):
    q, k, v = (t.requires_grad_() for t in rows(5, 5, 3, length=60))
    bias = torch.randn(2, 11, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 2, 60, 3, dtype=torch.float64)
    made = gossamer.relative_linear_attention(q, k, v, bias, method=method), relative(q, k, v, bias, False)
    found, wanted = (torch.autograd.grad((m * weights).sum(), (q, k, v, bias)) for m in made)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_rows_without_far_keys_are_exact_where_near_ones_weigh_little():
    """Nothing cancels: near pairs are not first counted as far ones."""
    q, k, v = rows(5, 5, 3, length=100, dtype=torch.float32)
    bias = torch.full((21,), -20.0)
    bias[0] = bias[-1] = 0.0
    found = gossamer.relative_linear_attention(q, k, v, bias, causal=True, eps=0.0)
    exact = relative(*(t.double() for t in (q, k, v)), bias.double(), True, eps=0.0)
    torch.testing.assert_close(found[:, :, :9].double(), exact[:, :, :9], rtol=1e-5, atol=1e-5)


# ---- MossFormer ----


def moss(q, k, lq, lk, v, chunk):
    at = torch.arange(q.shape[2]) // chunk
    local = (q @ k.mT / chunk).relu().square() * (at == at[:, None])
    return local @ v + lq @ lk.mT @ v / q.shape[2]


@pytest.mark.parametrize(("length", "chunk"), [(64, 16), (70, 16), (5, 16), (33, 1)])
def test_mossformer(length, chunk):
    given = [t.requires_grad_() for t in rows(6, 6, 4, 4, 7, length=length, heads=1)]
    found, exact = gossamer.mossformer_attention(*given, chunk=chunk), moss(*given, chunk)
    torch.testing.assert_close(found, exact)
    weights = torch.randn_like(exact)
    pairs = zip(*(torch.autograd.grad((m * weights).sum(), given) for m in (found, exact)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mossformer_in_16_bits(dtype):
    given = rows(6, 6, 4, 4, 7, length=300, heads=1, dtype=dtype)
    exact = moss(*(t.double() for t in given), 64)
    made = gossamer.mossformer_attention(*given, chunk=64), moss(*given, 64)
    error, plain = ((m.double() - exact).abs().max() for m in made)
    assert error <= 2 * plain + torch.finfo(dtype).eps * exact.abs().max()


# ---- Combiner ----


def combined(q, k, v, block, causal, summary, count):
    length, scale = q.shape[2], q.shape[3] ** -0.5
    pool = {"max": lambda t: t.amax(3), "mean": lambda t: t.mean(3)}[summary]
    qs, ks, vs = (t.unflatten(2, (-1, block)) for t in (q, k, v))
    inside = torch.einsum("bhnd,bhnjd->bhnj", pool(qs), ks).mul(scale).softmax(-1)
    values = torch.einsum("bhnj,bhnje->bhne", inside, vs)
    scores = torch.cat([q @ pool(ks).mT * scale, q @ k.mT * scale], -1)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    blocks = length // block
    if count:
        scores[..., :blocks] += torch.log(torch.tensor(float(block)))
    near = (j // block == i // block) & ((j <= i) | (not causal))
    far = torch.arange(blocks) < i // block if causal else torch.arange(blocks) != i // block
    scores = scores.masked_fill(~torch.cat([far, near], -1), -torch.inf)
    return scores.softmax(-1) @ torch.cat([values, v], 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("summary", "count"), [("max", False), ("mean", True)])
def test_combiner(causal, summary, count):
    q, k, v = (t.requires_grad_() for t in rows(8, 8, 8, length=48))
    options = {"block": 8, "causal": causal, "summary": summary, "count": count}
    found, exact = gossamer.combiner_attention(q, k, v, **options), combined(q, k, v, **options)
    torch.testing.assert_close(found, exact)
    if causal and count:
        weights = torch.randn_like(exact)
        made = (torch.autograd.grad((m * weights).sum(), (q, k, v)) for m in (found, exact))
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(one, other)


# ---- bad input ----

ZERO = torch.zeros(1, 2, 8, 4)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: gossamer.relative_linear_attention(ZERO, ZERO, ZERO, torch.zeros(4)), r"\(2 W \+ 1,\)"),
        (lambda: gossamer.relative_linear_attention(ZERO, ZERO, ZERO, torch.zeros(3, 5)), r"\(2, 2 W \+ 1\)"),
        (lambda: gossamer.relative_linear_attention(ZERO, ZERO, ZERO, torch.zeros(5), method="x"), "'fft'"),
        (lambda: gossamer.relative_linear_attention(ZERO, ZERO[:, :1], ZERO, torch.zeros(5)), "as query has"),
        (lambda: gossamer.mossformer_attention(*[ZERO] * 5, chunk=0), "at least 1"),
        (lambda: gossamer.mossformer_attention(ZERO, ZERO, ZERO, ZERO[..., :2], ZERO), "linear_key"),
        (lambda: gossamer.combiner_attention(ZERO, ZERO, ZERO, block=3), "divides the length 8"),
        (lambda: gossamer.combiner_attention(ZERO, ZERO, ZERO, block=4, summary="sum"), "'max' or 'mean'"),
        (lambda: gossamer.combiner_attention(ZERO, ZERO.double(), ZERO, block=4), "torch.float32 on cpu"),
    ],
)
def test_bad_input(run, message):
    with pytest.raises(InputError, match=message):
        run()

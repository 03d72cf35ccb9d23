"""Linear attention and its relatives inside torch.compile, torch.export and vmap: one operator each."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
from torch.library import opcheck  # noqa: E402

import gossamer  # noqa: E402
from gossamer import feature_maps  # noqa: E402
from gossamer.frontend.linear import operator as linear_operator  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=GENERATOR, dtype=dtype)


def rows(length=20, dtype=torch.float64):
    return [random(2, 2, length, 8, dtype=dtype) for _ in range(3)]


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def same(function, *given, call=None):
    """Results and gradients of a function, compiled and not."""
    results = []
    for one in (call or compiled(function), function):
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in given]
        out = one(*leaves)
        parts = [t for t in torch.utils._pytree.tree_leaves(out) if t.requires_grad]
        total = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in parts)
        results.append([*parts, *torch.autograd.grad(total, leaves)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def attend(q, k, v):
    return gossamer.linear_attention(q * 2, k, v, causal=True) + 1


def test_one_graph_serves_all_lengths():
    graphs = []

    def seen(module, inputs):
        graphs.append(module)
        return module

    watched = torch.compile(attend, fullgraph=True, backend=seen)
    for length in (7, 12, 30, 31):
        given = rows(length)
        torch.testing.assert_close(watched(*given), attend(*given))
    assert len(graphs) <= 2  # one for a length, one for any
    dynamic = compiled(attend, dynamic=True)
    for length in (12, 30):
        same(attend, *rows(length), call=dynamic)


def traced_map(x):
    return torch.exp(x / 4), torch.exp(-x / 4)


OPTIONS = {
    "traced": dict(feature_map=traced_map),
    "relu, plain sums": dict(feature_map="relu", normalize=False),
    "two maps": dict(feature_map="elu", key_map="exp"),
    "causal": dict(causal=True, eps=1e-3),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    same(lambda q, k, v: gossamer.linear_attention(q, k, v, **OPTIONS[name]), *rows())


def test_states_pass_through():
    def halves(q, k, v):
        first = [t[:, :, :9] for t in (q, k, v)]
        last = [t[:, :, 9:] for t in (q, k, v)]
        out, state = gossamer.linear_attention(*first, causal=True, return_state=True)
        more, end = gossamer.linear_attention(*last, causal=True, initial_state=state, return_state=True)
        return torch.cat([out, more], 2), end

    same(halves, *rows())


@pytest.mark.parametrize("made_inside", [True, False])
def test_maps_that_read_weights(made_inside):
    weight = random(2, 8, 5, dtype=torch.float64)
    if made_inside:
        same(lambda q, k, v, w: gossamer.linear_attention(q, k, v, feature_maps.hedgehog(w)), *rows(), weight)
        return
    made = feature_maps.positive(weight)
    same(lambda q, k, v: gossamer.linear_attention(q, k, v, made), *rows())


def test_relatives():
    bias = random(2, 9, dtype=torch.float64)
    same(lambda q, k, v, b: gossamer.relative_linear_attention(q, k, v, b, causal=True), *rows(), bias)
    same(lambda q, k, v: gossamer.mossformer_attention(q, k, q, k, v, chunk=8), *rows())
    same(lambda q, k, v: gossamer.combiner_attention(q, k, v, block=5), *rows())


def test_flurka():
    tensors = [random(*shape, dtype=torch.float64) for shape in ((2, 20, 12), *[(12, 8)] * 3, (6, 20))]
    same(lambda *given: gossamer.flurka(*given, heads=2, feature_map="relu"), *tensors)


class Layer(torch.nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Layer(), tuple(rows()), dynamic_shapes=({2: length},) * 3, strict=strict)
    names = [node.target for node in program.graph.nodes if "gossamer" in str(node.target)]
    assert names == [torch.ops.gossamer.linear_attention.default]
    given = rows(33)
    torch.testing.assert_close(program.module()(*given), attend(*given))


def test_vmap():
    given = [random(3, 1, 2, 6, 4) for _ in range(3)]
    found = torch.vmap(gossamer.linear_attention)(*given)
    each = [gossamer.linear_attention(*one) for one in zip(*given, strict=True)]
    torch.testing.assert_close(found, torch.stack(each))


@pytest.mark.parametrize("length", [9, 0])
@pytest.mark.parametrize("normalize", [True, False])
def test_operators_keep_torchs_rules(monkeypatch, normalize, length):
    monkeypatch.setattr("gossamer.frontend.linear.attention.watched", lambda tensors: True)
    found = []
    operator = torch.ops.gossamer.linear_attention

    class Spy:
        def linear_attention(self, *given):
            found.append(given)
            return operator(*given)

    monkeypatch.setattr(linear_operator.torch.ops, "gossamer", Spy())
    q, k, v = (t.requires_grad_() for t in rows(length))
    gossamer.linear_attention(q, k, v, causal=True, normalize=normalize, return_state=True)
    monkeypatch.undo()
    (arguments,) = found
    opcheck(operator, arguments)


def test_what_is_wrong_is_said_while_tracing():
    q, k, v = rows()
    with pytest.raises(Exception, match=r"linear_attention\.key"):
        compiled(lambda q, k, v: gossamer.linear_attention(q, k[:, :, :, :3], v))(q, k, v)

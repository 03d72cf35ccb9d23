"""Layers of experts and routers under torch.func: grad, vjp, vmap of grad; what is refused."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer.ir.errors import UnsupportedError  # noqa: E402

T, E, K, H, INNER = 9, 4, 2, 16, 12
G = torch.Generator().manual_seed(0)
X, UP, DOWN = (torch.randn(*shape, generator=G) / 4 for shape in ((T, H), (E, 2 * INNER, H), (E, H, INNER)))
LOGITS = torch.randn(T, E, generator=G)
WEIGHTS, IDS = LOGITS.softmax(-1).topk(K)


def layer(x, up, weights):
    return gossamer.experts(x, IDS, weights, up, DOWN).square().sum()


def whole(x, logits, up):
    routing = gossamer.route(logits, K)
    loss = gossamer.load_balance_loss(logits, routing.topk_ids) + gossamer.z_loss(logits)
    return gossamer.experts(x, routing, None, up, DOWN).square().sum() + loss


def eager(function, *given):
    leaves = [t.clone().requires_grad_() for t in given]
    return torch.autograd.grad(function(*leaves), leaves)


@pytest.mark.parametrize(("function", "given"), [(layer, (X, UP, WEIGHTS)), (whole, (X, LOGITS, UP))])
def test_grad_is_what_autograd_gives(function, given):
    found = torch.func.grad(function, argnums=(0, 1, 2))(*given)
    for ours, theirs in zip(found, eager(function, *given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    out, pull = torch.func.vjp(lambda x: function(x, *given[1:]), given[0])
    torch.testing.assert_close(pull(torch.ones_like(out))[0], found[0])


def test_gradients_of_each_example():
    xs = torch.stack([X, 2 * X, -X])
    per = torch.vmap(torch.func.grad(layer), (0, None, None))(xs, UP, WEIGHTS)
    for x, found in zip(xs, per, strict=True):
        torch.testing.assert_close(found, eager(layer, x, UP, WEIGHTS)[0])


def test_parameters_by_functional_call():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Parameter(UP.clone()), torch.nn.Parameter(DOWN.clone())

        def forward(self, x):
            return gossamer.moe(x, LOGITS, self.up, self.down, top_k=K)

    block = Block()
    parameters = dict(block.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(block, p, (X,)).sum())(parameters)
    block(X).sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("what", ["layer", "router", "product"])
def test_penalties_on_gradients_are_refused(what):
    """With create_graph=True they would have no gradient, and a sum of losses would hide that."""
    x = X.clone().requires_grad_()
    out = {
        "layer": lambda: layer(x, UP, WEIGHTS),
        "router": lambda: gossamer.route(x, 2).topk_weights.square(),
        "product": lambda: gossamer.grouped_mm(x, x.detach().T[None], offs=torch.tensor([len(x)])),
    }[what]()
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert slope.requires_grad
    with pytest.raises(UnsupportedError, match="gradients of gradients are not built"):
        (out.sum() + slope.square().sum()).backward()


def test_second_gradients_and_tangents_are_refused():
    def first(x):
        return torch.func.grad(layer)(x, UP, WEIGHTS).sum()

    with pytest.raises(UnsupportedError, match="gradients of gradients are not built"):
        torch.func.grad(first)(X)
    with pytest.raises(UnsupportedError, match="x has a tangent, and forward-mode"):
        torch.func.jvp(lambda x: layer(x, UP, WEIGHTS), (X,), (X,))

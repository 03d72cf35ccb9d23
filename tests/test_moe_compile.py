"""Layers of experts and routers inside torch.compile and torch.export: operators, and nothing else."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
from torch.library import opcheck  # noqa: E402

import gossamer  # noqa: E402
from gossamer.frontend.moe import operator as moe_operator  # noqa: E402
from gossamer.ir.errors import InputError  # noqa: E402

E, K, H, I = 6, 2, 8, 5  # noqa: E741
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(shape, generator=GENERATOR)


MATRICES = random(E, 2 * I, H), random(E, H, I)
BIASES = {"gate_up_bias": random(E, 2 * I), "down_bias": random(E, H)}
GATE = random(E, H)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def block(x, gate, up, down):
    return gossamer.moe(x, x @ gate.T, up, down, top_k=K)


def test_gradients_and_numbers_of_tokens():
    graphs = []

    def seen(module, inputs):
        graphs.append(module)
        return module

    watched = torch.compile(block, fullgraph=True, backend=seen)
    for tokens in (7, 12, 30, 31):
        x = random(tokens, H)
        close(watched(x, GATE, *MATRICES), block(x, GATE, *MATRICES))
    assert len(graphs) <= 2  # one for a number, one for any
    function = compiled(block, dynamic=True)
    for tokens in (12, 30):
        given = [t.clone().requires_grad_() for t in (random(tokens, H), GATE, *MATRICES)]
        mine = torch.autograd.grad(function(*given).square().sum(), given)
        theirs = torch.autograd.grad(block(*given).square().sum(), given)
        for one, other in zip(mine, theirs, strict=True):
            close(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"router": "expert_choice"},
        {"capacity": 4, "capacity_order": "choice", **BIASES},
        {
            "router": "sigmoid",
            "groups": 3,
            "top_groups": 2,
            "activation": lambda gate, up: gate.sigmoid() * up,
        },
        {"router": lambda logit: logit.tanh() + 2, "recompute": True},
    ],
    ids=["expert_choice", "capacity", "groups", "traced"],
)
def test_options(options):
    def function(x, gate):
        return gossamer.moe(x, x @ gate.T, *MATRICES, top_k=K, **options)

    x, gate = random(9, H).requires_grad_(), GATE.clone().requires_grad_()
    found, expected = compiled(function)(x, gate), function(x, gate)
    close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.sum(), (x, gate)),
        torch.autograd.grad(expected.sum(), (x, gate)),
        strict=True,
    ):
        close(one, other)


def test_adapters_and_quantised_matrices():
    up = gossamer.quantize(MATRICES[0], "int8", group_size=4)
    lora = random(E, 2, H).requires_grad_(), random(E, 2 * I, 2).requires_grad_()

    def function(x, ids, weights, lora):
        return gossamer.experts(x, ids, weights, up, MATRICES[1], gate_up_lora=lora, lora_scale=0.5)

    x, weights, ids = random(9, H).requires_grad_(), random(9, K), torch.arange(18).view(9, K) % E
    found, expected = (f(x, ids, weights, lora) for f in (compiled(function), function))
    close(found, expected)
    mine, theirs = (torch.autograd.grad(o.sum(), (x, *lora)) for o in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        close(one, other)


def test_routings_are_edited_within_a_graph():
    def function(x, logits):
        chosen = gossamer.route(logits, K)
        halved = chosen.replace(weights=chosen.weights / 2)
        return gossamer.experts(x, halved, None, *MATRICES), chosen.topk_ids

    x, logits = random(9, H), random(9, E)
    for one, other in zip(compiled(function)(x, logits), function(x, logits), strict=True):
        close(one, other)


@pytest.mark.parametrize("changed", ["replaced", "in place", "other experts", "loss"])
def test_lists_are_read_and_changed_within_a_graph(changed):
    gate_up, down = (m.detach().clone() for m in MATRICES)  # tensors whose sizes are symbols

    def function(x, logits):
        chosen = gossamer.route(logits, K)
        if changed == "loss":
            return gossamer.load_balance_loss(logits, chosen)
        if changed == "in place":
            chosen.weights.mul_(3)
        elif changed == "replaced":
            chosen = chosen.replace(weights=chosen.weights * 3)
        else:
            chosen = chosen.replace(expert_ids=(chosen.expert_ids + 1) % E)
        return gossamer.experts(x, chosen, None, gate_up, down, activation=lambda g, u: g.tanh() * u)

    x, logits = random(9, H), random(9, E)
    close(compiled(function, dynamic=True)(x, logits), function(x, logits))


def test_vmap():
    x, logits = random(3, 7, H), random(3, 7, E)
    found = torch.vmap(lambda x, logits: gossamer.moe(x, logits, *MATRICES, top_k=K))(x, logits)
    close(
        found, torch.stack([gossamer.moe(*each, *MATRICES, top_k=K) for each in zip(x, logits, strict=True)])
    )


def test_no_tokens():
    x = torch.zeros(0, H, requires_grad=True)
    compiled(block)(x, GATE, *MATRICES).sum().backward()
    assert x.grad.shape == (0, H)


class Block(torch.nn.Module):
    def forward(self, x, gate, up, down):
        return block(x, gate, up, down)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    given = random(9, H), GATE, *MATRICES
    program = torch.export.export(Block(), given, dynamic_shapes=({0: tokens}, {}, {}, {}), strict=strict)
    names = [node.target for node in program.graph.nodes if "gossamer" in str(node.target)]
    assert names == [torch.ops.gossamer.moe.default] * 2
    x = random(20, H)
    close(program.module()(x, *given[1:]), block(x, *given[1:]))


def calls(monkeypatch, function):
    """The arguments of every call of the operator within a function."""
    found = []

    def spy(form, tensors, integers=(), numbers=()):
        found.append((list(tensors), list(integers), list(numbers), form.text))
        return torch.ops.gossamer.moe(*found[-1])

    for module in ("experts", "routers"):
        monkeypatch.setattr(f"gossamer.frontend.moe.{module}.call", spy)
    monkeypatch.setattr("gossamer.frontend.moe.experts.is_traced", lambda tensors: True)
    function()
    return found


@pytest.mark.parametrize("options", [{}, {"router": "expert_choice", **BIASES}, {"capacity": 3}], ids=str)
def test_operators_keep_torchs_rules(monkeypatch, options):
    x, logits = random(9, H).requires_grad_(), random(9, E).requires_grad_()
    found = calls(monkeypatch, lambda: gossamer.moe(x, logits, *MATRICES, top_k=K, **options))
    assert len(found) == 2
    for arguments in found[: 1 if "capacity" in options else 2]:  # rows that nobody has hold anything
        opcheck(torch.ops.gossamer.moe, arguments)


def test_gradients_of_the_operators(monkeypatch):
    wide = [t.double() for t in MATRICES]
    x, logits = random(5, H).double().requires_grad_(), random(5, E).double().requires_grad_()
    (routed, layer) = calls(monkeypatch, lambda: gossamer.moe(x, logits, *wide, top_k=K))
    for tensors, integers, numbers, form in (routed, layer):
        given = tuple(
            t.detach().clone().requires_grad_(t.is_floating_point() and t.shape[0] == 5) for t in tensors
        )
        place = [made.is_floating_point() for made in torch.ops.gossamer.moe(given, integers, numbers, form)]

        def apply(*tensors, rest=(integers, numbers, form), place=place):
            return torch.ops.gossamer.moe(list(tensors), *rest)[place.index(True)]

        assert torch.autograd.gradcheck(apply, given)


def test_what_is_wrong_is_said_while_tracing():
    x, logits = random(9, H), random(9, E)
    for function, words in (
        (
            lambda: gossamer.moe(x, logits, MATRICES[0], MATRICES[1][:, :, :2], top_k=K),
            "gate_up_proj, down_proj",
        ),
        (lambda: gossamer.route(logits, E + 1), "route.top_k"),
    ):
        with pytest.raises(Exception, match=words):
            compiled(function)()


def test_forms_are_text():
    form = moe_operator.MoeForm("route", ("logits",), (), ("scale",), (("term", ("exp", "x0")),), True)
    assert moe_operator.MoeForm.parse(form.text) == form
    with pytest.raises(InputError, match=r"gossamer::moe\.form"):
        moe_operator.MoeForm.parse("[0]")

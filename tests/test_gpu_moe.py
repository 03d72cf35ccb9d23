"""Layers of experts on a GPU: the error rule, gradients, quantised matrices, routers, graphs.

pytest -m gpu -n 12 tests/test_gpu_moe.py
"""

import pytest

torch = pytest.importorskip("torch")
import gossamer  # noqa: E402
from gossamer.frontend.moe.activation import clamped_swiglu  # noqa: E402

pytestmark = pytest.mark.gpu

from gossamer.tests import moe_cases as CASES  # noqa: E402

Case, plain, ULP = CASES.Case, CASES.plain, CASES.ULP
HALF = {"dtype": torch.bfloat16, "hidden": 128, "inner": 96}
GPT_OSS = {"transposed": True, "interleaved": True, "biased": True, "activation": clamped_swiglu()}
LAYERS = [
    Case(tokens=1, **HALF),
    Case(tokens=7, experts=16, top_k=4, **HALF),
    Case(tokens=300, experts=5, **HALF),
    Case(tokens=1500, experts=24, top_k=3, **HALF),
    Case(tokens=200, experts=6, **HALF | GPT_OSS),
    Case(tokens=90, gated=False, activation="relu2", **HALF),
    Case(tokens=90, hidden=72, inner=40, dtype=torch.float16),
    Case(tokens=90, hidden=64, inner=48, biased=True),
]


def cuda(layer):
    return {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in layer.items()}


def close(found, exact, theirs, dtype, name=""):
    """At most twice plain torch's error, and an ulp of the scale; errors of few numbers scatter: thrice."""
    found, theirs, exact = (t.detach().double().cpu() for t in (found, theirs, exact))
    allowed = 3 * (theirs - exact).abs().max() + 2 * ULP[dtype] * exact.abs().max()
    error = (found - exact).abs().max()
    assert error <= allowed, f"{name}: {float(error):.3g} > {float(allowed):.3g}"


@pytest.mark.parametrize("case", LAYERS, ids=repr)
def test_forward(case):
    layer, x = case.layer(), case.x()
    ids, weights = case.routing(0, -1, case.experts + 1)
    found = gossamer.experts(x.cuda(), ids.cuda(), weights.cuda(), **cuda(layer))
    exact, theirs = (plain(case, x, ids, weights, layer, kind) for kind in (torch.float64, case.dtype))
    close(found, exact, theirs, case.dtype)
    again = gossamer.experts(x.cuda(), ids.cuda(), weights.cuda(), **cuda(layer))
    assert torch.equal(found, again)


@pytest.mark.parametrize("case", LAYERS, ids=repr)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(case, recompute):
    layer, ids = case.layer(), case.routing(0, -1, case.experts + 1)[0]
    weights = case.routing(0)[1]
    names = [n for n in layer if n.endswith(("proj", "bias"))]
    slope = torch.randn(case.tokens, case.hidden, dtype=torch.float64)

    def run(kind, device):
        leaves = [t.to(device, kind).requires_grad_() for t in (case.x(), *(layer[n] for n in names))]
        scores = weights.to(device, torch.float64 if kind == torch.float64 else None).requires_grad_()
        own = layer | dict(zip(names, leaves[1:], strict=True))
        if device == "cpu":
            out = plain(case, leaves[0], ids, scores, own, kind)
        else:
            out = gossamer.experts(leaves[0], ids.cuda(), scores, **own, recompute=recompute)
        leaves.append(scores)
        return torch.autograd.grad(out, leaves, slope.to(device, out.dtype))

    found, exact, theirs = run(case.dtype, "cuda"), run(torch.float64, "cpu"), run(case.dtype, "cpu")
    for name, *each in zip(["x", *names, "weights"], found, exact, theirs, strict=True):
        close(*each, case.dtype, name)
    assert all(map(torch.equal, found, run(case.dtype, "cuda")))


@pytest.mark.parametrize("tokens", [1, 9, 300])
@pytest.mark.parametrize(
    "format, options",
    [
        ("int8", {}),
        ("int8", {"group_size": 32}),
        ("int4", {"group_size": 32}),
        ("int2", {}),
        ("fp8", {"group_size": "expert"}),
        ("mxfp4", {}),
    ],
    ids=str,
)
def test_quantised(tokens, format, options):
    case = Case(tokens=tokens, experts=6, dtype=torch.bfloat16, hidden=256, inner=128)
    layer, x = case.layer(), case.x()
    for name in ("gate_up_proj", "down_proj"):
        layer[name] = gossamer.quantize(layer[name].cuda(), format, **options)
    ids, weights = case.routing(0, -1, case.experts + 1)
    found = gossamer.experts(x.cuda(), ids.cuda(), weights.cuda(), **cuda(layer))
    wide = layer | {n: layer[n].dequantize(torch.float64).cpu() for n in ("gate_up_proj", "down_proj")}
    exact, theirs = (plain(case, x, ids, weights, wide, kind) for kind in (torch.float64, case.dtype))
    close(found, exact, theirs, case.dtype)


ROUTERS = {
    "softmax": {},
    "sigmoid groups": {"router": "sigmoid", "groups": 4, "top_groups": 2},
    "capacity": {"capacity": 9},
    "top_p": {"top_p": 0.6},
    "expert choice": {"router": "expert_choice", "capacity": 7},
}


def routed(name, logits):
    """(ids, weights) of a router by plain torch, -1 for what is dropped."""
    scores = logits.sigmoid() if name == "sigmoid groups" else logits.softmax(-1)
    if name == "expert choice":
        chosen = torch.zeros_like(scores).scatter(0, scores.topk(7, 0)[1], 1).bool()
        return torch.where(chosen, torch.arange(16), -1), scores * chosen
    ranked = scores
    if name == "sigmoid groups":
        groups = scores.view(-1, 4, 4)
        best = groups.topk(2, -1)[0].sum(-1).topk(2, -1)[1]
        kept = torch.zeros(len(scores), 4).scatter(1, best, 1).bool()
        ranked = torch.where(kept[..., None], groups, -1).flatten(1)
    ids = ranked.topk(4, -1)[1]
    weights, kept = scores.gather(1, ids), torch.ones_like(ids, dtype=torch.bool)
    if name == "top_p":
        kept = weights.cumsum(-1) - weights < 0.6
    weights = weights * kept / (weights * kept).sum(-1, keepdim=True)
    if name == "capacity":
        taken = torch.nn.functional.one_hot(ids.reshape(-1), 16).cumsum(0)
        kept = taken.gather(1, ids.reshape(-1, 1)).view_as(ids) <= 9
    return torch.where(kept, ids, -1), weights * kept


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name):
    logits = torch.randn(61, 16)
    found = gossamer.route(logits.cuda(), 4, **ROUTERS[name])
    ids, weights = routed(name, logits)
    token, place = (ids >= 0).nonzero(as_tuple=True)
    order = ids[token, place].sort(stable=True)[1]
    assert torch.equal(found.counts.cpu().long(), ids[token, place].bincount(minlength=16))
    assert torch.equal(found.token_ids.cpu().long()[: len(order)], token[order])
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.weights.cpu()[: len(order)], weights[token, place][order], **close)


def test_matrices_of_more_than_two_billion_elements():
    """All tokens go to the last expert, which begins beyond 2**31 elements; so do the gradients of it."""
    shape = (17, 2 * 8192, 8192)
    assert (shape[0] - 1) * shape[1] * shape[2] >= 2**31
    up = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, 0.01).requires_grad_()
    down = torch.empty(17, 8192, 8192, device="cuda", dtype=torch.bfloat16).normal_(0, 0.01)
    for tokens in (1, 40):
        x = torch.randn(tokens, 8192, device="cuda", dtype=torch.bfloat16)
        ids, weights = torch.full((tokens, 1), 16, device="cuda"), torch.ones(tokens, 1, device="cuda")
        out = gossamer.experts(x, ids, weights, up, down)
        (du,) = torch.autograd.grad(out, up, torch.ones_like(out))
        last = up[16:].detach().clone().requires_grad_()
        wanted = gossamer.experts(x, torch.zeros_like(ids), weights, last, down[16:].clone())
        (expected,) = torch.autograd.grad(wanted, last, torch.ones_like(wanted))
        torch.testing.assert_close(out, wanted, rtol=2e-2, atol=1e-2 * wanted.abs().max().item())
        torch.testing.assert_close(du[16:], expected, rtol=2e-2, atol=1e-2 * expected.abs().max().item())
        assert not du[:16].any()
        del out, du, wanted, expected


def test_rows_of_more_than_two_billion_elements():
    """x, the rows between the kernels and the result are larger than 2**31 elements; the end is compared."""
    tokens, hidden = 2**20 + 100, 2048
    assert tokens * hidden > 2**31
    case = Case(tokens=64, experts=4, top_k=1, dtype=torch.bfloat16, hidden=hidden, inner=64)
    layer = cuda(case.layer())
    x = torch.empty(tokens, hidden, device="cuda", dtype=torch.bfloat16).normal_()
    ids = torch.arange(tokens, device="cuda").reshape(-1, 1) % 4
    weights = torch.ones(tokens, 1, device="cuda")
    found = gossamer.experts(x, ids, weights, **layer)[-500:]
    wanted = gossamer.experts(x[-500:], ids[-500:], weights[-500:], **layer)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())


def test_a_graph_takes_new_routings():
    case = Case(tokens=64, experts=8, **HALF)
    layer, x = cuda(case.layer()), case.x().cuda()
    logits = torch.randn(64, 8, device="cuda")

    def run():
        return gossamer.moe(x, logits, layer["gate_up_proj"], layer["down_proj"], top_k=2)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in (1, 2):
        torch.manual_seed(seed)
        logits.normal_()
        x.normal_()
        graph.replay()
        assert torch.equal(out, run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "rank"), [(1, 8), (24, 8), (300, 16), (900, 16)])
def test_adapters_by_token(tokens, rank, dtype):
    """In a graph, too, whose ids change; and gradients. The reference adds adapters in float64."""
    case = Case(tokens=tokens, **HALF | {"dtype": dtype})
    layer, x = cuda(case.layer()), case.x().cuda().requires_grad_()
    ids, weights = (t.cuda() for t in case.routing(0, -1, case.experts + 1))
    shapes = (rank, case.hidden), (2 * case.inner, rank), (rank, case.inner), (case.hidden, rank)
    torch.manual_seed(0)
    a, b, c, d = (
        (torch.randn(5, case.experts, *s, device="cuda") / s[1] ** 0.5).to(dtype).requires_grad_()
        for s in shapes
    )
    chosen = torch.randint(-1, 5, (tokens,), device="cuda")

    def run(**more):
        lora = {"gate_up_lora": (a, b), "down_lora": (c, d), "adapter_ids": chosen}
        return gossamer.experts(x, ids, weights, **layer, **lora, **more)

    found, exact = run(), run(backend="reference")
    allowed = 8 * ULP[dtype] * exact.abs().max()
    assert (found - exact).abs().max() <= allowed
    slope = torch.randn_like(found)
    mine, theirs = (torch.autograd.grad((o * slope).sum(), (x, a, b, c, d)) for o in (found, exact))
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() <= 24 * ULP[dtype] * other.abs().max()
    with torch.no_grad():
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        for number in (-1, 3):
            chosen.copy_(
                torch.randint(-1, 5, (tokens,), device="cuda") if number < 0 else chosen * 0 + number
            )
            graph.replay()
            assert torch.equal(out, run())

"""Quantised experts on a GPU: the error rule for every format and load, widths by expert, gradients."""

import pytest

torch = pytest.importorskip("torch")
import gossamer  # noqa: E402

pytestmark = pytest.mark.gpu

from gossamer.tests import moe_cases as CASES  # noqa: E402

Case, plain, ULP = CASES.Case, CASES.plain, CASES.ULP
FORMATS = [
    ("int8", {}),
    ("int8", {"group_size": 64}),
    ("int4", {}),
    ("int4", {"group_size": 40}),
    ("int2", {}),
    ("fp8", {}),
    ("fp8", {"group_size": 128}),
    ("mxfp4", {}),
    ("int8", {"nested": (2, 4, 8)}),
    ("int8", {"symmetric": False}),
    ("int4", {"symmetric": False}),
    ("int2", {"symmetric": False, "group_size": 64}),
]


def judge(case, up, down, seed=0, **options):
    """The error rule, against float64 of what codes stand for; and the gradients of x and weights."""
    layer = case.layer(seed) | options
    x, (ids, weights) = case.x(seed).cuda().requires_grad_(), case.routing(seed, -1, case.experts + 1)
    weights = weights.cuda().requires_grad_()
    rest = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in layer.items() if n[-4:] != "proj"}
    found = gossamer.experts(x, ids.cuda(), weights, up, down, **rest)
    pairs = (("gate_up_proj", up), ("down_proj", down))
    wide = {name: matrix.dequantize(torch.float64).cpu() for name, matrix in pairs}
    exact_x, exact_w = (t.detach().cpu().double().requires_grad_() for t in (x, weights))
    exact = plain(case, exact_x, ids, exact_w, layer | wide, torch.float64)
    rounded = {n: w.to(case.dtype) for n, w in wide.items()}
    theirs = plain(case, x.detach().cpu(), ids, weights.detach().cpu(), layer | rounded, case.dtype)
    allowed = 2 * (theirs.double() - exact).abs().max() + 2 * ULP[case.dtype] * exact.abs().max()
    assert (found.detach().cpu().double() - exact).abs().max() <= allowed
    slope = torch.randn(exact.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((exact * slope).sum(), (exact_x, exact_w))
    made = torch.autograd.grad((found.double() * slope.cuda()).sum(), (x, weights))
    for one, other in zip(made, wanted, strict=True):
        assert (one.cpu().double() - other).abs().max() <= 24 * ULP[case.dtype] * other.abs().max()


@pytest.mark.parametrize("tokens", [1, 12, 150, 700])
@pytest.mark.parametrize(("format", "options"), FORMATS, ids=str)
def test_formats(format, options, tokens):
    case = Case(tokens=tokens, hidden=256, inner=384, dtype=torch.bfloat16, biased=tokens == 12)
    layer = case.layer()
    up, down = (gossamer.quantize(layer[n].cuda(), format, **options) for n in ("gate_up_proj", "down_proj"))
    judge(case, up, down)
    if options.get("nested"):
        widths = torch.tensor([2, 4, 8, 4], device="cuda")
        judge(case, up.read(widths), down.read(4))


@pytest.mark.parametrize(("hidden", "inner"), [(256, 384), (200, 328)])
@pytest.mark.parametrize(
    ("format", "tokens"), [("int4", 2000), ("int2", 2000), ("mxfp4", 2000), ("fp8", 3600), ("int8", 3600)]
)
def test_decoded_once(format, tokens, hidden, inner):
    """A thousand rows an expert and more: matrices are decoded before their products, gradients too."""
    case = Case(tokens=tokens, hidden=hidden, inner=inner, dtype=torch.bfloat16)
    layer = case.layer()
    judge(case, *(gossamer.quantize(layer[n].cuda(), format) for n in ("gate_up_proj", "down_proj")))


@pytest.mark.parametrize(("hidden", "inner"), [(2880, 2880), (33, 27), (160, 96)])
@pytest.mark.parametrize("format", ["int4", "mxfp4", "fp8"])
def test_sizes_that_tiles_do_not_divide(format, hidden, inner):
    case = Case(tokens=40, hidden=hidden, inner=inner, dtype=torch.float16, interleaved=True)
    layer = case.layer()
    judge(case, *(gossamer.quantize(layer[n].cuda(), format) for n in ("gate_up_proj", "down_proj")))


@pytest.mark.parametrize("tokens", [4, 2000])
def test_a_graph_of_cuda_replays(tokens):
    case = Case(tokens=tokens, hidden=256, inner=256, dtype=torch.bfloat16)
    layer, x, (ids, weights) = case.layer(), case.x().cuda(), case.routing()
    up, down = (gossamer.quantize(layer[n].cuda(), "int4") for n in ("gate_up_proj", "down_proj"))
    ids, weights = ids.cuda(), weights.cuda()
    expected = gossamer.experts(x, ids, weights, up, down)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gossamer.experts(x, ids, weights, up, down)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)

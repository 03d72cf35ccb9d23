"""Experts that multiply nothing: zeros, copies and constants, their gradients, and how little they launch."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer.frontend import testing  # noqa: E402
from gossamer.ir.errors import InputError  # noqa: E402
from gossamer.passes.moe.light import LightSpec, compile_light, compile_light_gradient  # noqa: E402

E, H, I, K = 3, 10, 4, 3  # noqa: E741


def given(tokens=9, constants=2, gated=True, dtype=torch.float32, hidden=H, seed=0):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    light = {"zero_experts": 1, "copy_experts": 2}
    if constants:
        light["constant_experts"] = random(constants, hidden)
    if constants and gated:
        light["constant_gates"] = random(constants, 2, hidden) / 2
    ids = torch.randint(-1, E + 3 + constants + 1, (tokens, K), generator=g)
    matrices = random(E, 2 * I, hidden) / 3, random(E, hidden, I) / 2
    return random(tokens, hidden), ids, random(tokens, K).abs(), matrices, light


@pytest.mark.parametrize(
    ("constants", "gated", "dtype", "hidden"),
    [
        (2, True, torch.float32, 300),
        (2, False, torch.bfloat16, H),
        (0, False, torch.float32, H),
        (1, True, torch.float16, H),
    ],
)
def test_layers(constants, gated, dtype, hidden):
    x, ids, weights, matrices, light = given(40, constants, gated, dtype, hidden)
    found = gossamer.experts(x, ids, weights, *matrices, **light)
    exact = gossamer.experts(x.double(), ids, weights.double(), *(m.double() for m in matrices),
                             **{n: v.double() if torch.is_tensor(v) else v for n, v in light.items()},
                             backend="reference")  # fmt: skip
    scale = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype] * exact.abs().max()
    assert found.dtype == dtype and (found.double() - exact).abs().max() <= scale
    alone = (ids < E) | (ids == E)  # tokens without copies and constants
    plain = gossamer.experts(x, ids, weights, *matrices)
    assert torch.equal(found[alone.all(1)], plain[alone.all(1)])


@pytest.mark.parametrize("gated", [True, False])
def test_gradients(gated):
    x, ids, weights, matrices, light = given(5, 2, gated, torch.float64)
    names = [name for name, value in light.items() if torch.is_tensor(value)]

    def function(x, weights, up, down, *values):
        more = light | dict(zip(names, values, strict=True))
        return gossamer.experts(x, ids, weights, up, down, **more)

    inputs = [x, weights, *matrices, *(light[name] for name in names)]
    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in inputs])


def test_what_is_not_a_number_stays_where_it_is():
    x, ids, weights, matrices, light = given(12)
    ids = ids.clamp(max=E + 4)
    ids[3, 0] = E + 4
    clean = gossamer.experts(x, ids, weights, *matrices, **light)
    x[5] = torch.nan
    light["constant_experts"] = light["constant_experts"].clone()
    light["constant_experts"][1] = torch.nan
    found = gossamer.experts(x, ids, weights, *matrices, **light)
    touched = (ids == E + 4).any(1)
    others = ~touched & (torch.arange(12) != 5)
    assert torch.equal(found[others], clean[others]) and found[touched].isnan().all()


def test_gradients_leave_out_tokens_that_choose_others():
    x, ids, weights, matrices, light = given(5)
    ids[:, :] = 0
    ids[0, 0] = E + 3  # the first constant
    x[1] = torch.nan
    vectors = light["constant_experts"].requires_grad_()
    gates = light["constant_gates"].requires_grad_()
    slope = torch.ones_like(x)
    slope[2] = torch.nan
    found = torch.autograd.grad(
        gossamer.experts(x, ids, weights, *matrices, **light), (vectors, gates), slope
    )
    assert all(g.isfinite().all() and g.any() for g in found)


def test_weights_of_rows_are_summed_in_float32():
    """300 rows of one token for one expert that copies."""
    x, _, _, matrices, _ = given(1, 0, dtype=torch.bfloat16)
    many, weight = 300, torch.tensor(0.01, dtype=torch.bfloat16)
    rows = gossamer.Routing(
        torch.zeros(many, dtype=torch.int32), torch.full((many,), E, dtype=torch.int32),
        weight.expand(many).contiguous(), torch.tensor([0] * E + [many], dtype=torch.int32), 1,
    )  # fmt: skip
    found = gossamer.experts(x, rows, None, *matrices, copy_experts=1)
    torch.testing.assert_close(found, (x.double() * weight.double() * many).bfloat16())


def test_from_logits_and_compiled():
    x, _, _, matrices, light = given(12)
    logits = torch.randn(12, E + 5, generator=torch.Generator().manual_seed(1))

    def function(x, logits):
        return gossamer.moe(x, logits, *matrices, top_k=2, **light)

    expected = gossamer.moe(x, logits, *matrices, top_k=2, backend="reference", **light)
    torch.testing.assert_close(function(x, logits), expected, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, logits), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_one_kernel_each_way_and_no_product():
    for target in ("cpu", "cuda:sm_90"):
        spec = LightSpec(E, 1, 2, 2, True, K, H, "f32", target=target)
        for program in (compile_light(spec), compile_light_gradient(spec)):
            testing.verify(program)
            assert testing.parse(testing.to_text(program)) == program
            assert len(program.kernels) == 1 and "dot(" not in testing.to_text(program)


def test_no_tokens():
    x, ids, weights, matrices, light = given(0)
    x.requires_grad_()
    gossamer.experts(x, ids, weights, *matrices, **light).sum().backward()
    assert x.grad.shape == (0, H)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"copy_experts": -1}, r"copy_experts: expected a number"),
        ({"constant_experts": torch.zeros(2, 3)}, r"constant_experts: expected shape \(2, 10\)"),
        ({"constant_gates": torch.zeros(2, 10)}, "constant_gates"),
        ({"constant_experts": None}, "constant_experts beside them"),
    ],
    ids=str,
)
def test_bad_input(changed, message):
    x, ids, weights, matrices, light = given()
    with pytest.raises(InputError, match=message):
        gossamer.experts(x, ids, weights, *matrices, **(light | changed))


@pytest.mark.parametrize("gated", [True, False])
def test_rows_beside_them(gated):
    """A list of rows gives what ids do, with gradients; an expert twice in a token counts twice."""
    x, ids, weights, matrices, light = given(12, 2, gated, torch.float64)
    leaves = [x, weights, *matrices, *(v for v in light.values() if torch.is_tensor(v))]
    for leaf in leaves:
        leaf.requires_grad_()
    rows = gossamer.Routing.from_topk(ids, weights, E + 5).replace()
    found = gossamer.experts(x, rows, None, *matrices, **light)
    wanted = gossamer.experts(x, ids, weights, *matrices, **light)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        found, gossamer.experts(x, rows, None, *matrices, **light, backend="reference")
    )
    slopes = [torch.autograd.grad(out.sin().sum(), leaves, retain_graph=True) for out in (found, wanted)]
    torch.testing.assert_close(*slopes)


def test_experts_choose_beside_them():
    x, _, _, matrices, light = given(12, 2, True, torch.float64)
    logits = torch.randn(12, E + 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = {"top_k": 2, "router": "expert_choice", **light}
    found = gossamer.moe(x, logits, *matrices, **settings)
    chosen = gossamer.route(logits, 2, router="expert_choice")
    ids, weights = torch.full((12, E + 5), -1), torch.zeros(12, E + 5, dtype=torch.float64)
    end = int(chosen.counts.sum())
    rows = (chosen.token_ids[:end].long(), chosen.expert_ids[:end].long())
    ids[rows], weights[rows] = rows[1], chosen.weights[:end].double()
    torch.testing.assert_close(found, gossamer.experts(x, ids, weights, *matrices, **light))


def test_rows_beside_them_compiled():
    x, ids, weights, matrices, light = given(9)

    def function(x, weights):
        rows = gossamer.Routing.from_topk(ids, weights, E + 5).replace()
        return gossamer.experts(x, rows, None, *matrices, **light)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weights), function(x, weights))


def test_what_is_out_of_range():
    x, ids, weights, matrices, light = given()
    with pytest.raises(InputError, match="among 8 experts"):
        gossamer.experts(x, gossamer.Routing.from_topk(ids, weights, E), None, *matrices, **light)
    with pytest.raises(InputError, match="ids from 0 to 7"):
        gossamer.experts(x, ids + 20, weights, *matrices, validate=True, **light)

"""Quantised experts on the CPU: against float64 of the dequantised matrices; formats, groups, widths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer import QuantizedWeight  # noqa: E402
from gossamer.ir.errors import InputError, UnsupportedError  # noqa: E402
from gossamer.ir.quantized import E2M1, Quantized, dequantize  # noqa: E402
from gossamer.tests import moe_cases as CASES  # noqa: E402

Case, plain, ULP = CASES.Case, CASES.plain, CASES.ULP

FORMATS = [
    ("int8", {}),
    ("int8", {"group_size": 16}),
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": 40}),  # no group of a step alone, and a smaller last one
    ("int2", {}),
    ("fp8", {"group_size": "expert"}),
    ("fp8", {"group_size": "tensor"}),
    ("mxfp4", {}),
]
ALIKE = [("int8", {"group_size": 16}), ("fp8", {"group_size": "tensor"})]  # in what is compiled


def quantised(case, format, seed=0, **options):
    """A case's layer with quantised matrices."""
    layer = case.layer(seed)
    for name in ("gate_up_proj", "down_proj"):
        layer[name] = gossamer.quantize(layer[name], format, **options)
    return layer


def judge(case, layer, seed=0):
    """`experts` is as exact as torch on the dequantised matrices, which it rounds to x's dtype."""
    x, (ids, weights) = case.x(seed), case.routing(seed, -1, case.experts + 1)
    found = gossamer.experts(x, ids, weights, **layer)
    wide = {n: layer[n].dequantize(torch.float64) for n in ("gate_up_proj", "down_proj")}
    exact = plain(case, x, ids, weights, layer | wide, torch.float64)
    rounded = {n: w.to(case.dtype) for n, w in wide.items()}
    theirs = plain(case, x, ids, weights, layer | rounded, case.dtype).double()
    allowed = 2 * (theirs - exact).abs().max() + 2 * ULP[case.dtype] * exact.abs().max()
    assert found.dtype == x.dtype
    assert (found.double() - exact).abs().max() <= allowed
    return found


@pytest.mark.parametrize(("format", "options"), [f for f in FORMATS if f not in ALIKE], ids=str)
def test_formats(format, options):
    case = Case(tokens=60 if format != "int8" else 1, hidden=64, inner=96)
    judge(case, quantised(case, format, **options))


@pytest.mark.parametrize(("format", "dtype"), [("int4", torch.bfloat16), ("mxfp4", torch.float16)])
def test_16_bits(format, dtype):
    case = Case(tokens=40, hidden=64, inner=32, dtype=dtype, biased=True)
    judge(case, quantised(case, format, group_size=32))


@settings(max_examples=3, deadline=None)
@given(
    st.sampled_from(["int8", "int4", "int2", "fp8"]),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 80),
    st.integers(0, 9),
)
def test_any_sizes_and_groups(format, hidden, inner, group, seed):
    case = Case(tokens=7, hidden=hidden, inner=inner, interleaved=seed % 2 == 1)
    judge(case, quantised(case, format, seed, group_size=group), seed)


@pytest.mark.parametrize("nested", [(2, 4, 8), (4, 8)])
def test_nested_widths_of_one_copy(nested):
    case = Case(tokens=20, hidden=33, inner=24)
    layer = quantised(case, "int8", nested=nested)
    widths = torch.tensor([nested[0], 8, 4, nested[0]])
    for bits in (nested[0], widths):
        read = layer | {n: layer[n].read(bits) for n in ("gate_up_proj", "down_proj")}
        judge(case, read)
        assert read["down_proj"].codes[0].data_ptr() == layer["down_proj"].codes[0].data_ptr()
    matrix, whole = layer["down_proj"], layer["down_proj"].dequantize()
    errors = [(matrix.read(b).dequantize() - whole).abs().max().item() for b in nested]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    by_expert = matrix.read(widths).dequantize()
    for e, bits in enumerate(widths.tolist()):
        assert torch.equal(by_expert[e], matrix.read(bits).dequantize()[e])


def test_upper_bits_of_an_int8_code_are_the_int4_and_the_int2_code():
    codes = torch.randint(-128, 128, (2, 3, 8))
    stored = QuantizedWeight.from_codes("int8", codes, 1.0, nested=(2, 4, 8))
    for bits in (2, 4, 8):
        lost = 8 - bits
        expected = (codes >> lost << lost) + ((1 << lost) - 1) / 2
        assert torch.equal(stored.read(bits).dequantize(torch.float64), expected.double())


def test_bytes():
    w = torch.randn(2, 64, 256)
    sizes = {f: gossamer.quantize(w, f).nbytes / w.numel() for f in ("int8", "int4", "int2", "fp8", "mxfp4")}
    assert sizes["int4"] == 0.5 + 4 / 128 and sizes["mxfp4"] == 0.5 + 1 / 32
    assert sizes["int2"] == 0.25 + 4 / 64 and sizes["int8"] == sizes["fp8"] == 1 + 4 / 256
    assert gossamer.quantize(w, "int8", nested=(2, 4, 8)).nbytes == sizes["int8"] * w.numel()


def test_quantising_rounds_to_the_nearest_number_of_the_format():
    w = torch.randn(2, 16, 64)
    for format, step in (("int8", 1 / 127), ("fp8", 2.0**-4), ("mxfp4", 1 / 4)):
        error = (gossamer.quantize(w, format).dequantize() - w).abs()
        assert (error <= w.abs().amax(-1, keepdim=True) * step).all()
    squares = [((gossamer.quantize(w, f).dequantize() - w) ** 2).mean() for f in ("int2", "int4", "int8")]
    assert squares[0] < 0.15 and squares[1] < 0.015 and squares[2] < 1e-4
    zeros = torch.zeros(1, 4, 32)
    formats = ("int8", "int4", "int2", "fp8", "mxfp4")
    assert all(torch.equal(gossamer.quantize(zeros, f).dequantize(), zeros) for f in formats)


def test_torch_and_the_ir_agree_on_what_codes_stand_for():
    g = torch.Generator().manual_seed(0)
    for format, options in [*FORMATS, ("int8", {"nested": (2, 4, 8)})]:
        w = gossamer.quantize(torch.randn(3, 5, 37, generator=g), format, **options)
        values = [t.numpy() for t in w.tensors("w").values()]
        np.testing.assert_allclose(dequantize(w._q, values), w.dequantize(torch.float64), rtol=1e-12)


def test_gpt_oss_blocks():
    g = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, 6, 3), generator=g, dtype=torch.uint8)
    table = torch.tensor([*E2M1, *(-v for v in E2M1)])
    pairs = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), -1).flatten(3)
    expected = (pairs * torch.exp2(scales.float() - 127)[..., None]).flatten(2)
    found = QuantizedWeight.from_mxfp4(blocks, scales)
    assert torch.equal(found.dequantize(), expected) and found.nbytes == blocks.numel() + scales.numel()


def test_scales_of_blocks_of_rows_and_columns():
    codes = torch.randn(2, 20, 40).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, 3)
    found = QuantizedWeight.from_codes("fp8", codes, scales, group_size=16, row_block=8)
    spread = scales.repeat_interleave(8, 1)[:, :20].repeat_interleave(16, 2)[..., :40]
    torch.testing.assert_close(found.dequantize(), codes.float() * spread)


@pytest.mark.parametrize(("format", "options"), [("int4", {"group_size": 20}), ("mxfp4", {}), ("int2", {})])
def test_gradients_flow_through_frozen_matrices(format, options):
    case = Case(tokens=30, hidden=64, inner=48)
    layer = quantised(case, format, **options)
    x, (ids, weights) = case.x().requires_grad_(), case.routing()
    weights.requires_grad_()
    do = torch.randn(x.shape)
    wide = {n: layer[n].dequantize(torch.float64) for n in ("gate_up_proj", "down_proj")}
    exact = plain(case, x, ids, weights, layer | wide, torch.float64)
    expected = torch.autograd.grad(exact, (x, weights), do.double())
    for recompute in (False, True):
        out = gossamer.experts(x, ids, weights, recompute=recompute, **layer)
        for found, wanted in zip(torch.autograd.grad(out, (x, weights), do), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_one_matrix_quantised_and_the_other_trained():
    case = Case(tokens=12, hidden=32, inner=16)
    layer, x, (ids, weights) = quantised(case, "int4", group_size=16), case.x(), case.routing()
    down = torch.randn(case.experts, case.hidden, case.inner, requires_grad=True)
    found = gossamer.experts(x, ids, weights, **(layer | {"down_proj": down}))
    wide = layer | {"gate_up_proj": layer["gate_up_proj"].dequantize(torch.float64), "down_proj": down}
    exact = plain(case, x, ids, weights, wide, torch.float64)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    (gradient,), (wanted,) = (torch.autograd.grad(o.sum(), down) for o in (found, exact))
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_moe_and_the_reference_take_codes():
    case = Case(tokens=10, hidden=32, inner=16)
    layer, x = quantised(case, "int8"), case.x()
    logits = torch.randn(10, case.experts)
    out = gossamer.moe(x, logits, layer["gate_up_proj"], layer["down_proj"], top_k=2)
    exact = gossamer.moe(x, logits, layer["gate_up_proj"], layer["down_proj"], top_k=2, backend="reference")
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)


def test_a_module_keeps_moves_saves_and_loads_codes():
    holder = torch.nn.Module()
    holder.down_proj = gossamer.quantize(torch.randn(2, 4, 32), "fp8")
    state = holder.state_dict()
    assert {k.removeprefix("down_proj.") for k in state} == {"codes0", "scales", "_extra_state"}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    before = holder.down_proj.dequantize()
    holder.to(torch.bfloat16)
    assert torch.equal(holder.down_proj.dequantize(), before)
    other = torch.nn.Module()
    other.down_proj = gossamer.quantize(torch.randn(2, 4, 32), "fp8")
    other.load_state_dict(state)
    assert torch.equal(other.down_proj.dequantize(), before)
    assert repr(other.down_proj) == "QuantizedWeight(fp8, (2, 4, 32), group_size=32, bits=8)"


def test_codes_of_another_format_are_not_loaded():
    matrix = torch.randn(2, 4, 32)
    state = gossamer.quantize(matrix, "fp8").state_dict()
    expected = r"load_state_dict: expected int codes of 8 bits, .*; got '?e4m3 codes of 8 bits"
    with pytest.raises(InputError, match=expected):
        gossamer.quantize(matrix, "int8").load_state_dict(state)


def test_a_checkpoint():
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 8, 1, 16), generator=g, dtype=torch.uint8)
    scales = torch.full((2, 8, 1), 127, dtype=torch.uint8)
    checkpoint = {
        "layers.0.mlp.experts.gate_up_proj": torch.randn(2, 8, 32, generator=g),
        "layers.0.mlp.experts.down_proj": torch.randn(2, 32, 4, generator=g),
        "layers.1.mlp.experts.down_proj_blocks": blocks,
        "layers.1.mlp.experts.down_proj_scales": scales,
        "layers.0.mlp.router.weight": torch.randn(2, 32, generator=g),
    }
    found = gossamer.quantize_experts(checkpoint, "int4")
    kinds = {name: getattr(value, "format", None) for name, value in found.items()}
    assert kinds == {
        "layers.0.mlp.experts.gate_up_proj": "int4",
        "layers.0.mlp.experts.down_proj": "int4",
        "layers.1.mlp.experts.down_proj": "mxfp4",
        "layers.0.mlp.router.weight": None,
    }


# ---- what is refused ----

E, N, K = 2, 4, 8
CODES = torch.zeros(E, N, K, dtype=torch.int8)
BAD = {
    "bits": (lambda: gossamer.quantize(torch.ones(E, N, K), "int3"), "format: expected one of int8, int4"),
    "group": (lambda: gossamer.quantize(torch.ones(E, N, K), group_size=0), "a positive number or one of"),
    "mxfp4 group": (
        lambda: gossamer.quantize(torch.ones(E, N, K), "mxfp4", group_size=16),
        "expected 32 for mxfp4; got 16",
    ),
    "nested": (lambda: gossamer.quantize(torch.ones(E, N, K), "int8", nested=(3, 8)), r"\(4, 8\), \(2, 4"),
    "nested fp8": (lambda: gossamer.quantize(torch.ones(E, N, K), "fp8", nested=(4, 8)), "None for fp8"),
    "integers": (lambda: gossamer.quantize(CODES), r"floats \(experts, out, in\)"),
    "not a number": (
        lambda: gossamer.quantize(torch.tensor([[[1.0]], [[torch.nan]]]), "int4"),
        "finite numbers within float32's range; got others in expert 1",
    ),
    "beyond float32": (lambda: gossamer.quantize(1e39 * torch.ones(1, 1, 1).double(), "fp8"), "finite"),
    "range": (lambda: QuantizedWeight.from_codes("int4", CODES + 9, 1.0), "-8 to 7 for int4; got 9"),
    "floats": (lambda: QuantizedWeight.from_codes("int4", CODES.float(), 1.0), "integers for int4"),
    "scales": (
        lambda: QuantizedWeight.from_codes("int8", CODES, torch.ones(E, N, 3), group_size=4),
        r"shape \(2, 4, 2\), one of scales for 4 columns each; got \(2, 4, 3\)",
    ),
    "scales without a group": (
        lambda: QuantizedWeight.from_codes("int8", CODES, torch.ones(E, N, 2)),
        "Pass group_size=",
    ),
    "scales of integers": (
        lambda: QuantizedWeight.from_codes("int8", CODES, torch.ones(E, N).int()),
        "float32, float16, bfloat16 or uint8",
    ),
    "blocks": (
        lambda: QuantizedWeight.from_mxfp4(CODES.byte()[..., None], CODES.byte()),
        r"blocks \(E, N, G, 16\)",
    ),
    "width": (lambda: gossamer.quantize(torch.ones(E, N, K), "int8").read(4), "nested=\\(2, 4, 8\\)"),
    "widths": (
        lambda: gossamer.quantize(torch.ones(E, N, K), "int8", nested=(4, 8)).read(torch.tensor([4, 3])),
        r"widths of 4, 8 for all experts; got \[4, 3\]",
    ),
    "no experts": (lambda: gossamer.quantize_experts(torch.nn.Linear(2, 2)), "gate_up_proj and down_proj"),
    "transposed": (
        lambda: gossamer.experts(
            torch.ones(3, N),
            torch.zeros(3, 1, dtype=torch.int64),
            torch.ones(3, 1),
            gossamer.quantize(torch.ones(E, N, 2 * K)),
            gossamer.quantize(torch.ones(E, K, N)),
        ),
        r"quantised matrices \(experts, out, in\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    call, message = BAD[name]
    with pytest.raises(InputError, match=message):
        call()


def test_codes_have_no_gradient():
    w = gossamer.quantize(torch.ones(E, 2 * N, K), "int8")
    down = gossamer.quantize(torch.ones(E, K, N), "int8")
    with pytest.raises(UnsupportedError, match="frozen"):
        w.requires_grad_()
    w.scales.requires_grad = True
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(UnsupportedError, match="gate_up_proj: quantised weights are frozen"):
        gossamer.experts(torch.ones(1, K), ids, torch.ones(1, 1), w, down)


def test_storage_says_what_lies_where():
    q = Quantized("int", (2, 4, 8), 10, 10)
    assert (q.slices, q.stretch, [q.row_bytes(n) for n in range(3)]) == (4, 3, [3, 3, 6])
    assert [[q.place(n, s) for s in range(4)] for n in (1, 2)] == [
        [(0, 0), (0, 2), (0, 4), (0, 6)],
        [(0, 0), (1, 0), (0, 4), (1, 4)],
    ]


# ---- where torch watches, and Hugging Face ----


def test_torch_compile():
    case = Case(tokens=9, hidden=32, inner=16)
    layer, (ids, weights) = quantised(case, "int4", group_size=16), case.routing()
    up, down = layer["gate_up_proj"], layer["down_proj"]

    def block(x):
        return gossamer.experts(x, ids, weights, up, down)

    torch._dynamo.reset()
    x = case.x().requires_grad_()
    found = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    expected = block(x)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(o.square().sum(), x)[0] for o in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_a_model_of_transformers(name):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    more = {"head_dim": 16, "layer_types": ["full_attention"]} if name == "GptOss" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    gossamer.register_transformers()
    assert gossamer.quantize_experts(model, "mxfp4") is model
    found = model.set_experts_implementation("gossamer") or model(tokens).logits
    for module in model.modules():  # the same model with what codes stand for
        for matrix in ("gate_up_proj", "down_proj"):
            if isinstance(getattr(module, matrix, None), QuantizedWeight):
                dense = getattr(module, matrix).dequantize()
                delattr(module, matrix)
                dense = dense.transpose(1, 2).contiguous() if module.is_transposed else dense
                setattr(module, matrix, torch.nn.Parameter(dense))
    model.set_experts_implementation("eager")
    torch.testing.assert_close(found, model(tokens).logits, rtol=1e-4, atol=1e-4)

"""Zero points of codes: asymmetric integers, and the checkpoints that have them."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer import QuantizedWeight  # noqa: E402
from gossamer.ir.errors import InputError, UnsupportedError, VerifyError  # noqa: E402
from gossamer.ir.graph import Graph, Op, Value  # noqa: E402
from gossamer.ir.graph_verify import verify  # noqa: E402
from gossamer.ir.quantized import Quantized, dequantize  # noqa: E402
from gossamer.tests import moe_cases as CASES  # noqa: E402

Case, plain, ULP = CASES.Case, CASES.plain, CASES.ULP

E, N, K = 2, 16, 32


def codes(bits, seed=0):
    """Codes, and integer zero points of groups of 8 columns."""
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, 1 << bits, shape, generator=g) for shape in ((E, N, K), (E, N, K // 8))]
    return *draw, torch.rand(E, N, K // 8, generator=g) / 8


def by_hand(codes, zeros, scales):
    return (codes - zeros.repeat_interleave(8, -1)) * scales.repeat_interleave(8, -1)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", [torch.int32, torch.float32, torch.bfloat16])
def test_codes_stand_for_distances_from_zero_points(bits, kind):
    given, zeros, scales = codes(bits)
    zeros = zeros.to(kind) + (0.25 if kind.is_floating_point else 0)
    made = QuantizedWeight.from_codes(f"int{bits}", given, scales, group_size=8, zeros=zeros)
    assert torch.equal(made.dequantize(), by_hand(given, zeros.float(), scales))
    assert torch.equal(made.expert(1).dequantize(), made.dequantize()[1:])
    stored = [
        t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy() for t in made.tensors("w").values()
    ]
    exact = dequantize(Quantized(*made.key), stored)
    torch.testing.assert_close(made.dequantize(torch.float64), torch.from_numpy(exact))


@pytest.mark.parametrize(
    ("format", "options"), [("int8", {}), ("int4", {"group_size": 8}), ("int2", {})], ids=str
)
def test_ranges_that_are_not_around_zero_lose_less(format, options):
    w = torch.rand(E, N, K, generator=torch.Generator().manual_seed(0)) - 0.1
    exact, errors = w, []
    for symmetric in (True, False):
        made = gossamer.quantize(w, format, symmetric=symmetric, **options)
        errors.append((made.dequantize() - exact).square().mean())
    assert errors[1] < 0.5 * errors[0] and made.zeros.dtype == torch.uint8
    assert not made.requires_grad_(False).dequantize().isnan().any()


def test_numbers_of_one_sign_and_zeros_alone():
    w = torch.stack((torch.full((N, K), 3.0), torch.full((N, K), -3.0), torch.zeros(N, K)))
    for group in ("row", "expert", 8):
        made = gossamer.quantize(w, "int4", group_size=group, symmetric=False)
        torch.testing.assert_close(made.dequantize(), w)
    made = gossamer.quantize(w, "int8", group_size="tensor", symmetric=False)
    assert made.scales.numel() == made.zeros.numel() == 1
    torch.testing.assert_close(made.dequantize(), w, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("format", "options", "tokens", "dtype"),
    [
        ("int4", {"group_size": 16}, 1, torch.float32),
        ("int4", {"group_size": 16}, 60, torch.bfloat16),
        ("int8", {}, 60, torch.float32),
    ],
    ids=str,
)
def test_experts(format, options, tokens, dtype):
    case = Case(tokens=tokens, hidden=64, inner=48, dtype=dtype)
    largest = torch.zeros(3, dtype=torch.float64)  # over draws: errors of ours and theirs; values
    layer = case.layer()
    for name in ("gate_up_proj", "down_proj"):
        layer[name] = gossamer.quantize(layer[name] + 0.1, format, symmetric=False, **options)
    wide = {n: layer[n].dequantize(torch.float64) for n in ("gate_up_proj", "down_proj")}
    for seed in range(1 + 60 // tokens):
        x, (ids, weights) = case.x(seed), case.routing(seed)
        exact = plain(case, x, ids, weights, layer | wide, torch.float64)
        rounded = {n: w.to(dtype) for n, w in wide.items()}
        theirs = plain(case, x, ids, weights, layer | rounded, dtype)
        errors = [
            (t.double() - exact).abs().max() for t in (gossamer.experts(x, ids, weights, **layer), theirs)
        ]
        largest = torch.maximum(largest, torch.stack([*errors, exact.abs().max()]))
    assert largest[0] <= 2 * largest[1] + 2 * ULP[dtype] * largest[2]


def test_gradients_and_compile():
    case = Case(tokens=9, hidden=32, inner=16)
    layer, (ids, weights) = case.layer(), case.routing()
    up, down = (
        gossamer.quantize(layer[n], "int4", group_size=16, symmetric=False)
        for n in ("gate_up_proj", "down_proj")
    )

    def block(x):
        return gossamer.experts(x, ids, weights, up, down)

    x = case.x().requires_grad_()
    found = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    exact = gossamer.experts(x, ids, weights, up, down, backend="reference")
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    mine, theirs = (torch.autograd.grad(o.square().sum(), x)[0] for o in (found, exact))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_they_are_saved_and_loaded():
    def holder(seed, zeros):
        module, (given, points, scales) = torch.nn.Module(), codes(4, seed)
        points = points.float() if zeros == "floats" else points
        module.w = QuantizedWeight.from_codes("int4", given, scales, group_size=8, zeros=points)
        return module

    first, second = holder(0, "bytes"), holder(1, "bytes")
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.w.dequantize(), second.w.dequantize())
    with pytest.raises(InputError, match=r"f32 scales of 8, f32 zero points; got .* u8 zero points"):
        holder(1, "floats").load_state_dict(first.state_dict())


def test_checkpoints():
    w = torch.rand(E, N, K)
    checkpoint = {"a.experts.gate_up_proj": w, "a.experts.down_proj": w.mT.contiguous()}
    made = gossamer.quantize_experts(checkpoint, "int4", group_size=8, symmetric=False)
    assert all(m.zeros is not None for m in made.values())
    assert "zeros=uint8" in repr(made["a.experts.down_proj"])


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("offset", [1, 0])
def test_gptq(bits, offset):
    given, zeros, scales = codes(bits)
    zeros = zeros.clamp(min=offset)
    each = 32 // bits
    words, points = torch.zeros(E, K // each, N, dtype=torch.int64), torch.zeros(E, K // 8, N // each).long()
    for k in range(K):
        words[:, k // each] += given[:, :, k] << bits * (k % each)
    for n in range(N):
        points[..., n // each] += zeros[:, n] - offset << bits * (n % each)
    packed = [torch.where(p >= 2**31, p - 2**32, p).int() for p in (words, points)]
    made = QuantizedWeight.from_gptq(
        *packed, scales.mT, g_idx=torch.arange(K) // 8, bits=bits, zero_offset=offset
    )
    assert torch.equal(made.dequantize(), by_hand(given, zeros, scales))
    with pytest.raises(UnsupportedError, match="act-order"):
        QuantizedWeight.from_gptq(*packed, scales.mT, g_idx=torch.arange(K) % 4, bits=bits)


def test_gptq_of_groups_that_do_not_divide():
    """40 features in groups of 16: only g_idx or the size itself tell."""
    packed = (
        torch.randint(-(2**31), 2**31, (E, 40 // 8, N)).int(),
        torch.randint(0, 2**31, (E, 3, N // 8)).int(),
    )
    scales = torch.rand(E, 3, N)
    made = QuantizedWeight.from_gptq(*packed, scales, group_size=16)
    same = QuantizedWeight.from_gptq(*packed, scales, g_idx=torch.arange(40) // 16)
    field = packed[0].long().repeat_interleave(8, 1) >> 4 * (torch.arange(40) % 8)[:, None] & 15
    zero = packed[1].long().repeat_interleave(8, 2) >> 4 * (torch.arange(N) % 8) & 15
    group = torch.arange(40) // 16
    expected = ((field - zero[:, group] - 1) * scales[:, group]).mT
    torch.testing.assert_close(made.dequantize(), expected.contiguous())
    assert torch.equal(made.dequantize(), same.dequantize())
    for wrong, message in (
        ({}, "3 groups of 40 do not tell"),
        ({"group_size": 8}, "a size that makes 3 groups"),
        ({"g_idx": torch.arange(40.0)}, "integers"),
        ({"g_idx": torch.arange(7)}, "integers"),
    ):
        with pytest.raises(InputError, match=message):
            QuantizedWeight.from_gptq(*packed, scales, **wrong)


def test_awq():
    given, zeros, scales = codes(4)
    packed = []
    for tensor in (given.mT, zeros.mT):  # (E, K or G, N)
        words = torch.zeros(*tensor.shape[:2], N // 8, dtype=torch.int64)
        for field, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words += tensor[..., column::8] << 4 * field
        packed.append(torch.where(words >= 2**31, words - 2**32, words).int())
    made = QuantizedWeight.from_awq(*packed, scales.mT.half())
    assert made.scales.dtype == torch.float16 and made.zeros.dtype == torch.uint8
    assert torch.equal(made.dequantize(), by_hand(given, zeros, scales.half().float()))


GIVEN = codes(4)
BAD = {
    "fp8": (
        lambda: gossamer.quantize(torch.ones(E, N, K), "fp8", symmetric=False),
        "int8, int4 or int2 with zero",
    ),
    "nested": (
        lambda: gossamer.quantize(torch.ones(E, N, K), "int8", nested=(4, 8), symmetric=False),
        "None with zero points: nested codes are symmetric",
    ),
    "nested codes": (
        lambda: QuantizedWeight.from_codes("int8", GIVEN[0], 1.0, nested=(4, 8), zeros=8),
        "None with zero points",
    ),
    "signed": (
        lambda: QuantizedWeight.from_codes("int4", GIVEN[0] - 8, 1.0, zeros=8),
        "0 to 15 for int4; got -8",
    ),
    "beyond a byte": (
        lambda: QuantizedWeight.from_codes("int4", GIVEN[0], 1.0, zeros=torch.tensor(300)),
        "0 to 255",
    ),
    "truth values": (
        lambda: QuantizedWeight.from_codes("int4", GIVEN[0], 1.0, zeros=torch.tensor(True)),
        "integers",
    ),
    "doubles": (
        lambda: QuantizedWeight.from_codes("int4", GIVEN[0], 1.0, zeros=torch.ones(1).double()),
        "zeros: expected integers, float32, float16 or bfloat16; got torch.float64",
    ),
    "shape": (
        lambda: QuantizedWeight.from_codes("int4", GIVEN[0], GIVEN[2], group_size=8, zeros=GIVEN[1][..., :3]),
        r"zeros: expected shape \(2, 16, 4\), one of zeros for 8 columns each; got \(2, 16, 3\)",
    ),
    "gptq": (
        lambda: QuantizedWeight.from_gptq(
            torch.ones(E, 4, N), torch.ones(E, 4, 2).int(), torch.ones(E, 4, N)
        ),
        "qweight: expected int32 of 3 dimensions",
    ),
    "gptq bits": (
        lambda: QuantizedWeight.from_gptq(*[torch.ones(1, 1, 1).int()] * 2, torch.ones(1, 1, 1), bits=3),
        "bits: expected 2, 4 or 8; got 3",
    ),
    "awq": (
        lambda: QuantizedWeight.from_awq(
            torch.ones(E, K, 2).int(), torch.ones(E, 4, 1).int(), torch.ones(E, 4, N)
        ),
        r"codes \(2, 16, 32\), zero points \(2, 8, 4\), scales \(2, 4, 16\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    function, message = BAD[name]
    with pytest.raises(InputError, match=message):
        function()


@pytest.mark.parametrize(
    ("element", "planes", "zero"), [("e2m1", (4,), "u8"), ("int", (4, 8), "u8"), ("int", (4,), "i8")]
)
def test_rules(element, planes, zero):
    q = Quantized(element, planes, 8, 4, bits=planes[-1], zero=zero)
    values = [Value("c", "u8", (2, 3, 4)), Value("s", "f32", (2, 3, 2)), Value("z", "u8", (2, 3, 2))]
    op = Op("dequantize", ("c", "s", "z"), (Value("w", "f32", (2, 3, 8)),), (("format", q),))
    with pytest.raises(VerifyError, match="zero points"):
        verify(Graph("wrong", tuple(values), (op,), ("w",)))

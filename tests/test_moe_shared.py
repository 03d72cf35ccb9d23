"""Shared experts, slices of dense networks as experts, and layers under torch.autocast."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer.ir.errors import InputError  # noqa: E402

T, E, K, H, I, S = 9, 4, 2, 16, 12, 20  # noqa: E741
F = torch.nn.functional


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def layer(dtype=torch.float64):
    up, down = random(E, 2 * I, H, dtype=dtype) / 4, random(E, H, I, seed=1, dtype=dtype) / 4
    return random(T, H, seed=2, dtype=dtype), random(T, E, seed=3, dtype=dtype), up, down


@pytest.mark.parametrize("weighted", [False, True])
def test_shared_experts_and_their_gradients(weighted):
    x, logits, up, down = layer()
    shared = [random(2 * S, H, seed=4) / 4, random(H, S, seed=5) / 4]
    given = [t.requires_grad_() for t in (x, *shared, *([random(T, 1, seed=6)] if weighted else []))]
    names = ("shared_gate_up_proj", "shared_down_proj", "shared_weights")
    found = gossamer.moe(x, logits, up, down, top_k=K, **dict(zip(names, given[1:], strict=False)))
    alone = gossamer.moe(x, logits, up, down, top_k=K)
    wanted = alone + network(*given[:3]) * (given[3] if weighted else 1)
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(out.sin().sum(), given) for out in (found, wanted)]
    torch.testing.assert_close(*slopes)


def test_square_shared_experts_have_the_layout_of_the_others():
    x, logits, up, down = layer()
    up, down = up[:, :I].mT.contiguous(), down.mT.contiguous()  # (H, I), (I, H): without a gate
    shared = {"shared_gate_up_proj": random(H, H, seed=4), "shared_down_proj": random(H, H, seed=5)}
    found = gossamer.moe(x, logits, up, down, top_k=K, activation="silu", **shared)
    alone = gossamer.moe(x, logits, up, down, top_k=K, activation="silu")
    first, second = shared.values()
    torch.testing.assert_close(found, alone + F.silu(x @ first) @ second)
    shared = {"shared_gate_up_proj": random(S, H), "shared_down_proj": random(H, S)}
    with pytest.raises(InputError, match="as the experts are laid out"):
        gossamer.moe(x, logits, up, down, top_k=K, activation="silu", **shared)


def test_shared_experts_are_laid_out_as_experts_are():
    x, logits, up, down = layer()
    shared = random(2 * S, H, seed=4) / 4, random(H, S, seed=5) / 4
    flat = gossamer.moe(
        x, logits, up, down, top_k=K, shared_gate_up_proj=shared[0], shared_down_proj=shared[1]
    )
    turned = gossamer.moe(
        x, logits, up.transpose(1, 2), down.transpose(1, 2), top_k=K, shared_gate_up_proj=shared[0].T,
        shared_down_proj=shared[1].T, transposed=True, zero_experts=0,
    )  # fmt: skip
    torch.testing.assert_close(turned, flat)
    codes = [gossamer.quantize(w[None], "int8") for w in shared]
    x, logits, up, down = (t.float() for t in (x, logits, up, down))
    found, wanted = (
        gossamer.moe(x, logits, up, down, top_k=K, shared_gate_up_proj=a, shared_down_proj=b)
        for a, b in (codes, [w.dequantize()[0] for w in codes])
    )
    torch.testing.assert_close(found, wanted)
    assert gossamer.moe(
        x[:0], logits[:0], up, down, top_k=K, shared_gate_up_proj=codes[0], shared_down_proj=codes[1]
    ).shape == (0, H)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("ordered", [False, True])
def test_slices_of_a_dense_network(gated, ordered):
    x, up, down = random(T, H), random((1 + gated) * 24, H, seed=1) / 4, random(H, 24, seed=2) / 4
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)) if ordered else None
    given = [t.requires_grad_() for t in (up, down)]
    slices = gossamer.slice_experts(*given, 4, order=order)
    assert [tuple(s.shape) for s in slices] == [(4, (1 + gated) * 6, H), (4, H, 6)]
    ids = torch.arange(4).expand(T, 4)
    activation = "swiglu" if gated else "relu2"
    found = gossamer.experts(x, ids, torch.ones(T, 4), *slices, activation=activation)
    wanted = network(x, up, down) if gated else F.linear(F.relu(F.linear(x, up)) ** 2, down)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), given) for out in (found, wanted)))
    first = (order if ordered else torch.arange(24))[:6]
    torch.testing.assert_close(slices[1][0], down[:, first])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts": 5}, r"slice_experts\.num_experts: expected a divisor of 24 inner features; got 5"),
        ({"down_proj": torch.zeros(24, 8)}, r"\(2 I, H\) or \(I, H\), and \(H, I\); got \(48, 8\) and"),
        ({"gate_up_proj": torch.zeros(1, 48, 8)}, r"slice_experts\.gate_up_proj: expected 2 dimensions"),
        ({"order": torch.zeros(5).long()}, r"slice_experts\.order: expected int32 or int64 of shape \(24,\)"),
    ],
    ids=str,
)
def test_bad_slices(changed, message):
    given = {"gate_up_proj": torch.zeros(48, 8), "down_proj": torch.zeros(8, 24), "num_experts": 4}
    with pytest.raises(InputError, match=message):
        gossamer.slice_experts(**(given | changed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """Master matrices of float32 beside activations of either dtype are taken in autocast's."""
    x, logits, up, down = layer(torch.float32)
    given = x.to(dtype).requires_grad_(), up.requires_grad_(), down.requires_grad_()
    shared = {"shared_gate_up_proj": random(2 * S, H).float(), "shared_down_proj": random(H, S).float()}
    with torch.autocast("cpu", torch.bfloat16):
        found = gossamer.moe(given[0], logits, *given[1:], top_k=K, **shared)
        found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    narrow = [t.detach().bfloat16() for t in given]
    shared = {name: t.bfloat16() for name, t in shared.items()}
    torch.testing.assert_close(found, gossamer.moe(narrow[0], logits, *narrow[1:], top_k=K, **shared))
    assert [t.grad.dtype for t in given] == [t.dtype for t in given]
    wide = [t.detach().double() for t in (x, logits, up, down)]
    with torch.autocast("cpu", torch.bfloat16):
        assert gossamer.moe(*wide, top_k=K).dtype == torch.float64


@pytest.mark.parametrize("by_token", [False, True])
def test_biases_and_adapters_of_shared_experts(by_token):
    x, logits, up, down = layer()
    shared = random(2 * S, H, seed=4) / 4, random(H, S, seed=5) / 4
    biases = random(2 * S, seed=6), random(H, seed=7)
    many = (2,) if by_token else ()
    lora = [random(*many, *shape, seed=8) for shape in ((3, H), (2 * S, 3), (3, S), (H, 3))]
    leaves = [t.requires_grad_() for t in (x, *shared, *biases, *lora)]
    ids = torch.arange(T) % 3 - 1 if by_token else None
    found = gossamer.moe(
        x, logits, up, down, top_k=K, lora_scale=0.5, adapter_ids=ids, validate=True,
        shared_gate_up_proj=shared[0], shared_down_proj=shared[1], shared_gate_up_bias=biases[0],
        shared_down_bias=biases[1], shared_gate_up_lora=lora[:2], shared_down_lora=lora[2:],
    )  # fmt: skip
    rows = []
    for token in range(T):
        number = () if ids is None else (int(ids[token]),)
        a, b, c, d = (0 * m[0] if number == (-1,) else m[number] for m in lora)
        first, second = shared[0] + 0.5 * b @ a, shared[1] + 0.5 * d @ c
        gate, more = F.linear(x[token], first, biases[0]).chunk(2, -1)
        rows.append(F.linear(F.silu(gate) * more, second, biases[1]))
    wanted = gossamer.moe(x, logits, up, down, top_k=K) + torch.stack(rows)
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"shared_gate_up_bias": torch.zeros(2 * S)},
            "shared_gate_up_bias: expected shared_gate_up_proj and",
        ),
        (
            {"shared_down_lora": (torch.zeros(2, S), torch.zeros(H, 2))},
            "shared_down_lora: expected shared_gate",
        ),
        ({"shared_gate_up_lora": torch.zeros(2, S)}, "shared_gate_up_lora: expected two tensors"),
    ],
)
def test_biases_and_adapters_of_no_shared_experts(given, message):
    with pytest.raises(InputError, match=message):
        gossamer.moe(*layer(), top_k=K, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shared_gate_up_bias": random(2 * S)}, "shared_down_bias: expected both biases or neither"),
        (
            {"shared_gate_up_bias": random(1, 2 * S), "shared_down_bias": random(H)},
            r"shared_gate_up_bias: .*\(H,\)",
        ),
        ({"shared_down_lora": (random(1, 2, S), random(1, H, 2))}, r"shared_down_lora: .* \(r, in\) and"),
    ],
)
def test_bad_biases_and_adapters_of_shared_experts(given, message):
    shared = {"shared_gate_up_proj": random(2 * S, H), "shared_down_proj": random(H, S)}
    with pytest.raises(InputError, match=message):
        gossamer.moe(*layer(), top_k=K, **shared, **given)

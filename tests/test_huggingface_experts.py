"""Models of transformers with experts_implementation="gossamer": as eager in all they give."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer.frontend.huggingface_experts import experts_forward, gate_of  # noqa: E402
from gossamer.ir.errors import UnsupportedError  # noqa: E402

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "intermediate_size": 24, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24,
        "num_experts": 4, "num_experts_per_tok": 2,
    },
    "Qwen3Moe": {
        "intermediate_size": 24, "moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2,
        "head_dim": 16, "norm_topk_prob": True,
    },
    "Olmoe": {"intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "intermediate_size": 24, "moe_intermediate_size": 20, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "num_key_value_heads": 2,
    },
    "GptOss": {
        "intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
    },
}  # fmt: skip


def build(name):
    config = getattr(transformers, f"{name}Config")(**(SMALL | MODELS[name]))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # uninitialised experts, and biases other than 0
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_as_eager(name):
    gossamer.register_transformers()
    model = build(name)
    tokens = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(0))
    found = {}
    for implementation in ("eager", "gossamer"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        out = model(tokens, labels=tokens)
        out.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            text = model.generate(tokens, max_new_tokens=6, do_sample=False)
        found[implementation] = out.logits.detach(), out.loss.detach(), gradients, text
    eager, ours = found["eager"], found["gossamer"]
    torch.testing.assert_close(ours[0], eager[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], eager[1], rtol=1e-5, atol=1e-5)
    assert ours[2].keys() == eager[2].keys()
    for parameter, gradient in eager[2].items():
        torch.testing.assert_close(ours[2][parameter], gradient, rtol=1e-3, atol=1e-4, msg=parameter)
    assert torch.equal(ours[3], eager[3])


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_as_eager(name, padded):
    gossamer.register_transformers()
    model = build(name)
    tokens = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(tokens)
    seen[0, :4] = 1 - int(padded)
    found = {}
    for implementation in ("eager", "gossamer"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(tokens, attention_mask=seen).logits
        logits[seen.bool()].square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            text = model.generate(tokens, attention_mask=seen, max_new_tokens=6, do_sample=False)
        found[implementation] = logits[seen.bool()].detach(), gradients, text
    eager, ours = found["eager"], found["gossamer"]
    torch.testing.assert_close(ours[0], eager[0], rtol=1e-4, atol=1e-4)
    for parameter, gradient in eager[1].items():
        scale = 1e-4 * gradient.abs().max().item() + 1e-5
        torch.testing.assert_close(ours[1][parameter], gradient, rtol=1e-3, atol=scale, msg=parameter)
    assert torch.equal(ours[2], eager[2])


def experts_of(name):
    return next(m for m in build(name).modules() if hasattr(m, "has_gate"))


def test_gates_are_read_from_the_module():
    module = experts_of("GptOss")
    first = gate_of(module)
    module.alpha = 2.0
    assert gate_of(module) != first
    module._apply_gate = lambda gate_up: gate_up.sum(-1)
    module.alpha = 3.0
    with pytest.raises(UnsupportedError, match=r"takes \.sum of the first product"):
        gate_of(module)


def test_a_norm_behind_experts_is_refused():
    module = experts_of("Mixtral")
    module.has_post_expert_norm = True
    with pytest.raises(UnsupportedError, match="a norm behind each expert"):
        experts_forward(module, torch.zeros(1, 32), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2))

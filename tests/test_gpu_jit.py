"""gossamer.jit and attn_implementation="gossamer" on a GPU, against eager attention in float64."""

import pytest
import torch

import gossamer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
transformers = pytest.importorskip("transformers")

COMMON = dict(
    vocab_size=99, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
WINDOW = COMMON | dict(sliding_window=48)


@pytest.mark.parametrize("how", ["jit", "registered"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_models(family, dtype, how):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(COMMON if family == "Llama" else WINDOW))
    make = getattr(transformers, f"{family}Model")._from_config
    model = make(config, attn_implementation="eager").to("cuda", dtype).eval()
    ids = torch.randint(3, 99, (2, 200), device="cuda")
    with torch.no_grad():
        plain = model(ids, use_cache=False).last_hidden_state
        exact = make(config, attn_implementation="eager").to("cuda").double().eval()
        exact.load_state_dict(model.state_dict())
        exact = exact(ids, use_cache=False).last_hidden_state
        if how == "jit":
            f = gossamer.jit(model)
        else:
            gossamer.register_transformers()
            f = model
            f.set_attn_implementation("gossamer")
        ours = f(ids, use_cache=False).last_hidden_state
    if how == "jit":
        assert len(f.report().compiled) == 2 and not f.report().left
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + ulp


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache):
    gossamer.register_transformers()
    torch.manual_seed(0)
    config = transformers.MistralConfig(**WINDOW)
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="eager").cuda().eval()
    ids = torch.randint(3, 99, (2, 60), device="cuda")
    options = dict(max_new_tokens=8, do_sample=False, cache_implementation=cache, disable_compile=True)
    options |= dict(output_scores=True, return_dict_in_generate=True, attention_mask=torch.ones_like(ids))
    plain = torch.stack(model.generate(ids, **options).scores)
    model.set_attn_implementation("gossamer")
    torch.testing.assert_close(
        torch.stack(model.generate(ids, **options).scores), plain, rtol=1e-3, atol=1e-3
    )

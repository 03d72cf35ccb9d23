"""attn_implementation="gossamer": forward passes, caches, padding and packed sequences of models."""

import pytest
import torch
import torch._dynamo

import gossamer
from gossamer.ir.errors import UnsupportedError
from gossamer.runtime.driver import compilations

transformers = pytest.importorskip("transformers")

COMMON = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
GROUPED = COMMON | dict(num_key_value_heads=2, head_dim=8)
WINDOW = GROUPED | dict(sliding_window=8)
DECODERS = {
    "Llama": GROUPED,
    "Mistral": WINDOW,
    "Gemma2": WINDOW | dict(query_pre_attn_scalar=8),
    "Gemma3": WINDOW | dict(query_pre_attn_scalar=8, sliding_window_pattern=2),
    "Mixtral": WINDOW | dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": GROUPED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "GPT2": dict(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, eos_token_id=None
    ),
    "GptOss": WINDOW | dict(num_local_experts=4),
}
IDS = torch.arange(3, 27).view(2, 12) * 7 % 96 + 3
PADDING = torch.ones(2, 12, dtype=torch.long)
PADDING[0, :4] = 0


@pytest.fixture(autouse=True)
def registered():
    gossamer.register_transformers()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def both(family, options, head="Model"):
    """A model with eager attention, and the same one with ours."""
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**options)
    family += text if head == "Model" else ""
    head = "LMHeadModel" if (family, head) == ("GPT2", "ForCausalLM") else head
    plain = getattr(transformers, f"{family}{head}")._from_config(config, attn_implementation="eager").eval()
    ours = (
        getattr(transformers, f"{family}{head}")._from_config(config, attn_implementation="gossamer").eval()
    )
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def check(ours, plain, **tolerance):
    torch.testing.assert_close(ours, plain, **{"rtol": 1e-5, "atol": 2e-6, **tolerance})


@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family):
    plain, ours = both(family, DECODERS[family])
    check(ours(IDS).last_hidden_state, plain(IDS).last_hidden_state)
    kept = PADDING.bool()
    results = (m(IDS, attention_mask=PADDING).last_hidden_state[kept] for m in (ours, plain))
    check(*results)


def test_encoders_and_both():
    plain, ours = both("Bert", COMMON | dict(eos_token_id=2))
    kept = PADDING.bool()
    check(ours(IDS).last_hidden_state, plain(IDS).last_hidden_state)
    check(*(m(IDS, attention_mask=PADDING).last_hidden_state[kept] for m in (ours, plain)))
    plain, ours = both("ModernBert", COMMON | dict(local_attention=6, cls_token_id=1, sep_token_id=2))
    check(ours(IDS).last_hidden_state, plain(IDS).last_hidden_state)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    plain, ours = both("ViT", vision | dict(image_size=16, patch_size=4))
    image = torch.randn(2, 3, 16, 16)
    check(ours(image).last_hidden_state, plain(image).last_hidden_state)


def test_masks_are_closed_forms():
    seen = []
    _, ours = both("Mistral", WINDOW)
    for layer in ours.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    ours(IDS)
    assert seen[0] is seen[1]
    assert seen[0].mask == gossamer.masks.sliding_window(7, 0)


def test_packed_sequences():
    plain, ours = both("Llama", GROUPED)
    places = torch.tensor([[*range(5), *range(7)], [*range(9), *range(3)]])
    packed = dict(position_ids=places, use_cache=False)
    check(ours(IDS, **packed).last_hidden_state, plain(IDS, **packed).last_hidden_state)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_generate(family, cache):
    plain, ours = both(family, DECODERS[family], "ForCausalLM")
    options = dict(max_new_tokens=6, do_sample=False, output_scores=True, return_dict_in_generate=True)
    for mask in (torch.ones_like(PADDING), PADDING):
        found = [
            m.generate(IDS, attention_mask=mask, cache_implementation=cache, **options) for m in (ours, plain)
        ]
        assert (found[0].sequences == found[1].sequences).all()
        check(torch.stack(found[0].scores), torch.stack(found[1].scores))


def test_decoding_compiles_nothing_for_another_step():
    _, ours = both("Mistral", WINDOW, "ForCausalLM")
    options = dict(do_sample=False, attention_mask=torch.ones_like(IDS))
    ours.generate(IDS, max_new_tokens=3, **options)
    before = compilations()
    ours.generate(IDS, max_new_tokens=20, **options)
    assert compilations() == before


def test_training_and_dropout():
    plain, ours = both("Llama", GROUPED | dict(attention_dropout=0.0))
    with torch.enable_grad():
        for m in (plain, ours):
            m.train()
            (m(IDS, use_cache=False).last_hidden_state ** 2).mean().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        check(a.grad, b.grad)
    _, ours = both("Llama", GROUPED | dict(attention_dropout=0.5))
    ours.train()
    one, two = ours(IDS).last_hidden_state, ours(IDS).last_hidden_state
    assert not torch.equal(one, two) and one.isfinite().all()


def test_masks_of_four_dimensions():
    plain, ours = both("Llama", GROUPED)
    pairs = torch.rand(2, 1, 12, 12) < 0.6
    pairs[..., 0] = True
    low = torch.finfo(torch.float32).min
    added = torch.where(pairs, 0.0, low)
    check(
        ours(IDS, attention_mask=pairs).last_hidden_state, plain(IDS, attention_mask=added).last_hidden_state
    )
    check(
        ours(IDS, attention_mask=added).last_hidden_state, plain(IDS, attention_mask=added).last_hidden_state
    )


def test_inside_torch_compile():
    torch._dynamo.reset()
    plain, ours = both("Gemma2", DECODERS["Gemma2"])
    found = torch.compile(ours, backend="eager")(IDS, use_cache=False).last_hidden_state
    check(found, plain(IDS, use_cache=False).last_hidden_state)


def test_what_there_is_none_of_is_refused():
    _, ours = both("Llama", GROUPED)
    q = torch.randn(1, 4, 3, 8)
    forward = transformers.AttentionInterface()["gossamer"]
    with pytest.raises(UnsupportedError, match="no attention weights"):
        forward(ours, q, q, q, None, output_attentions=True)
    with pytest.raises(UnsupportedError, match="paged caches"):
        forward(ours, q, q, q, None, cache=object())
    with pytest.raises(ValueError, match="4 dimensions"):
        forward(ours, q, q, q, torch.ones(3, 3, dtype=torch.bool))

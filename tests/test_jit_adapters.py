"""gossamer.jit on modules that no graph can be captured of: adapters compute them, and reports say so."""

import subprocess
import sys

import pytest
import torch
import torch._dynamo

import gossamer
from gossamer.frontend.capture import adapters, longformer
from gossamer.frontend.capture import transformers_experts as adapt_experts

transformers = pytest.importorskip("transformers", minversion="5.0")

COMMON = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
)  # fmt: skip
GROUPED = COMMON | dict(num_key_value_heads=2, head_dim=8, num_experts_per_tok=2)
IDS = torch.arange(3, 99).view(2, 48) % 97 + 1
PADDED = torch.ones_like(IDS)
PADDED[0, 41:] = 0
EVERYWHERE = torch.zeros_like(IDS)
EVERYWHERE[:, 0] = EVERYWHERE[1, 17] = 1
LONGFORMER = COMMON | dict(
    attention_window=8, sep_token_id=2, max_position_embeddings=66, attention_probs_dropout_prob=0.0
)
BIGBIRD = COMMON | dict(block_size=4, num_random_blocks=2, attention_type="block_sparse")
CAUSAL = dict(use_cache=False)

# class, options of its configuration, inputs, sites of attention, of experts
MODELS = {
    "longformer": (
        "Longformer", LONGFORMER, dict(attention_mask=PADDED, global_attention_mask=EVERYWHERE), 2, 0,
    ),
    "bigbird": ("BigBird", BIGBIRD, dict(attention_mask=PADDED), 2, 0),
    "mixtral": ("Mixtral", GROUPED | dict(num_local_experts=4), CAUSAL, 2, 2),
    "qwen3_moe": ("Qwen3Moe", GROUPED | dict(num_experts=4, moe_intermediate_size=24), CAUSAL, 2, 2),
    "olmoe": ("Olmoe", GROUPED | dict(num_experts=4), CAUSAL, 2, 2),
    "gpt_oss": ("GptOss", GROUPED | dict(num_local_experts=4, sliding_window=8), CAUSAL, 2, 2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def build(name):
    family, options, inputs, attentions, experts = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}Model")(config).eval()  # in float64 some give NaN, some nothing
    if experts:
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, dict(input_ids=IDS) | inputs, attentions, experts


def run(model, call, inputs):
    """The output, and the gradient of every parameter that has one."""
    model.zero_grad()
    out = call(**inputs).last_hidden_state
    out.square().mean().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(model, inputs, f=None):
    """The compiled model's output and gradients against the original's; its report."""
    f = f or gossamer.jit(model)
    plain, wanted = run(model, model, inputs)
    ours, found = run(model, f, inputs)
    kept = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
    torch.testing.assert_close(ours[kept], plain[kept], rtol=1e-4, atol=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        atol = 2e-4 * gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=atol, msg=name)
    return f.report()


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_compiled_and_equal(name):
    model, inputs, attentions, experts = build(name)
    report = check(model, inputs)
    kinds = [part.kind for part in report.compiled]
    assert [kinds.count("attention"), kinds.count("experts")] == [attentions, experts], report
    assert not [part for part in report.left if part.kind != "graph"], report
    classes = {"longformer": "LongformerSelfAttention", "bigbird": "BigBirdBlockSparseAttention"}
    named = [str(part) for part in report.compiled if part.detail]
    assert len(named) == (experts or attentions)
    for line in named:
        assert (
            "modeling_" in line and " by the adapter of " in line and line.endswith(classes.get(name, "ts"))
        )


MANY = torch.zeros_like(IDS).index_fill(1, torch.arange(0, 36, 5), 1)
OTHERS = [{}, dict(attention_mask=PADDED), dict(attention_mask=PADDED, global_attention_mask=MANY)]


@pytest.mark.parametrize("given", OTHERS)
def test_longformer_with_other_masks(given):
    model, *_ = build("longformer")
    kept = given.get("attention_mask", torch.ones_like(IDS)).bool()
    with torch.no_grad():
        ours, plain = (m(IDS, **given).last_hidden_state[kept] for m in (gossamer.jit(model), model))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_layers_of_a_longformer_share_what_they_ask_of_its_tokens(monkeypatch):
    """To ask waits for the device: once a pass, and again where masks have changed."""
    asked = []
    tokens = longformer._tokens
    monkeypatch.setattr(longformer, "_tokens", lambda *given: asked.append(1) or tokens(*given))
    model, *_ = build("longformer")
    f, whole = gossamer.jit(model), torch.ones_like(IDS)
    given = dict(attention_mask=whole, global_attention_mask=EVERYWHERE.clone())
    with torch.no_grad():
        for passes in (1, 2, 3):
            ours, plain = f(IDS, **given).last_hidden_state, model(IDS, **given).last_hidden_state
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
            assert len(asked) == passes
            given["global_attention_mask"][:, 5 * passes] = 1


def test_layers_of_a_longformer_in_checkpoints():
    """Layers are computed again in another order."""
    model, inputs, *_ = build("longformer")
    for part in model.train().modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.gradient_checkpointing_enable()
    assert len(check(model, inputs).compiled) == 2


def test_bigbird_in_training_draws_the_same_blocks():
    model, *_ = build("bigbird")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    report = check(model.train(), dict(input_ids=IDS))
    assert len(report.compiled) == 2


def test_dropout_in_training_is_left_alone():
    model, inputs, *_ = build("longformer")
    for layer in model.encoder.layer:
        layer.attention.self.dropout = 0.5
    f = gossamer.jit(model.train())
    with torch.no_grad():
        f(**inputs)
    left = [part for part in f.report().left if part.kind == "attention"]
    assert not f.report().compiled and len(left) == 2
    assert all("dropout" in part.why and "modeling_longformer.py:" in part.where for part in left), left


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_probabilities_are_the_originals(name):
    model, inputs, *_ = build(name)
    f = gossamer.jit(model)
    with torch.no_grad():
        ours, plain = (m(**inputs, output_attentions=True).attentions for m in (f, model))
    assert len(ours) == len(plain) == 2
    torch.testing.assert_close(ours, plain)
    assert "its probabilities are asked for" in str(f.report())


def test_experts_that_cannot_be_captured_are_left_alone():
    model, inputs, *_ = build("mixtral")
    for layer in model.layers:
        layer.mlp.experts.act_fn = torch.nn.Softmax(-1)
    report = check(model, inputs)
    assert {part.kind for part in report.compiled} == {"attention"}
    assert "left experts at" in str(report) and "activation" in str(report)


def test_faster_experts_of_torch_are_left_alone():
    model, *_ = build("mixtral")
    experts = model.layers[0].mlp.experts
    for how, dtype, left in (("eager", torch.bfloat16, False), ("grouped_mm", torch.bfloat16, True)):
        model.set_experts_implementation(how)
        assert (adapt_experts.why_not(experts.to(dtype)) is not None) == left
    assert adapt_experts.why_not(experts.float()) is None


def test_other_backends_and_eager_mode_see_the_class_itself(monkeypatch):
    called = []
    monkeypatch.setattr(adapters, "run", None)
    model, inputs, *_ = build("mixtral")
    with torch.no_grad():
        model(**inputs)
        torch.compile(model, backend=lambda graph, _: called.append(graph) or graph.forward)(**inputs)
    assert called and not any(n.target is adapters.adapted for g in called for n in g.graph.nodes)


def test_a_function_is_captured_before_the_library_is_imported():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


LATE = """
import sys, torch, gossamer
@gossamer.jit
def f(model, ids):
    return model(ids, use_cache=False).last_hidden_state
assert "transformers.integrations.moe" not in sys.modules
from transformers import MixtralConfig, MixtralModel
config = MixtralConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, experts_implementation="eager",
    attn_implementation="eager")
with torch.no_grad():
    f(MixtralModel(config).eval(), torch.arange(8)[None])
assert [part.kind for part in f.report().compiled] == ["experts", "attention"], f.report()
"""

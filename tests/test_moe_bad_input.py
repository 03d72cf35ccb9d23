"""What gossamer.experts, moe, route and Routing refuse, and in which words."""

import pytest

torch = pytest.importorskip("torch")
import gossamer  # noqa: E402
from gossamer.ir.errors import InputError, TraceError, UnsupportedError  # noqa: E402

T, E, K, H, I = 5, 4, 2, 8, 6  # noqa: E741


def layer(**changed):
    found = {
        "x": torch.zeros(T, H),
        "topk_ids": torch.zeros(T, K, dtype=torch.int64),
        "topk_weights": torch.zeros(T, K),
        "gate_up_proj": torch.zeros(E, 2 * I, H),
        "down_proj": torch.zeros(E, H, I),
    }
    return found | changed


BAD = {
    "x of three dimensions": ({"x": torch.zeros(1, T, H)}, "experts.x: expected 2 dimensions"),
    "no tensor": ({"x": [[1.0]]}, "experts.x: expected a torch.Tensor; got list"),
    "x of integers": ({"x": torch.zeros(T, H, dtype=torch.int64)}, "x's dtype|float16, bfloat16"),
    "other dtype": ({"down_proj": torch.zeros(E, H, I).half()}, "experts.down_proj: expected x's dtype"),
    "layout": (
        {"gate_up_proj": torch.zeros(E, 2 * I, H + 1)},
        r"expected \[E, 2I, H\] and \[E, H",
    ),
    "mixed layouts": ({"down_proj": torch.zeros(E, I, H)}, r"got \[4, 12, 8\] and \[4, 6, 8\]"),
    "asked for the other layout": ({"transposed": True}, "the other layout fits"),
    "other number of experts": ({"down_proj": torch.zeros(E + 1, H, I)}, "expected 4 experts"),
    "interleaved, no gate": ({"gate_up_proj": torch.zeros(E, I, H), "interleaved": True}, "with a gate"),
    "one bias": ({"down_bias": torch.zeros(E, H)}, "experts.gate_up_bias: expected both biases"),
    "bias": (
        {"gate_up_bias": torch.zeros(E, I), "down_bias": torch.zeros(E, H)},
        r"experts.gate_up_bias: expected shape \(4, 12\)",
    ),
    "ids of floats": ({"topk_ids": torch.zeros(T, K)}, "experts.topk_ids: expected int32 or int64"),
    "ids of other tokens": ({"topk_ids": torch.zeros(T + 1, K, dtype=torch.int64)}, "expected 5 tokens"),
    "weights of another shape": ({"topk_weights": torch.zeros(T, K + 1)}, "the shape of the ids"),
    "no weights": ({"topk_weights": None}, "experts.topk_weights"),
    "an id too large": ({"topk_ids": torch.full((T, K), E + 1), "validate": True}, "ids from 0 to 3.* got 5"),
    "an id too small": ({"topk_ids": torch.full((T, K), -2), "validate": True}, "got -2"),
    "activation": ({"activation": "swish"}, "experts.activation: expected one of swiglu"),
    "gate that is not there": ({"gate_up_proj": torch.zeros(E, I, H)}, "These matrices have no gate"),
    "matrices of lists": ({"gate_up_proj": [[0.0]]}, "gate_up_proj: expected a torch.Tensor or a Quantized"),
    "half an adapter": (
        {"gate_up_lora": (torch.zeros(E, 2, H),)},
        "expected two tensors, a .* got 1 of them",
    ),
    "adapters of one tensor": ({"down_lora": torch.zeros(E, 2, I)}, "experts.down_lora: .* got Tensor"),
    "no inner features": (
        {"gate_up_proj": torch.zeros(E, 0, H), "down_proj": torch.zeros(E, H, 0)},
        "expected H and I of 1 or more",
    ),
    "half a shared expert": (
        {"shared_down_proj": torch.zeros(H, I)},
        "experts.shared_gate_up_proj: .* got None",
    ),
    "weights of no shared expert": (
        {"shared_weights": torch.zeros(T)},
        "shared_gate_up_proj and shared_down",
    ),
    "shared experts of three dimensions": (
        {"shared_gate_up_proj": torch.zeros(1, 2 * I, H), "shared_down_proj": torch.zeros(1, H, I)},
        r"two matrices, \(2 S, H\) and \(H, S\); got \(1, 12, 8\)",
    ),
    "a shared expert without a gate": (
        {"shared_gate_up_proj": torch.zeros(I, H), "shared_down_proj": torch.zeros(H, I)},
        r"\(2 S, H\) and \(H, S\) with H = 8, as the experts are laid out; got \(6, 8\) and \(8, 6\)",
    ),
    "a shared expert of another dtype": (
        {"shared_gate_up_proj": torch.zeros(2 * I, H).half(), "shared_down_proj": torch.zeros(H, I).half()},
        "experts.shared_gate_up_proj: expected x's dtype torch.float32; got torch.float16",
    ),
    "shared weights": (
        {
            "shared_gate_up_proj": torch.zeros(2 * I, H),
            "shared_down_proj": torch.zeros(H, I),
            "shared_weights": torch.zeros(T + 1),
        },
        "a weight for each of 5 tokens",
    ),
    "backend": ({"backend": "cuda"}, "experts.backend: expected one of auto"),
    "backend of another device": ({"backend": "triton"}, "cuda tensors for 'triton'"),
}


@pytest.mark.parametrize("name", BAD)
def test_experts(name):
    changed, message = BAD[name]
    with pytest.raises(InputError, match=message):
        gossamer.experts(**layer(**changed))


def test_activations_that_cannot_be_captured():
    with pytest.raises(TraceError):
        gossamer.experts(**layer(activation=lambda gate, up: gate if gate > 0 else up))
    with pytest.raises(TraceError, match="expects 2 arguments"):
        gossamer.experts(**layer(activation=lambda gate, up, more: gate))
    table = torch.ones(4)
    with pytest.raises(UnsupportedError, match="reads tensors"):
        gossamer.experts(**layer(activation=lambda gate, up: gate * up * table[0]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top_k": 5}, "route.top_k: expected 1 to 4, the number of experts; got 5"),
        ({"top_k": 0}, "route.top_k"),
        ({"router": "switch"}, "route.router: expected a function, or one of softmax"),
        ({"groups": 3}, "groups that divide 4 experts"),
        ({"groups": 4, "top_groups": 1}, "enough of them open for 2"),
        ({"correction_bias": torch.zeros(3)}, r"route.correction_bias: expected shape \(4,\)"),
        ({"router_logits": torch.zeros(T, E, dtype=torch.int64)}, "route.router_logits"),
        ({"router_logits": torch.zeros(E)}, r"2 dimensions \(tokens, experts\)"),
    ],
    ids=str,
)
def test_route(changed, message):
    with pytest.raises(InputError, match=message):
        gossamer.route(**({"router_logits": torch.zeros(T, E), "top_k": K} | changed))


@pytest.mark.parametrize("shape", [(T, E + 1), (T + 1, E)])
def test_logits_of_the_wrong_width(shape):
    given = layer()
    with pytest.raises(InputError, match=r"moe\.router_logits"):
        gossamer.moe(given["x"], torch.zeros(shape), given["gate_up_proj"], given["down_proj"], top_k=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": torch.zeros(5)}, r"Routing\.weights: expected shape \(6,\), as token_ids has"),
        ({"weights": torch.zeros(6).int()}, r"Routing\.weights: expected one of float16.*; got torch.int32"),
        ({"weights": [0.0] * 6}, r"Routing\.weights: expected a torch.Tensor; got list"),
        ({"counts": torch.zeros(E)}, r"Routing\.counts: expected one of int32, int64; got torch.float32"),
        ({"counts": torch.zeros(E, 1).int()}, r"Routing\.counts: expected 1 dimensions \(experts,\)"),
        ({"token_ids": torch.zeros(6)}, r"Routing\.token_ids: expected one of int32, int64"),
        ({"expert_ids": torch.zeros(6)}, r"Routing\.expert_ids: expected one of int32, int64"),
    ],
    ids=str,
)
def test_parts_of_routings(changed, message):
    rows = torch.zeros(6, dtype=torch.int32)
    parts = {"token_ids": rows, "expert_ids": rows, "weights": torch.zeros(6), "counts": rows[:E]}
    with pytest.raises(InputError, match=message):
        gossamer.Routing(**(parts | changed), num_tokens=T)


@pytest.mark.parametrize("ids", [-2, E + 1])
def test_ids_of_routings_are_validated(ids):
    chosen = gossamer.Routing.known(torch.full((T,), ids), E)
    given = layer(topk_ids=chosen, topk_weights=None)
    assert not gossamer.experts(**given).any()
    with pytest.raises(InputError, match=f"ids from 0 to {E - 1}, or -1 or {E} for none; got {ids}"):
        gossamer.experts(**given, validate=True)


def test_routings():
    rows = torch.zeros(6, dtype=torch.int32)
    chosen = gossamer.Routing(rows, rows, torch.zeros(6), torch.tensor([6, 0, 0, 0]), T)
    with pytest.raises(InputError, match=r"Routing\.replace"):
        chosen.replace(experts=rows)
    given = layer(topk_ids=chosen, topk_weights=None)
    with pytest.raises(InputError, match="a Routing of 4 tokens"):
        gossamer.experts(**(given | {"x": torch.zeros(4, H)}))
    for changed, message in (
        ({"counts": torch.tensor([7, 0, 0, 0])}, "counts of 6 rows at most"),
        ({"counts": torch.tensor([5, 1, 0, 0])}, "expert_ids sorted"),
        ({"token_ids": rows + T}, "token_ids from 0 to 4"),
    ):
        with pytest.raises(InputError, match=message):
            gossamer.experts(**(given | {"topk_ids": chosen.replace(**changed), "validate": True}))

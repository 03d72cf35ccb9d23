"""Launches of layers of experts on a GPU whose driver runs nothing: how many, of what, with which grids."""

import struct
from functools import partial

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
import gossamer  # noqa: E402
from gossamer.frontend import plan  # noqa: E402
from gossamer.frontend.moe import autograd as moe_autograd  # noqa: E402
from gossamer.frontend.moe import layer_kernels, router_form  # noqa: E402
from gossamer.frontend.prepare import allocate  # noqa: E402
from gossamer.ir.expr import real, sigmoid  # noqa: E402
from gossamer.ir.ragged import Tiling  # noqa: E402
from gossamer.passes.moe.pipeline import compile_experts  # noqa: E402
from gossamer.passes.moe.spec import ExpertsSpec  # noqa: E402
from gossamer.runtime.driver import driver  # noqa: E402

E, K, H, I = 8, 2, 64, 32  # noqa: E741


@pytest.fixture
def cuda(fake, monkeypatch):
    for module in (layer_kernels, plan, router_form):
        monkeypatch.setattr(module, "target_of", lambda device: "cuda:sm_90")
    return fake


def layer(tokens):
    x = torch.randn(tokens, H, dtype=torch.bfloat16)
    ids, weights = torch.randint(0, E, (tokens, K)), torch.rand(tokens, K)
    up, down = torch.randn(E, 2 * I, H, dtype=torch.bfloat16), torch.randn(E, H, I, dtype=torch.bfloat16)
    return x, ids, weights, up, down


@pytest.mark.parametrize(
    ("tokens", "names"),
    [
        (1, ["experts_h", "experts_o"]),
        (16, ["group_place", "experts_h", "experts_y", "experts_o"]),
        (600, ["group_count", "group_place", "experts_h", "experts_y", "experts_o"]),
    ],
)
def test_launches(cuda, tokens, names):
    given = layer(tokens)
    for _ in range(2):
        found = gossamer.experts(*given)
    assert found.shape == (tokens, H)
    assert [one.name for one in cuda.launched] == names * 2
    grids = {one.name: one.grid for one in cuda.launched}
    assert grids["experts_o"] == (H // 8 if tokens == 1 else tokens)
    if tokens == 600:  # 150 rows an expert: tiles of 128
        assert grids["group_count"] == -(-tokens * K // 512)
        assert grids["experts_y"] == tokens * K // 128 + E
    x = given[0]
    assert any(x.data_ptr() in one.arguments for one in cuda.launched)


@pytest.mark.parametrize("by_token", [False, True])
def test_adapters_launch(cuda, by_token):
    """Two kernels for a token, as without adapters; one more a product for many, whatever a stack holds."""
    for tokens, rank in ((1, 4), (16, 4), (1, 64)):
        cuda.launched.clear()
        x, *rest = layer(tokens)
        a, b = torch.randn(3, E, rank, H), torch.randn(3, E, 2 * I, rank)
        lora = [m.bfloat16() if by_token else m[0].bfloat16() for m in (a, b)]
        more = {"adapter_ids": torch.randint(-1, 3, (tokens,))} if by_token else {}
        gossamer.experts(x, *rest, gate_up_lora=lora, **more)
        names = ["experts_h", "experts_o"]
        if (tokens, rank) != (1, 4):
            names = ["group_place", "experts_gate_up_t", "experts_h", "experts_y", "experts_o"]
        assert [one.name for one in cuda.launched] == names


def test_rows_by_descriptor_and_by_address(cuda):
    """The last rows of an expert are a smaller tile, which is loaded by address: a kernel takes both."""
    more = {"rows": 128, "inner": 64, "rest": 32, "wide": 8, "meta": (("descriptors", 1),)}
    spec = ExpertsSpec(
        E, K, H, I, real("x0") * sigmoid(real("x0")) * real("x1"), dtype="bf16", target="cuda:sm_90",
        tiling=(Tiling(cols=16, **more), Tiling(cols=32, **more)),
    )  # fmt: skip
    x, ids, weights, up, down = layer(600)
    values = {"x": x, "ids": ids.reshape(-1), "weights": weights.reshape(-1), "gate_up": up, "down": down}
    values["o"] = torch.empty_like(x)
    executable = driver().compile(compile_experts(spec), spec.target)
    executable.bind(values, allocate=partial(allocate, device=x.device))(values)
    (launched,) = (one for one in cuda.launched if one.name == "experts_y")
    boxed = [struct.unpack_from("<Q", a, 8)[0] for a in launched.arguments if isinstance(a, bytes)]
    assert len(boxed) == 2 and boxed[0] in launched.arguments and boxed[1] == down.data_ptr()


def test_gradients_launch(cuda, monkeypatch):
    x, ids, weights, up, down = layer(40)
    sorted_ids, order = ids.reshape(-1).sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(80)
    bounds = torch.searchsorted(sorted_ids, torch.arange(E + 1)).int()
    rows = (order // K).int(), bounds, place.reshape(40, K).int()
    monkeypatch.setattr(moe_autograd, "grouped", lambda ids, experts: rows)  # nothing runs, these are read
    x.requires_grad_()
    up.requires_grad_()
    gossamer.experts(x, ids, weights, up, down).sum().backward()
    names = [one.name for one in cuda.launched]
    assert names[:3] == ["experts_h", "experts_y", "experts_o"]
    assert names[3:] == ["experts_du", "experts_dg", "experts_dxs", "experts_dx", "experts_dgate_up"]


ROUTERS = {
    "softmax": ({}, ["router"]),
    "deepseek": (
        {"router": "sigmoid", "correction_bias": torch.zeros(E), "groups": 4, "top_groups": 2},
        ["router"],
    ),
    "gpt-oss": ({"router": "softmax_of_topk"}, ["router"]),
    "top_p": ({"top_p": 0.5}, ["router"]),
    "dynmole": ({"top_p": 0.5, "entropy_threshold": 0.9, "min_k": 1}, ["router"]),
    "smile": ({"group_logits": torch.randn(40, 4), "top_groups": 1}, ["router"]),
    "tutel": ({"expert_vectors": torch.randn(6, E), "temperature": torch.ones(1)}, ["router"]),
    "thor": ({"router": "random", "seed": 3}, ["router"]),
    "hash": ({"router": "random", "token_ids": torch.arange(40)}, ["router"]),
    "expertweave": (
        {"remap": torch.zeros(2, E).int(), "request_ids": torch.zeros(40).int(), "num_experts": 9},
        ["router"],
    ),
    "switch": ({"capacity": 5}, ["router", "router_limit"]),
    "gshard": ({"capacity": 5, "capacity_order": "choice"}, ["router", "router_limit"]),
    "expert_choice": ({"router": "expert_choice"}, ["router_scores", "router_choose"]),
}
FREE = (
    "empty",
    "detach",
    "view",
    "reshape",
    "alias",
    "t",
    "transpose",
    "numpy_T",
    "permute",
    "as_strided",
    "to",
)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_two_launches_at_most(cuda, name):
    options, kernels = ROUTERS[name]
    logits = torch.randn(40, E)
    gossamer.route(logits, K - (name == "smile"), **options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        gossamer.route(logits, K - (name == "smile"), **options)
    operators = {event.key.removeprefix("aten::") for event in seen.key_averages() if "aten::" in event.key}
    assert operators <= set(FREE)  # which compute nothing
    assert [one.name for one in cuda.launched] == 2 * kernels


@pytest.mark.parametrize("options", [{}, {"capacity": 5}, {"router": "expert_choice"}], ids=str)
def test_gradients_of_a_router_are_one_launch(cuda, options):
    logits = torch.randn(40, E, requires_grad=True)
    chosen = gossamer.route(logits, K, **options)
    (chosen.topk_weights if chosen.topk_ids is not None else chosen.operands()["weights"]).sum().backward()
    assert [one.name for one in cuda.launched][-1] == "router_gradient" and len(cuda.launched) <= 3

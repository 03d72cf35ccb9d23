"""Launches of layers of experts on a GPU whose driver runs nothing: how many, of what, with which grids."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
import gossamer  # noqa: E402
from gossamer.frontend import moe, moe_autograd, routing  # noqa: E402

E, K, H, I = 8, 2, 64, 32  # noqa: E741


@pytest.fixture
def cuda(fake, monkeypatch):
    for module in (moe, routing):
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


def test_a_router_is_one_launch(cuda):
    gossamer.route(torch.randn(40, E), K, router="sigmoid", correction_bias=torch.zeros(E))
    assert [(one.name, one.grid) for one in cuda.launched] == [("router", 3)]

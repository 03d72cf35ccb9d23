"""Launches of quantised experts on a GPU whose driver runs nothing: their kernels bind codes and scales."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
import gossamer  # noqa: E402
from gossamer.frontend import plan  # noqa: E402
from gossamer.frontend.moe import layer_kernels  # noqa: E402

E, K, H, I = 8, 2, 64, 32  # noqa: E741


@pytest.fixture
def cuda(fake, monkeypatch):
    for module in (layer_kernels, plan):
        monkeypatch.setattr(module, "target_of", lambda device: "cuda:sm_90")
    return fake


@pytest.mark.parametrize(
    ("format", "tokens", "names"),
    [
        ("mxfp4", 1, ["experts_h", "experts_o"]),
        ("fp8", 16, ["group_place", "experts_h", "experts_y", "experts_o"]),
        ("nested", 600, ["group_count", "group_place", "experts_h", "experts_y", "experts_o"]),
    ],
)
def test_launches(cuda, format, tokens, names):
    x = torch.randn(tokens, H, dtype=torch.bfloat16)
    ids, weights = torch.randint(0, E, (tokens, K)), torch.rand(tokens, K)
    options = {"nested": (2, 4, 8)} if format == "nested" else {}
    kind = "int8" if options else format
    up, down = (gossamer.quantize(torch.randn(E, n, k), kind, **options) for n, k in ((2 * I, H), (H, I)))
    if options:
        up, down = up.read(torch.full((E,), 4)), down.read(4)
    for _ in range(2):
        assert gossamer.experts(x, ids, weights, up, down).shape == (tokens, H)
    assert [one.name for one in cuda.launched] == names * 2
    arguments = [a for one in cuda.launched for a in one.arguments]
    # A tensor map of the fake driver has the address behind its first 8 bytes.
    given = {int.from_bytes(a[8:16], "little") if isinstance(a, bytes) else a for a in arguments}
    read = [*up.codes, up.scales, down.codes[0], down.scales] + ([up.widths] if options else [])
    assert {t.data_ptr() for t in read} <= given
    if options:  # of codes of which four bits are read, the lower half is not even passed
        assert down.codes[2].data_ptr() not in given

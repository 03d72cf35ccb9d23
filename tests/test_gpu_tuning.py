"""Schedules on a GPU: every one that tuning would time gives the right result, and one of them wins.

pytest -m gpu -n 12 tests/test_gpu_*.py
"""

import pytest

import gossamer
from gossamer import Schedule, masks
from gossamer.ir.errors import InputError
from gossamer.runtime import tuning

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu

MASKS = {
    "causal": masks.causal(),
    "window": masks.sliding_window(32),
    "strided": masks.strided(16, 20),
    "neighborhood": masks.neighborhood((20, 24), (7, 7), edges="clip"),
    "document": masks.document(torch.arange(480) // 100),
}


def tensors(size=64, length=480):
    generator = torch.Generator("cuda").manual_seed(size)
    shape = (2, 3, length, size)
    return [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_what_is_timed_is_right(name, size, tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(tmp_path))
    tuning.reset()
    inputs, mask = tensors(size), MASKS[name].to("cuda")
    wanted = gossamer.attention(*(t.cpu() for t in inputs), mask=MASKS[name], backend="reference").cuda()
    chosen = gossamer.tune(*inputs, mask=mask)
    [answer] = tuning.tuning()._answers.values()
    assert len(answer.timed) > 1 and all(0 < seconds < 1 for _, seconds in answer.timed)
    for text in (*(text for text, _ in answer.timed), "tune"):
        found = gossamer.attention(*inputs, mask=mask, schedule=text)
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
    assert all(isinstance(s, Schedule) for s in (chosen if isinstance(chosen, tuple) else (chosen,)))
    tuning.reset()


def test_a_schedule_that_does_not_fit_is_refused_before_it_is_launched():
    large = Schedule((128,), (128,), lazy_rescale=False, meta=(("stages", 4), ("warps", 8)))
    with pytest.raises(InputError, match="bytes of shared memory"):
        gossamer.attention(*tensors(128), mask=masks.causal(), schedule=large)

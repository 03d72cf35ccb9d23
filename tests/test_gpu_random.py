"""Random masks on a GPU: those that test_attention_random.py runs on the CPU, shared out among processes.

pytest -m gpu -n 12 tests/test_gpu_random.py
"""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gossamer import testing
from gossamer.frontend.checking import check_attention

pytestmark = pytest.mark.gpu

SHARES, MASKS = 30, 12  # of them, each with masks of its own
LENGTHS = st.sampled_from([1, 64, 127, 255, 257, 513, 600]) | st.integers(1, 600)
HEADS = st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (3, 1)])


# A failing mask is told and not made smaller: that would compile for minutes.
@pytest.mark.parametrize("share", range(SHARES))
@settings(
    max_examples=MASKS,
    deadline=None,
    phases=[Phase.generate],
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    mask=testing.masks(4, 600),
    lengths=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=2, max_size=2),
    heads=HEADS,
    batch=st.integers(1, 2),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_random_masks(share, mask, lengths, heads, batch, dtype):
    for q_len, kv_len in lengths:
        q = torch.randn(batch, heads[0], q_len, 32).to("cuda", dtype)
        k, v = torch.randn(2, batch, heads[1], kv_len, 32).to("cuda", dtype)
        check_attention(q, k, v, mask=mask.to("cuda"), enable_gqa=True)

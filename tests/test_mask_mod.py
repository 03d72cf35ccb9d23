"""Masks handed to PyTorch's own FlexAttention."""

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.flex_attention import create_block_mask

import gossamer
from gossamer import testing
from gossamer.frontend.mask_mod import mask_mod_of
from gossamer.ir.errors import UnsupportedError
from gossamer.tests import attention_cases as CASES


def expect_same_pairs(mask, q_len, kv_len, batch=0):
    mask_mod = mask_mod_of(mask.to("cpu"), q_len, kv_len)
    found = mask_mod(batch, 0, torch.arange(q_len)[:, None], torch.arange(kv_len))
    assert found.dtype == torch.bool
    assert (found.expand(q_len, kv_len).numpy() == mask.to_dense(q_len, kv_len, batch)).all()


@pytest.mark.parametrize("name", CASES.LIBRARY)
def test_library_masks(name):
    for mask in CASES.LIBRARY[name]:
        for batch in range(2 if "batch" in name else 1):
            expect_same_pairs(mask, 81, 97, batch)


@settings(max_examples=60, deadline=None)
@given(testing.masks(4, 110))
def test_random_masks(mask):
    expect_same_pairs(mask, 63, 110)


@pytest.mark.parametrize("name", ["bigbird", "document", "neighborhood", "full", "nothing"])
def test_block_masks_of_pytorch(name):
    mask = CASES.LIBRARY[name][0].to("cpu")
    block_mask = create_block_mask(mask_mod_of(mask, 81, 81), None, None, 81, 81, device="cpu", BLOCK_SIZE=16)
    dense = torch.from_numpy(mask.to_dense(81, 81))
    blocks = torch.nn.functional.pad(dense, (0, 15, 0, 15)).view(6, 16, 6, 16).any(3).any(1)
    assert (block_mask.to_dense()[0, 0].bool() == blocks).all()


def test_what_has_no_form_is_refused():
    mask = gossamer.Mask.trace(lambda b, h, q, k: torch.sqrt(q * 1.0) > k)
    with pytest.raises(UnsupportedError, match="no form in torch operations"):
        mask_mod_of(mask, 8, 8)

"""FlexAttention code on gossamer: one import changes.

    python examples/flex_drop_in.py [--length 2048]

A decoder's mask over packed documents, with ALiBi scores and grouped heads, written for PyTorch's
flex_attention. Nothing is wrapped in torch.compile, and no list of blocks is made unless one is printed.
"""

import argparse

import torch

# from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention
from gossamer.flex import and_masks, create_block_mask, flex_attention

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--length", type=int, default=2048)
length = parser.parse_args().length

document = torch.arange(length) // (length // 6)  # six documents in a row, and a rest
slopes = torch.exp2(-torch.arange(1, 9).float())


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def same_document(b, h, q_idx, kv_idx):
    return document[q_idx] == document[kv_idx]


def alibi(score, b, h, q_idx, kv_idx):
    return score + slopes[h] * (kv_idx - q_idx)


query = torch.randn(1, 8, length, 64)
key, value = torch.randn(2, 1, 2, length, 64)
block_mask = create_block_mask(and_masks(causal, same_document), B=None, H=None, Q_LEN=length, KV_LEN=length)
out = flex_attention(query, key, value, score_mod=alibi, block_mask=block_mask, enable_gqa=True)
print(block_mask)
print("output", tuple(out.shape))

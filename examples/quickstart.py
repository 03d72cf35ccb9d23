"""From a Python function to a kernel: the four texts of one attention.

python examples/quickstart.py
"""

import torch

import gossamer

WINDOW = 128  # only compared: a runtime value of the kernel, another one compiles nothing


def mask_mod(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= WINDOW)


print("---- capture: what the function computes, read once")
mask = gossamer.Mask.trace(mask_mod)
print(mask)

print("---- IR: the mask, its integers as parameters, and what is proven about it")
print(mask.analyze(2048, 2048).explain())

print("---- IR after the passes: a program of tiles, its loops in closed form")
kernel = gossamer.compile(gossamer.AttentionSpec(mask, dtype="f32", qk_size=64), target="cpu")
print(kernel.ir)

print("---- kernel: what LLVM compiles")
print(kernel.source)

q, k, v = torch.randn(3, 1, 8, 2048, 64)
out = gossamer.attention(q, k, v, mask=mask)
exact = gossamer.attention(q, k, v, mask=mask, backend="reference")
print(f"---- largest error against float64: {(out - exact).abs().max():.1e}")

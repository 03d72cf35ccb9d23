"""One small launch of every kind of kernel, for compute-sanitizer:

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/memcheck.py
    python tests/memcheck.py cpu        # the same calls there

Lengths are odd, so that every tile at an edge is a part of one. Prints what it ran.
"""

import sys
from collections.abc import Callable

import torch

import gossamer
from gossamer import masks

Call = Callable[[], object]


def calls(device: str) -> dict[str, Call]:
    """What to run, by name."""

    def tensors(q_len: int, kv_len: int, size: int = 64, heads: int = 2) -> tuple[torch.Tensor, ...]:
        shapes = (1, heads, q_len, size), (1, 2, kv_len, size), (1, 2, kv_len, size)
        return tuple(torch.randn(shape).to(device, torch.float16) for shape in shapes)

    short, long, wide = tensors(201, 203), tensors(403, 407), tensors(201, 203, size=80)
    ids = (torch.arange(407) // 61).to(device)
    table = (torch.rand(2, 201, 203) < 0.2).to(device)
    bias = torch.randn(2, 300).to(device)
    cache = tensors(3, 1301)
    lens = torch.tensor([1207], dtype=torch.int32, device=device)
    pages = torch.randn(90, 2, 16, 64).to(device, torch.float16)
    table_of_pages = torch.randperm(90)[None, :80].int().to(device)
    bounds = torch.tensor([0, 33, 33, 170, 201], dtype=torch.int32, device=device)

    def gradients(given: tuple[torch.Tensor, ...], **options: object) -> Call:
        def run() -> object:
            leaves = [t.detach().requires_grad_() for t in given]
            with torch.enable_grad():
                out = gossamer.attention(*leaves, **options)
                return torch.autograd.grad(out, leaves, torch.ones_like(out))

        return run

    learned = bias.clone().requires_grad_()
    by_distance = {"score_mod": lambda s, b, h, q, k: s + learned[h, q - k], "mask": masks.causal()}
    x = torch.randn(77, 96).to(device, torch.float16)
    up, down = (torch.randn(5, *shape).to(device, torch.float16) for shape in ((112, 96), (96, 56)))
    logits = torch.randn(77, 5, device=device)
    return {
        "gradients": gradients(short),
        "gradients, causal": gradients(wide, mask=masks.causal()),
        "gradients, strided": gradients(long, mask=masks.strided(16, 20)),
        "gradients, neighborhood": gradients(long, mask=masks.neighborhood((13, 31), 5)),
        "gradients, documents": gradients(long, mask=masks.document(ids)),
        "gradients, captured": gradients(short, **by_distance),
        "experts": lambda: gossamer.moe(x, logits, up, down, top_k=2),
        "experts, one token": lambda: gossamer.moe(x[:1], logits[:1], up, down, top_k=2),
        "dense": lambda: gossamer.attention(*short),
        "causal": lambda: gossamer.attention(*short, mask=masks.causal(), return_lse=True),
        "odd head size": lambda: gossamer.attention(*wide, mask=masks.causal()),
        "window": lambda: gossamer.attention(*long, mask=masks.sliding_window(70, 9)),
        "dilated": lambda: gossamer.attention(*long, mask=masks.dilated_window(33, 4)),
        "strided, two kernels": lambda: gossamer.attention(*long, mask=masks.strided(16, 20)),
        "longformer": lambda: gossamer.attention(*long, mask=masks.longformer(30, 5)),
        "bigbird": lambda: gossamer.attention(*long, mask=masks.bigbird(30, 5, 2, 32)),
        "neighborhood, 2-d": lambda: gossamer.attention(*long, mask=masks.neighborhood((13, 31), 5)),
        "neighborhood, 3-d": lambda: gossamer.attention(
            *short, mask=masks.neighborhood((3, 6, 11), 3, edges="clip")
        ),
        "axial": lambda: gossamer.attention(*long, mask=masks.axial((13, 31), 0)),
        "documents": lambda: gossamer.attention(*long, mask=masks.document(ids)),
        "boolean tensor": lambda: gossamer.attention(*short, mask=table),
        "bits": lambda: gossamer.attention(*long, mask=lambda b, h, q, k: (q & k) == 0),
        "score_mod": lambda: gossamer.attention(
            *short, mask=masks.causal(), score_mod=lambda s, b, h, q, k: s + bias[h, q - k]
        ),
        "sinks": lambda: gossamer.attention(*short, mask=masks.causal(), sinks=bias[:, 0]),
        "dropout": lambda: gossamer.attention(*short, dropout_p=0.2, dropout_seed=3),
        "prob_mod of its own pass": lambda: gossamer.attention(
            *short, mask=masks.causal(), prob_mod=lambda p, b, h, q, k: p * p
        ),
        "column sums": lambda: gossamer.attention(*short, mask=masks.causal(), return_column_sums=True),
        "few rows, many keys": lambda: gossamer.attention(
            *cache, q_offset=1300, mask=masks.sliding_window(900, 0)
        ),
        "lengths": lambda: gossamer.attention(*cache, kv_lens=lens),
        "pages": lambda: gossamer.attention(
            cache[0], pages, pages, block_table=table_of_pages, kv_lens=lens, enable_gqa=True
        ),
        "packed": lambda: gossamer.attention(
            *short, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, mask=masks.causal()
        ),
        "views": lambda: gossamer.attention(*(t[:, :, ::2, 1::2] for t in long), mask=masks.causal()),
    }


def main(device: str = "cuda") -> None:
    for name, call in calls(device).items():
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        print(name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

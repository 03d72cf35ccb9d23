"""gossamer.jit on attention written at random, mistakes included: always what the original computes."""

import math
import random

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import gossamer

INF = math.inf
N = 16


def mask_of(rng):
    """A mask (True = attend) of rows i and columns j: the usual ones, transposed or off by one."""
    width = rng.randint(0, 6)
    masks = [
        lambda i, j: i >= j,
        lambda i, j: (i >= j) & (i - j < width),
        lambda i, j: (i - j).abs() <= width,
        lambda i, j: (i - j) % (width + 1) == 0,
        lambda i, j: (i // 4 == j // 4) | (j < 2),
        lambda i, j: i > j,  # the first row is empty
        lambda i, j: (i >= j) & (j >= width),
    ]
    mask = rng.choice(masks)
    return (lambda i, j: mask(j, i)) if rng.random() < 0.25 else mask


def program_of(rng):
    mask, fill = mask_of(rng), rng.choice([-INF, -1e9, -1e4, -10.0, torch.finfo(torch.float64).min])
    scale, where, dim = rng.choice([0.3, 1.0, -0.5, 0.0]), rng.choice("qsd"), rng.choice([-1, -1, -1, -2])
    how, made = (
        rng.choice(["fill", "where", "add", "factor", "in_place"]),
        rng.choice(["index", "tri", "fold"]),
    )
    cap, again, order = rng.random() < 0.2, rng.random() < 0.2, rng.choice(["bhqk", "bqhk", "bhkq"])

    def masked(s):
        i, j = torch.arange(N)[:, None], torch.arange(N)
        kept = mask(i, j)
        if made == "fold":
            kept = kept & torch.ones(N, N, dtype=torch.bool).tril(4).logical_not().logical_not()
        if made == "tri":
            kept = kept | (torch.eye(N) == 1)
        if how == "fill":
            return s.masked_fill(~kept, fill)
        if how == "where":
            return torch.where(kept, s, fill)
        if how == "in_place":
            return (s + 0).masked_fill_(kept == 0, fill)
        if how == "factor" and math.isfinite(fill):
            return s + (1 - kept.to(s.dtype)) * fill
        return s + torch.zeros(N, N, dtype=s.dtype).masked_fill(kept.logical_not(), fill)

    def program(q, k, v):
        if where == "q":
            q = q * scale
        s = torch.einsum(f"bhqd,bhkd->{order}", q, k)
        s = s.permute([order.index(x) for x in "bhqk"])
        s = s * scale if where == "s" else s / (scale + 2) if where == "d" else s
        s = 2 * torch.tanh(s / 2) if cap else s
        p = F.softmax(masked(s), dim=dim)
        p = p * 0.5 if again else p
        return p @ v

    return program


@pytest.mark.parametrize("seed", range(16))
def test_random_program(seed):
    rng = random.Random(seed)
    torch._dynamo.reset()
    program = program_of(rng)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 2, N, 8, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        f = gossamer.jit(program)
        # A row of nothing but scores near -1e9 has seven digits left in the original too.
        torch.testing.assert_close(f(q, k, v), program(q, k, v), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert len(f.report().compiled) + len(f.report().left) == 1

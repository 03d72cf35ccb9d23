"""Gradients of attention against the dense formula, by the error rule of docs/design.md."""

import math

import torch

import gossamer
from gossamer.frontend.checking import judged


def dense(q, k, v, attends, score=None, prob=None, sinks=None, scale=None):
    """(out, lse) in torch operators. attends: bool (B, Hq, q_len, kv_len)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    at = torch.meshgrid(*(torch.arange(n, device=q.device) for n in attends.shape), indexing="ij")
    scores = (q @ k.mT) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if score is not None:
        scores = score(scores, *at)
    scores = scores.masked_fill(~attends, -math.inf)
    some = (scores > -math.inf).any(-1)
    lse = torch.where(some, scores.masked_fill(~some[..., None], 0).logsumexp(-1), -math.inf)
    total = lse if sinks is None else torch.logaddexp(lse, sinks[:, None])
    weights = (scores - total.masked_fill(~some, 0)[..., None]).exp().masked_fill(~attends, 0)
    if prob is not None:
        weights = prob(weights, *at).masked_fill(~attends, 0)
    return weights @ v, lse


def parts(q, k, v, attends, grad_out, score, prob, sinks, scale):
    """The sizes of what adds up to the gradients of q and k: where that cancels, rounding is of these."""
    eye = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*q.shape[:2], -1, -1)
    weights, _ = dense(
        q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), eye, attends, score, prob, sinks, scale
    )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    pairs = (
        weights.abs()
        * (grad_out.abs() @ v.abs().mT)
        * (1 / math.sqrt(q.shape[3]) if scale is None else abs(scale))
    )
    sizes = pairs @ k.abs(), pairs.mT @ q.abs()
    return [float(size.detach().max()) if size.numel() else 0.0 for size in sizes]


def check_gradients(*args, draws=8, **options):
    """Assert the rule for the gradients of q, k, v, of captures and of sinks; draws: as for `judged`."""
    return judged(lambda judge, _: see_gradients(judge, *args, **options), draws)


def see_gradients(
    judge,
    q_len,
    kv_len,
    mask=None,
    *,
    batch=1,
    heads=(2, 2),
    size=16,
    v_size=None,
    dtype=torch.float32,
    device="cpu",
    captures=(),
    score=None,
    prob=None,
    sinks=False,
    through_lse=True,
    attends=None,
    scale=None,
    **options,
):
    """Show a judge the gradients of fresh numbers.

    score, prob: from captures to a score_mod and a prob_mod. attends: the dense mask."""
    hq, hk = heads

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, device=device)

    q, k, v = (
        normal(batch, hq, q_len, size),
        normal(batch, hk, kv_len, size),
        normal(batch, hk, kv_len, v_size or size),
    )
    tensors = [q, k, v, *captures, *([normal(hq)] if sinks else [])]
    if attends is None:
        bound = gossamer.Mask.of(mask)
        each = [
            torch.from_numpy(bound.to_dense(q_len, kv_len, b, h)) for b in range(batch) for h in range(hq)
        ]
        attends = torch.stack(each).view(batch, hq, q_len, kv_len).to(device)
    grad_out, grad_lse = normal(batch, hq, q_len, v_size or size), normal(batch, hq, q_len)

    def run(dtype, attend):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        own = leaves[3 : 3 + len(captures)]
        more = {"sinks": leaves[-1]} if sinks else {}
        out, lse = attend(*leaves[:3], score and score(*own), prob and prob(*own), **more)
        some = lse.detach() > -math.inf
        total = (out * grad_out.to(out.dtype)).sum()
        if through_lse:
            total = total + (lse.masked_fill(~some, 0) * grad_lse.to(lse.dtype)).sum()
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    def ours(q, k, v, score_mod, prob_mod, **more):
        given = {"mask": mask, "score_mod": score_mod, "prob_mod": prob_mod, "enable_gqa": hq != hk}
        return gossamer.attention(q, k, v, return_lse=True, scale=scale, **given, **more, **options)

    def plain(*given, **more):
        return dense(*given[:3], attends, *given[3:], scale=scale, **more)

    found, exact, peer = run(dtype, ours), run(torch.float64, plain), run(dtype, plain)
    names = ["dq", "dk", "dv", *(f"capture {n}" for n in range(len(captures))), "sinks"]
    own = tensors[3 : 3 + len(captures)]
    more = (score and score(*own), prob and prob(*own), tensors[-1] if sinks else None, scale)
    least = dict(zip(("dq", "dk"), parts(q, k, v, attends, grad_out, *more), strict=True))
    for name, got, wanted, other in zip(names, found, exact, peer, strict=False):
        assert got.dtype == dtype
        if dtype == torch.float64:  # nothing plain is more exact
            torch.testing.assert_close(
                got, wanted, rtol=1e-11, atol=1e-11 * (1 + float(wanted.abs().max() if wanted.numel() else 0))
            )
            continue
        judge.see(name, got, wanted.cpu().numpy(), other, least.get(name))
    return found

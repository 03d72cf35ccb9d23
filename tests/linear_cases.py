"""Linear attention for tests: the dense formula, and how far a result may be off (docs/design.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import gossamer
from gossamer import feature_maps
from gossamer.frontend.checking import Judge, judged


@dataclass(frozen=True)
class Case:
    """Sizes and options of one linear attention."""

    length: int = 70
    keys: int | None = None
    heads: int = 2
    key_heads: int = 2
    size: int = 16
    v_size: int = 16
    batch: int = 1
    causal: bool = True
    normalize: bool = True
    dtype: Any = torch.float32
    feature_map: Any = "elu"
    key_map: Any = None
    eps: float = 1e-3
    initial: bool = False
    positive: bool = False

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        n = self.length if self.keys is None else self.keys
        shapes = {"query": (self.heads, self.length, self.size), "key": (self.key_heads, n, self.size)}
        shapes["value"] = (self.key_heads, n, self.v_size)
        made = {
            name: torch.randn((self.batch, *shape), generator=g, dtype=torch.float64).to(self.dtype)
            for name, shape in shapes.items()
        }
        return made

    def states(self, seed: int, features: int) -> tuple[torch.Tensor, ...]:
        g = torch.Generator().manual_seed(seed + 1)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        shape = (self.batch, self.key_heads, features, self.v_size)
        state, sums = (torch.rand(s, generator=g, dtype=torch.float64).to(wide) for s in (shape, shape[:3]))
        return (state, sums) if self.normalize else (state,)


def phi(given: Any, x: torch.Tensor) -> torch.Tensor:
    """Features of rows by torch."""
    match given:
        case "elu":
            return torch.nn.functional.elu(x) + 1
        case "relu":
            return x.relu() + 1e-3
        case "identity":
            return x
        case "exp":
            return x.exp()
        case feature_maps.FeatureMap():
            return given(x)
    made = given(x)
    return torch.cat(made, -1) if isinstance(made, tuple) else made


def dense(case: Case, q: Any, k: Any, v: Any, states: tuple[Any, ...] = ()) -> tuple[torch.Tensor, ...]:
    """(out, *new states) over all pairs, in the dtype of q."""
    fq, fk = phi(case.feature_map, q), phi(case.key_map or case.feature_map, k)
    group = case.heads // case.key_heads
    fks, vs, *init = (t.repeat_interleave(group, 1) for t in (fk, v, *states))
    scores = fq @ fks.mT
    scores = scores.tril() if case.causal else scores
    out, den = scores @ vs, scores.sum(-1, keepdim=True)
    if init:
        out = out + fq @ init[0].to(q.dtype)
    if init[1:]:
        den = den + fq @ init[1].to(q.dtype)[..., None]
    new = (fk.mT @ v, fk.sum(2))[: 2 if case.normalize else 1]
    new = tuple(n + s.to(q.dtype) for n, s in zip(new, states, strict=True)) if states else new
    return (out / (den + case.eps) if case.normalize else out, *new)


def call(
    case: Case, q: Any, k: Any, v: Any, states: tuple[Any, ...] = (), function: Any = None, **more: Any
) -> tuple[Any, ...]:
    """(out, *new states) by gossamer, or by a function with the same arguments."""
    given = (states if case.normalize else states[0]) if states else None
    found = (function or gossamer.linear_attention)(
        q, k, v, case.feature_map, key_map=case.key_map, causal=case.causal, normalize=case.normalize,
        eps=case.eps, initial_state=given, return_state=True, enable_gqa=True, **more,
    )  # fmt: skip
    return (found[0], *(found[1] if case.normalize else (found[1],)))


def check(case: Case, *, gradients: bool = False, **more: Any) -> None:
    """The error rule for out and states, or for the gradients of everything."""
    see = _gradients if gradients else _forward
    judged(lambda judge, draw: see(judge, case, draw, **more))


def _drawn(case: Case, seed: int) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    tensors = list(case.tensors(seed).values())
    features = phi(case.key_map or case.feature_map, tensors[1]).shape[-1]
    return tensors, case.states(seed, features) if case.initial else ()


def _forward(judge: Judge, case: Case, seed: int, **more: Any) -> None:
    tensors, states = _drawn(case, seed)
    found = call(case, *tensors, states, **more)
    exact = dense(case, *(t.double() for t in tensors), tuple(s.double() for s in states))
    peer = dense(case, *tensors, states)
    for name, ours, wanted, theirs in zip(("out", "state", "sums"), found, exact, peer, strict=False):
        _see(judge, case, name, ours, wanted, theirs)


def _see(
    judge: Judge, case: Case, name: str, ours: Any, wanted: Any, theirs: Any, least: float | None = None
) -> None:
    if case.dtype == torch.float64:  # the reference is as exact
        scale = max(float(wanted.abs().max()), least or 0.0)
        assert float((ours - wanted).abs().max()) <= 1e-12 * scale, name
        return
    judge.see(name, ours.detach(), wanted.detach().numpy(), theirs.detach(), least)


def _gradients(judge: Judge, case: Case, seed: int, **more: Any) -> None:
    tensors, states = _drawn(case, seed)
    g = torch.Generator().manual_seed(seed + 2)
    weights: list[torch.Tensor] = []

    def run(compute: Any, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in given]
        made = compute(leaves)
        while len(weights) < len(made):
            shape = made[len(weights)].shape
            weights.append(torch.randn(shape, generator=g, dtype=torch.float64).to(case.dtype))
        total = [m.double() * w.double() for m, w in zip(made, weights, strict=True)]
        return torch.autograd.grad(sum(t.sum() for t in total), leaves)

    given = [*tensors, *states]
    ours = run(lambda x: call(case, *x[:3], tuple(x[3:]), **more), given)
    exact = run(lambda x: dense(case, *x[:3], tuple(x[3:])), [t.double() for t in given])
    peer = run(lambda x: dense(case, *x[:3], tuple(x[3:])), given)
    names = ("dq", "dk", "dv", "dstate", "dsums")
    sizes = _parts(case, tensors, weights[0])
    for name, found, wanted, theirs in zip(names, ours, exact, peer, strict=False):
        _see(judge, case, name, found, wanted, theirs, sizes.get(name))


def _parts(case: Case, tensors: list[torch.Tensor], do: torch.Tensor) -> dict[str, float]:
    """The sizes of what adds up to the gradients of q and k: where that cancels, rounding is of these."""
    q, k, v = (t.double() for t in tensors)
    group = case.heads // case.key_heads
    fq, fk = phi(case.feature_map, q).abs(), phi(case.key_map or case.feature_map, k).abs()
    fk, v = (t.repeat_interleave(group, 1) for t in (fk, v.abs()))
    scores = fq @ fk.mT
    allowed = torch.ones_like(scores).tril() if case.causal else torch.ones_like(scores)
    den = (scores * allowed).sum(-1, keepdim=True) + case.eps if case.normalize else 1.0
    pairs = (do.double().abs() / den) @ v.mT * allowed
    return {"dq": float((pairs @ fk).max()), "dk": float((pairs.mT @ fq).max())}

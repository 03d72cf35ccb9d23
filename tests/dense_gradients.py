"""Gradients of a checked attention by differentiating the dense formula in torch, in float64."""

from __future__ import annotations

import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gossamer.frontend
from gossamer.frontend.captured import as_tensor
from gossamer.frontend.term import float_of
from gossamer.ir.philox import random_bits

OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "shr": lambda a, b: a >> b,
    "neg": lambda a: -a,
    "abs": abs,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "min": torch.minimum,
    "max": torch.maximum,
    "ge": lambda a, b: a >= b,
    "where": torch.where,
}


def _random_bits(key: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(random_bits(*(t.numpy() for t in (key, x, y)))))


OPERATIONS["random_bits"] = _random_bits


def evaluate(term: Any, names: dict[str, Any]) -> Any:
    """A term in torch operators."""
    if isinstance(term, str):
        return names[term]
    if not isinstance(term, tuple):
        return torch.tensor(term)
    if term[0] == "f":
        return torch.tensor(float_of(term), dtype=torch.float64)
    if term[0] in ("read", "readf"):
        found = names[term[1]][tuple(evaluate(t, names).clamp(min=0) for t in term[2:])]
        return found.double() if term[0] == "readf" else found
    if term[0] == "cast":
        return evaluate(term[2], names)
    return OPERATIONS[term[0]](*(evaluate(t, names) for t in term[1:]))


def gradients(*arguments: Any, deterministic: bool | None = None) -> dict[str, Tensor]:
    """As `gossamer.frontend.gradients.gradients`, of sequences of one length.

    In a thread of its own, for operators run where autograd is switched off."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_gradients, *arguments).result()


def _gradients(
    problem: Any,
    mask: Any,
    score: Any,
    scale: Any,
    softmax: Any,
    placed: Any,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    assert not placed.uneven
    sources = {"q": problem.query, "k": problem.key, "v": problem.value}
    for letter, source in (("t", score), ("w", softmax.prob)):
        if source is not None:
            sources |= {f"{letter}{i}": as_tensor(t) for i, t in enumerate(source.tensors)}
    if softmax.sinks is not None:
        sources["sinks"] = softmax.sinks
    with torch.enable_grad():
        given = {n: t.detach().double().requires_grad_() if n in wanted else t for n, t in sources.items()}
        q, k, v = (given[n].double() for n in "qkv")
        group = problem.heads // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        sizes = (problem.batch, problem.heads, problem.q_len, problem.kv_len)
        b, h, i, j = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
        i = i + placed.values.get("q_offset", 0)
        names = given | {"b": b, "h": h, "q": i, "k": j}
        attends = torch.zeros(sizes, dtype=torch.bool)
        for x, y in itertools.product(range(sizes[0]), range(sizes[1])):
            offset = placed.values.get("q_offset", 0)
            seen = torch.from_numpy(mask.to_dense(problem.q_len + offset, problem.kv_len, x, y))
            attends[x, y] = seen[offset:]
        s = q @ k.transpose(-1, -2) * (1 / math.sqrt(problem.qk_size) if scale is None else float(scale))
        if score is not None:
            numbers = {f"s{n}": torch.tensor(value) for n, value in enumerate(score.values)}
            s = evaluate(score.key[1], names | numbers | {"score": s})
        s = s.masked_fill(~attends, -1e30)
        total = torch.logsumexp(s, -1)
        empty = ~attends.any(-1)
        joined = total
        if softmax.sinks is not None:
            joined = torch.logaddexp(total, given["sinks"].double()[:, None])
        p = torch.where(attends, torch.exp(s - joined[..., None]), 0.0)
        if softmax.prob is not None:
            numbers = {f"x{n}": torch.tensor(value) for n, value in enumerate(softmax.prob.values)}
            p = torch.where(attends, evaluate(softmax.prob.key[1], names | numbers | {"prob": p}), 0.0)
        results, grads = [p @ v], [grad_out.double()]
        if grad_lse is not None:
            results.append(total)
            grads.append(torch.where(empty, 0.0, grad_lse.double()))
        order = sorted(wanted)
        found = torch.autograd.grad(results, [given[n] for n in order], grads, allow_unused=True)
    made = {n: torch.zeros_like(given[n]) if g is None else g for n, g in zip(order, found, strict=True)}
    return {n: g.to(sources[n].dtype).contiguous() for n, g in made.items()}


def install() -> None:
    """Let the package use these where it has none of its own."""
    if find_spec("gossamer.frontend.gradients") is None:
        module = ModuleType("gossamer.frontend.gradients")
        module.gradients = gradients  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        gossamer.frontend.gradients = module  # type: ignore[attr-defined]

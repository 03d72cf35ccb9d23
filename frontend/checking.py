"""The correctness rule, as a function: our error against float64 stays within twice a plain computation's.

    max |ours - exact| <= 2 * max |plain - exact| + one ulp of the output's scale

`exact` is the reference backend in float64 on the same inputs, `plain` the same formula written with
torch operators in the inputs' dtype. Where products of float32 may round to tf32, `plain` reads its operands
as tensor cores do, without the last 13 bits (PTX ISA, "wgmma"): libraries round them beforehand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from .attention import attention
from .device import precision_of
from .mask import Mask
from .problem import DTYPE_NAMES, Problem
from .reference import exact_attention, map_pairs
from .score import ScoreMod
from .softmax import Softmax


def check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: Any = None,
    score_mod: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    draws: int = 8,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `gossamer.attention` and assert the rule for output and LSE; returns both.

    Takes what `gossamer.attention` takes of one sequence a batch (no offsets, lengths, bounds or tables);
    return_lse is implied, dropout needs its seed, and column sums are judged where they are asked for.
    draws: as for `judged`; all but the first have the same numbers in another order. Raises ErrorTooLarge,
    or AssertionError for another shape or for infinities and NaN in other places."""
    given = dict(mask=mask, score_mod=score_mod, scale=scale, enable_gqa=enable_gqa, **options)

    def draw(judge: Judge, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [x if n == 0 else _shuffled(x) for x in (query, key, value)]
        results: Any = attention(*tensors, return_lse=True, **given)
        see_results(judge, results, *tensors, **given)
        return results[0], results[1]

    return judged(draw, draws)


T = TypeVar("T")


class ErrorTooLarge(AssertionError):
    """The rule is broken. error: the largest one. allowed: by the rule."""

    def __init__(self, name: str, error: float, plain: float, ulp: float) -> None:
        self.error, self.allowed = error, 2 * plain + ulp
        super().__init__(f"{name}: error {error:.3g} > 2 * {plain:.3g} (plain) + {ulp:.3g} (ulp)")


class Judge:
    """The largest errors of every result over the draws seen so far."""

    def __init__(self) -> None:
        self._worst: dict[str, tuple[float, float, float]] = {}

    def see(
        self,
        name: str,
        ours: torch.Tensor,
        exact: np.ndarray,
        plain: torch.Tensor,
        least: float | None = None,
    ) -> None:
        """Add one draw's result. Infinities must agree in place and sign, NaN in place.

        least: the scale of what was added up to it, where that may cancel."""
        assert tuple(ours.shape) == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {exact.shape}"
        got, peer = (t.double().cpu().numpy().astype(exact.dtype) for t in (ours, plain))
        finite = np.isfinite(exact)
        assert (np.isfinite(got) == finite).all(), f"{name}: non-finite values differ from the reference"
        infinite = np.isinf(exact)
        assert (got[infinite] == exact[infinite]).all(), f"{name}: infinities differ from the reference"
        if not finite.any():
            return
        defined = finite & np.isfinite(peer)
        error = np.abs(got[finite] - exact[finite]).max()
        allowed = np.abs(peer[defined] - exact[defined]).max(initial=0)
        info = torch.finfo(ours.dtype)
        # An LSE is a maximum plus the logarithm of a sum: parts of order one, also where they cancel.
        least = least or (1.0 if name == "LSE" else info.tiny)
        found = error, allowed, info.eps * max(np.abs(exact[finite]).max(), least)
        before = self._worst.get(name, found)
        self._worst[name] = max(before[0], found[0]), max(before[1], found[1]), max(before[2], found[2])

    def settle(self) -> None:
        """Raises ErrorTooLarge for the first result whose largest error breaks the rule."""
        for name, (error, plain, ulp) in self._worst.items():
            if not error <= 2 * plain + ulp:
                raise ErrorTooLarge(name, error, plain, ulp)


def judged(draw: Callable[[Judge, int], T], draws: int = 8) -> T:
    """Run draw(judge, n), which shows a judge its results; what the first returned, if the rule holds.

    Largest errors of a few numbers scatter, ours and a plain computation's apart from each other: one small
    case in a thousand breaks the rule by chance. After a miss more is drawn, up to `draws` times, and the
    largest errors over all draws are compared: chance evens out, a worse computation does not. Raises
    ErrorTooLarge; at once where the error is a hundred times what is allowed."""
    judge, results = Judge(), []
    for n in range(draws):
        results.append(draw(judge, n))
        try:
            judge.settle()
            break
        except ErrorTooLarge as miss:
            if n == draws - 1 or miss.error > 100 * miss.allowed:
                raise
    return results[0]


def _shuffled(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in another order, in a tensor of the same strides."""
    numbers = tensor.flatten()[torch.randperm(tensor.numel(), device=tensor.device)]
    return torch.empty_like(tensor).copy_(numbers.view(tensor.shape))


def see_results(
    judge: Judge,
    results: Sequence[torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: Any = None,
    score_mod: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> None:
    """Show a judge the output, the LSE and, if given, the column sums of these inputs."""
    bound, score = Mask.of(mask), None if score_mod is None else ScoreMod.of(score_mod)
    floats = np.longdouble if query.dtype == torch.float64 else np.float64
    problem = Problem(query, key, value, enable_gqa)
    sinks, prob_mod, seed = (options.get(name) for name in ("sinks", "prob_mod", "dropout_seed"))
    softmax = Softmax.of(problem, sinks, prob_mod, options.get("dropout_p", 0.0), seed)
    exact = exact_attention(problem, bound, score, scale, floats, softmax)
    plain = _plain(query, key, value, bound, score_mod, scale, softmax)
    names = ("output", "LSE", "column sums")
    for name, ours, wanted, peer in zip(names, results, exact, plain, strict=False):
        judge.see(name, ours, wanted, peer)


def _plain(
    q: Any, k: Any, v: Any, mask: Mask, score_mod: Any, scale: float | None, softmax: Softmax
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The formula in torch operators, in the inputs' dtype."""
    batch, heads, q_len, size = q.shape
    kv_len = k.shape[2]
    repeat = heads // max(1, k.shape[1])
    k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
    read = _as_tf32 if precision_of(q.device, DTYPE_NAMES[q.dtype]) == "tf32" else lambda x: x
    scores = (read(q) @ read(k).transpose(-1, -2)) * (1 / math.sqrt(size) if scale is None else scale)
    points = (torch.arange(n, device=q.device) for n in (batch, heads, q_len, kv_len))
    grid = torch.meshgrid(*points, indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, *grid).to(q.dtype)
    attends = torch.empty(scores.shape, dtype=torch.bool)
    for b, h in itertools.product(range(batch), range(heads)):
        attends[b, h] = torch.from_numpy(mask.to_dense(q_len, kv_len, b, h))
    attends = attends.to(q.device)
    scores = scores.masked_fill(~attends, -math.inf)
    lse = (
        torch.logsumexp(scores.float() if q.dtype != torch.float64 else scores, -1)
        if kv_len
        else scores.new_full(scores.shape[:-1], -math.inf)
    )
    if softmax.sinks is not None:
        sinks = softmax.sinks.to(q.dtype)[:, None, None].expand(batch, -1, q_len, 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    weights = torch.nan_to_num(weights, 0.0)
    sums = weights.to(lse.dtype).sum(2)
    if softmax.prob is not None:
        found = weights.double().cpu().numpy(), attends.cpu().numpy()
        mapped = map_pairs(softmax.prob, *found, np.float64, np.arange(batch), 0)
        weights = torch.from_numpy(mapped).to(q.device, q.dtype).masked_fill(~attends, 0)
    return read(weights) @ read(v), lse, sums


def _as_tf32(x: torch.Tensor) -> torch.Tensor:
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
